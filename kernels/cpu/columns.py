"""Columns of [N, D] embeddings whose batch lies spread over the ranks of a group (csrc/cpu/columns.h).

What is summed over the ranks comes out the same on all: decisions may hang on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sslops import _C

from .memory import FLOAT64, empty

if TYPE_CHECKING:
    from sslops.distributed import Part

PANEL = 1024  # rows of a [D, D] matrix that are summed over the ranks at a time
# Of a matrix's squares: above it the off-diagonal part, a difference on the gram route, loses more than a digit.
LARGEST_DIAGONAL_SHARE = 0.9


def panels(d: int) -> Iterator[tuple[int, int]]:
    """(first, how many)"""
    for first in range(0, d, PANEL):
        yield first, min(PANEL, d - first)


def all_reduce(x: Tensor, part: Part | None) -> Tensor:
    """x, summed over the ranks in place"""
    if part is not None:
        dist.all_reduce(x, group=part.group)
    return x


def moments_of(z: Tensor, part: Part) -> Tensor:
    """[2, D]: mean and biased variance over all ranks' rows, in float64"""
    local, ranks = torch.empty(2, z.shape[1], **FLOAT64), part.group.size()
    _C.columns_moments(z, local)
    mean = all_reduce(local[0] / ranks, part)
    var = all_reduce((local[1] + (local[0] - mean).square()) / ranks, part)
    return torch.stack([mean, var])


def moments_of_views(x: Any, part: Part | None) -> tuple[Tensor | None, Tensor | None]:
    """Of x's two views over all ranks; None where each rank's rows are normalised by their own"""
    return (moments_of(x.z_a, part), moments_of(x.z_b, part)) if part is not None and x.synced else (None, None)


def own_rows(z: Tensor, route: str, part: Part | None) -> Tensor:
    """This rank's rows of a view, which the gram route has of all ranks"""
    return z if part is None or route == "panels" else z[part.first : part.first + part.rows]


def operand(z: Tensor, eps: float, moments: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[N, D] float32: z normalised, or centred for eps < 0, with the values that a matmul's operand has in `dtype`"""
    a = empty(*z.shape)
    _C.columns_normalize(z, eps, moments, dtype, a)
    return a


def normalize_backward(grad: float, z: Tensor, eps: float, g: Tensor, part: Part | None = None) -> Tensor:
    """dz [N, D] from g [N, D], the gradient of the normalised z, times grad; with a part statistics are of all ranks"""
    moments = means = None
    if part is not None:
        moments, means = moments_of(z, part), torch.empty(2, z.shape[1], **FLOAT64)
        _C.columns_gradient_means(z, eps, moments, g, means)
        all_reduce(means, part).div_(part.group.size())
    dz = empty(*z.shape, dtype=z.dtype)
    _C.columns_normalize_backward(grad, z, eps, moments, g, means, dz)
    return dz
