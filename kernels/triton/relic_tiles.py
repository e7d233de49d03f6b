"""The tiles of S and of S^T of RELIC's pairs of crops: their logits, which of them are negatives, what they weigh."""

import triton
import triton.language as tl

from .rows import LN2, row_tile


@triton.jit
def pair_views(z, pair, B, stride, onlines, targets, ORDERED: tl.constexpr):
    """The operands of a pair's crops, [B, stride] each; with an order they are the pair's own, and else the crops'"""
    view = tl.cast(B, tl.int64) * stride
    if ORDERED:
        return z + pair * view, z + (onlines * targets + pair) * view
    return z + pair // targets * view, z + (onlines + pair % targets) * view


@triton.jit
def wrapped(begin, tile, B, BLOCK: tl.constexpr):
    """Where the block of BLOCK rows starts that is `tile` blocks, in cyclic order, after that of row `begin`"""
    return (begin // BLOCK + tile) % tl.cdiv(B, BLOCK) * BLOCK


@triton.jit
def logits(
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
def has_others(i, j, B, negatives, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether the tile at (i, j) holds anything but negatives"""
    return (negatives < B - 1) | ((i < j + BLOCK_N) & (j < i + BLOCK_M)) | (j + BLOCK_N > B)


@triton.jit
def is_negative(rows, columns, B, negatives):
    """Which columns are among the `negatives` rows that follow the row in cyclic order; rows below B"""
    steps = columns - rows
    steps = tl.where(steps < 0, steps + B, steps)
    return (steps > 0) & (steps <= negatives) & (columns < B)


@triton.jit
def row_stats(grad, stats, rows, B, w_scale):
    """grad w_scale / r of a and of b, alpha + beta Y, s, and the maxima of a and of b: of the rows, zeros from B on"""
    inside, step = rows < B, tl.cast(B, tl.int64)
    g = tl.load(grad + rows, mask=inside, other=0.0) * w_scale
    stats += rows
    top_a = tl.load(stats, mask=inside, other=0.0)
    p = g * tl.load(stats + step, mask=inside, other=0.0)
    top_b = tl.load(stats + 2 * step, mask=inside, other=0.0)
    q = g * tl.load(stats + 3 * step, mask=inside, other=0.0)
    c = tl.load(stats + 4 * step, mask=inside, other=0.0)
    s = tl.load(stats + 6 * step, mask=inside, other=0.0)
    return p, q, c, s, top_a, top_b


@triton.jit
def weights(u, v, own, other, scale, beta, SEARCH: tl.constexpr):
    """dL/dS tau, S = u: what is due to the rows of S (`own` their stats), and what to its columns (`other`)"""
    p, _, c, s, top, _ = own
    p_other, q_other, _, _, top_a, top_b = other
    e_own = tl.exp2((u - top) * scale)
    e_q, e_p = e_own, tl.exp2((v - top_a) * scale)
    if SEARCH:
        e_q = tl.exp2((u - top_b) * scale)
    return e_own * p * (c - beta * (scale * LN2) * (v - s)), beta * (e_q * q_other - e_p * p_other)
