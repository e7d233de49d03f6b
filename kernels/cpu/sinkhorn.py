"""Sinkhorn's potentials on the CPU: one pass over the scores an iteration. Of features, it makes them again in each
(csrc/cpu/sinkhorn.h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.ops.sinkhorn import Arguments


def _given(x: Arguments) -> tuple[Any, ...]:
    return x.scores, x.prototypes, x.unit_prototypes, x.operand_dtype, float(x.temperature)


def _count(x: Arguments) -> int:
    return x.scores.shape[2] if x.prototypes is None else len(x.prototypes)


def columns(x: Arguments) -> tuple[Tensor, Tensor]:
    """[V, K] each: a maximum of a column's logits, and the sum of exp(logit - maximum)"""
    top, sums = torch.empty(2, len(x.scores), _count(x), **FLOAT32).unbind()
    _C.sinkhorn_columns(*_given(x), top, sums)
    return top.double() / float(x.temperature), sums.double()


def mass(x: Arguments, b: Tensor) -> Tensor:
    """[V, K]: the sum over the rows of softmax(logits + b)"""
    found = torch.empty(b.shape, **FLOAT32)
    _C.sinkhorn_mass(*_given(x), b.float(), found)
    return found.double()


def forward(x: Arguments, potentials: Callable[..., Tensor]) -> Tensor:
    if x.ranks:
        return potentials(x, columns, mass).float()  # [V, K] is too little for float64 to cost anything
    b = torch.empty(len(x.scores), _count(x), **FLOAT32)
    _C.sinkhorn_potentials(*_given(x), x.iterations, x.balanced, b)
    return b
