"""NT-Xent in Triton: nothing of size M x M in memory, 5 M^2 D FLOP where the maximum is known, else 6; metrics: 2 for
each view but one.

E_ij = exp(s_ij / tau - m_i) over the negatives of row i, r_i their sum with the positive's term. Two unit rows have
s <= 1, so m = 1 / tau needs no search and makes E symmetric: the forward pass visits half the tiles and adds each to
its rows and to its columns. The gradient is dz = (W z - positives) / tau, W_ij = g_i E_ij / r_i + g_j E_ji / r_j.
The positives stay out of both matmuls: rounded inside W they would drown the gradient of aligned pairs. Of more than
two views a row has several: r is one sum for each, 1 / r in W their mean, which only what closes the sums knows of.

Order of every sum is fixed on a chip, so the same input gives the same bits. Scratch, in bytes: z in the operands'
dtype, padded to a multiple of 64 columns; forward 4 a row and panel (8 with the maxima searched), PANELS at most;
backward D x 4 a row, and BLOCKS blocks of rows a multiprocessor more (flash), or one W block (panel).
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, pairs, views, w_z
from .launch import refuses  # noqa: F401
from .pairs import products
from .rows import (
    LN2,
    LOG2E,
    LOWEST,
    close,
    close_decoupled,
    column_tile,
    fixed_maximum,
    input_gradients,
    log2_of,
    operand,
    row_tile,
)
from .views import of_negatives, row_ranges

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.nt_xent import Arguments

DISTRIBUTED = True

# These change from batch to batch: no compilation for each.
SIZES = ("N", "M", "panel", "row0", "row1", "panels")

PANELS = 64  # at most: their parts are scratch, and read by _losses at once


@triton.jit(do_not_specialize=SIZES)
def _negative_sums(
    z, classes, r_parts, m_parts, temperature, scale, maximum, N, M, stride, panel, row0, row1,
    SEARCH: tl.constexpr, PRECISION: tl.constexpr, STATIONARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """r_parts[k, i], m_parts[k, i]: the sum of E_ij and the largest logit over the negatives j of row i in panel k.

    The rows are cut into P panels, an odd number, of which the last may have none. Program (a, d) has the pair of
    panels a and b = a + d mod P: with d <= P / 2 every pair once, which gives part b of panel a's rows and, by
    symmetry, part a of panel b's. With the maximum to search, columns would cost more than they save: all d, rows only,
    and maybe only those from row0 to row1.
    """
    scale = log2_of(temperature, scale)
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
                s = products(z, z, i, j, M, M, stride, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
            if SEARCH:
                s = s * scale
                s = of_negatives(s, i, j, float("-inf"), classes, N, M, BLOCK_M, BLOCK_N)
                higher = tl.maximum(top, tl.max(s, 1))
                r = r * tl.exp2(top - higher) + tl.sum(tl.exp2(s - higher[:, None]), 1)
                top = higher
            else:
                e = tl.exp2(s * scale - maximum * LOG2E)
                e = of_negatives(e, i, j, 0.0, classes, N, M, BLOCK_M, BLOCK_N)
                r += tl.sum(e, 1)
                before = tl.load(columns_part + columns, mask=columns < tl.where(i > start, M, 0), other=0.0)
                tl.store(columns_part + columns, before + tl.sum(e, 0), mask=columns < tl.where(a != b, M, 0))
        tl.store(r_parts + rows_part + rows, r, mask=rows < M)
        if SEARCH:
            tl.store(m_parts + rows_part + rows, top, mask=rows < M)
        tl.debug_barrier()  # the columns' parts are read again by other threads


@triton.jit
def _positives(s_pos, i, N, VIEWS: tl.constexpr):
    """Where the rows' first positives are: [VIEWS - 1, VIEWS N], and of two views a number for both, [N]"""
    return s_pos + (tl.where(i < N, i, i - N) if VIEWS == 2 else i)


@triton.jit(do_not_specialize=SIZES)
def _losses(
    r_parts, m_parts, s_pos, weights, losses, stats, temperature, scale, maximum, N, M, panels,
    SEARCH: tl.constexpr, VIEWS: tl.constexpr, DECOUPLED: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses [M] and stats [VIEWS + 1, M] of ops/nt_xent.py from the parts, in their order"""
    SHARE: tl.constexpr = 1 / (VIEWS - 1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < M
    part = tl.arange(0, PARTS)[:, None]
    at = part.to(tl.int64) * M + i[None, :]
    mask = (part < panels) & inside[None, :]
    r = tl.load(r_parts + at, mask=mask, other=0.0)
    scale, s_pos, step = log2_of(temperature, scale), _positives(s_pos, i, N, VIEWS), M.to(tl.int64)
    if SEARCH:
        tops = tl.load(m_parts + at, mask=mask, other=LOWEST)
        m = tl.max(tops, 0)
        if VIEWS == 2 and not DECOUPLED:
            m = tl.maximum(m, tl.load(s_pos, mask=inside, other=0.0) * scale)
        m = m * LN2
        top = m * LOG2E  # what the backward pass makes of m
        r = r * tl.exp2(tops - top[None, :])
    else:
        m = tl.zeros([BLOCK], tl.float32) + maximum
        top = m * LOG2E
    r, stats = tl.sum(r, 0), stats + i
    none = tl.zeros([BLOCK], tl.float32)
    if DECOUPLED:
        weight, logits = none + 1.0, none
        if weights is not None:
            weight = tl.load(weights + i, mask=inside, other=0.0)
        for k in range(1, VIEWS):
            logits += tl.load(s_pos + (k - 1) * step, mask=inside, other=0.0) * scale
            tl.store(stats + (k + 1) * step, weight * SHARE, mask=inside)
        r, loss = close_decoupled(r, (top - weight * (logits * SHARE)) * LN2)
        inverse = tl.div_rn(1.0, r)
    else:
        loss, inverse = none, none
        for k in range(1, VIEWS):
            positive = tl.load(s_pos + (k - 1) * step, mask=inside, other=0.0) * scale
            highest, shrink = top, none + 1.0
            if SEARCH and VIEWS > 2:  # beside an easy one's exponential the others' may be nothing
                highest = tl.maximum(top, positive)
                shrink = tl.exp2(top - highest)
            total, share, one = close(r * shrink, tl.exp2(positive - highest), (highest - positive) * LN2)
            loss += one * SHARE
            inverse += tl.div_rn(shrink, total) * SHARE
            tl.store(stats + (k + 1) * step, share * SHARE, mask=inside)
    tl.store(losses + i, loss, mask=inside)
    tl.store(stats, m, mask=inside)
    tl.store(stats + step, inverse, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _exceeding(
    z, classes, s_pos, above, N, M, stride, row0,
    VIEWS: tl.constexpr, PRECISION: tl.constexpr, STATIONARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """above [M], from row0: negatives that exceed the row's positive. _negative_sums has no registers left for it"""
    i = row0 + tl.program_id(0) * BLOCK_M
    rows = i + tl.arange(0, BLOCK_M)
    positive = tl.load(_positives(s_pos, rows, N, VIEWS), mask=rows < M, other=0.0)
    count = tl.zeros([BLOCK_M], tl.float32)
    if STATIONARY:
        zi = row_tile(z, i, M, BLOCK_K, BLOCK_M, BLOCK_K)
    for j in range(0, M, BLOCK_N):
        if STATIONARY:
            s = tl.dot(zi, column_tile(z, j, M, BLOCK_K, BLOCK_N, BLOCK_K), input_precision=PRECISION)
        else:
            s = products(z, z, i, j, M, M, stride, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        s = of_negatives(s, i, j, float("-inf"), classes, N, M, BLOCK_M, BLOCK_N)
        count += tl.sum((s > positive[:, None]).to(tl.float32), 1)
    tl.store(above + rows, count, mask=rows < M)


def _two(x: Arguments) -> tuple[Tensor, Tensor] | None:
    """The views, if they are no more"""
    if x.z1 is not None:
        return x.z0, x.z1
    return (x.z0[0], x.z0[1]) if len(x.z0) == 2 else None


def _sizes(x: Arguments) -> tuple[int, int, int]:
    """V, N, D"""
    return (2, *x.z0.shape) if x.z1 is not None else tuple(x.z0.shape)  # type: ignore[return-value]


def _operand(x: Arguments, step: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """z and inv_norm of all rows; of two views s_pos [N] too"""
    if pair := _two(x):
        return operand(*pair, x.normalize, x.operand_dtype, step)
    return *pairs.operand(x.z0.flatten(0, 1), x.normalize, x.operand_dtype, step), None


def _classes(x: Arguments) -> Tensor | None:
    """[V N]: pairs of one are no negatives; None where those of one example are at N rows from each other"""
    v, n, _ = _sizes(x)
    if x.query_ids is None and v == 2:
        return None
    ids = torch.arange(n, device=x.z0.device, dtype=torch.int32) if x.query_ids is None else x.query_ids
    return ids.repeat(v)


def _of(own: slice | None, v: int, x: Tensor) -> Tensor:
    """x [.., V B], of the examples `own`, from x [.., V N]"""
    return x if own is None else x.unflatten(-1, (v, -1))[..., own].flatten(-2).contiguous()


@functools.lru_cache(1024)
def _panels(m: int, rows: int, search: bool, block: int, processors: int) -> tuple[int, float]:
    """How long they are, in whole blocks, and which share of the chip works on pairs that are needed: a program takes
    as long as it has pairs, and all wait for the multiprocessor with the most of them.
    """

    def time(panel: int) -> int:
        n = triton.cdiv(m, panel)
        programs = triton.cdiv(rows, panel) * n if search else n * (n + 1) // 2
        return triton.cdiv(programs, processors) * panel**2

    lengths = {triton.cdiv(triton.cdiv(m, n), block) * block for n in range(1, PANELS + 1)}
    panel = min(lengths, key=lambda length: (time(length), -length))
    return panel, (rows * m if search else m * m / 2) / (processors * time(panel))


def _schedule(
    m: int, rows: int, search: bool, config: dict[str, int], dtype: torch.dtype, processors: int
) -> tuple[int, dict[str, int]]:
    """How long panels are, in whole tiles either way, and the config: smaller tiles where a small batch has too few"""
    block = max(config["BLOCK_M"], config["BLOCK_N"])
    panel, share = _panels(m, rows, search, block, processors)
    if block > 64 and dtype != torch.float32:  # whose finer tiles spill with 8 warps or with 4
        half = block // 2
        finer, of_finer = _panels(m, rows, search, half, processors)
        if of_finer > 1.25 * share:  # they read their operands more often
            tile = {name: min(config[name], half) for name in ("BLOCK_M", "BLOCK_N")}
            return finer, config | tile
    return panel, config


def _maximum(temperature: float | Tensor, normalize: bool, rows: int, own: slice | None) -> float | None:
    """None for a part of the batch: only where the maximum is searched for do rows go without their columns"""
    return fixed_maximum(temperature, normalize, rows) if own is None else None


def forward(x: Arguments, part: Part | None = None) -> tuple[Tensor, ...]:
    own = None if part is None else slice(part.first, part.first + part.rows)
    v, n, d = _sizes(x)
    m = v * n
    losses = x.z0.new_empty(m, dtype=torch.float32)
    stats, logged = losses.new_empty((v + 1, m)), losses.new_empty((2 * (v - 1) if x.count_exceeding else 0, m))
    if n == 0:
        return losses, logged, torch.empty_like(losses), stats
    precision = launch.precision("nt_xent", x.operand_dtype)
    config = launch.nearest("nt_xent", x.z0.device, x.operand_dtype, d)["forward"]
    maximum, scale = _maximum(x.temperature, x.normalize, m, own), launch.scale_of(x.temperature)
    search, classes = maximum is None, _classes(x)
    if classes is not None:  # larger tiles spill with them
        config |= {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8}
    rows = m if own is None else v * (own.stop - own.start)
    panel, config = _schedule(m, rows, search, config, x.operand_dtype, launch.processors(x.z0.device))
    panels = triton.cdiv(m, panel)
    odd = panels // 2 * 2 + 1  # the last may have no rows
    with launch.on(x.z0.device):
        z, inv_norm, s_pos = _operand(x, config["BLOCK_K"])
        if s_pos is None:
            s_pos = views.products(x.z0, inv_norm)
        stride = z.shape[1]
        r_parts = losses.new_empty((odd, m))
        m_parts = torch.empty_like(r_parts) if search else None
        for row0, row1 in row_ranges(v, n, own):
            grid = (triton.cdiv(row1 - row0, panel), odd) if search else (odd, odd // 2 + 1)
            _negative_sums[grid](
                z, classes, r_parts, m_parts, *scale, maximum, n, m, stride, panel, row0, row1,
                search, precision, stride == config["BLOCK_K"], **config,
            )  # fmt: skip
        _losses[triton.cdiv(m, 64),](
            r_parts, m_parts, s_pos, x.positive_weights, losses, stats, *scale, maximum, n, m, panels,
            search, v, x.decoupled, triton.next_power_of_2(PANELS), 64, **launch.FUSED,
        )  # fmt: skip
        if x.count_exceeding:
            logged[: v - 1].view(-1, s_pos.shape[-1]).copy_(s_pos)
            for k, (row0, row1) in itertools.product(range(v - 1), row_ranges(v, n, own)):
                _exceeding[triton.cdiv(row1 - row0, config["BLOCK_M"]),](
                    z, classes, s_pos.view(v - 1, -1)[k], logged[v - 1 + k], n, m, stride, row0,
                    v, precision, stride == config["BLOCK_K"], **config,
                )  # fmt: skip
    return _of(own, v, losses), _of(own, v, logged), inv_norm, _of(own, v, stats)


def backward(
    grad: Tensor, x: Arguments, inv_norm: Tensor, stats: Tensor, part: Part | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    own = None if part is None else slice(part.first, part.first + part.rows)
    v, n, d = _sizes(x)
    learned = x.needs_grad[2]
    dtemperature = grad.new_empty(0)
    if n == 0:
        none = x.z0.new_empty(0 if x.z1 is None else x.z1.shape)
        return torch.empty_like(x.z0), none, grad.new_zeros(()) if learned else dtemperature
    precision = launch.precision("nt_xent", x.operand_dtype)
    configs = launch.nearest("nt_xent", x.z0.device, x.operand_dtype, d)
    maximum, scale = _maximum(x.temperature, x.normalize, v * n, own), launch.scale_of(x.temperature)
    of_rows, config = (w_z.flash, configs["flash"]) if "flash" in configs else (w_z.panels, configs["panels"])
    with launch.on(x.z0.device):
        z, _, _ = _operand(x, config["BLOCK_K"])
        # what a row's weights add up to: of the decoupled form 1, whatever its positive's is
        w_scale = launch.half_scale(x.operand_dtype, lambda: grad if x.decoupled else grad * stats[2:].sum(0))
        rows = _classes(x), grad, stats, *scale, maximum, w_scale
        dz = of_rows(z, v, rows, maximum is None, precision, config, own)
        norms, pair = _of(own, v, inv_norm), _two(x)
        if pair is not None:
            of_pair = pair if own is None else (pair[0][own], pair[1][own])
            # (1 - p) of the positive, of both its rows; 1 - p itself would cancel
            pull = _of(own, v, stats[2])
            found, dots = input_gradients(
                of_pair, 2, dz, norms, pull, w_scale, scale, x.normalize, grad=_of(own, v, grad), dotted=learned
            )
            dz0, dz1 = found if x.z1 is not None else (torch.stack(found), x.z0.new_empty(0))
        else:
            of_all = x.z0 if own is None else x.z0[:, own].contiguous()
            views.subtract_pulls(x.z0, inv_norm, grad, stats[2:], w_scale, dz[0], own or slice(0, n))
            (dx,), dots = input_gradients(
                (of_all.flatten(0, 1),), 1, dz, norms, None, w_scale, scale, x.normalize, dotted=learned
            )
            dz0, dz1 = dx.view(of_all.shape), x.z0.new_empty(0)
        if learned:  # dL/d(1/tau) = (tau / 2) sum_i <z_i, dz_i>
            dtemperature = -0.5 * dots.sum() / x.temperature
    return dz0, dz1, dtemperature
