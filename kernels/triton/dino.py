"""DINO in Triton: see kernels/triton/prototypes.py and last_layer.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import last_layer, prototypes
from .launch import refuses  # noqa: F401
from .prototypes import Problem

if TYPE_CHECKING:
    from sslops.ops.dino import Arguments


def _problem(x: Arguments) -> Problem:
    return Problem(
        x.student, x.teacher, x.student_temp, x.teacher_temp, x.bias, x.weights, None, x.same_view,
        mean=x.reduction == "mean",
    )  # fmt: skip


def forward(x: Arguments) -> tuple[Any, ...]:
    return (prototypes if x.prototypes is None else last_layer).forward(x, _problem(x))


def backward(grad: Tensor, x: Arguments, entropy: Tensor, stats: Tensor) -> tuple[list[Tensor], Tensor]:
    if x.prototypes is not None:
        return last_layer.backward(grad, x, _problem(x))
    return prototypes.backward(grad, _problem(x), stats), grad.new_empty(0)
