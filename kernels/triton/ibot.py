"""iBOT in Triton: one pair of views of each example; see kernels/triton/prototypes.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import prototypes
from .launch import refuses  # noqa: F401
from .prototypes import Problem

if TYPE_CHECKING:
    from sslops.ops.ibot import Arguments


LACKS = ("last layer of its own",)


def _problem(x: Arguments) -> Problem:
    bias = None if x.bias is None else x.bias[None]
    return Problem(
        [x.student[None]], [x.teacher[None]], x.student_temp, x.teacher_temp, bias, x.weights, x.index, True,
        mean=x.reduction == "mean",
    )  # fmt: skip


def forward(x: Arguments) -> tuple[Tensor, ...]:
    result, entropy, stats, *gradients = prototypes.forward(x, _problem(x))
    return result, entropy, stats, *(gradient[0] for gradient in gradients)


def backward(grad: Tensor, x: Arguments, entropy: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    return prototypes.backward(grad, _problem(x), stats)[0][0], grad.new_empty(0)
