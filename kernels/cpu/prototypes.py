"""Cross entropies of assignments to prototypes on the CPU: an example's logits are read from memory once, and once more
from the cache for the gradient; or they are made of features, in chunks of rows (csrc/cpu/prototypes.h).
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


def forward(x: Any, problem: Problem) -> tuple[Any, ...]:
    """The op's outputs"""
    rows = problem.student[0].shape[1]
    students, teachers = (sum(map(len, crops)) for crops in (problem.student, problem.teacher))
    losses, loss = torch.empty(rows, **FLOAT32), None if x.reduction == "none" else torch.empty((), **FLOAT32)
    entropy, result = torch.empty(teachers, rows, **FLOAT32), losses if loss is None else loss
    wanted = x.ready and any(x.needs_grad) and loss is not None
    if x.prototypes is not None:
        d_student, d_prototypes = _features(x, problem, wanted, None, losses, loss, entropy)
        gradients = [d_student] if len(d_student) else []
        return result, entropy, torch.empty(0, **FLOAT32), gradients, d_prototypes
    stats = torch.empty(2, students, rows, **FLOAT32)
    first = problem.student[0]
    gradients = [empty(piece, *first.shape[1:], dtype=first.dtype) for piece in x.pieces()] if wanted else []
    _C.prototypes_forward(*problem, losses, loss, entropy, stats, gradients)
    return result, entropy, stats, gradients, torch.empty(0, **FLOAT32)


def backward(grad: Tensor, x: Any, problem: Problem, stats: Tensor) -> tuple[list[Tensor], Tensor]:
    if x.prototypes is not None:  # all over again
        losses = torch.empty(problem.student[0].shape[1], **FLOAT32)
        gradients = _features(x, problem, True, grad if grad.dim() else None, losses, None, None)
        d_student, d_prototypes = (
            gradients
            if grad.dim()
            else (
                torch.where(d == 0, d, d * grad)
                for d in gradients  # of forward's bits; what has no part stays 0
            )
        )
        crops = d_student.split([len(crop) if x.needs_grad[0] else 0 for crop in problem.student])
        gradients = [d.to(crop.dtype) for d, crop in zip(crops, problem.student, strict=True)]
        return gradients, d_prototypes.to(x.prototypes.dtype)
    gradients = [empty(*crop.shape, dtype=crop.dtype) for crop in problem.student]
    _C.prototypes_backward(*problem, grad, stats, gradients)
    return gradients, torch.empty(0, **FLOAT32)


def _features(x: Any, problem: Problem, wanted: bool, grad: Tensor | None, *results: Tensor | None) -> list[Tensor]:
    """The gradients, of the loss or under `grad`, and the results"""
    student, teacher, *rest = problem
    shapes = (sum(map(len, student)), *student[0].shape[1:]), x.prototypes.shape
    gradients = [empty(*(shape if wanted and each else (0,))) for shape, each in zip(shapes, x.needs_grad, strict=True)]
    layers = x.prototypes, x.teacher_prototypes, x.unit_prototypes, x.operand_dtype
    _C.prototypes_features(student, teacher, *layers, *rest, grad, *results, *gradients)
    return gradients
