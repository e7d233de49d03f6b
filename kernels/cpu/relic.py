"""RELIC on the CPU: symmetric tiles in both directions, nothing of size B x B (csrc/cpu/relic.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.ops.relic import Arguments


def _common(x: Arguments) -> tuple[object, ...]:
    weights = float(x.temperature), x.alpha, x.beta, x.negatives
    return x.online, x.target, *weights, x.normalize, x.operand_dtype


def forward(x: Arguments) -> tuple[Tensor, ...]:
    b, d = x.online.shape
    losses, stats = torch.empty(b, **FLOAT32), torch.empty(8, b, **FLOAT32)
    of_sum = torch.zeros(x.gradients, b, d, **FLOAT32), torch.zeros(1, **FLOAT32)
    _C.relic_forward(*_common(x), x.count_exceeding, losses, stats, *of_sum)
    return losses, stats, *of_sum


def backward(
    grad: Tensor, x: Arguments, stats: Tensor, of_sum: Tensor, of_sum_temperature: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    donline, dtarget = torch.empty_like(x.online), torch.empty_like(x.target) if x.gradients == 2 else None
    dtemperature = torch.empty((), **FLOAT32)
    _C.relic_backward(grad, *_common(x), stats, of_sum, of_sum_temperature, donline, dtarget, dtemperature)
    return donline, x.target.new_empty(0) if dtarget is None else dtarget, dtemperature
