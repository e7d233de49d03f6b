"""Rows picked by their indices on CUDA: one launch. The gradient is one too, or zeros and a scatter for unique ids."""

from torch import Tensor

from sslops import _C

from .device import DTYPE_CODES, launch
from .device import refuses_but_floats as refuses  # noqa: F401


def forward(tokens: Tensor, ids: Tensor, out: Tensor) -> None:
    """out [B, K, D] = the rows of tokens [B, L, D] that ids [B, K] name; a token's elements lie together"""
    size = tokens.element_size()
    launch(
        out.device, _C.cuda_gather_tokens,
        tokens.data_ptr(), tokens.stride(0) * size, tokens.stride(1) * size, ids.data_ptr(), *ids.shape,
        tokens.shape[1], tokens.shape[2] * size, out.data_ptr(),
    )  # fmt: skip


def backward(grad: Tensor, ids: Tensor, unique: bool, out: Tensor) -> None:
    """out [B, L, D], from grad [B, K, D]"""
    size = grad.element_size()
    if unique:
        out.zero_()
        launch(
            out.device, _C.cuda_gather_tokens_scatter, grad.data_ptr(), ids.data_ptr(), *ids.shape,
            out.shape[1], out.shape[2] * size, out.data_ptr(), out.stride(0) * size, out.stride(1) * size,
        )  # fmt: skip
        return
    launch(
        out.device, _C.cuda_gather_tokens_backward,
        grad.data_ptr(), grad.stride(0) * size, grad.stride(1) * size, DTYPE_CODES[grad.dtype],
        ids.data_ptr(), *ids.shape, *out.shape[1:],
        out.data_ptr(), out.stride(0) * size, out.stride(1) * size, DTYPE_CODES[out.dtype],
    )  # fmt: skip
