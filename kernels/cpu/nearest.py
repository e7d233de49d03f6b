"""Nearest neighbours on the CPU: candidates pass by in chunks, nothing of size B x K (csrc/cpu/nearest.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .memory import refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.ops.nearest import Arguments


def forward(x: Arguments) -> Tensor:
    ids = torch.empty(len(x.query), x.k, dtype=torch.int64, device="cpu")
    _C.nearest_forward(x.query, x.support, x.normalize, x.operand_dtype, x.first, ids)
    return ids
