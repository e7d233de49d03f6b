"""SIGReg on the CPU: two sweeps over tiles of projections, of which only the sums over the batch are kept
(csrc/cpu/sigreg.h). With a process group these are summed over the ranks, and each has its own rows' gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .columns import all_reduce
from .memory import empty, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.sigreg import Arguments

DISTRIBUTED = True


def forward(x: Arguments, scale: float, part: Part | None = None) -> tuple[Tensor, ...]:
    """loss [], the statistic times scale; sums [V, 2, K - 1, M] of all ranks; directions [M, D] if they are drawn"""
    directions, drawn = x.directions, x.z.new_empty(0, dtype=torch.float32)
    if directions is None:
        directions = drawn = empty(x.slices, x.z.shape[2])
        _C.sigreg_draw(x.key, drawn)
    sums = empty(len(x.z), 2, x.knots - 1, len(directions))
    _C.sigreg_forward(x.z, directions, _step(x), sums)
    all_reduce(sums, part)
    loss = _C.sigreg_statistic(sums, _step(x)) * scale
    return x.z.new_full((), loss, dtype=torch.float32), sums, drawn


def backward(grad: Tensor, x: Arguments, scale: float, sums: Tensor, drawn: Tensor) -> Tensor:
    dz = empty(*x.z.shape, dtype=x.z.dtype)
    directions = drawn if x.directions is None else x.directions
    _C.sigreg_backward(2 * float(grad) * scale, x.z, directions, _step(x), sums, dz)
    return dz


def _step(x: Arguments) -> float:
    return x.t_max / (x.knots - 1)
