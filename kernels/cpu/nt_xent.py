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


def forward(x: Arguments, part: Part | None = None) -> tuple[Tensor, ...]:
    v, n = (len(x.z0), x.z0.shape[1]) if x.z1 is None else (2, len(x.z0))
    rows = v * (part.rows if part else n)
    losses, inv_norm = torch.empty(rows, **FLOAT32), torch.empty(v * n, **FLOAT32)
    stats, logged = torch.empty(v + 1, rows, **FLOAT32), torch.empty(2 * (v - 1) * x.count_exceeding, rows, **FLOAT32)
    _C.nt_xent_forward(
        x.z0, x.z1, x.query_ids, x.positive_weights, float(x.temperature), x.normalize, x.decoupled, x.operand_dtype,
        part.first if part else 0, losses, logged, inv_norm, stats,
    )  # fmt: skip
    return losses, logged, inv_norm, stats


def backward(
    grad: Tensor, x: Arguments, inv_norm: Tensor, stats: Tensor, part: Part | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    *views, n, d = x.z0.shape
    shape = (*views, part.rows if part else n, d)
    dz0, dz1 = x.z0.new_empty(shape), x.z0.new_empty(0 if x.z1 is None else shape)
    dots = torch.empty((views[0] if views else 2) * shape[-2], **FLOAT32)
    _C.nt_xent_backward(
        grad, x.z0, x.z1, x.query_ids, float(x.temperature), x.normalize, x.operand_dtype, part.first if part else 0,
        torch.empty_like(inv_norm), stats, dz0, dz1, dots,  # found anew: what is saved is not written to
    )  # fmt: skip
    # dL/d(1/tau) = (tau / 2) sum_i <z_i, dz_i>
    return dz0, dz1, dots * (-0.5 / float(x.temperature)) if x.needs_grad[2] else dots
