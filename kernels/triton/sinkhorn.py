"""Sinkhorn's potentials in Triton: of its columns two reads of the scores, and two more an iteration.

An iteration takes the rows' softmax (prototypes.py's first sweep) and sums the columns of it. Columns are summed in
blocks of rows whose number follows from the shape, and the blocks in their order. Scratch: a number a column for each
of at most BLOCKS blocks, and the rows' parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, prototypes
from .launch import refuses  # noqa: F401
from .rows import LOG2E, LOWEST

if TYPE_CHECKING:
    from sslops.ops.sinkhorn import Arguments

LACKS = ("last layer of its own",)
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


def _grid(x: Arguments) -> tuple[tuple[int, int, int], int]:
    """Blocks of columns, of rows, and views; and how many rows a block has"""
    views, rows, k = x.scores.shape
    across, step = triton.cdiv(k, TILE["BLOCK_K"]), TILE["BLOCK_R"]
    wanted = min(max(1, PROGRAMS // (across * max(1, views))), BLOCKS)
    height = max(1, triton.cdiv(rows, wanted * step)) * step
    return (across, max(1, triton.cdiv(rows, height)), views), height


def columns(x: Arguments) -> tuple[Tensor, Tensor]:
    """[V, K] each: a maximum of a column's logits, and the sum of exp(logit - maximum)"""
    views, rows, k = x.scores.shape
    grid, height = _grid(x)
    tops, sums = x.scores.new_empty(2, grid[1], views, k, dtype=torch.float32).unbind()
    _columns[grid](x.scores, tops, sums, *prototypes.inverse(x.temperature), rows, k, views, height, **TILE)
    logits = tops.double() / x.temperature
    top = logits.amax(0)
    return top, (sums * (logits - top).exp()).sum(0)


def mass(x: Arguments, b: Tensor) -> Tensor:
    """[V, K]: the sum over the rows of softmax(logits + b)"""
    views, rows, k = x.scores.shape
    grid, height = _grid(x)
    sums, bias = x.scores.new_empty(grid[1], views, k, dtype=torch.float32), b.float()
    stats = sums.new_empty(2, views, rows)
    if rows:
        stats, _ = prototypes.read(prototypes.rows_of([x.scores], x.temperature, bias, None))
    _mass[grid](x.scores, bias, stats, sums, *prototypes.inverse(x.temperature), rows, k, views, height, **TILE)
    return sums.sum(0, dtype=torch.float64)


def forward(x: Arguments, potentials: Callable[..., Tensor]) -> Tensor:
    with launch.on(x.scores.device):
        if not len(x.scores):
            return x.scores.new_empty(0, x.scores.shape[2], dtype=torch.float32)
        return potentials(x, columns, mass).float()  # [V, K] is too little for float64 to cost anything
