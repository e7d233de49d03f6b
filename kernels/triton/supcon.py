"""SupCon in Triton: tiles of the logits and of which labels are equal, nothing of size M x M, or M x K, in memory.

Forward, 2 M^2 D FLOP: blocks of rows, by as many spans of columns as fill the chip, add up r = sum exp(s - top) over a
row's others and, over its positives, how many, and s - top ("out") or exp(s - top_p) ("in"). What the spans found is
joined in their order; no term of a loss cancels against another. Backward, 4 M^2 D: the tiles again, W z with W_ij =
g_i (p_ij - q_ij) + g_j (p_ji - q_ji), q being what the positives are to be: the difference is rounded, its terms are
not. Rows wider than a block: each slice of their columns makes the tiles anew. Of keys, which have no gradient, the
columns are these, W has the rows' terms only, and both passes are forward's, 6 M K D.

Order of every sum is fixed, so the same input gives the same bits. Scratch, in bytes: z and keys in the operands'
dtype; forward 20 a row and span, backward 4 D a row and span, PROGRAMS blocks of rows at least.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import refuses  # noqa: F401
from .pairs import given, log2_parts, number, operand, positive, power
from .rows import LOWEST, address, column_tile, input_gradients, logits_range, own_rows, row_tile

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.supcon import Arguments

DISTRIBUTED = True

# These change from batch to batch: no compilation for each.
SIZES = ("M", "N", "rows", "count", "first", "span", "splits")

PROGRAMS = 264  # two on each of an H100's 132 multiprocessors; at most PARTS spans
PARTS = 64
SUMS = 5  # r, of the positives, how many, the tops: of a row and span


@triton.jit
def _parts(temperature, value):
    """log2_parts of 1 / tau, of NaN for what is no temperature; its infinity weighs all pairs alike"""
    return log2_parts(1.0 / positive(number(temperature, value)).to(tl.float64))


@triton.jit
def _rows(z, own, inside, column, stride, BLOCK_K: tl.constexpr):
    """z[own, column : column + BLOCK_K], zeros where not inside"""
    return tl.load(address(z, own, column + tl.arange(0, BLOCK_K), stride), mask=inside[:, None], other=0.0)


@triton.jit
def _row_ids(labels, ids, own, inside):
    """Of the own rows"""
    label = tl.load(labels + own, mask=inside, other=-1)
    return label, label if ids is None else tl.load(ids + own, mask=inside, other=-1)


@triton.jit
def _logits(
    z, zi, own, inside, label, row_id, keys, key_labels, key_ids, j, M, stride,
    AMONG_KEYS: tl.constexpr, PRECISION: tl.constexpr, STATIONARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s [BLOCK_M, BLOCK_N] of own rows, zi if stationary, and the keys from j, -inf of what is no candidate, and which
    are positives
    """
    if STATIONARY:
        s = tl.dot(zi, column_tile(keys, j, M, stride, BLOCK_N, BLOCK_K), input_precision=PRECISION)
    else:
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, stride, BLOCK_K):
            a, b = _rows(z, own, inside, k, stride, BLOCK_K), column_tile(keys + k, j, M, stride, BLOCK_N, BLOCK_K)
            s = tl.dot(a, b, s, input_precision=PRECISION)
    columns = j + tl.arange(0, BLOCK_N)
    other = (columns < M)[None, :]
    if key_ids is not None:  # the row's own is its own
        other = (row_id[:, None] != tl.load(key_ids + columns, mask=columns < M, other=-2)[None, :]) & other
    elif not AMONG_KEYS:
        other = (own[:, None] != columns[None, :]) & other
    same = other & (label[:, None] == tl.load(key_labels + columns, mask=columns < M, other=-2)[None, :])
    return tl.where(other, s, float("-inf")), same


@triton.jit(do_not_specialize=SIZES)
def _sums(
    z, labels, ids, keys, key_labels, key_ids, parts, temperature, value, M, N, rows, count, first, stride, span,
    INSIDE: tl.constexpr, SEARCH: tl.constexpr, PRECISION: tl.constexpr, STATIONARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts [SUMS, splits, rows] of a span of columns; the tops, where they are searched for, and else 1"""
    AMONG_KEYS: tl.constexpr = keys is not None
    if not AMONG_KEYS:
        keys, key_labels, key_ids = z, labels, ids
    high, low = _parts(temperature, value)
    k, split = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1)
    own, inside = own_rows(k, N, count, first), k < rows
    stride = BLOCK_K if STATIONARY else stride
    zi = _rows(z, own, inside, 0, stride, BLOCK_K)
    label, row_id = _row_ids(labels, ids, own, inside)
    r = tl.zeros([BLOCK_M], tl.float32)
    p, found = r, r
    top = r + LOWEST if SEARCH else r + 1.0
    top_p = top
    for j in range(split * span, tl.minimum(split * span + span, M), BLOCK_N):
        s, same = _logits(
            z, zi, own, inside, label, row_id, keys, key_labels, key_ids, j, M, stride,
            AMONG_KEYS, PRECISION, STATIONARY, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if SEARCH:
            higher = tl.maximum(top, tl.max(s, 1))
            r = r * power(top - higher, high, low)
            if not INSIDE:
                p += found * (top - higher)
            top = higher
        e = power(s - top[:, None], high, low)
        r += tl.sum(e, 1)
        found += tl.sum(tl.where(same, 1.0, 0.0), 1)
        if INSIDE and SEARCH:
            positive = tl.where(same, s, float("-inf"))
            higher = tl.maximum(top_p, tl.max(positive, 1))
            p = p * power(top_p - higher, high, low) + tl.sum(power(positive - higher[:, None], high, low), 1)
            top_p = higher
        else:
            p += tl.sum(tl.where(same, e if INSIDE else s - top[:, None], 0.0), 1)
    step = tl.cast(tl.num_programs(1), tl.int64) * rows
    parts += tl.cast(split, tl.int64) * rows + k
    tl.store(parts, r, mask=inside)
    tl.store(parts + step, p, mask=inside)
    tl.store(parts + 2 * step, found, mask=inside)
    tl.store(parts + 3 * step, top, mask=inside)
    tl.store(parts + 4 * step, top_p, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _losses(
    parts, weights, temperature, value, losses, positives, stats, rows, splits,
    INSIDE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses, positives [rows] and stats [4, rows] from the parts, in their order"""
    high, low = _parts(temperature, value)
    inverse = tl.div_rn(1.0, number(temperature, value))
    i, part = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PARTS)[:, None]
    inside = i < rows
    mask, step = (part < splits) & inside[None, :], tl.cast(splits, tl.int64) * rows
    parts += part.to(tl.int64) * rows + i[None, :]
    r = tl.load(parts, mask=mask, other=0.0)
    p = tl.load(parts + step, mask=mask, other=0.0)
    counts = tl.load(parts + 2 * step, mask=mask, other=0.0)
    tops = tl.load(parts + 3 * step, mask=mask, other=LOWEST)
    top, top_p, count = tl.max(tops, 0), tl.zeros([BLOCK], tl.float32), tl.sum(counts, 0)
    r = tl.sum(r * power(tops - top[None, :], high, low), 0)
    alone = count == 0.0
    weight = tl.zeros([BLOCK], tl.float32) + 1.0
    if weights is not None:
        weight = tl.load(weights + i, mask=inside, other=0.0)
        alone = alone | (weight == 0.0)
    if INSIDE:
        tops = tl.load(parts + 4 * step, mask=mask, other=LOWEST)
        top_p = tl.max(tops, 0)
        p = tl.sum(p * power(tops - top_p[None, :], high, low), 0)
        loss = (tl.log(r) - tl.log(p)) + (top - top_p) * inverse + tl.log(count)
        wanted = tl.div_rn(1.0, tl.where(alone, 1.0, p))
    else:
        p = tl.sum(p + counts * (tops - top[None, :]), 0)
        wanted = tl.div_rn(1.0, tl.where(alone, 1.0, count))
        loss = tl.log(r) - p * wanted * inverse
    tl.store(losses + i, tl.where(alone, 0.0, weight * loss), mask=inside)
    tl.store(positives + i, count, mask=inside)
    stats, step = stats + i, tl.cast(rows, tl.int64)
    tl.store(stats, top, mask=inside)
    tl.store(stats + step, tl.where(alone, 0.0, tl.div_rn(weight, tl.where(alone, 1.0, r))), mask=inside)
    tl.store(stats + 2 * step, top_p, mask=inside)
    tl.store(stats + 3 * step, tl.where(alone, 0.0, weight * wanted), mask=inside)


@triton.jit
def _row_stats(grad, stats, rows, inside, M):
    """The tops, grad / r, and grad times what the positives' terms are of q; zeros where not inside"""
    g, step = tl.load(grad + rows, mask=inside, other=0.0), tl.cast(M, tl.int64)
    top = tl.load(stats + rows, mask=inside, other=0.0)
    weight = g * tl.load(stats + step + rows, mask=inside, other=0.0)
    top_p = tl.load(stats + 2 * step + rows, mask=inside, other=0.0)
    return top, weight, top_p, g * tl.load(stats + 3 * step + rows, mask=inside, other=0.0)


@triton.jit
def _weighted(s, top, weight, high, low):
    """0 for no weight, whatever the logit is"""
    return tl.where(weight == 0.0, 0.0, power(s - top, high, low) * weight)


@triton.jit(do_not_specialize=SIZES)
def _weigh_back(
    z, labels, ids, keys, key_labels, key_ids, grad, stats, dz, temperature, value,
    M, N, rows, count, first, stride, span,
    INSIDE: tl.constexpr, SEARCH: tl.constexpr, PRECISION: tl.constexpr, STATIONARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz [splits, rows, stride], BLOCK_K columns a program: W z of the own rows over a span of columns.

    Exact float32 has the forward pass's BLOCK_K: s is rounded as there, and in e / r most of that error cancels.
    """
    AMONG_KEYS: tl.constexpr = keys is not None
    if not AMONG_KEYS:
        keys, key_labels, key_ids = z, labels, ids
    high, low = _parts(temperature, value)
    k, split, column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1), tl.program_id(2) * BLOCK_K
    own, inside = own_rows(k, N, count, first), k < rows
    stride = BLOCK_K if STATIONARY else stride
    zi = _rows(z, own, inside, 0, stride, BLOCK_K)
    label, row_id = _row_ids(labels, ids, own, inside)
    top_i, weight_i, top_pi, wanted_i = _row_stats(grad, stats, own, inside, rows if AMONG_KEYS else M)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for j in range(split * span, tl.minimum(split * span + span, M), BLOCK_N):
        s, same = _logits(
            z, zi, own, inside, label, row_id, keys, key_labels, key_ids, j, M, stride,
            AMONG_KEYS, PRECISION, STATIONARY, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if not AMONG_KEYS:
            columns = j + tl.arange(0, BLOCK_N)
            top_j, weight_j, top_pj, wanted_j = _row_stats(grad, stats, columns, columns < M, M)
        if SEARCH:
            p, q = _weighted(s, top_i[:, None], weight_i[:, None], high, low), wanted_i[:, None]
            if INSIDE:
                q = _weighted(s, top_pi[:, None], q, high, low)
            if not AMONG_KEYS:
                p += _weighted(s, top_j[None, :], weight_j[None, :], high, low)
                q += _weighted(s, top_pj[None, :], wanted_j[None, :], high, low) if INSIDE else wanted_j[None, :]
        else:
            e, p, q = power(s - top_i[:, None], high, low), weight_i[:, None], wanted_i[:, None]
            if not AMONG_KEYS:
                p, q = p + weight_j[None, :], q + wanted_j[None, :]
            p, q = e * p, e * q if INSIDE else q
        w = p - tl.where(same, q, 0.0)
        zj = row_tile(keys + column, j, M, stride, BLOCK_N, BLOCK_K)
        acc = tl.dot(w.to(z.dtype.element_ty), zj, acc, input_precision=PRECISION)
    dz += tl.cast(split, tl.int64) * rows * stride
    tl.store(address(dz, k, column + tl.arange(0, BLOCK_K), stride), acc, mask=inside[:, None])


def _operands(x: Arguments, part: Part | None, step: int) -> tuple[Tensor, tuple[Any, ...], tuple[int, ...]]:
    """The inverse norms of all rows; rows and keys as kernels take them; M, N, own rows, examples, the first of them"""
    *views, n, _ = x.z.shape
    z, inv_norm = operand(x.z.flatten(0, -2), x.normalize, x.operand_dtype, step)
    labels, ids = (of.repeat(views[0]) if views and of is not None else of for of in (x.labels, x.query_ids))
    keys = None if x.keys is None else operand(x.keys, x.normalize, x.operand_dtype, step)[0]
    count, first = (part.rows, part.first) if part else (n, 0)
    rows, columns = x.z.shape[:-2].numel() * count, len(z) if keys is None else len(keys)
    return inv_norm, (z, labels, ids, keys, x.key_labels, x.key_ids), (columns, n, rows, count, first)


def _spans(rows: int, m: int, config: dict[str, int]) -> tuple[int, int, int]:
    """Blocks of rows, how long spans of columns are, and how many"""
    blocks = triton.cdiv(rows, config["BLOCK_M"])
    return blocks, *launch.spans(max(m, 1), config["BLOCK_N"], min(PROGRAMS // blocks, PARTS))


def _kind(x: Arguments) -> tuple[bool, bool, str]:
    """INSIDE, SEARCH and PRECISION. Where 1 is the top no sum is below exp(-43): half of float32's range, the other
    half being for grad / r.
    """
    return x.where == "in", logits_range(x.temperature, x.normalize) > 43, launch.precision("supcon", x.operand_dtype)


def forward(x: Arguments, part: Part | None = None) -> tuple[Tensor, ...]:
    config = launch.nearest("supcon", x.z.device, x.operand_dtype, x.z.shape[-1])["forward"]
    if x.query_ids is not None:  # a larger block spills with them
        config |= {"BLOCK_M": min(config["BLOCK_M"], 64), "num_warps": 8}
    with launch.on(x.z.device):
        inv_norm, tensors, (m, n, rows, count, first) = _operands(x, part, config["BLOCK_K"])
        losses, positives, stats = (inv_norm.new_empty(*shape, rows) for shape in ((), (1,), (4,)))
        if rows == 0:
            return losses, positives, inv_norm, stats
        temperature, (blocks, span, splits) = given(x.temperature), _spans(rows, m, config)
        parts, stride = losses.new_empty(SUMS, splits, rows), tensors[0].shape[1]
        _sums[blocks, splits](
            *tensors, parts, *temperature, m, n, rows, count, first, stride, span,
            *_kind(x), stride == config["BLOCK_K"], **config,
        )  # fmt: skip
        weights = None if x.weights is None else x.weights[first : first + count].repeat(rows // count)
        _losses[triton.cdiv(rows, 16),](
            parts, weights, *temperature, losses, positives, stats, rows, splits, x.where == "in", PARTS, 16,
            **launch.FUSED,
        )  # fmt: skip
    return losses, positives, inv_norm, stats


def _gradient(
    grad: Tensor, x: Arguments, inv_norm: Tensor, stats: Tensor, part: Part | None, dtype: torch.dtype, dotted: bool
) -> tuple[Tensor, Tensor]:
    """dz of the own rows, in dtype, and dots of unit rows and their gradients, if dotted; grad of all rows"""
    config = launch.nearest("supcon", x.z.device, x.operand_dtype, x.z.shape[-1])["backward"]
    with launch.on(x.z.device):
        _, tensors, (m, n, rows, count, first) = _operands(x, part, config["BLOCK_K"])
        own, stride = x.z if part is None else x.z[..., first : first + count, :].contiguous(), tensors[0].shape[1]
        if rows == 0:
            return torch.empty_like(own, dtype=dtype), grad.new_empty(0)
        blocks, span, splits = _spans(rows, m, config)
        weights = x.weights  # in the stats already
        w_scale = launch.half_scale(
            x.operand_dtype, lambda: grad if weights is None else grad * weights.repeat(len(grad) // n)
        )
        dz = grad.new_empty(splits, rows, stride)
        _weigh_back[blocks, splits, stride // config["BLOCK_K"]](
            *tensors, grad if w_scale is None else grad * w_scale, stats, dz, *given(x.temperature),
            m, n, rows, count, first, stride, span, *_kind(x), stride == config["BLOCK_K"], **config,
        )  # fmt: skip
        norms = inv_norm if part is None else inv_norm.view(-1, n)[:, first : first + count].flatten()
        (dx,), dots = input_gradients(
            (own.flatten(0, -2),), 1, dz, norms, None, w_scale, launch.scale_of(x.temperature), x.normalize,
            dtype=dtype, dotted=dotted,
        )  # fmt: skip
    return dx.view(own.shape), dots


def backward(
    grad: Tensor, x: Arguments, inv_norm: Tensor, stats: Tensor, part: Part | None = None
) -> tuple[Tensor, Tensor]:
    learned = x.needs_grad[1]
    dz, dots = _gradient(grad, x, inv_norm, stats, part, x.z.dtype, learned)
    # dL/d(1/tau) = (tau / 2) sum_i <z_i, dz_i>
    return dz, -0.5 * dots.sum() / x.temperature if learned else dots


def among_keys(x: Arguments) -> tuple[Tensor, ...]:
    """losses, positives, and of each row's weighted loss dz and dtemperature, if any will be wanted"""
    losses, positives, inv_norm, stats = forward(x)
    if not any(x.needs_grad):
        return losses, positives, losses.new_empty(0, x.z.shape[-1]), losses.new_empty(0)
    dz, dots = _gradient(torch.ones_like(losses), x, inv_norm, stats, None, torch.float32, True)
    return losses, positives, dz.flatten(0, -2), dots * (-1 / x.temperature)
