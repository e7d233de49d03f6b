"""Sinkhorn's potentials in Triton: of its columns two reads of the scores, and two more an iteration.

An iteration takes the rows' softmax (prototypes.py's first sweep) and sums the columns of it. Columns are summed in
blocks of rows whose number follows from the shape, and the blocks in their order. Scratch: a number a column for each
of at most BLOCKS blocks, and the rows' parts. With a last layer all that is a chunk's, and its logits (last_layer.py):
they are made again in every pass, and kept if one chunk is all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import last_layer, launch, prototypes
from .launch import refuses  # noqa: F401
from .rows import LOG2E, LOWEST

if TYPE_CHECKING:
    from sslops.ops.sinkhorn import Arguments

SIZES = ("B", "V", "height")

PROGRAMS = 528  # four on each of an H100's 132 multiprocessors
BLOCKS = 32
TILE: dict[str, Any] = {"BLOCK_R": 16, "BLOCK_K": 256, "num_warps": 4, **launch.FUSED}


@triton.jit(do_not_specialize=SIZES)
def _columns(scores, tops, sums, temperature, inverse, B, K, V, height, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """tops, sums [blocks, V, K]: of each block's rows a maximum of the column, and the sum of exp((x - top) / tau)"""
    block, v = tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)[:, None]
    begin = block * height
    end = tl.minimum(begin + height, B)
    scores += v * B * K + column[None, :]
    top = tl.full([BLOCK_R, BLOCK_K], LOWEST, tl.float32)
    for i in range(begin, end, BLOCK_R):
        inside = (i + r < end) & (column < K)[None, :]
        x = tl.load(scores + (i + r).to(tl.int64) * K, mask=inside, other=0.0).to(tl.float32)
        top = tl.maximum(top, tl.where(inside, x, LOWEST))
    highest = tl.max(top, 0)
    scale = prototypes.inverse_of(temperature, inverse) * LOG2E
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for i in range(begin, end, BLOCK_R):
        inside = (i + r < end) & (column < K)[None, :]
        x = tl.load(scores + (i + r).to(tl.int64) * K, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(inside, tl.exp2((x - highest[None, :]) * scale), 0.0)
    at = (tl.cast(block, tl.int64) * V + v) * K + column
    tl.store(tops + at, highest, mask=column < K)
    tl.store(sums + at, tl.sum(total, 0), mask=column < K)


@triton.jit(do_not_specialize=SIZES)
def _mass(scores, b, stats, sums, temperature, inverse, B, K, V, height, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):
    """sums [blocks, V, K] over each block's rows of softmax(x / tau + b); stats [2, V, B] = top, 1 / sum"""
    block, v = tl.program_id(1), tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)[:, None]
    begin = block * height
    end = tl.minimum(begin + height, B)
    scores += v * B * K + column[None, :]
    stats += v * B
    inverse = prototypes.inverse_of(temperature, inverse)
    bias = tl.load(b + v * K + column, mask=column < K, other=0.0)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for i in range(begin, end, BLOCK_R):
        inside = (i + r < end) & (column < K)[None, :]
        x = tl.load(scores + (i + r).to(tl.int64) * K, mask=inside, other=0.0).to(tl.float32)
        top = tl.load(stats + i + r, mask=i + r < end, other=0.0)
        share = tl.load(stats + V * tl.cast(B, tl.int64) + i + r, mask=i + r < end, other=0.0)
        total += tl.where(inside, tl.exp2((x * inverse + bias - top) * LOG2E) * share, 0.0)
    tl.store(sums + (tl.cast(block, tl.int64) * V + v) * K + column, tl.sum(total, 0), mask=column < K)


VIEWS = 8  # of a chunk at most: a program of the first sweep has an example's of all
Chunks = Callable[[], Iterable[tuple[slice, Tensor]]]  # all scores, as often as they are wanted: [n, rows, K] of views


def _grid(scores: Tensor) -> tuple[tuple[int, int, int], int]:
    """Blocks of columns, of rows, and views; and how many rows a block has"""
    views, rows, k = scores.shape
    across, step = triton.cdiv(k, TILE["BLOCK_K"]), TILE["BLOCK_R"]
    wanted = min(max(1, PROGRAMS // (across * max(1, views))), BLOCKS)
    height = max(1, triton.cdiv(rows, wanted * step)) * step
    return (across, max(1, triton.cdiv(rows, height)), views), height


def columns(x: Arguments, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """[V, K] each: a maximum of a column's logits, and the sum of exp(logit - maximum)"""
    shape, scale = (len(x.scores), _count(x)), x.temperature
    top = x.scores.new_full(shape, LOWEST.value, dtype=torch.float64) / scale
    total = torch.zeros_like(top)
    for own, scores in chunks():
        views, rows, k = scores.shape
        grid, height = _grid(scores)
        tops, sums = scores.new_empty(2, grid[1], views, k, dtype=torch.float32).unbind()
        _columns[grid](scores, tops, sums, *prototypes.inverse(scale), rows, k, views, height, **TILE)
        logits = torch.cat([top[None, own], tops.double() / scale])
        highest = logits.amax(0)
        total[own] = (torch.cat([total[None, own], sums]) * (logits - highest).exp()).sum(0)
        top[own] = highest
    return top, total


def mass(x: Arguments, b: Tensor, chunks: Chunks) -> Tensor:
    """[V, K]: the sum over the rows of softmax(logits + b)"""
    found = torch.zeros_like(b, dtype=torch.float64)
    for own, scores in chunks():
        views, rows, k = scores.shape
        grid, height = _grid(scores)
        sums, bias = scores.new_empty(grid[1], views, k, dtype=torch.float32), b[own].float()
        stats, _ = prototypes.read(prototypes.rows_of([scores], x.temperature, bias, None))
        _mass[grid](scores, bias, stats, sums, *prototypes.inverse(x.temperature), rows, k, views, height, **TILE)
        found[own] += sums.sum(0, dtype=torch.float64)
    return found


def _count(x: Arguments) -> int:
    return x.scores.shape[2] if x.prototypes is None else len(x.prototypes)


def _chunks(x: Arguments) -> Chunks:
    views, rows, _ = x.scores.shape
    if x.prototypes is None:
        some = [slice(view, view + VIEWS) for view in range(0, views, VIEWS)] if rows else []
        return lambda: [(own, x.scores[own]) for own in some]
    weight, _ = last_layer.operand(x.prototypes, x.unit_prototypes, x.operand_dtype)
    most = last_layer.chunk_of(len(weight))
    step = min(VIEWS, max(1, most // max(1, rows)))

    def chunks() -> Iterator[tuple[slice, Tensor]]:
        for view in range(0, views, step):
            own = slice(view, view + step)
            for first in range(0, rows, most):
                yield own, last_layer.logits(x.scores[own, first : first + most], weight)[0]

    kept = list(chunks()) if views * rows <= most else None
    return chunks if kept is None else lambda: kept


def forward(x: Arguments, potentials: Callable[..., Tensor]) -> Tensor:
    with launch.on(x.scores.device):
        if not len(x.scores):
            return x.scores.new_empty(0, _count(x), dtype=torch.float32)
        chunks = _chunks(x)
        found = potentials(x, lambda x: columns(x, chunks), lambda x, b: mass(x, b, chunks))
    return found.float()  # [V, K] is too little for float64 to cost anything
