"""Sinkhorn's potentials on the CPU: one pass over the scores an iteration (csrc/cpu/sinkhorn.h)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.ops.sinkhorn import Arguments


def columns(x: Arguments) -> tuple[Tensor, Tensor]:
    """[V, K] each: a maximum of a column's logits, and the sum of exp(logit - maximum)"""
    top, sums = torch.empty(2, len(x.scores), x.scores.shape[2], **FLOAT32).unbind()
    _C.sinkhorn_columns(x.scores, float(x.temperature), top, sums)
    return top.double() / float(x.temperature), sums.double()


def mass(x: Arguments, b: Tensor) -> Tensor:
    """[V, K]: the sum over the rows of softmax(logits + b)"""
    found = torch.empty(b.shape, **FLOAT32)
    _C.sinkhorn_mass(x.scores, float(x.temperature), b.float(), found)
    return found.double()


def forward(x: Arguments, potentials: Callable[..., Tensor]) -> Tensor:
    return potentials(x, columns, mass).float()  # [V, K] is too little for float64 to cost anything
