"""DINO on the CPU: see kernels/cpu/prototypes.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import prototypes
from .memory import refuses  # noqa: F401
from .prototypes import Problem

if TYPE_CHECKING:
    from sslops.ops.dino import Arguments


def _problem(x: Arguments) -> Problem:
    temperatures = float(x.student_temp), float(x.teacher_temp)
    return Problem(
        x.student, x.teacher, *temperatures, x.bias, x.weights, None, x.same_view, mean=x.reduction == "mean"
    )


def forward(x: Arguments) -> tuple[Any, ...]:
    return prototypes.forward(x, _problem(x))


def backward(grad: Tensor, x: Arguments, entropy: Tensor, stats: Tensor) -> tuple[list[Tensor], Tensor]:
    return prototypes.backward(grad, x, _problem(x), stats)
