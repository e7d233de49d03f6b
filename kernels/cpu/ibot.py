"""iBOT on the CPU: one pair of views of each example; see kernels/cpu/prototypes.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import prototypes
from .memory import refuses  # noqa: F401
from .prototypes import Problem

if TYPE_CHECKING:
    from sslops.ops.ibot import Arguments


def _problem(x: Arguments) -> Problem:
    temperatures, bias = (float(x.student_temp), float(x.teacher_temp)), None if x.bias is None else x.bias[None]
    return Problem(
        [x.student[None]], [x.teacher[None]], *temperatures, bias, x.weights, x.index, True, mean=x.reduction == "mean"
    )


def forward(x: Arguments) -> tuple[Any, ...]:
    result, entropy, stats, gradients, d_prototypes = prototypes.forward(x, _problem(x))
    return result, entropy, stats, [d_student.squeeze(0) for d_student in gradients], d_prototypes


def backward(grad: Tensor, x: Arguments, entropy: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    (d_student,), d_prototypes = prototypes.backward(grad, x, _problem(x), stats)
    return d_student.squeeze(0), d_prototypes
