"""SupCon on the CPU: symmetric tiles in both directions, of which few are held until the losses are known; with keys
two passes over them, both in forward (csrc/cpu/supcon.h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.supcon import Arguments

DISTRIBUTED = True


def _common(x: Arguments, part: Part | None) -> tuple[object, ...]:
    options = float(x.temperature), x.normalize, x.where == "in", x.operand_dtype
    return x.z, x.labels, x.query_ids, *options, part.first if part else 0


def forward(x: Arguments, part: Part | None = None, factor: float = 0.0) -> tuple[Tensor, ...]:
    """With a factor also the gradients of that times the losses' sum, in float32"""
    views, n = x.z.shape[:-2].numel(), x.z.shape[-2]
    rows = views * (part.rows if part else n)
    losses, positives, inv_norm = (torch.empty(shape, **FLOAT32) for shape in ((rows,), (1, rows), (views * n,)))
    stats = torch.empty(4, rows, **FLOAT32)
    gradients = (torch.empty(x.z.shape, **FLOAT32), torch.empty((), **FLOAT32)) if factor else ()
    z, labels, ids, *options = _common(x, part)
    _C.supcon_forward(
        z, labels, ids, x.weights, *options, losses, positives, inv_norm, stats, factor, *(gradients or (None, None))
    )
    return losses, positives, inv_norm, stats, *gradients


def backward(
    grad: Tensor, x: Arguments, inv_norm: Tensor, stats: Tensor, part: Part | None = None
) -> tuple[Tensor, Tensor]:
    *views, n, d = x.z.shape
    dz, dtemperature = x.z.new_empty(*views, part.rows if part else n, d), torch.empty((), **FLOAT32)
    # inv_norm found anew: what is saved is not written to
    _C.supcon_backward(grad, *_common(x, part), torch.empty_like(inv_norm), stats, dz, dtemperature)
    return dz, dtemperature


def among_keys(x: Arguments) -> tuple[Tensor, ...]:
    """losses, positives, and of each row's weighted loss dz and dtemperature"""
    rows, d = x.z.shape[:-1].numel(), x.z.shape[-1]
    graded = rows if any(x.needs_grad) else 0
    shapes = (rows,), (rows,), (1, rows), (graded, d), (graded,)
    inv_norm, *found = (torch.empty(shape, **FLOAT32) for shape in shapes)
    beside = x.keys, x.key_labels, x.key_ids, float(x.temperature), x.normalize, x.where == "in", x.operand_dtype
    _C.supcon_among_keys(x.z, x.labels, x.query_ids, x.weights, *beside, inv_norm, *found)
    return tuple(found)
