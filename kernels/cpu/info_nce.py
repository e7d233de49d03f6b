"""InfoNCE on the CPU: candidates pass by in chunks, nothing of size B x K (csrc/cpu/info_nce.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, on_huge_pages, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.info_nce import Arguments

DISTRIBUTED = True


def _tensors(x: Arguments) -> tuple[Tensor | None, ...]:
    shared = x.query, x.key, x.negatives, x.query_ids, x.negative_ids, x.negative_mask
    return *shared, x.paired_negatives, x.paired_mask


def _options(x: Arguments, part: Part | None) -> tuple[object, ...]:
    return float(x.temperature), x.normalize, x.operand_dtype, part.first if part else 0


def forward(x: Arguments, part: Part | None = None) -> tuple[Tensor, ...]:
    b, d = x.query.shape
    graded = b if x.needs_grad[0] or x.needs_grad[3] else 0
    shapes = (b,), (2, b), (graded, d), (graded,), (3, b)
    found = tuple(torch.empty(shape, **FLOAT32) for shape in shapes)
    _C.info_nce_forward(*_tensors(x), x.positive_weights, *_options(x, part), x.decoupled, *found)
    return found


def backward(grad: Tensor, x: Arguments, stats: Tensor, part: Part | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """dkey, dnegatives, dpaired: [0] for what is not asked for"""
    inputs, (_, key_grad, negatives_grad, _, paired_grad) = (x.key, x.negatives, x.paired_negatives), x.needs_grad
    dkey, dnegatives, dpaired = (
        on_huge_pages(torch.empty_like(z)) if wanted and z is not None else (grad if z is None else z).new_empty(0)
        for z, wanted in zip(inputs, (key_grad, negatives_grad, paired_grad), strict=True)
    )
    _C.info_nce_backward(grad, *_tensors(x), *_options(x, part), stats, dkey, dnegatives, dpaired)
    return dkey, dnegatives, dpaired
