"""What DINO's and iBOT's losses share: the maths, the registered ops' outputs, the mean over ranks, what is logged."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check, _sums, distributed
from ._contrastive import REDUCTIONS
from ._library import Out


class Metrics(NamedTuple):
    """Means over the examples, weighted as the loss is: 0-d tensors without a gradient, to be logged later."""

    teacher_entropy: Tensor  # of the targets: log K where they are uniform, 0 where they are one prototype
    divergence: Tensor  # KL(target, student): the cross entropy minus the targets' entropy


class Outputs(NamedTuple):
    result: Out  # the loss, or the losses
    entropy: Out  # of the targets
    stats: Out  # of the students' softmax: a maximum, and the sum of exp(y - maximum)
    gradients: list[Out]  # the student's where grad is 1, in forward's own sweep: in one piece, or tensor by tensor
    d_prototypes: Out  # ... and that of the prototypes


KEPT = 32 << 20  # bytes: a larger piece glibc's malloc gives back to the system, which clears it again for the next one


def outputs(teachers: int, students: int, rows: int, student: list[Tensor], x: Any) -> Outputs:
    ready = x.ready and any(x.needs_grad) and x.reduction != "none"
    fused = x.prototypes is not None
    apart = len(x.pieces()) == len(student)
    shapes = [tuple(crop.shape) for crop in student] if apart else [(students, *student[0].shape[1:])]
    of_student = [Out(shape, torch.float32 if fused else student[0].dtype) for shape in shapes]
    return Outputs(
        result=Out((rows,) if x.reduction == "none" else ()),
        entropy=Out((teachers, rows)),
        stats=Out((0,) if fused else (2, students, rows)),
        gradients=of_student if ready and x.needs_grad[0] else [],
        d_prototypes=Out(tuple(x.prototypes.shape) if fused and ready and x.needs_grad[1] else (0,)),
    )


def project(features: Tensor, prototypes: Tensor | None, unit: bool, operand: torch.dtype) -> Tensor:
    """Logits, float32 (float64 for float64) around a matmul; without prototypes they are that already"""
    if prototypes is None:
        return features
    wide = torch.promote_types(features.dtype, torch.float32)
    weight = F.normalize(prototypes.to(wide)) if unit else prototypes
    return F.linear(features.to(operand), weight.to(operand)).to(wide)


def pairs(teachers: int, students: int, same_view: bool) -> list[tuple[int, int]]:
    return [(t, v) for v in range(students) for t in range(teachers) if same_view or t != v]


def reference(student: Tensor, teacher: Tensor, same_view: bool, x: Any) -> tuple[Tensor, Tensor]:
    """The result and the targets' entropy [T, B]. student: [V, B, K], teacher: [T, B, K], or features"""
    student = project(student, x.prototypes, x.unit_prototypes, x.operand_dtype)
    teacher = project(teacher, x.teacher_prototypes, x.unit_prototypes, x.operand_dtype)
    wide = torch.promote_types(student.dtype, torch.float32)
    logits = teacher.to(wide) / x.teacher_temp
    if x.bias is not None:
        logits = logits + x.bias[:, None]
    log_q = logits.log_softmax(2)
    q = log_q.exp()
    log_p = (student.to(wide) / x.student_temp).log_softmax(2)
    chosen = pairs(len(teacher), len(student), same_view)
    losses = log_p.new_zeros(student.shape[1])
    for v in range(len(student)):
        paired = [t for t, other in chosen if other == v]
        if paired:
            losses = losses - (q[paired].sum(0) * log_p[v]).sum(1)
    losses = losses / len(chosen)
    if x.weights is not None:
        losses = losses * x.weights
    entropy = -torch.where(q == 0, 0.0, q * log_q).sum(2)
    return losses if x.reduction == "none" else losses.mean() if x.reduction == "mean" else losses.sum(), entropy


def check_options(op: str, reduction: str, return_metrics: bool, unit_prototypes: bool) -> None:
    _check.choice(op, "reduction", reduction, REDUCTIONS)
    _check.flag(op, "return_metrics", return_metrics)
    _check.flag(op, "unit_prototypes", unit_prototypes)


def check_prototypes(op: str, logits: str, x: Any) -> None:
    """logits: the argument's name, where there are no prototypes"""
    if count(x) == 0:
        name, given = (logits, _check.first(x)) if x.prototypes is None else ("prototypes", x.prototypes)
        _check.bad_value(op, name, "at least one prototype", list(given.shape))


def check_layers(op: str, teacher: Tensor, x: Any) -> None:
    """That there is a prototype, and that the teacher's logits and the bias are of as many"""
    k, of_teacher = count(x), x.teacher_prototypes
    check_prototypes(op, "student", x)
    if of_teacher is not None and x.prototypes is None:
        _check.bad_value(op, "teacher_prototypes", "none beside a student's logits", list(of_teacher.shape))
    if of_teacher is not None and len(of_teacher) != k:
        _check.bad_value(op, "teacher_prototypes", f"shape [{k}, E], a row for each prototype", list(of_teacher.shape))
    if of_teacher is None and teacher.shape[-1] != k:
        wanted = f"logits [.., {k}]" + (", or teacher_prototypes" if x.prototypes is not None else "")
        _check.bad_value(op, "teacher", wanted, list(teacher.shape))
    if x.bias is not None and x.bias.shape[-1] != k:
        _check.bad_value(op, "bias", f"shape [.., {k}]", list(x.bias.shape))


def count(x: Any) -> int:
    """K"""
    k: int = _check.first(x).shape[-1] if x.prototypes is None else len(x.prototypes)
    return k


def is_ready(student: Any, prototypes: Any) -> bool:
    """Whether the gradient is to be found in forward: always where logits would have to be made for it again. Not where
    backward finds its own: compiled, or in half precision on a GPU, scaled by no number that the host knows to be 1.
    """
    half = isinstance(student, Tensor) and student.device.type != "cpu" and student.dtype != torch.float32
    return prototypes is not None or not (half or torch.compiler.is_compiling())


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def wide(value: Any, like: Tensor) -> Any:
    """A bias or weights as kernels take them"""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().to(torch.promote_types(like.dtype, torch.float32))


def call(
    op: str, run: Any, x: Any, group: str, return_metrics: bool, backend: str | None,
    views: Callable[[Any], int] = lambda student: 1, same_view: bool = True,
) -> Any:  # fmt: skip
    """run(x, backend), reduced over the examples of all ranks"""
    reduction, first = x.reduction, _check.first(x)
    ours = reduction == "mean" and (bool(group) or x.weights is not None)
    if not (ours or group or return_metrics) or not isinstance(first, Tensor):  # which is refused
        return run(x, backend)[0]
    found: list[Tensor] = []  # the weights, and a rank's share of their sum

    def weighted(x: Any) -> Any:
        weights = x.weights
        if weights is None:
            weights = first.new_ones(first.shape[-2:-1], dtype=torch.promote_types(first.dtype, torch.float32))
        same = {**x._asdict(), x._fields[0]: first, "K": count(x), "metrics": return_metrics}
        options = distributed.options({k: v for k, v in same.items() if k != "ready"}) if group else ""
        total = distributed.mean(_sums.total(weights), group, op, options)
        if x.weights is not None:
            total = torch.where(total == 0, 1.0, total)
        found.extend((weights, total))
        return x._replace(weights=weights / total, reduction="sum") if ours else x

    result, entropy, *_ = run(x, backend, weighted)
    (weights, total), loss = found, result
    if group and reduction != "none":
        loss = distributed.mean(result, group) * (1 if reduction == "mean" else distributed.size(group))
    if group and reduction == "mean" and x.weights is None:
        loss = loss / (total != 0)  # NaN of no images on any rank
    if not return_metrics:
        return loss
    entropy = entropy.detach()  # [T, B], weighted by the pairs that each teacher's view is in
    students = views(x[0])
    own = 0 if same_view else min(len(entropy), students)
    of_pairs = (students * entropy.sum(0) - entropy[:own].sum(0)) / (students * len(entropy) - own)
    of_teacher = distributed.mean(_sums.total(of_pairs * weights) / total, group)
    cross = distributed.mean(_sums.total(result.detach()) / (1 if reduction == "mean" else total), group)
    return loss, Metrics(of_teacher, cross - of_teacher)
