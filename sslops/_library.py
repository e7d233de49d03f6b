"""Fused ops in torch's library: one pair of ops (forward, backward) each, for eager calls, torch.compile and export."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("sslops", "FRAGMENT")


def _without_autocast(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels are given the operands' dtype; autocast would round what they multiply on top of that."""

    def run(first: Tensor, *rest: Any) -> Any:
        with torch.autocast(first.device.type, enabled=False):
            return implementation(first, *rest)

    return run


def register(
    name: str,
    *,
    arguments: str,
    saved: str,
    gradients: Sequence[str],
    forward: Callable[..., Any],
    forward_fake: Callable[..., Any],
    backward: Callable[..., Any],
    backward_fake: Callable[..., Any],
) -> None:
    """Registers `name(arguments) -> (Tensor, saved)` and `name_backward(Tensor grad, arguments, saved)`.

    The first output is the result; the saved ones, if any, are kept for backward and have no gradient. The backward op
    returns one gradient for each argument named in `gradients`. Differentiating it raises: that is for backend="eager".
    """
    outputs = f"(Tensor result, {saved})" if saved else "Tensor"
    backward_arguments = ", ".join(filter(None, ["Tensor grad", arguments, saved]))
    gradient_outputs = ", ".join(["Tensor"] * len(gradients))
    schemas = {
        name: (f"({arguments}) -> {outputs}", forward, forward_fake),
        f"{name}_backward": (f"({backward_arguments}) -> ({gradient_outputs})", backward, backward_fake),
    }
    for op, (schema, implementation, fake) in schemas.items():
        _LIBRARY.define(op + schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(op, _without_autocast(implementation), "CompositeExplicitAutograd")
        torch.library.register_fake(f"sslops::{op}", fake, lib=_LIBRARY)

    argument_names = [argument.split()[1] for argument in arguments.split(", ")]
    backward_op = getattr(torch.ops.sslops, f"{name}_backward")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept = output[1:] if saved else ()
        ctx.mark_non_differentiable(*kept)
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)), *kept)

    def differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if tensor else value for tensor, value in zip(ctx.is_tensor, ctx.rest, strict=True)]
        found = dict(zip(gradients, backward_op(grad, *inputs, *tensors), strict=True))
        return tuple(found[n] if n in found and t else None for n, t in zip(argument_names, ctx.is_tensor, strict=True))

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{name}: fused kernels have no second derivative; use backend='eager'")

    torch.library.register_autograd(f"sslops::{name}", differentiate, setup_context=setup_context, lib=_LIBRARY)
    torch.library.register_autograd(f"sslops::{name}_backward", refuse, lib=_LIBRARY)
