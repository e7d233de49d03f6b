"""Panels of columns of [N, D] embeddings, centred or batch-normalised on the fly (csrc/cpu/columns.h)."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sslops import _C

from .tiles import DTYPE_CODES, FLOAT32

PANEL = 512  # columns: [256, 512] in float32 is 512 kB, a quarter of a core's cache


def panels(d: int) -> Iterator[tuple[int, int]]:
    """(first column, columns)"""
    for first in range(0, d, PANEL):
        yield first, min(PANEL, d - first)


def centre(x: Tensor, first: int, p: int, *, scale_eps: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """a [N, P] float32, mean [P], var [P] (biased): a = x - mean, over sqrt(var + scale_eps) if that is given"""
    n, d = x.shape
    a, mean, var = torch.empty(n, p, **FLOAT32), torch.empty(p, **FLOAT32), torch.empty(p, **FLOAT32)
    _C.columns_normalize(
        x.data_ptr(), DTYPE_CODES[x.dtype], n, d, first, p, scale_eps is not None, scale_eps or 0.0,
        a.data_ptr(), mean.data_ptr(), var.data_ptr(),
    )  # fmt: skip
    return a, mean, var


def rounded(a: Tensor, operand: torch.dtype) -> Tensor:
    """a, in float32, as the operand of a matmul in `operand` holds it"""
    return a if operand == torch.float32 else a.to(operand).float()


def diagonal(a: Tensor, b: Tensor) -> Tensor:
    """[P]: mean over the rows of a b, panels [N, P]"""
    n, p = a.shape
    c = torch.empty(p, **FLOAT32)
    _C.columns_diagonal(a.data_ptr(), b.data_ptr(), n, p, c.data_ptr())
    return c


def inner(x: Tensor, y: Tensor) -> float:
    """sum of x y, summed in float64"""
    total: float = _C.columns_inner(x.data_ptr(), y.data_ptr(), x.numel())
    return total


def normalize_backward(
    out: Tensor,
    first: int,
    a: Tensor,
    var: Tensor,
    eps: float,
    grad: float,
    t: Tensor,
    weight: float = 1.0,
    b: Tensor | None = None,
    slope: Tensor | None = None,
) -> None:
    """Columns of out [N, D] from g = weight t + b slope, the gradient of the normalised panel a"""
    n, d = out.shape
    _C.columns_normalize_backward(
        t.data_ptr(), t.stride(0), weight, 0 if b is None else b.data_ptr(), 0 if slope is None else slope.data_ptr(),
        a.data_ptr(), var.data_ptr(), eps, grad, n, d, first, a.shape[1], DTYPE_CODES[out.dtype], out.data_ptr(),
    )  # fmt: skip
