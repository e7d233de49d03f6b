"""Rows picked by their indices, and the gradient's way back: a native call each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .call import call, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.ops.gather_tokens import Arguments


def forward(x: Arguments) -> Tensor:
    tokens = x.tokens if x.tokens.stride(2) == 1 else x.tokens.contiguous()
    out = tokens.new_empty((*x.ids.shape, tokens.shape[2]))
    call(tokens.device, "gather_tokens", tokens, x.ids, x.counts, out)
    return out


def backward(grad: Tensor, x: Arguments) -> Tensor:
    d_tokens = x.tokens.new_empty(x.tokens.shape)
    if x.unique and d_tokens.is_cuda:  # on the CPU there is nothing to gain from knowing
        call(d_tokens.device, "gather_tokens_scatter", grad, x.ids, x.counts, d_tokens.zero_())
    else:
        call(d_tokens.device, "gather_tokens_backward", grad, x.ids, x.counts, d_tokens)
    return d_tokens
