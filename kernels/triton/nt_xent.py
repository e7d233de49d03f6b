"""NT-Xent in Triton: nothing of size M x M in memory, 5 M^2 D FLOP where the maximum is known, else 6; 2 for metrics.

E_ij = exp(s_ij / tau - m_i) over the negatives of row i, r_i their sum with the positive's term. Two unit rows have
s <= 1, so m = 1 / tau needs no search and makes E symmetric: the forward pass visits half the tiles and adds each to
its rows and to its columns. The gradient is dz = (W z - positives) / tau, W_ij = g_i E_ij / r_i + g_j E_ji / r_j.
The positives stay out of both matmuls: rounded inside W they would drown the gradient of aligned pairs.

Order of every sum is fixed, so the same input gives the same bits. Scratch, in bytes: z in the operands' dtype, padded
to a multiple of 64 columns; forward PANELS x 4 a row (x 8 with the maxima searched); backward D x 4 a row and
PROGRAMS blocks of rows more (flash), or D x 4 a row and one W block (panel).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import refuses  # noqa: F401
from .rows import (
    LN2,
    LOG2E,
    LOWEST,
    close,
    column_tile,
    fixed_maximum,
    input_gradients,
    load_scale,
    log2_scale,
    operand,
    row_tile,
)

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.nt_xent import Arguments

DISTRIBUTED = True
LACKS = ("views in one tensor", "query_ids", "decoupled form")

# These change from batch to batch: no compilation for each.
SIZES = ("N", "M", "panel", "span", "row0", "row1", "total", "column0", "width", "panels")

PANELS = 31  # odd, see _negative_sums; 31 * 16 programs fill 3.8 waves of an H100's 132 multiprocessors
PROGRAMS = 528  # of the flash backward: two waves of two on each of 132 multiprocessors
W_BLOCK = 4096  # rows and columns of the panel backward's W: 32 MiB in bf16


@triton.jit
def _similarities(
    z, i, j, M, stride, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """s [BLOCK_M, BLOCK_N] of the rows from i and from j, in steps of BLOCK_K columns of z"""
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, stride, BLOCK_K):
        a = row_tile(z + k, i, M, stride, BLOCK_M, BLOCK_K)
        b = column_tile(z + k, j, M, stride, BLOCK_N, BLOCK_K)
        s = tl.dot(a, b, s, input_precision=PRECISION)
    return s


@triton.jit
def _overlap(i, j, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return (i < j + BLOCK_N) & (j < i + BLOCK_M)


@triton.jit
def _has_others(i, j, N, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether the tile at (i, j) holds anything but negatives"""
    diagonal = _overlap(i, j, BLOCK_M, BLOCK_N)
    positives = _overlap(i + N, j, BLOCK_M, BLOCK_N) | _overlap(i, j + N, BLOCK_M, BLOCK_N)
    return diagonal | positives | (i + BLOCK_M > M) | (j + BLOCK_N > M)


@triton.jit
def _negatives(i, j, N, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Which pairs of the tile at (i, j) are negatives"""
    rows = i + tl.arange(0, BLOCK_M)[:, None]
    columns = j + tl.arange(0, BLOCK_N)[None, :]
    paired = (rows == columns) | (rows + N == columns) | (rows == columns + N)
    return (rows < M) & (columns < M) & ~paired


@triton.jit(do_not_specialize=SIZES)
def _negative_sums(
    z, r_parts, m_parts, scale, maximum, N, M, stride, panel, row0, row1,
    SEARCH: tl.constexpr, PRECISION: tl.constexpr, STATIONARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """r_parts[k, i], m_parts[k, i]: the sum of E_ij and the largest logit over the negatives j of row i in panel k.

    The rows are cut into an odd number P of panels. Program (a, d) has the pair of panels a and b = a + d mod P: with
    d <= P / 2 every pair once, which gives part b of panel a's rows and, by symmetry, part a of panel b's. With the
    maximum to search, columns would cost more than they save: all d, rows only, and maybe only those from row0 to row1.
    """
    scale = tl.load(scale)
    a = tl.program_id(0)
    b = (a + tl.program_id(1)) % (tl.num_programs(1) if SEARCH else tl.num_programs(0))
    columns_part = r_parts + a.to(tl.int64) * M
    rows_part = b.to(tl.int64) * M
    stride = BLOCK_K if STATIONARY else stride
    start = row0 + a * panel
    for i in range(start, tl.minimum(start + panel, row1), BLOCK_M):
        rows = i + tl.arange(0, BLOCK_M)
        r = tl.zeros([BLOCK_M], tl.float32)
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        if STATIONARY:
            zi = row_tile(z, i, M, stride, BLOCK_M, BLOCK_K)
        for j in range(b * panel, tl.minimum(b * panel + panel, M), BLOCK_N):
            columns = j + tl.arange(0, BLOCK_N)
            if STATIONARY:
                s = tl.dot(zi, column_tile(z, j, M, stride, BLOCK_N, BLOCK_K), input_precision=PRECISION)
            else:
                s = _similarities(z, i, j, M, stride, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
            if SEARCH:
                s = s * scale
                if _has_others(i, j, N, M, BLOCK_M, BLOCK_N):
                    s = tl.where(_negatives(i, j, N, M, BLOCK_M, BLOCK_N), s, float("-inf"))
                higher = tl.maximum(top, tl.max(s, 1))
                r = r * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
                top = higher
            else:
                e = tl.exp2(s * scale - maximum * LOG2E)
                if _has_others(i, j, N, M, BLOCK_M, BLOCK_N):
                    e = tl.where(_negatives(i, j, N, M, BLOCK_M, BLOCK_N), e, 0.0)
                r += tl.sum(e, 1)
                before = tl.load(columns_part + columns, mask=columns < tl.where(i > start, M, 0), other=0.0)
                tl.store(columns_part + columns, before + tl.sum(e, 0), mask=columns < tl.where(a != b, M, 0))
        tl.store(r_parts + rows_part + rows, r, mask=rows < M)
        if SEARCH:
            tl.store(m_parts + rows_part + rows, top, mask=rows < M)
        tl.debug_barrier()  # the columns' parts are read again by other threads


@triton.jit(do_not_specialize=SIZES)
def _losses(
    r_parts, m_parts, s_pos, losses, stats, scale, maximum, N, M, panels,
    SEARCH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses [M] and stats [3, M] = (m, 1 / r, r_neg / r) from the parts, in their order"""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < M
    part = tl.arange(0, PARTS)[:, None]
    at = part.to(tl.int64) * M + i[None, :]
    mask = (part < panels) & inside[None, :]
    r = tl.load(r_parts + at, mask=mask, other=0.0)
    positive = tl.load(s_pos + tl.where(i < N, i, i - N), mask=inside, other=0.0) * load_scale(scale)
    if SEARCH:
        tops = tl.load(m_parts + at, mask=mask, other=LOWEST)
        m = tl.maximum(tl.max(tops, 0), positive) * LN2
        top = m * LOG2E  # what the backward pass makes of m
        r = r * tl.exp2(tops - top[None, :])
    else:
        m = tl.zeros([BLOCK], tl.float32) + maximum
        top = m * LOG2E
    r, share, loss = close(tl.sum(r, 0), tl.exp2(positive - top), (top - positive) * LN2)
    tl.store(losses + i, loss, mask=inside)
    stats += i
    tl.store(stats, m, mask=inside)
    tl.store(stats + M, tl.div_rn(1.0, r), mask=inside)
    tl.store(stats + 2 * M.to(tl.int64), share, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _exceeding(
    z, s_pos, above, N, M, stride, row0, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """above [M], from row0: negatives that exceed the row's positive. _negative_sums has no registers left for it"""
    i = row0 + tl.program_id(0) * BLOCK_M
    rows = i + tl.arange(0, BLOCK_M)
    positive = tl.load(s_pos + tl.where(rows < N, rows, rows - N), mask=rows < M, other=0.0)
    count = tl.zeros([BLOCK_M], tl.float32)
    for j in range(0, M, BLOCK_N):
        s = _similarities(z, i, j, M, stride, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        if _has_others(i, j, N, M, BLOCK_M, BLOCK_N):
            s = tl.where(_negatives(i, j, N, M, BLOCK_M, BLOCK_N), s, float("-inf"))
        count += tl.sum((s > positive[:, None]).to(tl.float32), 1)
    tl.store(above + rows, count, mask=rows < M)


@triton.jit
def _row_stats(weights, m, i, M, maximum, SEARCH: tl.constexpr, BLOCK: tl.constexpr):
    """g / r, zeros from row M on, and the maximum times log2(e) of the rows from i"""
    rows = i + tl.arange(0, BLOCK)
    weight = tl.load(weights + rows, mask=rows < M, other=0.0)
    if SEARCH:
        maximum = tl.load(m + rows, mask=rows < M, other=0.0)
    return weight, maximum * LOG2E


@triton.jit
def _w_tile(
    s, i, j, weight_i, top_i, weight_j, top_j, scale, w_scale, N, M,
    SEARCH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """W of the tile at (i, j) from its similarities, 0 where the pair is no negative"""
    if SEARCH:
        s = s * scale
        w = tl.exp2(s - top_i[:, None]) * weight_i[:, None] + tl.exp2(s - top_j[None, :]) * weight_j[None, :]
    else:
        w = tl.exp2(s * scale - top_i) * (weight_i[:, None] + weight_j[None, :])
    if w_scale is not None:
        w = w * tl.load(w_scale)
    if _has_others(i, j, N, M, BLOCK_M, BLOCK_N):
        w = tl.where(_negatives(i, j, N, M, BLOCK_M, BLOCK_N), w, 0.0)
    return w


@triton.jit(do_not_specialize=SIZES)
def _flash(
    z, dz, weights, m, scale, maximum, w_scale, N, M, span, row0, row1, total,
    SEARCH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz [splits, total, BLOCK_K]: rows row0 to row1 of W z over the span of columns of each split"""
    scale = tl.load(scale)
    i = row0 + tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    zi = row_tile(z, i, M, BLOCK_K, BLOCK_M, BLOCK_K)
    weight_i, top_i = _row_stats(weights, m, i, M, maximum, SEARCH, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for j in range(split * span, tl.minimum(split * span + span, M), BLOCK_N):
        s = tl.dot(zi, column_tile(z, j, M, BLOCK_K, BLOCK_N, BLOCK_K), input_precision=PRECISION)
        weight_j, top_j = _row_stats(weights, m, j, M, maximum, SEARCH, BLOCK_N)
        w = _w_tile(s, i, j, weight_i, top_i, weight_j, top_j, scale, w_scale, N, M, SEARCH, BLOCK_M, BLOCK_N)
        zj = row_tile(z, j, M, BLOCK_K, BLOCK_N, BLOCK_K)
        acc = tl.dot(w.to(z.dtype.element_ty), zj, acc, input_precision=PRECISION)
    r = tl.arange(0, BLOCK_M)[:, None]
    to = dz + (tl.cast(split, tl.int64) * total + i - row0) * BLOCK_K + (r * BLOCK_K + tl.arange(0, BLOCK_K)[None, :])
    tl.store(to, acc, mask=i + r < row1)


@triton.jit(do_not_specialize=SIZES)
def _w_block(
    z, w, weights, m, scale, maximum, w_scale, N, M, stride, row0, column0, width,
    SEARCH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """w [.., width]: W of the rows from row0 and the width columns from column0, in the operands' dtype"""
    scale = tl.load(scale)
    i = row0 + tl.program_id(0) * BLOCK_M
    j = column0 + tl.program_id(1) * BLOCK_N
    s = _similarities(z, i, j, M, stride, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    weight_i, top_i = _row_stats(weights, m, i, M, maximum, SEARCH, BLOCK_M)
    weight_j, top_j = _row_stats(weights, m, j, M, maximum, SEARCH, BLOCK_N)
    tile = _w_tile(s, i, j, weight_i, top_i, weight_j, top_j, scale, w_scale, N, M, SEARCH, BLOCK_M, BLOCK_N)
    rows = i + tl.arange(0, BLOCK_M)[:, None]
    columns = j + tl.arange(0, BLOCK_N)[None, :]
    to = w + (rows - row0) * width + (columns - column0)
    tl.store(to, tile.to(w.dtype.element_ty), mask=(rows < M) & (columns < M))


def _ranges(n: int, own: slice | None) -> list[tuple[int, int]]:
    """Rows of both views' examples `own`; by default all, as one"""
    return [(0, 2 * n)] if own is None else [(own.start, own.stop), (n + own.start, n + own.stop)]


def _of(own: slice | None, x: Tensor) -> Tensor:
    """x [.., 2B], of the examples `own`, from x [.., 2N]"""
    return x if own is None else x.unflatten(-1, (2, -1))[..., own].flatten(-2).contiguous()


def _maximum(temperature: float | Tensor, normalize: bool, rows: int, own: slice | None) -> float | None:
    """None for a part of the batch: only where the maximum is searched for do rows go without their columns"""
    return fixed_maximum(temperature, normalize, rows) if own is None else None


def forward(x: Arguments, part: Part | None = None) -> tuple[Tensor, ...]:
    z0, z1, temperature, normalize, compute_dtype = x.z0, x.z1, x.temperature, x.normalize, x.operand_dtype
    assert z1 is not None  # see LACKS
    own = None if part is None else slice(part.first, part.first + part.rows)
    n, d = z0.shape
    m = 2 * n
    losses = z0.new_empty(m, dtype=torch.float32)
    stats, logged = losses.new_empty((3, m)), losses.new_empty((2 if x.count_exceeding else 0, m))
    if n == 0:
        return losses, logged, torch.empty_like(losses), stats
    precision = launch.precision(compute_dtype)
    config = launch.nearest("nt_xent", z0.device, compute_dtype, d)["forward"]
    maximum, scale = _maximum(temperature, normalize, m, own), log2_scale(temperature, z0)
    search = maximum is None
    block = config["BLOCK_M"]
    panel = triton.cdiv(triton.cdiv(m, PANELS), block) * block
    panels = triton.cdiv(m, panel)
    odd = panels // 2 * 2 + 1  # the last may have no rows
    with launch.on(z0.device):
        z, inv_norm, s_pos = operand(z0, z1, normalize, compute_dtype, config["BLOCK_K"])
        stride = z.shape[1]
        r_parts = losses.new_empty((odd, m))
        m_parts = torch.empty_like(r_parts) if search else None
        for row0, row1 in _ranges(n, own):
            grid = (triton.cdiv(row1 - row0, panel), odd) if search else (odd, odd // 2 + 1)
            _negative_sums[grid](
                z, r_parts, m_parts, scale, maximum, n, m, stride, panel, row0, row1,
                search, precision, stride == config["BLOCK_K"], **config,
            )  # fmt: skip
        _losses[triton.cdiv(m, 128),](
            r_parts, m_parts, s_pos, losses, stats, scale, maximum, n, m, panels, search, 32, 128, **launch.FUSED
        )
        if x.count_exceeding:
            torch.cat([s_pos, s_pos], out=logged[0])
            for row0, row1 in _ranges(n, own):
                _exceeding[triton.cdiv(row1 - row0, block),](
                    z, s_pos, logged[1], n, m, stride, row0, precision, **config
                )
    return _of(own, losses), _of(own, logged), inv_norm, _of(own, stats)


def backward(
    grad: Tensor, x: Arguments, inv_norm: Tensor, stats: Tensor, part: Part | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    z0, z1, temperature, normalize, compute_dtype = x.z0, x.z1, x.temperature, x.normalize, x.operand_dtype
    assert z1 is not None  # see LACKS
    own = None if part is None else slice(part.first, part.first + part.rows)
    n, d = z0.shape
    views = (z0, z1) if own is None else (z0[own], z1[own])
    if n == 0:
        return torch.empty_like(views[0]), torch.empty_like(views[1]), grad.new_zeros(())
    precision = launch.precision(compute_dtype)
    configs = launch.nearest("nt_xent", z0.device, compute_dtype, d)
    maximum, scale = _maximum(temperature, normalize, 2 * n, own), log2_scale(temperature, z0)
    w_z, config = (_w_z_flash, configs["flash"]) if "flash" in configs else (_w_z_panels, configs["panels"])
    with launch.on(z0.device):
        z, _, _ = operand(z0, z1, normalize, compute_dtype, config["BLOCK_K"])
        pulls = grad * stats[2]
        w_scale = launch.half_scale(compute_dtype, pulls)
        rows = (grad * stats[1], stats[0] if maximum is None else None, scale, maximum, w_scale)
        dz = w_z(z, rows, maximum is None, precision, config, own)
        # (1 - p) of the positive, of both its rows; 1 - p itself would cancel
        pull = _of(own, pulls).view(2, -1).sum(0)
        (dz0, dz1), dots = input_gradients(views, 2, dz, _of(own, inv_norm), pull, w_scale, scale, normalize)
        # dL/d(1/tau) = (tau / 2) sum_i <z_i, dz_i>
        return dz0, dz1, dots.sum() * (-0.5 / temperature)


def _w_z_flash(
    z: Tensor, rows: tuple[Any, ...], search: bool, precision: str, config: dict[str, int], own: slice | None
) -> Tensor:
    """[splits, 2B, stride] whose sum over the splits is W z"""
    m, stride = z.shape
    ranges = _ranges(m // 2, own)
    total = sum(row1 - row0 for row0, row1 in ranges)
    splits = triton.cdiv(PROGRAMS, triton.cdiv(total, config["BLOCK_M"]))
    span = triton.cdiv(triton.cdiv(m, splits), config["BLOCK_N"]) * config["BLOCK_N"]
    splits = triton.cdiv(m, span)
    dz = z.new_empty((splits, total, stride), dtype=torch.float32)
    written = 0
    for row0, row1 in ranges:
        _flash[triton.cdiv(row1 - row0, config["BLOCK_M"]), splits](
            z, dz.view(-1)[written * stride :], *rows, m // 2, m, span, row0, row1, total, search, precision, **config
        )
        written += row1 - row0
    return dz


def _w_z_panels(
    z: Tensor, rows: tuple[Any, ...], search: bool, precision: str, config: dict[str, int], own: slice | None
) -> Tensor:
    """[1, 2B, stride]: W z by blocks of W; of all rows those on and above the diagonal, each also used transposed"""
    m, stride = z.shape
    ranges = _ranges(m // 2, own)
    dz = z.new_zeros((1, sum(row1 - row0 for row0, row1 in ranges), stride), dtype=torch.float32)
    written = 0
    for row0, row1 in ranges:
        for i in range(row0, row1, W_BLOCK):
            zi = z[i : min(i + W_BLOCK, row1)]
            blocks = triton.cdiv(len(zi), config["BLOCK_M"])
            for j in range(i if own is None else 0, m, W_BLOCK):
                zj = z[j : j + W_BLOCK]
                w = z.new_empty((blocks * config["BLOCK_M"], len(zj)))
                _w_block[blocks, triton.cdiv(len(zj), config["BLOCK_N"])](
                    z, w, *rows, m // 2, m, stride, i, j, len(zj), search, precision, **config
                )
                w = w[: len(zi)]
                launch.multiply(dz[0, written : written + len(zi)], w, zj, beta=1.0)
                if own is None and i != j:
                    launch.multiply(dz[0, j : j + W_BLOCK], w.t(), zi, beta=1.0)
            written += len(zi)
    return dz
