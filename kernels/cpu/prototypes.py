"""Cross entropies of assignments to prototypes on the CPU: an example's logits are read from memory once, and once more
from the cache for the gradient (csrc/cpu/prototypes.h).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, empty


class Problem(NamedTuple):
    """What both directions are given."""

    student: list[Tensor]  # [V_i, B, K] each
    teacher: list[Tensor]
    student_temp: float
    teacher_temp: float
    bias: Tensor | None  # [1, K] or [T, K]
    weights: Tensor | None  # [B]
    index: Tensor | None  # type: ignore[assignment]  # a tuple has a method of that name; [B], rows of the teacher
    same_view: bool
    mean: bool


def forward(x: Any, problem: Problem) -> tuple[Tensor, ...]:
    """The op's outputs, the gradient as [V, B, K]"""
    first = problem.student[0]
    rows, k = first.shape[1:]
    students, teachers = (sum(map(len, crops)) for crops in (problem.student, problem.teacher))
    losses, loss = torch.empty(rows, **FLOAT32), None if x.reduction == "none" else torch.empty((), **FLOAT32)
    entropy, stats = torch.empty(teachers, rows, **FLOAT32), torch.empty(2, students, rows, **FLOAT32)
    wanted = x.ready and any(x.needs_grad) and loss is not None
    gradients = [empty(students, rows, k, dtype=first.dtype)] if wanted else []
    _C.prototypes_forward(*problem, losses, loss, entropy, stats, gradients)
    return losses if loss is None else loss, entropy, stats, *gradients


def backward(grad: Tensor, problem: Problem, stats: Tensor) -> list[Tensor]:
    gradients = [empty(*crop.shape, dtype=crop.dtype) for crop in problem.student]
    _C.prototypes_backward(*problem, grad, stats, gradients)
    return gradients
