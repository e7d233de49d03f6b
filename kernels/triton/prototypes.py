"""Cross entropies of assignments to K prototypes in Triton, for dino and ibot; and rows' softmax, for sinkhorn too.

Two sweeps over the logits, in chunks of as many prototypes as a program has registers for. In both a program has a
chunk of one example: its teachers' exponentials stay, its student crops pass by one after another, so an exponential
is taken of each logit once. _read finds sums relative to each chunk's own maximum, _join the rows' of them, in the
chunks' order, and _write the gradient. Scratch: 2 + 3 T / V + T floats for each chunk of a student's row.

Exponents are (x - top) / temperature, which no large logit makes inexact. tl.exp2's 2 ulp stay: see rows.py; `/` is
div_rn, once a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .rows import LN2, LOG2E, LOWEST, guarded

SIZES = ("B", "S", "T", "V", "all_views", "chunks", "first")  # not those whose being multiples of 16 lets loads be wide

FLOAT32: dict[str, Any] = {"dtype": torch.float32}
CHUNK = 4096  # prototypes times teachers that a program has
EXAMPLES = 1024  # that _total adds up at once

FAINT = tl.constexpr(-200.0)  # an exponent whose exponential is 0
NOTHING = tl.constexpr(-1000.0)  # so, behind the last prototype


class Problem(NamedTuple):
    """What both directions are given."""

    student: Sequence[Tensor]  # [V_i, B, K] each
    teacher: Sequence[Tensor]
    student_temp: float | Tensor
    teacher_temp: float | Tensor
    bias: Tensor | None  # [1, K] or [T, K]
    weights: Tensor | None  # [B]
    index: Tensor | None  # type: ignore[assignment]  # a tuple has a method of that name; [B], rows of the teacher
    same_view: bool
    mean: bool


@triton.jit
def inverse_of(temperature, inverse):
    """1 / tau, of a tau on the device guarded; else as it was given"""
    if temperature is not None:
        inverse = guarded(tl.div_rn(1.0, tl.load(temperature)))
    return inverse


@triton.jit
def _exponents(
    teacher, bias, index, inverse, b, S, K, T, teacher_step, bias_step, column,
    TEACHERS: tl.constexpr,
):  # fmt: skip
    """y [TEACHERS, BLOCK] and u: (y - top) u are base-2 exponents of the example's targets; 0 outside.

    y = x and u = log2(e) / tau, or with a bias x / tau + bias and log2(e). NaN for rows that there are not.
    """
    t = tl.arange(0, TEACHERS)[:, None]
    row, width = b.to(tl.int64), K
    if index is not None:
        row = tl.load(index + b)
        known = (row >= 0) & (row < S)
        width = tl.where(known, K, 0)
    inside = (t < T) & (column < width)
    y = tl.load(teacher + row * K + (t.to(tl.int64) * teacher_step + column), mask=inside, other=0.0).to(tl.float32)
    if index is not None:
        y = tl.where(known, y, float("nan"))
    unit = inverse * LOG2E
    if bias is not None:
        at = bias + t.to(tl.int64) * bias_step + column
        y = y * inverse + tl.load(at, mask=(t < T) & (column < K), other=0.0)
        unit = LOG2E
    return y, unit


@triton.jit(do_not_specialize=SIZES)
def _read(
    teacher, bias, index, student, of_teachers, of_students, crosses,
    teacher_temp, teacher_inverse, student_temp, student_inverse,
    B, S, K, T, V, all_views, first, teacher_step, bias_step, student_step,
    TEACHERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of each chunk of each row: of_teachers [3, T, B, chunks] = top, sum of e^d, sum of -d e^d; of_students
    [2, all_views, B, chunks] = top, sum, and crosses [all_views, T, B, chunks] = sum of -d e^d of a teacher, of V views
    from `first` on, if there is a student.
    """
    b, chunk, chunks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    column = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = column < K
    t = tl.arange(0, TEACHERS)
    inverse = inverse_of(teacher_temp, teacher_inverse)
    y, unit = _exponents(teacher, bias, index, inverse, b, S, K, T, teacher_step, bias_step, column, TEACHERS)
    top = tl.maximum(tl.max(tl.where(inside, y, LOWEST), 1), LOWEST)
    d = tl.where(inside, (y - top[:, None]) * unit, NOTHING)
    e = tl.exp2(d)
    rows = tl.cast(B, tl.int64) * chunks
    at = of_teachers + t.to(tl.int64) * rows + b.to(tl.int64) * chunks + chunk
    mask = t < tl.where(first == 0, T, 0)  # once, of the runs of views that there may be
    tl.store(at, top, mask=mask)
    tl.store(at + T * rows, tl.sum(e, 1), mask=mask)
    tl.store(at + 2 * T * rows, tl.sum(e * tl.maximum(d, FAINT), 1) * -LN2, mask=mask)
    if student is not None:
        scale = inverse_of(student_temp, student_inverse) * LOG2E
        crop = student + b.to(tl.int64) * K + column
        for v in range(0, V):
            x = tl.load(crop + tl.cast(v, tl.int64) * student_step, mask=inside, other=0.0).to(tl.float32)
            highest = tl.maximum(tl.max(tl.where(inside, x, LOWEST), 1), LOWEST)
            below = tl.where(inside, (x - highest[:, None]) * scale, NOTHING)
            view = tl.cast(first + v, tl.int64)
            to = of_students + view * rows + b.to(tl.int64) * chunks + chunk + tl.arange(0, 1)
            tl.store(to, highest)
            tl.store(to + all_views * rows, tl.sum(tl.exp2(below), 1))
            to_cross = crosses + (view * T + t) * rows + b.to(tl.int64) * chunks + chunk
            tl.store(to_cross, tl.sum(e * below, 1) * -LN2, mask=t < T)


@triton.jit(do_not_specialize=SIZES)
def _join(
    of_teachers, of_students, crosses, teacher_stats, entropy, stats, losses,
    teacher_temp, teacher_inverse, student_temp, student_inverse, B, T, all_views, chunks,
    BIAS: tl.constexpr, SAME: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """From the chunks' sums, of example b and view v: teacher_stats [2, T, B] = top, 1 / sum; entropy [T, B]; stats
    [2, all_views, B] = top, sum; losses [all_views, B], sums over the view's pairs.
    """
    b, v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, CHUNKS)
    mask = c < chunks
    rows = tl.cast(B, tl.int64) * chunks
    loss = 0.0
    if of_students is not None:
        at = of_students + v.to(tl.int64) * rows + b * chunks + c
        tops = tl.load(at, mask=mask, other=LOWEST)
        top = tl.max(tops, 0)
        below = tl.where(mask, (top - tops) * inverse_of(student_temp, student_inverse), 0.0)
        z = tl.sum(tl.load(at + all_views * rows, mask=mask, other=0.0) * tl.exp2(below * -LOG2E), 0)
        of_view = stats + v.to(tl.int64) * B + b
        tl.store(of_view, top)
        tl.store(of_view + all_views * tl.cast(B, tl.int64), z)
        log_z = tl.log(z)
    unit = 1.0 if BIAS else inverse_of(teacher_temp, teacher_inverse)
    for t in range(0, T):
        at = of_teachers + tl.cast(t, tl.int64) * rows + b * chunks + c
        tops = tl.load(at, mask=mask, other=LOWEST)
        top = tl.max(tops, 0)
        above = tl.maximum((tops - top) * unit, FAINT)
        share = tl.exp2(above * LOG2E)
        e = tl.load(at + T * rows, mask=mask, other=0.0)
        total = tl.sum(e * share, 0)
        if v == 0:
            h = tl.load(at + 2 * T * rows, mask=mask, other=0.0)
            row = t * tl.cast(B, tl.int64) + b
            tl.store(teacher_stats + row, top)
            tl.store(teacher_stats + T * tl.cast(B, tl.int64) + row, tl.div_rn(1.0, total))
            if entropy is not None:
                tl.store(entropy + row, tl.log(total) + tl.div_rn(tl.sum((h - e * above) * share, 0), total))
        if of_students is not None:
            cross = tl.load(crosses + (v.to(tl.int64) * T + t) * rows + b * chunks + c, mask=mask, other=0.0)
            cross = log_z + tl.div_rn(tl.sum((cross + e * below) * share, 0), total)
            if SAME:
                loss += cross
            else:
                loss += tl.where(t != v, cross, 0.0)
    if of_students is not None:
        tl.store(losses + v.to(tl.int64) * B + b, loss)


@triton.jit(do_not_specialize=SIZES)
def _total(rows, weights, share, mean, losses, loss, B, V, BLOCK: tl.constexpr):
    """losses [B] = weights share sum_v rows [V, B]; loss [] = mean times their sum. One program, so in one order"""
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, B, BLOCK):
        b = i + tl.arange(0, BLOCK)
        each = tl.zeros([BLOCK], tl.float32)
        for v in range(0, V):
            each += tl.load(rows + tl.cast(v, tl.int64) * B + b, mask=b < B, other=0.0)
        each *= share
        if weights is not None:
            each *= tl.load(weights + b, mask=b < B, other=0.0)
        if losses is not None:
            tl.store(losses + b, each, mask=b < B)
        total += each
    if loss is not None:
        tl.store(loss, tl.sum(total, 0) * mean)


@triton.jit(do_not_specialize=SIZES)
def _write(
    teacher, bias, index, teacher_stats, student, stats, gradient, weights, grad, share,
    teacher_temp, teacher_inverse, student_temp, student_inverse,
    B, S, K, T, V, all_views, first, teacher_step, bias_step, student_step, gradient_step,
    SAME: tl.constexpr, EACH: tl.constexpr, TEACHERS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of V views from `first` on. grad: [], or with EACH [B], or none, which is 1"""
    b, chunk = tl.program_id(0), tl.program_id(1)
    column = chunk * BLOCK + tl.arange(0, BLOCK)[None, :]
    t = tl.arange(0, TEACHERS)
    inverse = inverse_of(teacher_temp, teacher_inverse)
    y, unit = _exponents(teacher, bias, index, inverse, b, S, K, T, teacher_step, bias_step, column, TEACHERS)
    at = teacher_stats + t.to(tl.int64) * B + b
    top = tl.load(at, mask=t < T, other=0.0)
    inverse_sum = tl.load(at + T * tl.cast(B, tl.int64), mask=t < T, other=0.0)
    q = tl.where((t < T)[:, None], tl.exp2((y - top[:, None]) * unit) * inverse_sum[:, None], 0.0)
    inverse = inverse_of(student_temp, student_inverse)
    each = inverse * share
    if weights is not None:
        each *= tl.load(weights + b)
    if grad is not None:
        each *= tl.load(grad + b if EACH else grad)
    row = b.to(tl.int64) * K + column
    for v in range(0, V):
        view = first + v
        of_student = stats + tl.cast(view, tl.int64) * B + b
        highest, z = tl.load(of_student), tl.load(of_student + all_views * tl.cast(B, tl.int64))
        pairs, targets = T, q
        if not SAME:
            pairs = tl.where(view < T, T - 1, T)
            targets = tl.where((t != view)[:, None], q, 0.0)
        x = tl.load(student + tl.cast(v, tl.int64) * student_step + row, mask=column < K, other=0.0).to(tl.float32)
        p = tl.exp2((x - highest) * (inverse * LOG2E)) * tl.div_rn(pairs.to(tl.float32), z)
        g = tl.where(pairs > 0, (p - tl.sum(targets, 0)[None, :]) * each, 0.0)
        to = gradient + tl.cast(v, tl.int64) * gradient_step + row
        tl.store(to, g.to(gradient.dtype.element_ty), mask=column < K)


class Run(NamedTuple):
    """Views at equal steps in memory, of several lists of crops: what one launch can go through"""

    first: list[Tensor]  # of each list, from the first view on
    steps: list[int]  # in elements, from one view to the next
    start: int  # which view of all that is
    views: int


def runs(*lists: Sequence[Tensor]) -> Iterator[Run]:
    """Of crops [V_i, B, K] each, none empty. All chunks of one tensor are a run, and so are any two views."""
    views = [[crop[v:] for crop in crops for v in range(len(crop))] for crops in lists]
    sizes = [of_list[0].element_size() for of_list in views]
    at = [[view.data_ptr() for view in together] for together in zip(*views, strict=True)]
    steps = [[(b - a) // size for a, b, size in zip(*pair, sizes, strict=True)] for pair in itertools.pairwise(at)]
    steps.append([0] * len(lists))
    start = 0
    while start < len(at):
        end = start + 1
        while end < len(at) and steps[end - 1] == steps[start]:
            end += 1
        yield Run([of_list[start] for of_list in views], steps[start], start, end - start)
        start = end


def inverse(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """The temperature if it is on the device, where it stays, or 1 / tau"""
    return (temperature.float(), 0.0) if isinstance(temperature, Tensor) else (None, 1 / temperature)


class Rows(NamedTuple):
    """The teachers' rows [T, B, K], as both sweeps have them"""

    teacher: Tensor  # from the first view on
    bias: Tensor | None
    index: Tensor | None  # type: ignore[assignment]
    temperature: tuple[Tensor | None, float]  # see inverse
    sizes: tuple[int, int, int, int]  # B, S rows of a teacher, K, T
    steps: tuple[int, int]  # from one teacher to the next, and to its bias
    blocks: dict[str, Any]

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.sizes[2], self.blocks["BLOCK"])


def rows_of(teacher: Sequence[Tensor], temperature: float | Tensor, bias: Tensor | None, index: Tensor | None) -> Rows:
    found, *others = runs(teacher)
    if others:  # three views or more, in as many places
        found, *_ = runs([torch.cat(list(teacher))])
    _, of_teacher, k = found.first[0].shape
    examples = of_teacher if index is None else len(index)
    teachers = triton.next_power_of_2(found.views)
    blocks = {"TEACHERS": teachers, "BLOCK": min(triton.next_power_of_2(k), max(128, CHUNK // teachers))}
    bias_step = k if bias is not None and len(bias) > 1 else 0
    return Rows(
        found.first[0], bias, index, inverse(temperature), (examples, of_teacher, k, found.views),
        (found.steps[0], bias_step), blocks | {"num_warps": 4, **launch.FUSED},
    )  # fmt: skip


def read(
    rows: Rows, entropy: Tensor | None = None, student: Sequence[Tensor] = (), temperature: float | Tensor = 1.0,
    stats: Tensor | None = None, same_view: bool = True,
) -> tuple[Tensor, Any]:  # fmt: skip
    """The teachers' maxima and 1 over their sums [2, T, B], and the students' losses [V, B]; fills entropy and stats"""
    (b, _, _, teachers), chunks = rows.sizes, rows.chunks
    views = 0 if stats is None else stats.shape[1]
    new, of_student = rows.teacher.new_empty, inverse(temperature)
    teacher_stats, of_teachers = new(2, teachers, b, **FLOAT32), new(3, teachers, b, chunks, **FLOAT32)
    losses, of_students, crosses = None, None, None
    sweeps: list[tuple[Tensor | None, int, int, int]] = [(None, 0, 0, 0)]
    if views:
        losses, of_students = new(views, b, **FLOAT32), new(2, views, b, chunks, **FLOAT32)
        crosses = new(views, teachers, b, chunks, **FLOAT32)
        sweeps = [(run.first[0], run.views, run.start, run.steps[0]) for run in runs(student)]
    for first, count, start, step in sweeps:
        _read[b, chunks](
            rows.teacher, rows.bias, rows.index, first, of_teachers, of_students, crosses,
            *rows.temperature, *of_student, *rows.sizes, count, views, start, *rows.steps, step, **rows.blocks,
        )  # fmt: skip
    _join[b, max(1, views)](
        of_teachers, of_students, crosses, teacher_stats, entropy, stats, losses, *rows.temperature, *of_student,
        b, teachers, views, chunks, rows.bias is not None, same_view, triton.next_power_of_2(chunks),
        num_warps=1, **launch.FUSED,
    )  # fmt: skip
    return teacher_stats, losses


def write_gradients(
    problem: Problem, rows: Rows, teacher_stats: Tensor, stats: Tensor, grad: Tensor | None, gradients: list[Tensor]
) -> None:
    b = rows.sizes[0]
    share = 1 / (pairs_of(problem) * (b if problem.mean else 1))
    for run in runs(problem.student, gradients):
        _write[b, rows.chunks](
            rows.teacher, rows.bias, rows.index, teacher_stats, run.first[0], stats, run.first[1], problem.weights,
            grad, share, *rows.temperature, *inverse(problem.student_temp), *rows.sizes, run.views, stats.shape[1],
            run.start, *rows.steps, *run.steps, problem.same_view, grad is not None and grad.dim() > 0, **rows.blocks,
        )  # fmt: skip


def views_of(problem: Problem) -> tuple[int, int]:
    """Of the student and of the teacher"""
    return sum(map(len, problem.student)), sum(map(len, problem.teacher))


def pairs_of(problem: Problem) -> int:
    views, teachers = views_of(problem)
    return views * teachers - (0 if problem.same_view else min(views, teachers))


def rows_of_problem(problem: Problem) -> Rows:
    return rows_of(problem.teacher, problem.teacher_temp, problem.bias, problem.index)


def reduced(problem: Problem, of_views: Tensor, reduction: str) -> Tensor:
    """The op's result, from the losses [V, B]"""
    (views, b), new = of_views.shape, of_views.new_empty
    losses, loss = (new(b), None) if reduction == "none" else (None, new(()))
    if b:
        share, mean = 1 / pairs_of(problem), 1 / b if problem.mean else 1.0
        _total[1,](
            of_views, problem.weights, share, mean, losses, loss, b, views, EXAMPLES, num_warps=8, **launch.FUSED
        )
    elif loss is not None:
        loss.fill_(float("nan") if problem.mean else 0.0)
    result = losses if loss is None else loss
    assert result is not None
    return result


def forward(x: Any, problem: Problem) -> tuple[Any, ...]:
    """The op's outputs"""
    first = problem.student[0]
    b, k = first.shape[1:]
    views, teachers = views_of(problem)
    new = first.new_empty
    entropy, stats = new(teachers, b, **FLOAT32), new(2, views, b, **FLOAT32)
    gradients = [new(views, b, k)] if x.ready and x.needs_grad[0] and x.reduction != "none" else []
    of_views = stats[0]  # where there is no row
    with launch.on(first.device):
        if b:
            rows = rows_of_problem(problem)
            teacher_stats, of_views = read(
                rows, entropy, problem.student, problem.student_temp, stats, problem.same_view
            )
            if gradients:
                write_gradients(problem, rows, teacher_stats, stats, None, gradients)
        return reduced(problem, of_views, x.reduction), entropy, stats, gradients


def backward(grad: Tensor, problem: Problem, stats: Tensor) -> list[Tensor]:
    gradients = [torch.empty_like(crop) for crop in problem.student]
    if stats.numel():
        with launch.on(grad.device):
            rows = rows_of_problem(problem)
            teacher_stats, _ = read(rows)
            write_gradients(problem, rows, teacher_stats, stats, grad, gradients)
    return gradients
