"""NT-Xent on the CPU: symmetric tiles in both directions, of which few are held until the losses are known
(csrc/cpu/nt_xent.h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, refuses  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sslops.distributed import Part
    from sslops.ops.nt_xent import Arguments

DISTRIBUTED = True


def forward(x: Arguments, part: Part | None = None, factor: float = 0.0) -> tuple[Tensor, ...]:
    """With a factor also the gradients of that times the losses' sum, in float32"""
    v, n = (len(x.z0), x.z0.shape[1]) if x.z1 is None else (2, len(x.z0))
    rows = v * (part.rows if part else n)
    losses, inv_norm = torch.empty(rows, **FLOAT32), torch.empty(v * n, **FLOAT32)
    stats, logged = torch.empty(v + 1, rows, **FLOAT32), torch.empty(2 * (v - 1) * x.count_exceeding, rows, **FLOAT32)
    gradients = _gradients(x, x.z0.shape, torch.float32) if factor else ()
    _C.nt_xent_forward(
        x.z0, x.z1, x.query_ids, x.positive_weights, float(x.temperature), x.normalize, x.decoupled, x.operand_dtype,
        part.first if part else 0, losses, logged, inv_norm, stats, factor, *(gradients or (None, None, None)),
    )  # fmt: skip
    return losses, logged, inv_norm, stats, *gradients


def backward(
    grad: Tensor, x: Arguments, inv_norm: Tensor, stats: Tensor, part: Part | None = None
) -> tuple[Tensor, ...]:
    *views, n, d = x.z0.shape
    found = _gradients(x, (*views, part.rows if part else n, d), x.z0.dtype)
    _C.nt_xent_backward(
        grad, x.z0, x.z1, x.query_ids, float(x.temperature), x.normalize, x.operand_dtype, part.first if part else 0,
        torch.empty_like(inv_norm), stats, *found,  # found anew: what is saved is not written to
    )  # fmt: skip
    return found


def _gradients(x: Arguments, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of z0, z1 and the temperature"""
    of_z1 = x.z0.new_empty(0 if x.z1 is None else shape, dtype=dtype)
    return x.z0.new_empty(shape, dtype=dtype), of_z1, torch.empty((), **FLOAT32)
