"""The last layer of dino, ibot and sinkhorn on a GPU: a chunk of rows' logits by the library's matmul, prototypes.py's
sweeps over them, and the matmul again for the gradients.

A chunk has all K, so no logit is made twice: 4 U for R rows of a student and of a teacher, U = 2 R K D FLOP. Logits are
float32 and pass through memory, written once and read twice, and so does their gradient, in the operands' dtype: 30
bytes a pair of logits in half precision, and 8 D / rows more for the sums of the prototypes' gradient. As an estimate,
ViT-L's 3,763 patches at K = 65536, D = 256 take an H100 (3.0 TB/s, 650 TFLOP/s) 2.8 + 0.8 ms; eager, at 102 bytes, 9. A
kernel from features to sums makes each logit twice, 6 U, for a row's softmax is known at its end: 2 ms at best (450
TFLOP/s), in exact float32 more than this, and of crops by crops its tiles would have few rows.

Scratch, beside the operands: max(ROWS K, LOGITS) logits of the student and as many of the teacher, 4 bytes each, and 2
for the gradient; float32's takes the logits' place. The order of every sum is fixed by the shapes, if the matmul's is.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, pairs, prototypes
from .prototypes import FLOAT32, Problem
from .rows import address, load_at, row_blocks

ROWS, LOGITS = 512, 2**24
STEP = 8  # columns, 16 bytes in half precision, that operands are padded to: wider loads for the matmul


@triton.jit(do_not_specialize=("K",))
def _through_lengths(weight, inv_norm, d, K, D, stride, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """d [K, stride], the gradient of unit rows, becomes that of weight [K, D]"""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inv = tl.load(inv_norm + rows, mask=rows < K, other=0.0)
    dot = tl.zeros([BLOCK_R], tl.float32)
    for k in range(0, D, BLOCK_D):
        columns = k + tl.arange(0, BLOCK_D)
        mask = (rows < K)[:, None] & (columns < D)[None, :]
        gradient = tl.load(address(d, rows, columns, stride), mask=mask, other=0.0)
        dot += tl.sum(load_at(weight, rows, columns, K, D) * inv[:, None] * gradient, 1)
    along = tl.where(inv < 1e12, dot, 0.0)  # a row shorter than 1e-12 is scaled and no more, as F.normalize does
    tl.debug_barrier()  # all of a row is read before any is written
    for k in range(0, D, BLOCK_D):
        columns = k + tl.arange(0, BLOCK_D)
        mask = (rows < K)[:, None] & (columns < D)[None, :]
        gradient = tl.load(address(d, rows, columns, stride), mask=mask, other=0.0)
        unit = load_at(weight, rows, columns, K, D) * inv[:, None]
        tl.store(address(d, rows, columns, stride), (gradient - unit * along[:, None]) * inv[:, None], mask=mask)


def chunk_of(k: int) -> int:
    """How many rows of K logits a chunk has at most"""
    return max(ROWS, LOGITS // k)


def operand(x: Tensor, unit: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """z [N, D, padded] of x [N, D], its rows unit if asked; and 1 / their lengths then"""
    if not unit and x.dtype == dtype and x.shape[1] and x.shape[1] % STEP == 0:
        return x, None
    z, inv_norm = pairs.operand(x, unit, dtype, STEP)
    return z, inv_norm if unit else None


def logits(features: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """[.., K] in float32 of features [.., D] and the operand of a layer; and the features as one [.., stride]"""
    z, _ = operand(features.flatten(0, -2), False, weight.dtype)
    found = z.new_empty(len(z), len(weight), **FLOAT32)
    launch.multiply(found, z, weight.t())
    return found.view(*features.shape[:-1], -1), z


def _gathered(teacher: Sequence[Tensor], index: Tensor | None) -> Sequence[Tensor]:
    """The teacher's rows as they are compared; NaN for those that there are not"""
    if index is None:
        return teacher
    rows = teacher[0][0]
    known = (index >= 0) & (index < len(rows))
    rows = torch.cat([rows, rows.new_full((1, rows.shape[1]), float("nan"))])
    return [rows[torch.where(known, index, len(rows) - 1)][None]]


def _weights(x: Any, problem: Problem, grad: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What each example counts, [] or [B], beside its weight; and the factor that has in it for float16's range"""
    b = problem.student[0].shape[1]
    if grad is None:
        grad = problem.student[0].new_full((), 1 / b if problem.mean else 1.0, **FLOAT32)
    scale = launch.half_scale(x.operand_dtype, lambda: grad if problem.weights is None else grad * problem.weights)
    if scale is None:
        return grad, None
    # no gradient of a logit is above its example's weight times T / (pairs tau)
    _, teachers = prototypes.views_of(problem)
    scale = scale * (problem.student_temp * (prototypes.pairs_of(problem) / teachers))
    return grad * scale, scale


def _run(x: Any, problem: Problem, wanted: list[bool], grad: Tensor | None) -> tuple[Tensor, ...]:
    """The result, the entropy, and the gradients [V, B, D] and [K, D] of the result or, under `grad` [B], of losses"""
    first = problem.student[0]
    b, d = first.shape[1:]
    views, teachers = prototypes.views_of(problem)
    new = partial(first.new_empty, **FLOAT32)
    weight, inv_norm = operand(x.prototypes, x.unit_prototypes, x.operand_dtype)
    losses, entropy = new(views, b), new(teachers, b)
    d_student, d_weight = new((views, b, d) if wanted[0] else 0), new(weight.shape if wanted[1] else 0)
    if not b:
        d_weight.zero_()
        return prototypes.reduced(problem, losses, x.reduction), entropy, d_student, d_weight[..., :d].contiguous()
    teacher, index, layer = problem.teacher, problem.index, None
    if x.teacher_prototypes is not None:
        layer, _ = operand(x.teacher_prototypes, x.unit_prototypes, x.operand_dtype)
        teacher, index = _gathered(teacher, index), None
    each, scale = _weights(x, problem, grad)

    def chunk(own: slice) -> None:  # whose memory is the next one's
        y, features = logits(torch.cat([crop[:, own] for crop in problem.student]), weight)
        targets = list(teacher) if index is not None else [crop[:, own] for crop in teacher]
        if layer is not None:
            targets = [logits(torch.cat(targets), layer)[0]]
        cut = [None if rows is None else rows[own] for rows in (problem.weights, index)]
        part = problem._replace(student=[y], teacher=targets, weights=cut[0], index=cut[1], mean=False)
        stats, of_targets = new(2, *y.shape[:2]), new(teachers, y.shape[1])
        rows = prototypes.rows_of_problem(part)
        of_teachers, losses[:, own] = prototypes.read(rows, of_targets, [y], part.student_temp, stats, part.same_view)
        entropy[:, own] = of_targets
        if not any(wanted):
            return
        g = y if weight.dtype == torch.float32 else torch.empty_like(y, dtype=weight.dtype)
        prototypes.write_gradients(part, rows, of_teachers, stats, each[own] if each.dim() else each, [g])
        if wanted[0]:
            of_features = new(views * len(y[0]), weight.shape[1])
            launch.multiply(of_features, g.flatten(0, 1), weight)
            d_student[:, own] = of_features.view(views, -1, weight.shape[1])[..., :d]
        if wanted[1]:
            launch.multiply(d_weight, g.flatten(0, 1).t(), features, beta=float(own.start > 0))

    most = chunk_of(len(weight)) // max(views, teachers if layer is not None else 0)
    most = most // 16 * 16 or max(1, most)  # slices as aligned as all
    for begin in range(0, b, most):
        chunk(slice(begin, begin + most))
    if scale is not None:
        d_student, d_weight = d_student.div_(scale), d_weight.div_(scale)
    if wanted[1] and inv_norm is not None:
        blocks = row_blocks(d)
        _through_lengths[triton.cdiv(len(weight), blocks["BLOCK_R"]),](
            x.prototypes, inv_norm, d_weight, len(weight), d, weight.shape[1], **blocks
        )  # fmt: skip
    return prototypes.reduced(problem, losses, x.reduction), entropy, d_student, d_weight[..., :d].contiguous()


def forward(x: Any, problem: Problem) -> tuple[Any, ...]:
    """The op's outputs"""
    wanted = [x.ready and each and x.reduction != "none" for each in x.needs_grad]
    with launch.on(problem.student[0].device):
        result, entropy, d_student, d_prototypes = _run(x, problem, wanted, None)
    return result, entropy, entropy.new_empty(0), [d_student] if len(d_student) else [], d_prototypes


def backward(grad: Tensor, x: Any, problem: Problem) -> tuple[list[Tensor], Tensor]:
    """All over again"""
    with launch.on(grad.device):
        _, _, *gradients = _run(x, problem, x.needs_grad, grad if grad.dim() else None)
        if not grad.dim():  # of forward's bits; what has no part stays 0
            gradients = [torch.where(d == 0, d, d * grad) for d in gradients]
    d_student, d_prototypes = gradients
    crops = d_student.split([len(crop) if x.needs_grad[0] else 0 for crop in problem.student])
    of_crops = [d.to(crop.dtype) for d, crop in zip(crops, problem.student, strict=True)]
    return of_crops, d_prototypes.to(x.prototypes.dtype)
