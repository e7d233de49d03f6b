"""Ops under torch.func."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from . import _check
from ._schema import tensors_in


def through_levels(
    name: str, op: Any, values: list[Any], setup_context: Callable[..., None], backward: Callable[..., Any]
) -> Any:
    """op(*values) under torch.func, which takes autograd.Functions of this form through its levels, and no op of
    torch.library that has a derivative. Batches go one by one.
    """
    flat, spec = tree_flatten(values, is_leaf=lambda x: isinstance(x, list) and not tensors_in(x))
    of_output: list[Any] = []

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(*flat: Any) -> Any:
            leaves, form = tree_flatten(op(*tree_unflatten(flat, spec)))
            of_output[:] = [form]
            return tuple(leaves)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, tree_unflatten(inputs, spec), tree_unflatten(output, of_output[0]))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return tuple(tree_leaves(backward(ctx, *grads)))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *flat: Any) -> Any:
            if not info.batch_size:
                _check.bad_value(name, "vmap", "at least one in the batch", "none")
            dims = [d if isinstance(x, Tensor) else None for x, d in zip(flat, in_dims, strict=True)]
            results = [
                Function.apply(*(x if d is None else x.select(d, k) for x, d in zip(flat, dims, strict=True)))
                for k in range(info.batch_size)
            ]
            return tuple(torch.stack(each) for each in zip(*results, strict=True)), 0

    Function.__name__ = name  # in messages
    return tree_unflatten(Function.apply(*flat), of_output[0])
