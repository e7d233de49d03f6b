"""RELIC in Triton: the tiles of a = S and of b = S^T pass by together, nothing of size B x B in memory.

All pairs of crops are in the same three launches a direction, each pair in programs of its own.

Forward, 4 B^2 D FLOP: blocks of rows, by as many spans of column tiles as fill the chip, add up what a row needs of its
negatives; what the spans found is joined in their order. Backward, 6 B^2 D for each input that learns: the tiles again,
and their weights times the other view. The positives stay out of the weights, where rounding would drown the gradient
of aligned pairs. Few negatives: only the tiles of their band. Rows wider than a block: each slice of their columns
makes the tiles anew.

Order of every sum is fixed, so the same input gives the same bits. Scratch, in bytes: the crops in the operands' dtype,
or where negatives are drawn both of each pair, in its order; forward 28 a pair, row and span, backward 4 D a pair, row
and span, BLOCKS blocks of rows a multiprocessor at least.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import refuses  # noqa: F401
from .relic_tiles import has_others, is_negative, logits, pair_views, row_stats, weights, wrapped
from .rows import (
    LN2,
    LOWEST,
    address,
    atanh_series,
    close,
    inv_norms,
    load,
    log2_of,
    logits_range,
    row_blocks,
    row_tile,
)

if TYPE_CHECKING:
    from sslops.ops.relic import Arguments

# These change from batch to batch: no compilation for each.
SIZES = ("B", "negatives", "blocks", "tiles", "span", "splits", "onlines", "targets")

BLOCKS = 2  # of a multiprocessor, about; but at most PARTS spans
PARTS = 64
SUMS = tl.constexpr(7)  # A, B, Y, E, V or a's maximum, b's maximum, how many exceed: of a row and span


@triton.jit(do_not_specialize=SIZES)
def _prepare(
    online, target, order, z, inv_norm, s_pos, grad, in_order, B, D, stride, onlines, targets,
    NORMALIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z, the matmuls' operands: crops normalised, rounded, padded, and in order; inv_norm [O + T, B]; s_pos [P, B]; of
    grad [P, B] in_order [P, B], if it is given.
    """
    rows, pair = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(1)
    o, t, inside = pair // targets, pair % targets, rows < B
    given = rows
    if order is not None:
        given = tl.load(order + tl.cast(pair, tl.int64) * B + rows, mask=inside, other=0)
    online += tl.cast(o, tl.int64) * B * D
    target += tl.cast(t, tl.int64) * B * D
    inv0 = tl.full([BLOCK_R], 1.0, tl.float32)
    inv1 = inv0
    if NORMALIZE:
        inv0 = inv_norms(online, given, B, D, BLOCK_R, BLOCK_D)
        inv1 = inv_norms(target, given, B, D, BLOCK_R, BLOCK_D)
    z0, z1 = pair_views(z, pair, B, stride, onlines, targets, order is not None)
    # One pair of each crop writes what is the crop's.
    first0, first1 = rows < tl.where(t == 0, B, 0), rows < tl.where(o == 0, B, 0)
    own0, own1 = (inside, inside) if order is not None else (first0, first1)
    s = tl.zeros([BLOCK_R], tl.float32)
    for k in range(0, stride, BLOCK_D):
        a = (load(online, given, k, B, D, BLOCK_D) * inv0[:, None]).to(z.dtype.element_ty)
        b = (load(target, given, k, B, D, BLOCK_D) * inv1[:, None]).to(z.dtype.element_ty)
        s += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
        columns = k + tl.arange(0, BLOCK_D)
        wide = (columns < stride)[None, :]
        tl.store(address(z0, rows, columns, stride), a, mask=own0[:, None] & wide)
        tl.store(address(z1, rows, columns, stride), b, mask=own1[:, None] & wide)
    tl.store(inv_norm + tl.cast(o, tl.int64) * B + given, inv0, mask=first0)
    tl.store(inv_norm + tl.cast(onlines + t, tl.int64) * B + given, inv1, mask=first1)
    tl.store(s_pos + tl.cast(pair, tl.int64) * B + rows, s, mask=inside)
    if grad is not None:
        g = tl.load(grad + tl.cast(pair, tl.int64) * B + given, mask=inside, other=0.0)
        tl.store(in_order + tl.cast(pair, tl.int64) * B + rows, g, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _weigh(
    z, s_pos, parts, temperature, scale, B, negatives, stride, tiles, span, onlines, targets,
    SEARCH: tl.constexpr, COUNT: tl.constexpr, ORDERED: tl.constexpr, PRECISION: tl.constexpr, STATIONARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts [P, SUMS, splits, B] of a span of tiles: over a row's negatives, with d = (b - a) / tau, the sums of

    A: exp(a - m), B: exp(b - m'), Y: exp(a - m) (b - s), E: exp(a - m) d, V: exp(a - m) (exp(d) - 1 - d), all over tau;
    the maxima m and m' where they are searched for, and V where they are not; how many a exceed s.
    """
    scale = log2_of(temperature, scale)
    i, split, pair = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    stride = BLOCK_K if STATIONARY else stride
    o, t = pair_views(z, pair, B, stride, onlines, targets, ORDERED)
    oi = row_tile(o, i, B, stride, BLOCK_M, BLOCK_K)
    ti = row_tile(t, i, B, stride, BLOCK_M, BLOCK_K)
    rows = i + tl.arange(0, BLOCK_M)
    s = tl.load(s_pos + tl.cast(pair, tl.int64) * B + rows, mask=rows < B, other=0.0)
    top_a = s if SEARCH else tl.full([BLOCK_M], 1.0, tl.float32)
    top_b = top_a
    sum_a = tl.zeros([BLOCK_M], tl.float32)
    sum_b = tl.zeros([BLOCK_M], tl.float32)
    sum_y = tl.zeros([BLOCK_M], tl.float32)
    sum_e = tl.zeros([BLOCK_M], tl.float32)
    sum_v = tl.zeros([BLOCK_M], tl.float32)
    above = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(split * span, tl.minimum(split * span + span, tiles)):
        j = wrapped(i, tile, B, BLOCK_N)
        a, b, _ = logits(o, t, oi, ti, i, j, 0, B, stride, PRECISION, STATIONARY, BLOCK_M, BLOCK_N, BLOCK_K)
        columns = j + tl.arange(0, BLOCK_N)
        others = has_others(i, j, B, negatives, BLOCK_M, BLOCK_N)
        if others:
            negative = is_negative(rows[:, None], columns[None, :], B, negatives)
            a = tl.where(negative, a, s[:, None])  # adds nothing to any sum but A and B
            b = tl.where(negative, b, s[:, None])
        if SEARCH:
            higher = tl.maximum(top_a, tl.max(a, 1))
            shrink = tl.exp2((top_a - higher) * scale)
            sum_a, sum_y, sum_e, top_a = sum_a * shrink, sum_y * shrink, sum_e * shrink, higher
            higher = tl.maximum(top_b, tl.max(b, 1))
            sum_b, top_b = sum_b * tl.exp2((top_b - higher) * scale), higher
        p = tl.exp2((a - top_a[:, None]) * scale)
        q = tl.exp2((b - top_b[:, None]) * scale)
        if others:
            negative = is_negative(rows[:, None], columns[None, :], B, negatives)
            p = tl.where(negative, p, 0.0)
            q = tl.where(negative, q, 0.0)
        d = (b - a) * (scale * LN2)
        sum_a += tl.sum(p, 1)
        sum_b += tl.sum(q, 1)
        sum_y += tl.sum(p * (b - s[:, None]), 1)
        sum_e += tl.sum(p * d, 1)
        if not SEARCH:
            square = d * d  # exp(d) - 1 - d by its series where the difference would lose digits
            series = square * (d * (d * (d * (d * (1 / 720) + 1 / 120) + 1 / 24) + 1 / 6) + 0.5)
            sum_v += tl.sum(tl.where(square < 0.0625, p * series, (q - p) - p * d), 1)
        if COUNT:
            above += tl.sum(tl.where(a > s[:, None], 1.0, 0.0), 1)
    inside, step = rows < B, tl.cast(tl.num_programs(1), tl.int64) * B
    parts += (pair * SUMS * tl.num_programs(1) + split) * tl.cast(B, tl.int64) + rows
    tl.store(parts, sum_a, mask=inside)
    tl.store(parts + step, sum_b, mask=inside)
    tl.store(parts + 2 * step, sum_y, mask=inside)
    tl.store(parts + 3 * step, sum_e, mask=inside)
    if SEARCH:
        tl.store(parts + 4 * step, top_a, mask=inside)
        tl.store(parts + 5 * step, top_b, mask=inside)
    else:
        tl.store(parts + 4 * step, sum_v, mask=inside)
    if COUNT:
        tl.store(parts + 6 * step, above, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _losses(
    s_pos, parts, order, temperature, scale, alpha, beta, losses, stats, B, splits,
    SEARCH: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses [P, B] and stats [P, 8, B] from the parts, in their order"""
    scale = log2_of(temperature, scale)
    inv_tau = scale * LN2
    i, pair, step = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1), tl.cast(B, tl.int64)
    inside = i < B
    part = tl.arange(0, PARTS)[:, None]
    mask = (part < splits) & inside[None, :]
    parts += (pair * SUMS * splits + part) * step + i[None, :]
    s = tl.load(s_pos + pair * step + i, mask=inside, other=0.0)
    a = tl.load(parts, mask=mask, other=0.0)
    b = tl.load(parts + splits * step, mask=mask, other=0.0)
    y = tl.load(parts + 2 * splits * step, mask=mask, other=0.0)
    e = tl.load(parts + 3 * splits * step, mask=mask, other=0.0)
    top_a = tl.full([BLOCK], 1.0, tl.float32)
    top_b = top_a
    if SEARCH:
        tops_a = tl.load(parts + 4 * splits * step, mask=mask, other=LOWEST)
        tops_b = tl.load(parts + 5 * splits * step, mask=mask, other=LOWEST)
        top_a, top_b = tl.max(tops_a, 0), tl.max(tops_b, 0)
        shrink = tl.exp2((tops_a - top_a[None, :]) * scale)
        a, y, e = a * shrink, y * shrink, e * shrink
        b = b * tl.exp2((tops_b - top_b[None, :]) * scale)
    sum_a, sum_b = tl.sum(a, 0), tl.sum(b, 0)
    r_a, share_a, loss_a = close(sum_a, tl.exp2((s - top_a) * scale), (top_a - s) * inv_tau)
    r_b, share_b, loss_b = close(sum_b, tl.exp2((s - top_b) * scale), (top_b - s) * inv_tau)
    y = tl.div_rn(tl.sum(y, 0), r_a) * inv_tau
    divergence = loss_b - loss_a - tl.div_rn(tl.sum(e, 0), r_a)  # log E_p[exp(d)] - E_p[d]
    if not SEARCH:
        # Where p and q are close, by numbers of its own size; log(1 + u) - u by the series of log1p, less its u.
        u = tl.div_rn(sum_b - sum_a, r_a)
        near = tl.abs(u) < 0.5
        u = tl.where(near, u, 0.0)
        h = tl.div_rn(u, 2.0 + u)
        k = h * h
        v = tl.div_rn(tl.sum(tl.load(parts + 4 * splits * step, mask=mask, other=0.0), 0), r_a)
        divergence = tl.where(near, v + (2.0 * h * k * atanh_series(k) - u * h), divergence)
    above = tl.zeros([BLOCK], tl.float32)
    if COUNT:
        above = tl.sum(tl.load(parts + 6 * splits * step, mask=mask, other=0.0), 0)
    given = i if order is None else tl.load(order + pair * step + i, mask=inside, other=0)
    tl.store(losses + pair * step + given, alpha * loss_a + beta * divergence, mask=inside)
    stats += pair * 8 * step + i
    tl.store(stats, top_a, mask=inside)
    tl.store(stats + step, tl.div_rn(1.0, r_a), mask=inside)
    tl.store(stats + 2 * step, top_b, mask=inside)
    tl.store(stats + 3 * step, tl.div_rn(1.0, r_b), mask=inside)
    tl.store(stats + 4 * step, alpha + beta * y, mask=inside)
    # beside the gradient, whose rows are as they are given
    draws = alpha * share_a - beta * ((1.0 - share_a) * y + (share_a - share_b))
    tl.store(stats - i + 5 * step + given, draws, mask=inside)
    tl.store(stats + 6 * step, s, mask=inside)
    tl.store(stats + 7 * step, above, mask=inside)


@triton.jit
def _weigh_view(
    x, y, grad, order, stats, w_scale, dz, scale, beta, B, negatives, stride, tiles, span, i, split, column,
    TARGET: tl.constexpr, SEARCH: tl.constexpr, PRECISION: tl.constexpr, STATIONARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """_weigh_back of a view x, dz [B, BLOCK_K]: of online, or of the target, which takes the transpose times online"""
    xi = row_tile(x, i, B, stride, BLOCK_M, BLOCK_K)
    yi = row_tile(y, i, B, stride, BLOCK_M, BLOCK_K)
    rows = (i + tl.arange(0, BLOCK_M))[:, None]
    of_rows = row_stats(grad, stats, rows, B, w_scale)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    begin = tl.where(i < negatives, i - negatives + B, i - negatives)
    for tile in range(split * span, tl.minimum(split * span + span, tiles)):
        j = wrapped(begin, tile, B, BLOCK_N)
        columns = (j + tl.arange(0, BLOCK_N))[None, :]
        u, v, yj = logits(x, y, xi, yi, i, j, column, B, stride, PRECISION, STATIONARY, BLOCK_M, BLOCK_N, BLOCK_K)
        of_columns = row_stats(grad, stats, columns, B, w_scale)
        if TARGET:
            w, w_other = weights(u, v, of_columns, of_rows, scale, beta, SEARCH)
        else:
            w, w_other = weights(u, v, of_rows, of_columns, scale, beta, SEARCH)
        if has_others(i, j, B, negatives, BLOCK_M, BLOCK_N):
            follows = is_negative(rows, columns, B, negatives)
            precedes = is_negative(columns, rows, B, negatives) & (columns < B)
            w = tl.where(precedes if TARGET else follows, w, 0.0)
            w_other = tl.where(follows if TARGET else precedes, w_other, 0.0)
        acc = tl.dot((w + w_other).to(x.dtype.element_ty), yj, acc, input_precision=PRECISION)
    given = i + tl.arange(0, BLOCK_M)
    if order is not None:
        given = tl.load(order + given, mask=given < B, other=0)
    tl.store(address(dz, given, tl.arange(0, BLOCK_K), BLOCK_K), acc * (1.0 / w_scale), mask=rows < B)


@triton.jit(do_not_specialize=SIZES)
def _weigh_back(
    z, grad, order, stats, w_scale, dz, temperature, scale, beta,
    B, negatives, stride, blocks, tiles, span, onlines, targets,
    BOTH: tl.constexpr, SEARCH: tl.constexpr, PRECISION: tl.constexpr, STATIONARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz [P, splits, 1 or 2, slices, B, BLOCK_K], a slice of columns a program: of a span of tiles dL/dS tau times the
    target, in the rows' given order; or of BOTH views.
    """
    scale, w = log2_of(temperature, scale), 1.0
    stride = BLOCK_K if STATIONARY else stride
    slices, split, pair = stride // BLOCK_K, tl.program_id(1), tl.program_id(2)
    i, part = tl.program_id(0) % blocks * BLOCK_M, tl.program_id(0) // blocks
    column = part % slices * BLOCK_K
    o, t = pair_views(z, pair, B, stride, onlines, targets, order is not None)
    step = tl.cast(B, tl.int64)
    dz += ((pair * tl.num_programs(1) + split) * (tl.num_programs(0) // blocks) + part) * step * BLOCK_K
    grad += pair * step
    stats += pair * 8 * step
    if order is not None:
        order += pair * step
    if w_scale is not None:
        w = tl.load(w_scale + pair)
    if part < slices:
        _weigh_view(
            o, t, grad, order, stats, w, dz, scale, beta, B, negatives, stride, tiles, span, i, split, column,
            False, SEARCH, PRECISION, STATIONARY, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif BOTH:
        _weigh_view(
            t, o, grad, order, stats, w, dz, scale, beta, B, negatives, stride, tiles, span, i, split, column,
            True, SEARCH, PRECISION, STATIONARY, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit
def _gradient_tile(
    x, others, z, dz, inv, inv_others, grad, stats, inv_tau, rows, k, B, D, step, first, every, count, splits,
    SLICE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The unit row and its gradient [rows, k : k + BLOCK_D]: over its pairs, the sum of the spans less the positive's
    share, over tau.
    """
    columns, own = k + tl.arange(0, BLOCK_D), load(x, rows, k, B, D, BLOCK_D) * inv[:, None]
    mask, total = (rows < B)[:, None] & (columns < D)[None, :], tl.zeros_like(own)
    at = address(dz, rows, columns % SLICE + columns // SLICE * SLICE * tl.cast(B, tl.int64), SLICE)
    for n in range(0, count * splits):
        span = (first + n // splits * every) * splits + n % splits
        total += tl.load(at + span * step, mask=mask, other=0.0)
    for n in range(0, count):
        pair = first + n * every
        row = pair * tl.cast(B, tl.int64) + rows
        pull = tl.load(grad + row, mask=rows < B, other=0.0)
        pull = pull * tl.load(stats + (pair * 7 + 5) * tl.cast(B, tl.int64) + row, mask=rows < B, other=0.0)
        inv_other = tl.load(inv_others + n * tl.cast(B, tl.int64) + rows, mask=rows < B, other=0.0)
        other = load(others + n * tl.cast(B, tl.int64) * D, rows, k, B, D, BLOCK_D) * inv_other[:, None]
        total -= pull[:, None] * other.to(z.dtype.element_ty).to(tl.float32)
    return own, total * inv_tau


@triton.jit
def _crop_gradient(
    x, others, z, dz, inv_norm, inv_others, grad, stats, inv_tau, dx, dots, rows,
    B, D, step, first, every, count, splits,
    NORMALIZE: tl.constexpr, SLICE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx [B, D] and dots [B], if any, of the crop x [B, D], whose `count` pairs are every so many"""
    inside = rows < B
    inv = tl.load(inv_norm + rows, mask=inside, other=0.0)
    dot = tl.zeros([BLOCK_R], tl.float32)
    if NORMALIZE or dots is not None:
        for k in range(0, D, BLOCK_D):
            own, d = _gradient_tile(
                x, others, z, dz, inv, inv_others, grad, stats, inv_tau, rows, k, B, D, step, first, every, count,
                splits, SLICE, BLOCK_D,
            )  # fmt: skip
            dot += tl.sum(own * d, 1)
    if dots is not None:
        tl.store(dots + rows, dot, mask=inside)
    along = tl.where(inv < 1e12, dot, 0.0)  # a row shorter than 1e-12 is scaled and no more, as F.normalize does
    for k in range(0, D, BLOCK_D):
        own, d = _gradient_tile(
            x, others, z, dz, inv, inv_others, grad, stats, inv_tau, rows, k, B, D, step, first, every, count, splits,
            SLICE, BLOCK_D,
        )  # fmt: skip
        if NORMALIZE:
            d = (d - own * along[:, None]) * inv[:, None]
        columns = k + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (columns < D)[None, :]
        tl.store(address(dx, rows, columns, D), d.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _gradient(
    online, target, z, dz, inv_norm, grad, stats, temperature, scale, donline, dtarget, dots,
    B, D, stride, splits, onlines, targets,
    NORMALIZE: tl.constexpr, SLICE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """donline [O, B, D] and, unless it is None, dtarget [T, B, D]; dots [O, B] = <row, gradient>, or None"""
    BOTH: tl.constexpr = dtarget is not None
    rows, crop = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(1)
    inv_tau, all_rows = log2_of(temperature, scale) * LN2, tl.cast(B, tl.int64)
    step = all_rows * stride * (2 if BOTH else 1)
    o, t = tl.minimum(crop, onlines - 1), tl.maximum(crop - onlines, 0)
    if crop < onlines:
        _crop_gradient(
            online + o * all_rows * D, target, z, dz, inv_norm + o * all_rows, inv_norm + onlines * all_rows,
            grad, stats, inv_tau, donline + o * all_rows * D, dots if dots is None else dots + o * all_rows, rows,
            B, D, step, o * targets, 1, targets, splits, NORMALIZE, SLICE, BLOCK_R, BLOCK_D,
        )  # fmt: skip
    elif BOTH:
        _crop_gradient(
            target + t * all_rows * D, online, z, dz + all_rows * stride, inv_norm + (onlines + t) * all_rows, inv_norm,
            grad, stats, inv_tau, dtarget + t * all_rows * D, None, rows,
            B, D, step, t, targets, onlines, splits, NORMALIZE, SLICE, BLOCK_R, BLOCK_D,
        )  # fmt: skip


def _spans(x: Arguments, before: int, after: int, config: dict[str, int]) -> tuple[int, int, int, int]:
    """Blocks of rows, the tiles that may hold their pairs, how long spans of tiles are, and how many.

    A row has pairs with the rows from `before` before it to `after` after it, in cyclic order.
    """
    b, m, n = x.online.shape[-2], config["BLOCK_M"], config["BLOCK_N"]
    tiles = triton.cdiv(m + before + after, n) + (b % n > 0) + (m % n + before % n > 0)
    blocks, tiles = triton.cdiv(b, m), min(tiles, triton.cdiv(b, n))
    of_each = BLOCKS * launch.processors(x.online.device) // (blocks * math.prod(x.crops))
    span = triton.cdiv(tiles, max(1, min(of_each, PARTS)))
    return blocks, tiles, span, triton.cdiv(tiles, span)


def _searches(temperature: float | Tensor, normalize: bool) -> bool:
    """Whether for the maxima. Where 1 is the maximum no sum of exp((s - 1) / tau) is below exp(-43): half of float32's
    range, the other half being for grad / r.
    """
    return logits_range(temperature, normalize) > 43


def _largest_weights(grad: Tensor, x: Arguments, stats: Tensor) -> Tensor:
    """[P, B]: no weight of the pair i, j is above the sum of i's and j's; grad [P, B] in order, stats [P, 8, B]"""
    top, inv, s = stats[:, 0:4:2], stats[:, 1:4:2], stats[:, 6:7]
    share = (1 - ((s - top) / x.temperature).exp() * inv).clamp(min=2**-22).amax(1)
    longest = [
        1.01 if x.normalize else torch.linalg.vector_norm(each.float(), dim=-1).amax() for each in (x.online, x.target)
    ]
    return grad * share * (stats[:, 4].abs() + x.beta * (1 + 2 * longest[0] * longest[1] / x.temperature))


def _operand(
    x: Arguments, step: int, grad: Tensor | None = None, in_order: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """z [crops, B, D up to a multiple of step], inv_norm [O + T, B], s_pos [P, B] of the rounded rows"""
    (*_, b, d), (onlines, targets) = x.online.shape, x.crops or (1, 1)
    stride, pairs = triton.cdiv(d, step) * step, onlines * targets
    z = x.online.new_empty((onlines + targets if x.order is None else 2 * pairs, b, stride), dtype=x.operand_dtype)
    inv_norm, s_pos = (z.new_empty((n, b), dtype=torch.float32) for n in (onlines + targets, pairs))
    blocks = row_blocks(stride)
    _prepare[triton.cdiv(b, blocks["BLOCK_R"]), pairs](
        x.online, x.target, x.order, z, inv_norm, s_pos, grad, in_order, b, d, stride, onlines, targets, x.normalize,
        **blocks,
    )  # fmt: skip
    return z, inv_norm, s_pos


def forward(x: Arguments) -> tuple[Tensor, ...]:
    (*_, b, d), (onlines, targets) = x.online.shape, x.crops or (1, 1)
    losses = x.online.new_empty((*x.crops, b), dtype=torch.float32)
    stats = losses.new_empty(*x.crops, 8, b)
    if b == 0:
        return losses, stats
    config = launch.nearest("relic", x.online.device, x.operand_dtype, d)["forward"]
    search, scale = _searches(x.temperature, x.normalize), launch.scale_of(x.temperature)
    with launch.on(x.online.device):
        z, _, s_pos = _operand(x, config["BLOCK_K"])
        stride = z.shape[2]
        blocks, tiles, span, splits = _spans(x, 0, x.negatives, config)
        parts = losses.new_empty(onlines * targets, SUMS.value, splits, b)
        _weigh[blocks, splits, onlines * targets](
            z, s_pos, parts, *scale, b, x.negatives, stride, tiles, span, onlines, targets, search, x.count_exceeding,
            x.order is not None, launch.precision("relic", x.operand_dtype), stride == config["BLOCK_K"], **config,
        )  # fmt: skip
        _losses[triton.cdiv(b, 16), onlines * targets](
            s_pos, parts, x.order, *scale, x.alpha, x.beta, losses, stats, b, splits, search, x.count_exceeding,
            PARTS, 16, **launch.FUSED,
        )  # fmt: skip
    return losses, stats


def backward(grad: Tensor, x: Arguments, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    (*_, b, d), (onlines, targets) = x.online.shape, x.crops or (1, 1)
    pairs, gradients, learned = onlines * targets, x.gradients, x.needs_grad[2]
    donline = torch.empty_like(x.online)
    dtarget = torch.empty_like(x.target) if gradients == 2 else None
    if b == 0:
        return donline, x.target.new_empty(0) if dtarget is None else dtarget, grad.new_zeros(())
    config = launch.nearest("relic", x.online.device, x.operand_dtype, d)["backward"]
    search, scale = _searches(x.temperature, x.normalize), launch.scale_of(x.temperature)
    if search and gradients == 2:  # larger blocks of such wide rows have no room in shared memory
        config |= {"BLOCK_M": min(config["BLOCK_M"], 64)}
    with launch.on(x.online.device):
        in_order = grad if x.order is None else torch.empty_like(grad)
        z, inv_norm, _ = _operand(x, config["BLOCK_K"], None if x.order is None else grad, in_order)
        stride = z.shape[2]
        w_scale = launch.half_scale(
            x.operand_dtype, lambda: _largest_weights(in_order.view(pairs, b), x, stats.view(pairs, 8, b)), dim=1
        )
        blocks, tiles, span, splits = _spans(x, x.negatives, x.negatives, config)
        dz = grad.new_empty(pairs, splits, gradients, stride // config["BLOCK_K"], b, config["BLOCK_K"])
        _weigh_back[blocks * gradients * stride // config["BLOCK_K"], splits, pairs](
            z, in_order, x.order, stats, w_scale, dz, *scale, x.beta,
            b, x.negatives, stride, blocks, tiles, span, onlines, targets,
            gradients == 2, search, launch.precision("relic", x.operand_dtype), stride == config["BLOCK_K"], **config,
        )  # fmt: skip
        rows, dots = row_blocks(d), grad.new_empty(onlines, b) if learned else None
        _gradient[triton.cdiv(b, rows["BLOCK_R"]), onlines + (targets if gradients == 2 else 0)](
            x.online, x.target, z, dz, inv_norm, grad, stats, *scale, donline, dtarget, dots,
            b, d, stride, splits, onlines, targets, x.normalize, config["BLOCK_K"], **rows,
        )  # fmt: skip
    dtemperature = grad.new_empty(0) if dots is None else -dots.sum() / x.temperature
    return donline, x.target.new_empty(0) if dtarget is None else dtarget, dtemperature
