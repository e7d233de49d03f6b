"""Panels of columns of [N, D] embeddings, centred or batch-normalised on the fly (csrc/cpu/columns.h).

With a process group the batch lies spread over its ranks, an equal part on each. What is summed over them comes out the
same on all: decisions may hang on it.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sslops import _C

from .memory import empty
from .tiles import DTYPE_CODES, FLOAT32

Group = Any  # dist.ProcessGroup | None: torch may be built without

PANEL = 512  # columns: [256, 512] in float32 is 512 kB, a quarter of a core's cache
WIDE_PANEL = 1024  # of many rows, which no cache holds: larger products run nearer to their peak
GRAM_BLOCK = 128  # rows of a Gram matrix, from its diagonal on: the rest is their mirror image
# Of a matrix's squares: above it the off-diagonal part, a difference on the gram route, loses more than a digit.
LARGEST_DIAGONAL_SHARE = 0.9


def panels(d: int, width: int = PANEL) -> Iterator[tuple[int, int]]:
    """(first column, columns)"""
    for first in range(0, d, width):
        yield first, min(width, d - first)


def ranks(group: Group) -> int:
    return 1 if group is None else group.size()


def batch(z: Tensor, gathered: bool, group: Group) -> tuple[int, slice]:
    """N, over all ranks, and where in z this rank's rows are"""
    if not gathered or group is None:
        return len(z) * ranks(group), slice(0, len(z))
    rows = len(z) // group.size()
    return len(z), slice(group.rank() * rows, (group.rank() + 1) * rows)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """x, summed over the ranks in place"""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def moments_of(views: list[Tensor], group: Group) -> list[Tensor | None]:
    """[2, D] for each of the ranks' views [B, D]: mean and biased variance over all rows, in float64; None if local"""
    if group is None:
        return [None] * len(views)
    d = views[0].shape[1]
    local = torch.empty(len(views), 2, d, dtype=torch.float64, device="cpu")
    for x, moments in zip(views, local, strict=True):
        _C.columns_moments(x.data_ptr(), DTYPE_CODES[x.dtype], *x.shape, moments.data_ptr())
    mean = all_reduce(local[:, 0] / ranks(group), group)
    var = all_reduce((local[:, 1] + (local[:, 0] - mean).square()) / ranks(group), group)
    return list(torch.stack([mean, var], 1))


def centre(
    x: Tensor, first: int, p: int, *, scale_eps: float | None = None, moments: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """a [N, P] float32, mean [P], var [P] (biased): a = x - mean, over sqrt(var + scale_eps) if that is given

    moments: not x's own, but these (from moments_of).
    """
    n, d = x.shape
    a, mean, var = empty(n, p), torch.empty(p, **FLOAT32), torch.empty(p, **FLOAT32)
    _C.columns_normalize(
        x.data_ptr(), DTYPE_CODES[x.dtype], n, d, first, p, scale_eps is not None, scale_eps or 0.0,
        0 if moments is None else moments.data_ptr(), a.data_ptr(), mean.data_ptr(), var.data_ptr(),
    )  # fmt: skip
    return a, mean, var


def rounded(a: Tensor, operand: torch.dtype) -> Tensor:
    """a, in float32, as the operand of a matmul in `operand` holds it"""
    return a if operand == torch.float32 else a.to(operand).float()


def add_gram(gram: Tensor, a: Tensor, own: slice) -> None:
    """gram [B, N] += a[own] a^T; of a whole one, B = N, the upper triangle, by blocks: `mirror` once makes the rest"""
    whole = len(gram) == len(a)
    for i in range(0, len(gram), GRAM_BLOCK):
        first, last = own.start + i, min(own.start + i + GRAM_BLOCK, own.stop)
        columns = slice(first if whole else 0, len(a))
        gram[i : i + GRAM_BLOCK, columns].addmm_(a[first:last], a[columns].t())


def mirror(gram: Tensor) -> Tensor:
    """gram [B, N], complete after all of add_gram"""
    rows, n = gram.shape
    for end in range(GRAM_BLOCK, n if rows == n else 0, GRAM_BLOCK):
        gram[end:, end - GRAM_BLOCK : end] = gram[end - GRAM_BLOCK : end, end:].t()
    return gram


def diagonal(a: Tensor, b: Tensor) -> Tensor:
    """[P]: mean over the rows of a b, panels [N, P]"""
    n, p = a.shape
    c = torch.empty(p, **FLOAT32)
    _C.columns_diagonal(a.data_ptr(), b.data_ptr(), n, p, c.data_ptr())
    return c


def inner(x: Tensor, y: Tensor, group: Group = None) -> float:
    """sum of x y, summed in float64, over the ranks too"""
    total = _C.columns_inner(x.data_ptr(), y.data_ptr(), x.numel())
    return float(all_reduce(torch.tensor(total, dtype=torch.float64, device="cpu"), group))


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
    *,
    group: Group = None,
) -> None:
    """Columns of out [N, D] from g = weight t + b slope, the gradient of the panel a, normalised over a group's rows"""
    (n, d), p = out.shape, a.shape[1]
    g = (
        t.data_ptr(), t.stride(0), weight, 0 if b is None else b.data_ptr(), 0 if slope is None else slope.data_ptr(),
    )  # fmt: skip
    means = None
    if group is not None:
        means = torch.empty(2, p, dtype=torch.float64, device="cpu")
        _C.columns_gradient_means(*g, a.data_ptr(), n, p, means.data_ptr())
        all_reduce(means, group).div_(ranks(group))
    _C.columns_normalize_backward(
        *g, a.data_ptr(), 0 if means is None else means.data_ptr(), var.data_ptr(), eps, grad, n, d, first, p,
        DTYPE_CODES[out.dtype], out.data_ptr(),
    )  # fmt: skip
