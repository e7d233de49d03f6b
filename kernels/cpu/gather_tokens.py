"""Rows picked by their indices on the CPU, and the gradient's way back: a native call each."""

from torch import Tensor

from sslops import _C

from .memory import on_huge_pages
from .tiles import DTYPE_CODES, refuses  # noqa: F401


def forward(tokens: Tensor, ids: Tensor, out: Tensor) -> None:
    """out [B, K, D] = the rows of tokens [B, L, D] that ids [B, K] name; a token's elements lie together"""
    size = tokens.element_size()
    _C.gather_tokens(
        tokens.data_ptr(), tokens.stride(0) * size, tokens.stride(1) * size, ids.data_ptr(), *ids.shape,
        tokens.shape[1], tokens.shape[2] * size, on_huge_pages(out).data_ptr(),
    )  # fmt: skip


def backward(grad: Tensor, ids: Tensor, unique: bool, out: Tensor) -> None:
    """out [B, L, D], from grad [B, K, D]. Unique ids are lists of one: nothing to gain from knowing."""
    size, out_size = grad.element_size(), out.element_size()
    _C.gather_tokens_backward(
        grad.data_ptr(), grad.stride(0) * size, grad.stride(1) * size, DTYPE_CODES[grad.dtype],
        ids.data_ptr(), *ids.shape, *out.shape[1:],
        on_huge_pages(out).data_ptr(), out.stride(0) * out_size, out.stride(1) * out_size, DTYPE_CODES[out.dtype],
    )  # fmt: skip
