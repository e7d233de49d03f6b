"""The cross-correlation matrix on the CPU, in tiles of the normalised views' product (csrc/cpu/cross_correlation.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from sslops import _C

from .columns import all_reduce, moments_of_views, normalize_backward
from .memory import empty, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.cross_correlation import Arguments

DISTRIBUTED = True


def forward(x: Arguments, part: Part | None = None) -> Tensor:
    n, d = x.z_a.shape
    c = empty(d, d)
    n *= part.group.size() if part else 1
    _C.cross_correlation_forward(x.z_a, x.z_b, x.eps, *moments_of_views(x, part), x.operand_dtype, n, c)
    return all_reduce(c, part)


def backward(grad: Tensor, x: Arguments, part: Part | None = None) -> tuple[Tensor, ...]:
    """From grad [D, D], the same on all ranks. W / N: the gradient is W times the share of these rows."""
    views, gradients = (x.z_a, x.z_b), []
    for k, (z, other, moments) in enumerate(zip(views, views[::-1], moments_of_views(x, part)[::-1], strict=True)):
        if not x.needs_grad[k]:
            gradients.append(z.new_empty(0))
            continue
        g = empty(*z.shape)
        _C.cross_correlation_product(other, x.eps, moments, x.operand_dtype, grad, k == 1, g)
        gradients.append(normalize_backward(1 / len(z), z, x.eps, g, part if x.synced else None))
    return tuple(gradients)
