"""The cross-correlation matrix on the CPU, in tiles of the normalised views' product (csrc/cpu/cross_correlation.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sslops import _C

from .columns import all_reduce, gradients_of, moments_of_views, normalize_backward, returned
from .memory import empty, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.cross_correlation import Arguments

DISTRIBUTED = True


def forward(x: Arguments, part: Part | None = None) -> Tensor:
    n, d = x.z_a.shape
    c = empty(d, d)
    n *= part.group.size() if part else 1
    _C.cross_correlation_forward(x.z_a, x.z_b, x.eps, moments_of_views(x, part), x.operand_dtype, n, c)
    return all_reduce(c, part)


def backward(grad: Tensor, x: Arguments, part: Part | None = None) -> tuple[Tensor, ...]:
    """From grad [D, D], the same on all ranks. W / N: the gradient is W times the share of these rows."""
    views, moments = [x.z_a, x.z_b], moments_of_views(x, part)
    dz = gradients_of(views, x)
    g = dz if moments is None else [None if out is None else empty(*out.shape) for out in dz]
    _C.cross_correlation_backward(*views, x.eps, moments, x.operand_dtype, grad, g)
    if part is not None and moments is not None:
        normalize_backward(1 / len(x.z_a), views, x.eps, moments, g, dz, part)
    return returned(dz, x)
