"""RELIC in Triton: the tiles of a = S and of b = S^T pass by together, nothing of size B x B in memory.

Forward, 4 B^2 D FLOP: blocks of rows, by as many spans of column tiles as fill the chip, add up what a row needs of its
negatives; what the spans found is joined in their order. Backward, 6 B^2 D for each input that learns: the tiles again,
and their weights times the other view. The positives stay out of the weights, where rounding would drown the gradient
of aligned pairs. Few negatives: only the tiles of their band. Rows wider than a block: each slice of their columns
makes the tiles anew.

Order of every sum is fixed, so the same input gives the same bits. Scratch, in bytes: both views in the operands'
dtype; forward 28 a row and span, backward 4 D a row and span, BLOCKS blocks of rows a multiprocessor at least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import refuses  # noqa: F401
from .rows import (
    LN2,
    LOWEST,
    atanh_series,
    close,
    input_gradients,
    log2_of,
    logits_range,
    operand,
    row_tile,
)

if TYPE_CHECKING:
    from sslops.ops.relic import Arguments

# These change from batch to batch: no compilation for each.
SIZES = ("B", "M", "negatives", "tiles", "span", "splits")

BLOCKS = 2  # of a multiprocessor, about; but at most PARTS spans
PARTS = 64
SUMS = 7  # A, B, Y, E, V or a's maximum, b's maximum, how many exceed: of a row and span


@triton.jit
def _wrapped(begin, tile, B, BLOCK: tl.constexpr):
    """Where the block of BLOCK rows starts that is `tile` blocks, in cyclic order, after that of row `begin`"""
    return (begin // BLOCK + tile) % tl.cdiv(B, BLOCK) * BLOCK


@triton.jit
def _logits(
    x, y, xi, yi, i, j, column, B, stride, PRECISION: tl.constexpr, STATIONARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> and <y_i, x_j> of the rows from i and from j, and y_j from `column` on; xi, yi: where stationary"""
    if STATIONARY:
        yj = row_tile(y, j, B, stride, BLOCK_N, BLOCK_K)
        u = tl.dot(xi, tl.trans(yj), input_precision=PRECISION)
        v = tl.dot(yi, tl.trans(row_tile(x, j, B, stride, BLOCK_N, BLOCK_K)), input_precision=PRECISION)
    else:
        u = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        v = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, stride, BLOCK_K):
            a = row_tile(x + k, i, B, stride, BLOCK_M, BLOCK_K)
            u = tl.dot(a, tl.trans(row_tile(y + k, j, B, stride, BLOCK_N, BLOCK_K)), u, input_precision=PRECISION)
            b = row_tile(y + k, i, B, stride, BLOCK_M, BLOCK_K)
            v = tl.dot(b, tl.trans(row_tile(x + k, j, B, stride, BLOCK_N, BLOCK_K)), v, input_precision=PRECISION)
        yj = row_tile(y + column, j, B, stride, BLOCK_N, BLOCK_K)
    return u, v, yj


@triton.jit
def _has_others(i, j, B, negatives, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether the tile at (i, j) holds anything but negatives"""
    return (negatives < B - 1) | ((i < j + BLOCK_N) & (j < i + BLOCK_M)) | (j + BLOCK_N > B)


@triton.jit
def _is_negative(rows, columns, B, negatives):
    """Which columns are among the `negatives` rows that follow the row in cyclic order; rows below B"""
    steps = columns - rows
    steps = tl.where(steps < 0, steps + B, steps)
    return (steps > 0) & (steps <= negatives) & (columns < B)


@triton.jit(do_not_specialize=SIZES)
def _weigh(
    z, s_pos, parts, temperature, scale, B, negatives, stride, tiles, span,
    SEARCH: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr, STATIONARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts [SUMS, splits, B] of a span of tiles: over a row's negatives, with d = (b - a) / tau, the sums of

    A: exp(a - m), B: exp(b - m'), Y: exp(a - m) (b - s), E: exp(a - m) d, V: exp(a - m) (exp(d) - 1 - d), all over tau;
    the maxima m and m' where they are searched for, and V where they are not; how many a exceed s.
    """
    scale = log2_of(temperature, scale)
    i, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    stride = BLOCK_K if STATIONARY else stride
    o, t = z, z + tl.cast(B, tl.int64) * stride
    oi = row_tile(o, i, B, stride, BLOCK_M, BLOCK_K)
    ti = row_tile(t, i, B, stride, BLOCK_M, BLOCK_K)
    rows = i + tl.arange(0, BLOCK_M)
    s = tl.load(s_pos + rows, mask=rows < B, other=0.0)
    top_a = s if SEARCH else tl.full([BLOCK_M], 1.0, tl.float32)
    top_b = top_a
    sum_a = tl.zeros([BLOCK_M], tl.float32)
    sum_b = tl.zeros([BLOCK_M], tl.float32)
    sum_y = tl.zeros([BLOCK_M], tl.float32)
    sum_e = tl.zeros([BLOCK_M], tl.float32)
    sum_v = tl.zeros([BLOCK_M], tl.float32)
    above = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(split * span, tl.minimum(split * span + span, tiles)):
        j = _wrapped(i, tile, B, BLOCK_N)
        a, b, _ = _logits(o, t, oi, ti, i, j, 0, B, stride, PRECISION, STATIONARY, BLOCK_M, BLOCK_N, BLOCK_K)
        columns = j + tl.arange(0, BLOCK_N)
        others = _has_others(i, j, B, negatives, BLOCK_M, BLOCK_N)
        if others:
            negative = _is_negative(rows[:, None], columns[None, :], B, negatives)
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
            negative = _is_negative(rows[:, None], columns[None, :], B, negatives)
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
    parts += tl.cast(split, tl.int64) * B + rows
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
    s_pos, parts, temperature, scale, alpha, beta, losses, stats, B, splits,
    SEARCH: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses [B] and stats [8, B] from the parts, in their order"""
    scale = log2_of(temperature, scale)
    inv_tau = scale * LN2
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < B
    part = tl.arange(0, PARTS)[:, None]
    mask = (part < splits) & inside[None, :]
    step = tl.cast(splits, tl.int64) * B
    parts += part.to(tl.int64) * B + i[None, :]
    s = tl.load(s_pos + i, mask=inside, other=0.0)
    a = tl.load(parts, mask=mask, other=0.0)
    b = tl.load(parts + step, mask=mask, other=0.0)
    y = tl.load(parts + 2 * step, mask=mask, other=0.0)
    e = tl.load(parts + 3 * step, mask=mask, other=0.0)
    top_a = tl.full([BLOCK], 1.0, tl.float32)
    top_b = top_a
    if SEARCH:
        tops_a = tl.load(parts + 4 * step, mask=mask, other=LOWEST)
        tops_b = tl.load(parts + 5 * step, mask=mask, other=LOWEST)
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
        v = tl.div_rn(tl.sum(tl.load(parts + 4 * step, mask=mask, other=0.0), 0), r_a)
        divergence = tl.where(near, v + (2.0 * h * k * atanh_series(k) - u * h), divergence)
    above = tl.zeros([BLOCK], tl.float32)
    if COUNT:
        above = tl.sum(tl.load(parts + 6 * step, mask=mask, other=0.0), 0)
    tl.store(losses + i, alpha * loss_a + beta * divergence, mask=inside)
    step = tl.cast(B, tl.int64)
    stats += i
    tl.store(stats, top_a, mask=inside)
    tl.store(stats + step, tl.div_rn(1.0, r_a), mask=inside)
    tl.store(stats + 2 * step, top_b, mask=inside)
    tl.store(stats + 3 * step, tl.div_rn(1.0, r_b), mask=inside)
    tl.store(stats + 4 * step, alpha + beta * y, mask=inside)
    tl.store(stats + 5 * step, alpha * share_a - beta * ((1.0 - share_a) * y + (share_a - share_b)), mask=inside)
    tl.store(stats + 6 * step, s, mask=inside)
    tl.store(stats + 7 * step, above, mask=inside)


@triton.jit
def _row_stats(grad, stats, rows, B):
    """grad / r of a and of b, alpha + beta Y, s, and the maxima of a and of b: of the rows, zeros from B on"""
    inside, step = rows < B, tl.cast(B, tl.int64)
    g = tl.load(grad + rows, mask=inside, other=0.0)
    stats += rows
    top_a = tl.load(stats, mask=inside, other=0.0)
    p = g * tl.load(stats + step, mask=inside, other=0.0)
    top_b = tl.load(stats + 2 * step, mask=inside, other=0.0)
    q = g * tl.load(stats + 3 * step, mask=inside, other=0.0)
    c = tl.load(stats + 4 * step, mask=inside, other=0.0)
    s = tl.load(stats + 6 * step, mask=inside, other=0.0)
    return p, q, c, s, top_a, top_b


@triton.jit
def _weights(u, v, own, other, scale, beta, SEARCH: tl.constexpr):
    """dL/dS tau, S = u: what is due to the rows of S (`own` their stats), and what to its columns (`other`)"""
    p, _, c, s, top, _ = own
    p_other, q_other, _, _, top_a, top_b = other
    e_own = tl.exp2((u - top) * scale)
    e_q, e_p = e_own, tl.exp2((v - top_a) * scale)
    if SEARCH:
        e_q = tl.exp2((u - top_b) * scale)
    return e_own * p * (c - beta * (scale * LN2) * (v - s)), beta * (e_q * q_other - e_p * p_other)


@triton.jit
def _weigh_view(
    z, grad, stats, dz, scale, beta, B, M, negatives, stride, tiles, span, column,
    TARGET: tl.constexpr, SEARCH: tl.constexpr, PRECISION: tl.constexpr, STATIONARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """_weigh_back of online, or of the target: the transpose times online, in the next B of the M rows"""
    i, split = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    next_view = tl.cast(B, tl.int64) * stride
    x, y = (z + next_view, z) if TARGET else (z, z + next_view)
    xi = row_tile(x, i, B, stride, BLOCK_M, BLOCK_K)
    yi = row_tile(y, i, B, stride, BLOCK_M, BLOCK_K)
    rows = (i + tl.arange(0, BLOCK_M))[:, None]
    of_rows = _row_stats(grad, stats, rows, B)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    begin = tl.where(i < negatives, i - negatives + B, i - negatives)
    for tile in range(split * span, tl.minimum(split * span + span, tiles)):
        j = _wrapped(begin, tile, B, BLOCK_N)
        columns = (j + tl.arange(0, BLOCK_N))[None, :]
        u, v, yj = _logits(x, y, xi, yi, i, j, column, B, stride, PRECISION, STATIONARY, BLOCK_M, BLOCK_N, BLOCK_K)
        of_columns = _row_stats(grad, stats, columns, B)
        if TARGET:
            w, w_other = _weights(u, v, of_columns, of_rows, scale, beta, SEARCH)
        else:
            w, w_other = _weights(u, v, of_rows, of_columns, scale, beta, SEARCH)
        if _has_others(i, j, B, negatives, BLOCK_M, BLOCK_N):
            follows = _is_negative(rows, columns, B, negatives)
            precedes = _is_negative(columns, rows, B, negatives) & (columns < B)
            w = tl.where(precedes if TARGET else follows, w, 0.0)
            w_other = tl.where(follows if TARGET else precedes, w_other, 0.0)
        acc = tl.dot((w + w_other).to(z.dtype.element_ty), yj, acc, input_precision=PRECISION)
    dz += (tl.cast(split, tl.int64) * M + i) * stride + column
    if TARGET:
        dz += next_view
    at = tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_K)[None, :]
    tl.store(dz + at, acc, mask=rows < B)


@triton.jit(do_not_specialize=SIZES)
def _weigh_back(
    z, grad, stats, dz, temperature, scale, beta, B, M, negatives, stride, tiles, span,
    BOTH: tl.constexpr, SEARCH: tl.constexpr, PRECISION: tl.constexpr, STATIONARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz [splits, M, stride], BLOCK_K columns a program: dL/dS tau times the target over a span of tiles; or BOTH"""
    scale = log2_of(temperature, scale)
    stride = BLOCK_K if STATIONARY else stride
    blocks = stride // BLOCK_K
    column = tl.program_id(2) % blocks * BLOCK_K
    if tl.program_id(2) < blocks:
        _weigh_view(
            z, grad, stats, dz, scale, beta, B, M, negatives, stride, tiles, span, column,
            False, SEARCH, PRECISION, STATIONARY, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    elif BOTH:
        _weigh_view(
            z, grad, stats, dz, scale, beta, B, M, negatives, stride, tiles, span, column,
            True, SEARCH, PRECISION, STATIONARY, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


def _spans(x: Tensor, before: int, after: int, config: dict[str, int]) -> tuple[int, int, int, int]:
    """Blocks of rows, the tiles that may hold their pairs, how long spans of tiles are, and how many.

    A row has pairs with the rows from `before` before it to `after` after it, in cyclic order.
    """
    b, m, n = len(x), config["BLOCK_M"], config["BLOCK_N"]
    tiles = triton.cdiv(m + before + after, n) + (b % n > 0) + (m % n + before % n > 0)
    blocks, tiles = triton.cdiv(b, m), min(tiles, triton.cdiv(b, n))
    span = triton.cdiv(tiles, max(1, min(BLOCKS * launch.processors(x.device) // blocks, PARTS)))
    return blocks, tiles, span, triton.cdiv(tiles, span)


def _searches(temperature: float | Tensor, normalize: bool) -> bool:
    """Whether for the maxima. Where 1 is the maximum no sum of exp((s - 1) / tau) is below exp(-43): half of float32's
    range, the other half being for grad / r.
    """
    return logits_range(temperature, normalize) > 43


def _largest_weights(
    grad: Tensor, stats: Tensor, online: Tensor, target: Tensor, temperature: float | Tensor, beta: float,
    normalize: bool,
) -> Tensor:  # fmt: skip
    """[B]: no weight of the pair i, j is above the sum of i's and j's"""
    top, inv, s = stats[0:4:2], stats[1:4:2], stats[6]
    share = (1 - ((s - top) / temperature).exp() * inv).clamp(min=2**-22).amax(0)
    longest = [1.01 if normalize else torch.linalg.vector_norm(x.float(), dim=1).amax() for x in (online, target)]
    return grad * share * (stats[4].abs() + beta * (1 + 2 * longest[0] * longest[1] / temperature))


def forward(x: Arguments) -> tuple[Tensor, ...]:
    online, target, temperature, operand_dtype = x.online, x.target, x.temperature, x.operand_dtype
    b, d = online.shape
    losses = online.new_empty(b, dtype=torch.float32)
    stats = losses.new_empty(8, b)
    if b == 0:
        return losses, stats
    config = launch.nearest("relic", online.device, operand_dtype, d)["forward"]
    negatives, search, scale = x.negatives, _searches(temperature, x.normalize), launch.scale_of(temperature)
    with launch.on(online.device):
        z, _, s_pos = operand(online, target, x.normalize, operand_dtype, config["BLOCK_K"], rounded=True)
        stride = z.shape[1]
        blocks, tiles, span, splits = _spans(online, 0, negatives, config)
        parts = losses.new_empty(SUMS, splits, b)
        _weigh[blocks, splits](
            z, s_pos, parts, *scale, b, negatives, stride, tiles, span, search, x.count_exceeding,
            launch.precision(operand_dtype), stride == config["BLOCK_K"], **config,
        )  # fmt: skip
        _losses[triton.cdiv(b, 16),](
            s_pos, parts, *scale, x.alpha, x.beta, losses, stats, b, splits, search, x.count_exceeding, PARTS, 16,
            **launch.FUSED,
        )  # fmt: skip
    return losses, stats


def backward(grad: Tensor, x: Arguments, stats: Tensor, *unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    online, target, temperature, operand_dtype = x.online, x.target, x.temperature, x.operand_dtype
    gradients = x.gradients
    b, d = online.shape
    if b == 0:
        return torch.empty_like(online), target.new_empty(target.shape if gradients == 2 else 0), grad.new_zeros(())
    config = launch.nearest("relic", online.device, operand_dtype, d)["backward"]
    negatives, search, scale = x.negatives, _searches(temperature, x.normalize), launch.scale_of(temperature)
    with launch.on(online.device):
        z, inv_norm, _ = operand(online, target, x.normalize, operand_dtype, config["BLOCK_K"], rounded=True)
        stride = z.shape[1]
        w_scale = None
        if operand_dtype == torch.float16:
            sizes = _largest_weights(grad, stats, online, target, temperature, x.beta, x.normalize)
            w_scale = launch.half_scale(operand_dtype, sizes)
        weights = grad if w_scale is None else grad * w_scale
        blocks, tiles, span, splits = _spans(online, negatives, negatives, config)
        dz = grad.new_empty(splits, gradients * b, stride)
        _weigh_back[blocks, splits, gradients * stride // config["BLOCK_K"]](
            z, weights, stats, dz, *scale, x.beta, b, gradients * b, negatives, stride, tiles, span,
            gradients == 2, search, launch.precision(operand_dtype), stride == config["BLOCK_K"], **config,
        )  # fmt: skip
        learned = x.needs_grad[2]
        found, dots = input_gradients(
            (online, target), gradients, dz, inv_norm, stats[5], w_scale, scale, x.normalize, z,
            grad=grad, dotted=learned,
        )  # fmt: skip
    dtarget = found[1] if gradients == 2 else target.new_empty(0)
    return found[0], dtarget, -dots[:b].sum() / temperature if learned else grad.new_empty(0)
