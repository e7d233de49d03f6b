"""iBOT in Triton: one pair of views of each example; see kernels/triton/prototypes.py and last_layer.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import last_layer, prototypes
from .launch import refuses  # noqa: F401
from .prototypes import Problem

if TYPE_CHECKING:
    from sslops.ops.ibot import Arguments


def _problem(x: Arguments) -> Problem:
    bias = None if x.bias is None else x.bias[None]
    return Problem(
        [x.student[None]], [x.teacher[None]], x.student_temp, x.teacher_temp, bias, x.weights, x.index, True,
        mean=x.reduction == "mean",
    )  # fmt: skip


def forward(x: Arguments) -> tuple[Any, ...]:
    of = prototypes if x.prototypes is None else last_layer
    result, entropy, stats, gradients, *d_prototypes = of.forward(x, _problem(x))
    return result, entropy, stats, [d_student.squeeze(0) for d_student in gradients], *d_prototypes


def backward(grad: Tensor, x: Arguments, entropy: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    if x.prototypes is None:
        return prototypes.backward(grad, _problem(x), stats)[0].squeeze(0), grad.new_empty(0)
    (d_student,), d_prototypes = last_layer.backward(grad, x, _problem(x))
    return d_student.squeeze(0), d_prototypes
