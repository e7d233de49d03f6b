"""The tokens that an encoder is to see: rows of each sequence, picked by their positions."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from .._library_old import register
from ..backend import kernel, resolve


def reference(tokens: Tensor, ids: Tensor) -> Tensor:
    """[B, K, D]"""
    return tokens.gather(1, ids.unsqueeze(2).expand(-1, -1, tokens.shape[2]))


class _Arguments(NamedTuple):
    tokens: Tensor
    ids: Tensor
    unique: bool
    backend: str


def _check_both(tokens: Tensor, ids: Tensor) -> None:
    _check.floats("gather_tokens", "[B, L, D]", tokens=tokens)
    _check.ids("gather_tokens", "[B, K]", ids=ids)
    _check.same_device("gather_tokens", "tokens", tokens, ids=ids)
    if len(ids) != len(tokens):
        _check.bad_value("gather_tokens", "ids", f"{len(tokens)} rows, as tokens has", list(ids.shape))


def _forward(x: _Arguments) -> Tensor:
    _check_both(x.tokens, x.ids)
    _check.id_range("gather_tokens", x.tokens.shape[1], ids=x.ids)
    out = _forward_fake(x)
    tokens = x.tokens if x.tokens.stride(2) == 1 else x.tokens.contiguous()
    kernel(x.backend, "gather_tokens").forward(tokens, x.ids.contiguous(), out)
    return out


def _forward_fake(x: _Arguments) -> Tensor:
    return x.tokens.new_empty((*x.ids.shape, x.tokens.shape[2]))


def _backward(grad: Tensor, x: _Arguments) -> Tensor:
    _check_both(x.tokens, x.ids)
    _check.id_range("gather_tokens", x.tokens.shape[1], ids=x.ids)
    shape = (*x.ids.shape, x.tokens.shape[2])
    if grad.shape != shape or grad.dtype != x.tokens.dtype or grad.device != x.tokens.device:
        _check.bad_value("gather_tokens", "grad", f"{x.tokens.dtype} {list(shape)}", f"{grad.dtype} {list(grad.shape)}")
    out = _backward_fake(grad, x)
    kernel(x.backend, "gather_tokens").backward(grad.contiguous(), x.ids.contiguous(), x.unique, out)
    return out


def _backward_fake(grad: Tensor, x: _Arguments) -> Tensor:
    return x.tokens.new_empty(x.tokens.shape)


register(
    "gather_tokens",
    _Arguments,
    gradients=("tokens",),
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
)


def gather_tokens(tokens: Tensor, ids: Tensor, *, unique: bool = False, backend: str | None = None) -> Tensor:
    """out[b, k] = tokens[b, ids[b, k]], with a gradient that is the same bits every run, for repeated ids too.

    Args:
        tokens: [B, L, D] float32, float16, bfloat16 or float64 (float64 runs the eager reference). Rows may lie apart
            (tokens[:, 1:] is not copied).
        ids: [B, K] int64 in [0, L). On a GPU they are not looked at: an id outside gives a row of NaN, and takes no
            part in the gradient (with device-side asserts compiled in, the kernel stops instead).
        unique: the caller knows that no id comes twice in a row of ids; a GPU then finds the gradient by a plain
            scatter. Wrongly said, one of the rows that share an id is all that counts.
        backend: "cpu", "cuda" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        [B, K, D] in the dtype of the tokens. Gradients of a repeated id are added up in float32, in the order of k.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; ids on the CPU out of range.
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.
    """
    _check_both(tokens, ids)
    _check.flag("gather_tokens", "unique", unique)
    backend = resolve("gather_tokens", tokens.device, tokens.dtype, backend)
    if backend == "eager":
        if not torch.compiler.is_compiling():
            _check.id_range("gather_tokens", tokens.shape[1], ids=ids)
        return reference(tokens, ids)
    out: Tensor = torch.ops.sslops.gather_tokens(tokens, ids, unique, backend)
    return out
