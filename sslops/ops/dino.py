"""DINO's loss: a student's crops must be assigned to prototypes as the teacher's other crops are."""

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from .. import _check, _prototypes, distributed
from .._check import Of
from .._library import register
from .._prototypes import Outputs


class Arguments(NamedTuple):
    student: Annotated[list[Tensor], Of("* B D", each=True)]  # logits, or features that are to be multiplied first
    teacher: Annotated[list[Tensor], Of("* B E", each=True)]
    prototypes: Annotated[Tensor | None, Of("K D")]  # of a dtype of their own, as under autocast
    teacher_prototypes: Annotated[Tensor | None, Of("K E")]
    unit_prototypes: bool
    student_temp: float | Tensor
    teacher_temp: float | Tensor
    bias: Annotated[Tensor | None, Of("* K", (torch.float32, torch.float64))]
    weights: Annotated[Tensor | None, Of("B", (torch.float32, torch.float64))]
    same_view: bool
    reduction: str
    ready: bool  # whether the gradient is to be found in forward
    operand_dtype: torch.dtype = torch.float32
    backend: str = ""
    needs_grad: list[bool] = []  # noqa: RUF012

    def pieces(self) -> list[int]:
        """How many crops each tensor of the student's gradient has: all, or where so much memory of a CPU would not be
        kept, as many as each of the student's.
        """
        size = sum(crop.numel() for crop in self.student) * self.student[0].dtype.itemsize
        lengths = [len(crop) for crop in self.student]
        apart = self.backend == "cpu" and self.prototypes is None and size > _prototypes.KEPT
        return lengths if apart else [sum(lengths)]


def views(crops: Sequence[Tensor]) -> int:
    return sum(len(crop) for crop in crops)


def outputs(x: Arguments) -> Outputs:
    return _prototypes.outputs(views(x.teacher), views(x.student), x.student[0].shape[1], x.student, x)


def reference(x: Arguments) -> tuple[Tensor, Tensor]:
    return _prototypes.reference(torch.cat(x.student), torch.cat(x.teacher), x.same_view, x)


def _check_arguments(x: Arguments) -> None:
    for name in ("student", "teacher"):
        crops = getattr(x, name)
        for k, crop in enumerate(crops):
            if crop.dtype != crops[0].dtype:
                _check.bad_value("dino", f"{name}[{k}]", f"the dtype of {name}[0], {crops[0].dtype}", crop.dtype)
    _prototypes.check_layers("dino", x.teacher[0], x)
    teachers = views(x.teacher)
    if not _prototypes.pairs(teachers, views(x.student), x.same_view):
        wanted = "a crop to pair with another of the teacher's (same_view leaves out none)"
        _check.bad_value("dino", "student", wanted, f"{views(x.student)} crops of {teachers} teachers'")
    if x.bias is not None and x.bias.shape[0] not in (1, teachers):
        _check.bad_value("dino", "bias", f"shape [K] or [{teachers}, K]", list(x.bias.shape))


_run = register("dino", Arguments, outputs, reference=reference, check=_check_arguments,
                gradients=("student", "prototypes"), unit=("gradients", "d_prototypes"))  # fmt: skip


def _listed(name: str, crops: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """[V_i, B, K] each"""
    if isinstance(crops, Tensor):
        return [crops]
    if not isinstance(crops, Sequence) or not crops:
        got = "none" if isinstance(crops, Sequence) else type(crops).__name__
        _check.bad_type("dino", name, "a tensor [V, B, K] or a list of crops [B, K]", got)
    return [crop[None] if isinstance(crop, Tensor) and crop.dim() == 2 else crop for crop in crops]


@distributed.in_step
def dino(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    student_temp: float | Tensor = 0.1,
    teacher_temp: float | Tensor = 0.04,
    bias: Tensor | None = None,
    prototypes: Tensor | None = None,
    teacher_prototypes: Tensor | None = None,
    same_view: bool = False,
    unit_prototypes: bool = False,
    reduction: str = "mean",
    return_metrics: bool = False,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Any:
    """The cross entropy of DINO, DINOv2, DINOv3 and SwAV between crops, from the logits of K prototypes, or from
    features and the prototypes.

    The mean over pairs of a teacher's crop t and a student's crop v, t != v, and over the B images of
    -sum_k q_tk log softmax(student_v / student_temp)_k, with q_t = softmax(teacher_t / teacher_temp + bias). Equal
    positions in the two lists are equal views: the teacher's crops come first among the student's. The student's
    gradient is found in forward, and nothing else of the logits' size is written.

    With `prototypes` the last layer is part of it: the student's logits are student @ prototypes.T, which are made in
    chunks of about 256 rows (512 on a GPU, more where they are short), in forward, with the gradients of both. In
    memory are one chunk's logits of the student, and of the teacher if it has a last layer too, and the gradients: no
    [V, B, K].

    Args:
        student: [V, B, K], or a list of crops [B, K] or [V_i, B, K], of any float dtype. Lists cost no copy. With
            prototypes, the features that the last layer gets, [V, B, D].
        teacher: [T, B, K], or a list as well. It gets no gradient. With teacher_prototypes features, [T, B, E].
        student_temp, teacher_temp: positive numbers, or 0-d tensors on the logits' device, which get no gradient and
            are not checked (the fused backends give NaN if one is not positive). A schedule inside a compiled step
            should be a tensor: a number that changes recompiles.
        bias: [K], or [T, K] for one each: minus the centre over teacher_temp (`nn.PrototypeCenter.bias`), or
            `sinkhorn`'s of the teacher's logits. No gradient. None: 0.
        prototypes: [K, D], any float dtype: the weight of a last layer without a bias, which gets its gradient unless
            it is frozen: detached, or without requires_grad. The products' operands have the features' dtype, under
            autocast that of autocast; the logits are float32.
        teacher_prototypes: [K, E], the teacher's own: no gradient. None: `teacher` are logits, as a teacher whose
            `sinkhorn` is needed has them.
        unit_prototypes: both are divided by the lengths of their rows first, as weight_norm with g = 1 has it
            (`norm_last_layer`; F.normalize, eps 1e-12). Of a g that is learned, give the weight that it makes.
        same_view: also the pairs t = v, as DINOv3 may have it.
        reduction: over the images, "mean" or "sum", or "none": the losses [B].
        return_metrics: return (loss, Metrics): the means over the pairs of the entropy of q and of KL(q, student).
        group: None, or "world" or a ProcessGroup over whose ranks the images lie, also if they are not as many on each:
            a mean or a sum is that of all, the same on every rank; "none" gives the rank's own. Gradients are those of
            the whole batch after DDP's averaging.
        backend: "cpu", "triton" or "eager"; the fastest that can run if None (see `sslops.explain`).

    Returns:
        The loss in float32 (float64 for float64 input): 0-d, or [B] for reduction="none". NaN for the mean of no
        images; NaN in a crop's logits makes the loss NaN, and the gradient of its image. With return_metrics, the pair.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; no pair of crops left;
            torch.distributed not initialised; other options on other ranks, or an error there (on a GPU some ranks
            notice choices at their next call, and have NaN until then, and numbers and errors not at all).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Caron et al., Emerging Properties in Self-Supervised Vision Transformers, arXiv:2104.14294, Eq. 3.
    """
    _prototypes.check_options("dino", reduction, return_metrics, unit_prototypes)
    _check.flag("dino", "same_view", same_view)
    ranks = distributed.name("dino", group)
    students, teachers = _listed("student", student), _listed("teacher", teacher)
    x = Arguments(
        students, [_prototypes.detached(crop) for crop in teachers], prototypes,
        _prototypes.detached(teacher_prototypes), unit_prototypes, _prototypes.detached(student_temp),
        _prototypes.detached(teacher_temp), bias, None, same_view, reduction,
        _prototypes.is_ready(students[0], prototypes),
    )  # fmt: skip
    if isinstance(bias, Tensor) and isinstance(students[0], Tensor):
        x = x._replace(bias=_prototypes.wide(bias[None] if bias.dim() == 1 else bias, students[0]))
    return _prototypes.call("dino", _run, x, ranks, return_metrics, backend, views, same_view)
