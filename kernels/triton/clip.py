"""CLIP in Triton: tiles of the logits for their rows and their columns, nothing of size N x N; 8 N^2 D FLOP.

Forward, 2 B N D: every tile adds exp(scale (s - top)) over its negatives to its rows' sums and to its columns', whose
parts are joined in their order. Where the tops are to be searched for, rows and columns have their own, which costs a
second exponential. Backward, 6 B N D: W_ij = g_i e_ij / r_i + g_j e_ij / c_j (pairs.py), the share of the negatives
being what a pair draws. Scratch beside that of pairs.py, in bytes: 4 PANELS a row and a column, 8 with tops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import refuses  # noqa: F401
from .pairs import (
    W_BLOCK,
    add_to,
    given,
    has_others,
    input_gradient,
    log2_parts,
    multiply_blocks,
    number,
    operand,
    panels,
    positive,
    power,
    products,
    spread,
)
from .rows import LOG2E, LOWEST, close, fixed_maximum

if TYPE_CHECKING:
    from collections.abc import Callable

    from sslops.distributed import Part
    from sslops.ops.clip import Arguments

DISTRIBUTED = True

# These change from batch to batch: no compilation for each.
SIZES = ("B", "N", "first", "high", "wide", "row0", "column0", "tiles", "row_parts", "column_parts")


@triton.jit(do_not_specialize=SIZES)
def _sums(
    left, right, row_sums, row_tops, column_sums, column_tops, similarity, scale, value, top,
    B, N, stride, first, high, wide,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of panel (a, b), `high` rows and `wide` columns: part b of its rows' sums [.., B], a of its columns' [.., N].

    The tops are searched for where there are tensors for them. similarity [B]: of the pairs.
    """
    high_scale, low_scale = log2_parts(positive(number(scale, value)).to(tl.float64))
    begin, b = tl.program_id(0) * high, tl.program_id(1)
    of_rows, of_columns = tl.cast(b, tl.int64) * B, tl.cast(tl.program_id(0), tl.int64) * N
    for i in range(begin, tl.minimum(begin + high, B), BLOCK_M):
        rows = i + tl.arange(0, BLOCK_M)
        r = tl.zeros([BLOCK_M], tl.float32)
        top_r = r + LOWEST
        for j in range(b * wide, tl.minimum(b * wide + wide, N), BLOCK_N):
            columns = j + tl.arange(0, BLOCK_N)
            s = products(left, right, i, j, B, N, stride, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
            if has_others(i, j, B, N, first, BLOCK_M, BLOCK_N):
                partner = first + rows
                pair = partner[:, None] == columns[None, :]
                here = (rows < B) & (partner >= j) & (partner < j + BLOCK_N)
                tl.store(similarity + rows, tl.sum(tl.where(pair, s, 0.0), 1), mask=here)
                s = tl.where((rows < B)[:, None] & (columns < N)[None, :] & ~pair, s, float("-inf"))
            earlier = columns < tl.where(i > begin, N, 0)
            c = tl.load(column_sums + of_columns + columns, mask=earlier, other=0.0)
            if row_tops is not None:
                higher = tl.maximum(top_r, tl.max(s, 1))
                e = power(s - higher[:, None], high_scale, low_scale)
                r = r * power(top_r - higher, high_scale, low_scale) + tl.sum(e, 1)
                top_r = higher
                top_c = tl.load(column_tops + of_columns + columns, mask=earlier, other=LOWEST)
                higher = tl.maximum(top_c, tl.max(s, 0))
                e = power(s - higher[None, :], high_scale, low_scale)
                c = c * power(top_c - higher, high_scale, low_scale) + tl.sum(e, 0)
                tl.store(column_tops + of_columns + columns, higher, mask=columns < N)
            else:
                e = power(s - top, high_scale, low_scale)
                r += tl.sum(e, 1)
                c += tl.sum(e, 0)
            tl.store(column_sums + of_columns + columns, c, mask=columns < N)
        tl.store(row_sums + of_rows + rows, r, mask=rows < B)
        if row_tops is not None:
            tl.store(row_tops + of_rows + rows, top_r, mask=rows < B)
        tl.debug_barrier()  # the columns' parts are read again by other threads


@triton.jit
def _closed(sums, tops, s, i, N, parts, scale, top, PARTS: tl.constexpr):
    """Of rows or of columns: the top, 1 over their sum, the share of the negatives, the loss"""
    high, low = log2_parts(scale.to(tl.float64))
    part = tl.arange(0, PARTS)[:, None]
    at, mask = part.to(tl.int64) * N + i[None, :], (part < parts) & (i < N)[None, :]
    r, m = tl.load(sums + at, mask=mask, other=0.0), tl.zeros_like(s) + top
    if tops is not None:
        tops = tl.load(tops + at, mask=mask, other=LOWEST)
        m = tl.maximum(tl.max(tops, 0), s)
        r = r * power(tops - m[None, :], high, low)
    total, share, loss = close(tl.sum(r, 0), power(s - m, high, low), (m - s) * scale)
    return m, tl.div_rn(1.0, total), share, loss


@triton.jit(do_not_specialize=SIZES)
def _close(
    row_sums, row_tops, column_sums, column_tops, similarity, losses, stats, scale, value, top,
    N, row_parts, column_parts, ROW_PARTS: tl.constexpr, COLUMN_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses [N] and stats [5, N] from the parts [.., N], in their order"""
    scale = positive(number(scale, value))
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside, step = i < N, tl.cast(N, tl.int64)
    s = tl.load(similarity + i, mask=inside, other=0.0)
    m, inverse, share, loss = _closed(row_sums, row_tops, s, i, N, row_parts, scale, top, ROW_PARTS)
    m_c, inverse_c, share_c, loss_c = _closed(
        column_sums, column_tops, s, i, N, column_parts, scale, top, COLUMN_PARTS
    )  # fmt: skip
    tl.store(losses + i, 0.5 * (loss + loss_c), mask=inside)
    stats += i
    tl.store(stats, m, mask=inside)
    tl.store(stats + step, inverse, mask=inside)
    tl.store(stats + 2 * step, m_c, mask=inside)
    tl.store(stats + 3 * step, inverse_c, mask=inside)
    tl.store(stats + 4 * step, share + share_c, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _weigh(
    left, right, w, parts, grad, stats, scale, value, w_scale, B, N, stride, width, first, row0, column0, tiles,
    SEARCH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """w [.., width]: W of the rows from row0 and the columns from column0; parts [.., tiles]: the sums of W s"""
    high, low = log2_parts(positive(number(scale, value)).to(tl.float64))
    i, j = row0 + tl.program_id(0) * BLOCK_M, column0 + tl.program_id(1) * BLOCK_N
    rows, columns, step = i + tl.arange(0, BLOCK_M), j + tl.arange(0, BLOCK_N), tl.cast(N, tl.int64)
    partner = first + rows
    s = products(left, right, i, j, B, N, stride, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    top = tl.load(stats + partner, mask=rows < B, other=0.0)
    g = tl.load(grad + partner, mask=rows < B, other=0.0)
    a = g * tl.load(stats + step + partner, mask=rows < B, other=0.0)
    c = tl.load(grad + columns, mask=columns < N, other=0.0)
    c = c * tl.load(stats + 3 * step + columns, mask=columns < N, other=0.0)
    e = power(s - top[:, None], high, low)
    if SEARCH:
        top_c = tl.load(stats + 2 * step + columns, mask=columns < N, other=0.0)
        v = e * a[:, None] + power(s - top_c[None, :], high, low) * c[None, :]
    else:
        v = e * (a[:, None] + c[None, :])
    others = has_others(i, j, B, N, first, BLOCK_M, BLOCK_N)
    if others:
        pair = partner[:, None] == columns[None, :]
        v = tl.where((rows < B)[:, None] & (columns < N)[None, :] & ~pair, v, 0.0)
    if w is not None:
        to = w + ((rows - row0)[:, None] * width + (columns - column0)[None, :])
        scaled = v if w_scale is None else v * tl.load(w_scale)
        tl.store(to, scaled.to(w.dtype.element_ty), mask=(rows < B)[:, None] & (columns < N)[None, :])
    if others:
        pull = g * tl.load(stats + 4 * step + partner, mask=rows < B, other=0.0)
        v = tl.where((rows < B)[:, None] & (partner[:, None] == columns[None, :]), -pull[:, None], v)
    add_to(parts, i // BLOCK_M * tiles + tl.program_id(1), 0.5 * v * s, column0 > 0)


def _fixed_top(x: Arguments) -> float | None:
    """In units of s; None where the tops are searched for"""
    if isinstance(x.logit_scale, Tensor):
        return None
    maximum = fixed_maximum(1 / x.logit_scale, x.normalize, len(x.text))
    return None if maximum is None else maximum / x.logit_scale


def _gathered(
    gather: Callable[[Tensor], Tensor], scale: Tensor | float, sums: Tensor, tops: Tensor | None, *more: Tensor
) -> Tensor:
    """[W, .., n] of all ranks: this one's parts [.., n] joined, their tops if there are any, and more [n]"""
    if tops is None:
        return gather(torch.stack([sums.sum(0), *more]))
    top = tops.amax(0)
    return gather(torch.stack([(sums * ((tops - top) * scale).exp()).sum(0), top, *more]))


def forward(
    x: Arguments, part: Part | None = None, gather: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """losses [N] and stats [5, N] of all; gather: the sums [..] of this part, as [W, ..] of all W"""
    image, text, operand_dtype = x.image, x.text, x.operand_dtype
    (b, d), n = image.shape, len(text)
    losses = image.new_empty(n, dtype=torch.float32)
    stats = losses.new_empty(5, n)
    if n == 0:
        return losses, stats
    config, top = launch.nearest("pairs", image.device, operand_dtype, d)["sums"], _fixed_top(x)
    scale = (*given(x.logit_scale), top or 0.0)
    high, wide = panels(b, n, config)
    grid = triton.cdiv(b, high), triton.cdiv(n, wide)
    with launch.on(image.device):
        left, _ = operand(image, x.normalize, operand_dtype, config["BLOCK_K"])
        right, _ = operand(text, x.normalize, operand_dtype, config["BLOCK_K"])
        similarity, rows, columns = losses.new_empty(b), losses.new_empty(grid[1], b), losses.new_empty(grid[0], n)
        row_tops, column_tops = (None if top is not None else torch.empty_like(sums) for sums in (rows, columns))
        _sums[grid](
            left, right, rows, row_tops, columns, column_tops, similarity, *scale, b, n, left.shape[1],
            part.first if part else 0, high, wide, launch.precision("pairs", operand_dtype), **config,
        )  # fmt: skip
        if gather is not None:
            of_rows = _gathered(gather, x.logit_scale, rows, row_tops, similarity).transpose(0, 1)
            of_rows = of_rows.reshape(-1, 1, n).contiguous()
            of_columns = _gathered(gather, x.logit_scale, columns, column_tops).transpose(0, 1).contiguous()
            rows, columns, similarity = of_rows[0], of_columns[0], of_rows[-1]
            row_tops, column_tops = (None, None) if top is not None else (of_rows[1], of_columns[1])
        parts = len(rows), len(columns)
        _close[triton.cdiv(n, 16),](
            rows, row_tops, columns, column_tops, similarity, losses, stats, *scale, n, *parts,
            *map(triton.next_power_of_2, parts), 16, **launch.FUSED,
        )  # fmt: skip
    return losses, stats


def backward(grad: Tensor, x: Arguments, stats: Tensor, part: Part | None = None) -> tuple[Tensor, ...]:
    """Of a part: its images' gradients, what its rows add to the texts', in float32, and to logit_scale's"""
    image, text, operand_dtype = x.image, x.text, x.operand_dtype
    (b, d), n, first = image.shape, len(text), part.first if part else 0
    config = launch.nearest("pairs", image.device, operand_dtype, d)["weigh"]
    dimage, dtext, dlogit_scale = image.new_empty(0), text.new_empty(0), grad.new_empty(0)
    if n == 0:
        return torch.empty_like(image), torch.empty_like(text), grad.new_zeros(() if x.needs_grad[2] else 0)
    with launch.on(image.device):
        w_scale, step = launch.half_scale(operand_dtype, lambda: grad * stats[4]), config["BLOCK_K"]
        left, inv_left = operand(image, x.normalize, operand_dtype, step)
        right, inv_right = operand(text, x.normalize, operand_dtype, step)
        dleft = left.new_empty(left.shape, dtype=torch.float32) if x.needs_grad[0] else None
        dright = right.new_empty(right.shape, dtype=torch.float32) if x.needs_grad[1] else None
        tiles = triton.cdiv(min(n, W_BLOCK), config["BLOCK_N"])
        parts = grad.new_empty(triton.cdiv(b, config["BLOCK_M"]), tiles, dtype=torch.float64)

        def weigh(w: Tensor | None, i: int, j: int, rows: int, columns: int) -> None:
            width = 0 if w is None else w.stride(0)
            _weigh[triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(columns, config["BLOCK_N"])](
                left, right, w, parts, grad, stats, *given(x.logit_scale), w_scale, b, n, left.shape[1], width, first,
                i, j, tiles, _fixed_top(x) is None, launch.precision("pairs", operand_dtype), **config,
            )  # fmt: skip

        multiply_blocks(left, right, dleft, dright, weigh)
        factor = 0.5 * LOG2E.value * x.logit_scale  # a loss is the mean of its row's and its column's
        own = slice(first, first + b)
        if dleft is not None:
            dimage = input_gradient(
                image, text[own], dleft, inv_left, inv_right[own], stats[4][own], w_scale, factor, x.normalize,
                grad=grad[own],
            )  # fmt: skip
        if dright is not None:
            others, inv, of_pairs = (spread(each, first, n) for each in (image, inv_left, grad[own]))
            wide = text if part is None else text.float()
            dtext = input_gradient(
                wide, others, dright, inv_right, inv, stats[4], w_scale, factor, x.normalize, grad=of_pairs
            )
        if x.needs_grad[2]:
            dlogit_scale = parts.sum().float()
    return dimage, dtext, dlogit_scale
