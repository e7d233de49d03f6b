"""Columns of [N, D] embeddings over the batch: their moments, the matmul operands made of them, and the way back.

Statistics are sums in a fixed order: exact at any mean, the same bits every run. The rows are cut into at most PARTS
parts for which programs run side by side; whoever needs a sum adds the parts up, in their order. In float32 are sums of
every BLOCK_R-th row of a part, of differences from a number near the mean; all others are float64.

Operands are [V, rows, stride] for V views: centred or batch-normalised, rounded once, with zeros in rows from N on and
in columns from D on, up to multiples of PAD, so that matmuls need not look where the contraction ends.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .rows import load_at

# These change from batch to batch: no compilation for each. Steps and D may be multiples of 16: loads are wide then.
SIZES = ("N", "span", "splits", "count", "tiles", "outer", "inner")

PAD = 128  # the largest step of a contraction in <op>.json
PARTS = 32
PROGRAMS = 8  # on each multiprocessor, about
BLOCKS = {"PARTS": PARTS, "BLOCK_R": 64, "BLOCK_D": 32, "num_warps": 8, **launch.FUSED}


@triton.jit
def _centred(x, rows, columns, mean, rest, N, D):
    """x - mean - rest, zeros outside of x"""
    return tl.where((rows < N)[:, None], load_at(x, rows, columns, N, D) - mean[None, :] - rest[None, :], 0.0)


@triton.jit
def _in_two(mean):
    """A float64 number as two of float32: what they are taken from is as exact as it can be in float32"""
    high = mean.to(tl.float32)
    return high, (mean - high.to(tl.float64)).to(tl.float32)


@triton.jit
def _down(sums):
    """[BLOCK_D], float64, of sums [BLOCK_R, BLOCK_D]"""
    return tl.sum(sums.to(tl.float64), 0)


@triton.jit
def _part(x, parts, view, columns, N, D, span, splits, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """parts[view, :, split, columns]: the mean of this split's rows and their squared distance from it"""
    split = tl.program_id(1)
    first, last = split * span, tl.minimum(split * span + span, N)
    tile = load_at(x, first + tl.arange(0, BLOCK_R), columns, N, D)
    near = tl.sum(tile, 0) * (1.0 / tl.minimum(tl.maximum(last - first, 1), BLOCK_R).to(tl.float32))
    sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    of_squares = sums
    for i in range(first, last, BLOCK_R):
        rows = i + tl.arange(0, BLOCK_R)
        off = tl.where((rows < N)[:, None], load_at(x, rows, columns, N, D) - near[None, :], 0.0)
        sums += off
        of_squares += off * off
    total, squares = _down(sums), _down(of_squares)
    off = total * (1.0 / tl.maximum(last - first, 1).to(tl.float64))
    squares -= total * off
    parts += (view * 2 * splits + split) * D + columns
    tl.store(parts, near.to(tl.float64) + off, mask=columns < D)
    tl.store(parts + splits * D, tl.where(squares < 0.0, 0.0, squares), mask=columns < D)  # NaN stays


@triton.jit(do_not_specialize=SIZES)
def _moments(x, y, parts, N, D, span, splits, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """parts [V, 2, splits, D], float64, of the views x and y"""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    _part(x, parts, 0, columns, N, D, span, splits, BLOCK_R, BLOCK_D)
    if y is not None:
        _part(y, parts, 1, columns, N, D, span, splits, BLOCK_R, BLOCK_D)


@triton.jit
def _parts(parts, k, columns, D, splits, PARTS: tl.constexpr):
    """[PARTS, columns] of the k-th sum, zeros from `splits` on"""
    part = tl.arange(0, PARTS)[:, None]
    at = parts + (k * splits + part) * D + columns[None, :]
    return tl.load(at, mask=(part < splits) & (columns < D)[None, :], other=0.0)


@triton.jit
def _statistics(parts, view, columns, N, D, span, splits, PARTS: tl.constexpr):
    """mean and biased variance of the view's columns, float64"""
    means = _parts(parts, 2 * view, columns, D, splits, PARTS)
    first = tl.arange(0, PARTS)[:, None] * span
    count = tl.where(first < N, tl.minimum(span, N - first), 0).to(tl.float64)
    mean = tl.sum(count * means, 0) / N
    off = means - mean[None, :]
    squares = tl.sum(_parts(parts, 2 * view + 1, columns, D, splits, PARTS), 0) + tl.sum(count * off * off, 0)
    return mean, squares / N


@triton.jit(do_not_specialize=SIZES)
def _operands(
    x, y, parts, out, moments, dots, eps, N, D, rows, stride, row_step, column_step, span, splits,
    NORMALIZE: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [V, rows, stride], a and b, and dots [K, splits, D], float64: sums down their columns.

    Batch-normalised: a b before and after rounding. Centred: a a, for two views b b and (x - y)^2 too, after rounding;
    and moments [V, 3, D], the mean and sqrt(unbiased variance + eps), the third row left to others.
    """
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    mean_x, var_x = _statistics(parts, 0, columns, N, D, span, splits, PARTS)
    rstd_x = tl.full([BLOCK_D], 1.0, tl.float32)
    rstd_y = rstd_x
    if y is not None:
        mean_y, var_y = _statistics(parts, 1, columns, N, D, span, splits, PARTS)
    if NORMALIZE:
        exact_x, exact_y = 1.0 / tl.sqrt(var_x + eps), 1.0 / tl.sqrt(var_y + eps)
        rstd_x, rstd_y = exact_x.to(tl.float32), exact_y.to(tl.float32)
    else:
        mine = columns < tl.where(split == 0, D, 0)
        tl.store(moments + columns, mean_x.to(tl.float32), mask=mine)
        tl.store(moments + D + columns, tl.sqrt(var_x * N / (N - 1) + eps).to(tl.float32), mask=mine)
        if y is not None:
            tl.store(moments + 3 * D + columns, mean_y.to(tl.float32), mask=mine)
            tl.store(moments + 4 * D + columns, tl.sqrt(var_y * N / (N - 1) + eps).to(tl.float32), mask=mine)
    high_x, low_x = _in_two(mean_x)
    if y is not None:
        high_y, low_y = _in_two(mean_y)
    first = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    second = first
    third = first
    for i in range(split * span, tl.minimum(split * span + span, rows), BLOCK_R):
        r = i + tl.arange(0, BLOCK_R)
        to = out + tl.cast(i, tl.int64) * row_step + tl.cast(tl.program_id(0), tl.int64) * BLOCK_D * column_step
        to += tl.arange(0, BLOCK_R)[:, None] * row_step + tl.arange(0, BLOCK_D)[None, :] * column_step
        mask = (r < rows)[:, None] & (columns < stride)[None, :]
        v = _centred(x, r, columns, high_x, low_x, N, D)
        a = (v * rstd_x[None, :]).to(out.dtype.element_ty)
        tl.store(to, a, mask=mask)
        a = a.to(tl.float32)
        if y is not None:
            w = _centred(y, r, columns, high_y, low_y, N, D)
            b = (w * rstd_y[None, :]).to(out.dtype.element_ty)
            tl.store(to + tl.cast(rows, tl.int64) * stride, b, mask=mask)
            b = b.to(tl.float32)
        if NORMALIZE:
            first += v * w
            second += a * b
        else:
            first += a * a
            if y is not None:
                second += b * b
                apart = load_at(x, r, columns, N, D) - load_at(y, r, columns, N, D)
                third += apart * apart
    dots += split * D + columns
    of_first = _down(first)
    if NORMALIZE:
        of_first = of_first * exact_x * exact_y
    tl.store(dots, of_first, mask=columns < D)
    if y is not None:
        tl.store(dots + splits * D, _down(second), mask=columns < D)
        if not NORMALIZE:
            tl.store(dots + 2 * splits * D, _down(third), mask=columns < D)


@triton.jit
def _factors(x, y, parts, share, t_scale, eps, weight, columns, N, D, span, splits, PARTS: tl.constexpr):
    """mean, in two, and 1 / sqrt(var + eps) of both views' columns, and what t and the other view are multiplied by"""
    mean_x, var_x = _statistics(parts, 0, columns, N, D, span, splits, PARTS)
    mean_y, var_y = _statistics(parts, 1, columns, N, D, span, splits, PARTS)
    rstd_x = (1.0 / tl.sqrt(var_x + eps)).to(tl.float32)
    rstd_y = (1.0 / tl.sqrt(var_y + eps)).to(tl.float32)
    if t_scale is not None:
        weight = weight / tl.load(t_scale)
    other = tl.zeros_like(rstd_x)
    if share is not None:
        other = tl.load(share + columns, mask=columns < D, other=0.0)
    mean_x, rest_x = _in_two(mean_x)
    mean_y, rest_y = _in_two(mean_y)
    return mean_x, rest_x, rstd_x, mean_y, rest_y, rstd_y, weight, other


@triton.jit(do_not_specialize=SIZES)
def _backward_sums(
    x, y, t, parts, share, t_scale, sums, eps, weight, N, D, span, splits,
    PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sums [4, splits, D], float64: of g and of a g, for both views"""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    mean_x, rest_x, rstd_x, mean_y, rest_y, rstd_y, weight, other = _factors(
        x, y, parts, share, t_scale, eps, weight, columns, N, D, span, splits, PARTS
    )
    g_x = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    ag_x, g_y, ag_y = g_x, g_x, g_x
    for i in range(split * span, tl.minimum(split * span + span, N), BLOCK_R):
        rows = i + tl.arange(0, BLOCK_R)
        a = _centred(x, rows, columns, mean_x, rest_x, N, D) * rstd_x[None, :]
        b = _centred(y, rows, columns, mean_y, rest_y, N, D) * rstd_y[None, :]
        g = load_at(t, rows, columns, N, D) * weight + b * other[None, :]
        g_x += g
        ag_x += a * g
        g = load_at(t + tl.cast(N, tl.int64) * D, rows, columns, N, D) * weight + a * other[None, :]
        g_y += g
        ag_y += b * g
    sums += split * D + columns
    tl.store(sums, _down(g_x), mask=columns < D)
    tl.store(sums + splits * D, _down(ag_x), mask=columns < D)
    tl.store(sums + 2 * splits * D, _down(g_y), mask=columns < D)
    tl.store(sums + 3 * splits * D, _down(ag_y), mask=columns < D)


@triton.jit
def _mean(sums, k, columns, N, D, splits, PARTS: tl.constexpr):
    return (tl.sum(_parts(sums, k, columns, D, splits, PARTS), 0) / N).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=SIZES)
def _backward(
    x, y, t, parts, share, t_scale, sums, grad, dx, dy, eps, weight, N, D, span, splits,
    PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx = (2 grad / N^2) rstd (g - mean(g) - a mean(a g)), g = weight t + share b; dy alike"""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    mean_x, rest_x, rstd_x, mean_y, rest_y, rstd_y, weight, other = _factors(
        x, y, parts, share, t_scale, eps, weight, columns, N, D, span, splits, PARTS
    )
    g_x, ag_x = _mean(sums, 0, columns, N, D, splits, PARTS), _mean(sums, 1, columns, N, D, splits, PARTS)
    g_y, ag_y = _mean(sums, 2, columns, N, D, splits, PARTS), _mean(sums, 3, columns, N, D, splits, PARTS)
    scale = 2.0 / (tl.cast(N, tl.float64) * N)
    if grad is not None:
        scale = scale * tl.load(grad)
    scale_x, scale_y = (rstd_x * scale).to(tl.float32), (rstd_y * scale).to(tl.float32)
    for i in range(split * span, tl.minimum(split * span + span, N), BLOCK_R):
        rows = i + tl.arange(0, BLOCK_R)
        a = _centred(x, rows, columns, mean_x, rest_x, N, D) * rstd_x[None, :]
        b = _centred(y, rows, columns, mean_y, rest_y, N, D) * rstd_y[None, :]
        at = rows.to(tl.int64)[:, None] * D + columns[None, :]
        mask = (rows < N)[:, None] & (columns < D)[None, :]
        g = load_at(t, rows, columns, N, D) * weight + b * other[None, :]
        out = (g - g_x - a * ag_x) * scale_x[None, :]
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=mask)
        g = load_at(t + tl.cast(N, tl.int64) * D, rows, columns, N, D) * weight + a * other[None, :]
        out = (g - g_y - b * ag_y) * scale_y[None, :]
        tl.store(dy + at, out.to(dy.dtype.element_ty), mask=mask)


def padded(size: int) -> int:
    return triton.cdiv(size, PAD) * PAD


def cut(x: Tensor) -> tuple[int, int]:
    """Rows of a part, padding included, and how many parts: enough for PROGRAMS programs"""
    n, d = padded(x.shape[0]), x.shape[1]
    step = BLOCKS["BLOCK_R"]
    programs = PROGRAMS * launch.processors(x.device)
    splits = min(PARTS, triton.cdiv(programs, triton.cdiv(d, BLOCKS["BLOCK_D"])), triton.cdiv(n, step))
    span = triton.cdiv(n, splits * step) * step
    return span, triton.cdiv(n, span)


def moments_of(x: Tensor, y: Tensor | None) -> Tensor:
    """Of the views' columns, in parts: for `operands` and `normalize_backward`"""
    n, d = x.shape
    span, splits = cut(x)
    parts = x.new_empty((1 if y is None else 2, 2, splits, d), dtype=torch.float64)
    _moments[triton.cdiv(d, BLOCKS["BLOCK_D"]), splits](x, y, parts, n, d, span, splits, **BLOCKS)
    return parts


def operands(
    x: Tensor,
    y: Tensor | None,
    operand: torch.dtype,
    eps: float,
    *,
    by_columns: bool,
    moments: Tensor | None = None,
    parts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operands [V, rows, stride] and their dots; batch-normalised, or centred where moments [V, 3, D] are given.

    by_columns: how they are stored; matmul kernels want the contraction contiguous. parts: moments_of(x, y), where they
    are at hand.
    """
    n, d = x.shape
    (span, splits), rows, stride = cut(x), padded(n), padded(d)
    views = 1 if y is None else 2
    out = x.new_empty((views, stride, rows) if by_columns else (views, rows, stride), dtype=operand)
    out = out.mT if by_columns else out
    dots = x.new_empty((2 if moments is None else 2 * views - 1, splits, d), dtype=torch.float64)
    parts = moments_of(x, y) if parts is None else parts
    _operands[triton.cdiv(stride, BLOCKS["BLOCK_D"]), splits](
        x, y, parts, out, moments, dots, eps, n, d, rows, stride, out.stride(1), out.stride(2), span, splits,
        moments is None, **BLOCKS,
    )  # fmt: skip
    return out, dots


def normalize_backward(
    x: Tensor,
    y: Tensor,
    t: Tensor,
    eps: float,
    weight: float,
    *,
    t_scale: Tensor | None = None,
    grad: Tensor | None = None,
    share: Tensor | None = None,
    parts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx, dy; the normalised views a and b have (2 / N^2) (weight t / t_scale + share b): t [2, N, D], share [D].

    parts: as `operands` has them.
    """
    n, d = x.shape
    span, splits = cut(x)
    grid = triton.cdiv(d, BLOCKS["BLOCK_D"]), splits
    parts = moments_of(x, y) if parts is None else parts
    sums = parts.new_empty((4, splits, d))
    dx, dy = torch.empty_like(x), torch.empty_like(y)
    numbers = (eps, weight, n, d, span, splits)
    _backward_sums[grid](x, y, t, parts, share, t_scale, sums, *numbers, **BLOCKS)
    _backward[grid](x, y, t, parts, share, t_scale, sums, grad, dx, dy, *numbers, **BLOCKS)
    return dx, dy


@triton.jit(do_not_specialize=SIZES)
def _total(terms, tiles_sums, loss, weight, count, tiles, outer, inner, BLOCK: tl.constexpr):
    """loss [] = sum of terms [count] + weight (sum of tiles_sums [tiles]) / (outer inner^2), in float64"""
    total = tl.zeros([BLOCK], tl.float64)
    for i in range(0, count, BLOCK):
        at = i + tl.arange(0, BLOCK)
        total += tl.load(terms + at, mask=at < count, other=0.0)
    squares = tl.zeros([BLOCK], tl.float64)
    for i in range(0, tiles, BLOCK):
        at = i + tl.arange(0, BLOCK)
        squares += tl.load(tiles_sums + at, mask=at < tiles, other=0.0)
    scale = tl.cast(inner, tl.float64)
    scale = weight / (scale * scale * outer)
    tl.store(loss, (tl.sum(total, 0) + tl.sum(squares, 0) * scale).to(tl.float32))


def total(terms: Tensor, tiles_sums: Tensor, weight: float, outer: int, inner: int) -> Tensor:
    """[]: the sum of terms and of weight tiles_sums / (outer inner^2)"""
    loss = terms.new_empty((), dtype=torch.float32)
    _total[(1,)](
        terms, tiles_sums, loss, weight, len(terms), tiles_sums.numel(), outer, inner,
        BLOCK=2048, num_warps=8, **launch.FUSED,
    )  # fmt: skip
    return loss
