"""iBOT's loss: a student's tokens must be assigned to prototypes as the teacher's same tokens are."""

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from .. import _check, _prototypes, distributed
from .._check import Of
from .._library import register
from .._prototypes import Outputs


class Arguments(NamedTuple):
    student: Annotated[Tensor, Of("R D")]  # logits, or features that are to be multiplied first
    teacher: Annotated[Tensor, Of("* E")]
    prototypes: Annotated[Tensor | None, Of("K D")]  # of a dtype of their own, as under autocast
    teacher_prototypes: Annotated[Tensor | None, Of("K E")]
    unit_prototypes: bool
    student_temp: float | Tensor
    teacher_temp: float | Tensor
    bias: Annotated[Tensor | None, Of("K", (torch.float32, torch.float64))]
    weights: Annotated[Tensor | None, Of("R", (torch.float32, torch.float64))]
    index: Annotated[Tensor | None, Of("R", _check.ID_DTYPES, below=lambda x: len(x.teacher))]  # type: ignore[assignment]  # tuple.index
    reduction: str
    ready: bool  # whether the gradient is to be found in forward
    operand_dtype: torch.dtype = torch.float32
    backend: str = ""
    needs_grad: list[bool] = []  # noqa: RUF012

    def pieces(self) -> list[int]:
        return [1]


def outputs(x: Arguments) -> Outputs:
    return _prototypes.outputs(1, 1, x.student.shape[0], [x.student], x)


def reference(x: Arguments) -> tuple[Tensor, Tensor]:
    teacher = x.teacher if x.index is None else x.teacher[x.index]
    x = x._replace(bias=None if x.bias is None else x.bias[None])
    return _prototypes.reference(x.student[None], teacher[None], True, x)


def _check_arguments(x: Arguments) -> None:
    _prototypes.check_layers("ibot", x.teacher, x)
    if x.index is None and len(x.teacher) != len(x.student):
        _check.bad_value("ibot", "teacher", f"{len(x.student)} rows, as the student has", list(x.teacher.shape))


_run = register("ibot", Arguments, outputs, reference=reference, check=_check_arguments,
                gradients=("student", "prototypes"), unit=("gradients", "d_prototypes"))  # fmt: skip


@distributed.in_step
def ibot(
    student: Tensor,
    teacher: Tensor,
    *,
    weights: Tensor | None = None,
    index: Tensor | None = None,
    student_temp: float | Tensor = 0.1,
    teacher_temp: float | Tensor = 0.07,
    bias: Tensor | None = None,
    prototypes: Tensor | None = None,
    teacher_prototypes: Tensor | None = None,
    unit_prototypes: bool = False,
    reduction: str = "mean",
    return_metrics: bool = False,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Any:
    """The cross entropy of iBOT and DINOv2 between tokens, row by row, from the logits of K prototypes, or from
    features and the prototypes.

    The weighted mean over the rows of -sum_k q_ik log softmax(student_i / student_temp)_k, with
    q_i = softmax(teacher_i / teacher_temp + bias). The student's gradient is found in forward, and nothing else of the
    logits' size is written. With a queue's similarities as logits it is ReSSL's loss, and distillation's.

    Args:
        student: [R, K], any float dtype: of the masked tokens, say. With prototypes features, [R, D].
        teacher: [R, K], or [S, K] with `index`. It gets no gradient. With teacher_prototypes features, [.., E].
        weights: [R], not negative, no gradient; None: all alike. The loss of DINOv2, which every image shares alike, is
            reduction="sum" with 1 / (the image's masked tokens * the images).
        index: [R] int64, the teacher's row for each of the student's: on the CPU its range is checked.
        student_temp, teacher_temp, bias [K], return_metrics, backend: as `dino` has them.
        prototypes [K, D], teacher_prototypes [K, E], unit_prototypes: as `dino` has them: the last layer is part of the
            loss, in chunks of rows, and no [R, K] is in memory. Of ReSSL, the queue, detached, twice.
        reduction: "mean": sum w_i loss_i / sum w_i; "sum", or "none": w_i loss_i, [R].
        group: as `dino` has it: ranks may have different numbers of rows, and weigh as these do.

    Returns:
        The loss in float32 (float64 for float64 input): 0-d, or [R] for reduction="none". The mean of no rows is NaN,
        but 0 where weights are given and their sum is 0. A NaN in a row makes the loss NaN, and the gradient of that
        row. With return_metrics, the pair.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; other options on other ranks, or an error there (on a GPU some ranks notice choices at their
            next call, and have NaN until then, and numbers and errors not at all).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Zhou et al., iBOT: Image BERT Pre-Training with Online Tokenizer, arXiv:2111.07832, Eq. 2.
    """
    _prototypes.check_options("ibot", reduction, return_metrics, unit_prototypes)
    ranks = distributed.name("ibot", group)
    x = Arguments(
        student, _prototypes.detached(teacher), prototypes, _prototypes.detached(teacher_prototypes), unit_prototypes,
        _prototypes.detached(student_temp), _prototypes.detached(teacher_temp), bias, weights, index, reduction,
        _prototypes.is_ready(student, prototypes),
    )  # fmt: skip
    if isinstance(student, Tensor):
        x = x._replace(bias=_prototypes.wide(bias, student), weights=_prototypes.wide(weights, student))
    return _prototypes.call("ibot", _run, x, ranks, return_metrics, backend)
