"""Columns of [N, D] embeddings whose batch lies spread over the ranks of a group (csrc/cpu/columns.h).

What is summed over the ranks comes out the same on all: decisions may hang on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sslops import _C

from .memory import FLOAT64, empty

if TYPE_CHECKING:
    from sslops.distributed import Part

PANEL = 1024  # rows of a [D, D] matrix that are summed over the ranks at a time


def panels(d: int) -> Iterator[tuple[int, int]]:
    """(first, how many)"""
    for first in range(0, d, PANEL):
        yield first, min(PANEL, d - first)


def all_reduce(x: Tensor, part: Part | None) -> Tensor:
    """x, summed over the ranks in place"""
    if part is not None:
        dist.all_reduce(x, group=part.group)
    return x


def moments_of(views: list[Tensor], part: Part) -> Tensor:
    """[V, 2, D]: mean and biased variance over all ranks' rows, in float64"""
    local, ranks = torch.empty(len(views), 2, views[0].shape[1], **FLOAT64), part.group.size()
    _C.columns_moments(views, local)
    mean, var = local.unbind(1)
    of_all = all_reduce(mean / ranks, part)
    return torch.stack([of_all, all_reduce((var + (mean - of_all).square()) / ranks, part)], 1)


def moments_of_views(x: Any, part: Part | None) -> Tensor | None:
    """Of x's two views over all ranks; None where each rank's rows are normalised by their own"""
    return moments_of([x.z_a, x.z_b], part) if part is not None and x.synced else None


def own_rows(z: Tensor, route: str, part: Part | None) -> Tensor:
    """This rank's rows of a view, which the gram route has of all ranks"""
    return z if part is None or route == "panels" else z[part.first : part.first + part.rows]


def operand(z: Tensor, eps: float, moments: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[N, D] float32: z normalised, or centred for eps < 0, with the values that a matmul's operand has in `dtype`"""
    a = empty(*z.shape)
    _C.columns_normalize(z, eps, moments, dtype, a)
    return a


Gradients = list[Tensor | None]  # of the views; None: not wanted


def gradients_of(views: Sequence[Tensor], x: Any) -> Gradients:
    """Where those that are wanted come to"""
    return [empty(*z.shape, dtype=z.dtype) if wanted else None for z, wanted in zip(views, x.needs_grad, strict=False)]


def returned(dz: Gradients, x: Any) -> tuple[Tensor, ...]:
    """As the op returns them"""
    given = [*dz, None][: len(x.needs_grad)]  # VICReg's second view need not be there
    return tuple(x.z_a.new_empty(0) if out is None else out for out in given)


def normalize_backward(
    grad: float, views: list[Tensor], eps: float, moments: Tensor, g: Gradients, dz: Gradients, part: Part
) -> None:
    """dz from g, the gradients of the views [N, D] as they are normalised by the statistics of all ranks, times grad"""
    means = torch.zeros(moments.shape, **FLOAT64)
    _C.columns_gradient_means(views, eps, moments, g, means)
    all_reduce(means, part).div_(part.group.size())
    _C.columns_normalize_backward(grad, views, eps, moments, g, means, dz)
