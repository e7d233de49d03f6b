"""NT-Xent on the CPU: symmetric tiles in both directions, nothing of size M x M (csrc/cpu/nt_xent.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.nt_xent import Arguments

DISTRIBUTED = True


def _common(x: Arguments, part: Part | None) -> tuple[object, ...]:
    return x.z0, x.z1, float(x.temperature), x.normalize, x.operand_dtype, part.first if part else 0


def forward(x: Arguments, part: Part | None = None) -> tuple[Tensor, ...]:
    rows = 2 * (part.rows if part else len(x.z0))
    losses, inv_norm = torch.empty(rows, **FLOAT32), torch.empty(2 * len(x.z0), **FLOAT32)
    stats, logged = torch.empty(3, rows, **FLOAT32), torch.empty(2 if x.count_exceeding else 0, rows, **FLOAT32)
    _C.nt_xent_forward(*_common(x, part), losses, logged, inv_norm, stats)
    return losses, logged, inv_norm, stats


def backward(
    grad: Tensor, x: Arguments, inv_norm: Tensor, stats: Tensor, part: Part | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    rows = part.rows if part else len(x.z0)
    dz0, dz1 = x.z0.new_empty(rows, x.z0.shape[1]), x.z1.new_empty(rows, x.z1.shape[1])
    dots = torch.empty(2 * rows, **FLOAT32)
    _C.nt_xent_backward(grad, *_common(x, part), inv_norm, stats, dz0, dz1, dots)
    # dL/d(1/tau) = (tau / 2) sum_i <z_i, dz_i>
    return dz0, dz1, dots.sum() * (-0.5 / float(x.temperature))
