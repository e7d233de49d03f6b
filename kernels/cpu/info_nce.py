"""InfoNCE on the CPU: candidates pass by in chunks, nothing of size B x K (csrc/cpu/info_nce.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.info_nce import Arguments

DISTRIBUTED = True


def _common(x: Arguments, part: Part | None) -> tuple[object, ...]:
    tensors = (x.query, x.key, x.negatives, x.query_ids, x.negative_ids)
    return *tensors, float(x.temperature), x.normalize, x.operand_dtype, part.first if part else 0


def forward(x: Arguments, part: Part | None = None) -> tuple[Tensor, ...]:
    b, d = x.query.shape
    graded = b if x.needs_grad[0] or x.needs_grad[3] else 0
    shapes = (b,), (2, b), (graded, d), (graded,), (3, b)
    found = tuple(torch.empty(shape, **FLOAT32) for shape in shapes)
    _C.info_nce_forward(*_common(x, part), x.decoupled, *found)
    return found


def backward(grad: Tensor, x: Arguments, stats: Tensor, part: Part | None = None) -> tuple[Tensor, Tensor]:
    """dkey, dnegatives: [0] for what is not asked for"""
    dkey, dnegatives = (
        x.key.new_empty(0) if z is None or not wanted else torch.empty_like(z)
        for z, wanted in zip((x.key, x.negatives), x.needs_grad[1:3], strict=True)
    )
    _C.info_nce_backward(grad, *_common(x, part), stats, dkey, dnegatives)
    return dkey, dnegatives
