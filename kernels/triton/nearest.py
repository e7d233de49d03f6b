"""Nearest neighbours in Triton: candidates pass by in tiles, nothing of size B x K in memory; 2 B K D FLOP for each k.

Blocks of queries, by as many spans of candidates as fill the chip, keep their best; what the spans found is joined in
their order. The next best are those after it: a pass each. Scratch, in bytes: the queries as operands, 8 a query and
span, and 4 a candidate if they are to be unit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import refuses  # noqa: F401
from .pairs import has_others, operand
from .rows import inverse, ragged_tile, row_tile

if TYPE_CHECKING:
    from sslops.ops.nearest import Arguments

# These change from batch to batch: no compilation for each.
SIZES = ("B", "K", "first", "span", "splits", "k", "rank")

PROGRAMS = 264  # two on each of an H100's 132 multiprocessors; at most PARTS spans
PARTS = 256
LEAST = tl.constexpr(-3.4028234663852886e38)  # what -inf and NaN are taken for


@triton.jit(do_not_specialize=SIZES)
def _search(
    query, support, inv_norm, last, last_id, values, ids, B, K, D, stride, first, span,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """values, ids [splits, B]: the best of each span of candidates, after last, last_id [B] if there are any"""
    i, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    rows = i + tl.arange(0, BLOCK_M)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    at = tl.zeros([BLOCK_M], tl.int32)
    if last is not None:
        worse = tl.load(last + rows, mask=rows < B, other=0.0)[:, None]
        after = tl.load(last_id + rows, mask=rows < B, other=0)[:, None]
    for j in range(split * span, tl.minimum(split * span + span, K), BLOCK_N):
        columns = j + tl.arange(0, BLOCK_N)
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, stride, BLOCK_K):
            a = row_tile(query + k, i, B, stride, BLOCK_M, BLOCK_K)
            b = ragged_tile(support, j, k, K, D, BLOCK_N, BLOCK_K)
            if inv_norm is not None:
                b = b.to(tl.float32) * tl.load(inv_norm + columns, mask=columns < K, other=0.0)[:, None]
            s = tl.dot(a, tl.trans(b.to(query.dtype.element_ty)), s, input_precision=PRECISION)
        s = tl.maximum(s, LEAST)  # which a NaN is not
        if has_others(i, j, B, K, first, BLOCK_M, BLOCK_N):
            itself = (first >= 0) & ((first + rows)[:, None] == columns[None, :])
            s = tl.where((columns < K)[None, :] & ~itself, s, float("-inf"))
        if last is not None:
            s = tl.where((s < worse) | ((s == worse) & (columns[None, :] > after)), s, float("-inf"))
        top = tl.max(s, 1)
        found = tl.min(tl.where(s == top[:, None], columns[None, :], K), 1)
        at = tl.where(top > best, found, at)
        best = tl.maximum(best, top)
    to = tl.cast(split, tl.int64) * B + rows
    tl.store(values + to, best, mask=rows < B)
    tl.store(ids + to, at, mask=rows < B)


@triton.jit(do_not_specialize=SIZES)
def _join(values, ids, last, last_id, out, B, splits, k, rank, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """out [B, k] at `rank`, and last, last_id [B]: the best of the spans', of equal ones the first"""
    rows, part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PARTS)[:, None]
    at, mask = part.to(tl.int64) * B + rows[None, :], (part < splits) & (rows < B)[None, :]
    found = tl.load(values + at, mask=mask, other=float("-inf"))
    best = tl.max(found, 0)
    first = tl.min(tl.where(found == best[None, :], tl.load(ids + at, mask=mask, other=0), 2147483647), 0)
    tl.store(last + rows, best, mask=rows < B)
    tl.store(last_id + rows, first, mask=rows < B)
    tl.store(out + rows.to(tl.int64) * k + rank, first.to(tl.int64), mask=rows < B)


def forward(x: Arguments) -> Tensor:
    query, support, operand_dtype, k = x.query, x.support, x.operand_dtype, x.k
    (b, d), candidates = query.shape, len(support)
    out = query.new_empty((b, k), dtype=torch.int64)
    if b == 0:
        return out
    config = launch.nearest("pairs", query.device, operand_dtype, d)["nearest"]
    blocks = triton.cdiv(b, config["BLOCK_M"])
    span, splits = launch.spans(candidates, config["BLOCK_N"], min(PROGRAMS // blocks, PARTS))
    with launch.on(query.device):
        z, _ = operand(query, x.normalize, operand_dtype, config["BLOCK_K"])
        inv_norm = inverse(support, x.normalize)
        values, last = (query.new_empty(shape, dtype=torch.float32) for shape in ((splits, b), b))
        ids, last_id = (each.new_empty(each.shape, dtype=torch.int32) for each in (values, last))
        for rank in range(k):
            before = (last, last_id) if rank else (None, None)
            _search[blocks, splits](
                z, support, inv_norm, *before, values, ids, b, candidates, d, z.shape[1], x.first, span,
                launch.precision("pairs", operand_dtype), **config,
            )  # fmt: skip
            _join[triton.cdiv(b, 16),](
                values, ids, last, last_id, out, b, splits, k, rank, triton.next_power_of_2(splits), 16, **launch.FUSED
            )
    return out
