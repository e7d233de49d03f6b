"""InfoNCE in Triton: the candidates pass by once, nothing of size B x K in memory.

Forward, 4 B K D FLOP: blocks of rows, by as many spans of candidates as fill the chip, add up e_ij = exp((s_ij - m_i) /
tau) over the negatives, and o_i, the negatives with these weights. What the spans found is joined in their order: the
query's gradient is (o_i / r_i - share of the negatives in r_i * key_i) / tau, the positive apart and in float32.
Backward, where candidates learn, 4 B K D more: blocks of candidates, by spans of rows, W^T Q from the weights again.
Rows wider than a block: each slice of their columns makes the logits anew, 2 (1 + slices) B K D FLOP.
Forward is two launches for few and narrow rows, which its blocks and the candidates' make unit; else up to four; one
more for a mask, and one for paired negatives, which are a span of their own (paired.py).

Order of every sum is fixed, so the same input gives the same bits. Scratch, in bytes: forward 4 (D + 3) a row and span,
backward 4 D a candidate and span, PROGRAMS blocks of rows at least; 4 a candidate; operands of 2 B rows; a mask's bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .candidates import candidate_tile, of_negatives, packed, store_gradient, strided, unit_row, unit_tile
from .launch import refuses  # noqa: F401
from .paired import add_paired, paired_gradient, tiles
from .rows import LN2, LOWEST, close, close_decoupled, fixed_maximum, inverse, log2_of, operand, row_tile

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.info_nce import Arguments

DISTRIBUTED = True

# These change from batch to batch: no compilation for each.
SIZES = ("B", "K", "words", "first", "span", "splits")

PROGRAMS = 264  # two on each of an H100's 132 multiprocessors; at most PARTS spans
PARTS = 512
WHOLE = 128 * 128  # elements of a block of rows that registers hold in float32, twice
OWN_NORMS = 4  # blocks of rows: more of them share norms of the candidates that a launch made
CHUNK = 32  # spans whose sums are read at once


@triton.jit(do_not_specialize=SIZES)
def _weigh(
    query, key, z, inv_norm, similarity, c, inv_c, query_ids, negative_ids, bits, words,
    r_parts, m_parts, exceeding_parts, o_parts, temperature, scale, maximum, B, K, D, stride, first, span,
    IN_BATCH: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHT: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STATIONARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of each span of candidates r, the largest s where it is searched for, how many exceed the positive, and WEIGHT o.

    r_parts, m_parts, exceeding_parts [splits, B]; o_parts [splits, B, stride], BLOCK_K columns a program. Rows that a
    block holds whole come from query and key, and z is None: inv_norm [2B] and similarity [B] are made here.
    """
    SOME: tl.constexpr = bits is not None
    scale = log2_of(temperature, scale)
    i, split, column = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2) * BLOCK_K
    stride = BLOCK_K if STATIONARY else stride
    rows = i + tl.arange(0, BLOCK_M)
    if z is None:
        q, inv = unit_tile(query, i, B, D, NORMALIZE, BLOCK_M, BLOCK_K)
        p, inv_key = unit_tile(key, i, B, D, NORMALIZE, BLOCK_M, BLOCK_K)
        positive = tl.sum(q * p, 1)
        zi = q.to(DTYPE)
        once = rows < tl.where(split == 0, B, 0)
        tl.store(inv_norm + rows, inv, mask=once)
        tl.store(inv_norm + B + rows, inv_key, mask=once)
        tl.store(similarity + rows, positive, mask=once)
    else:
        positive = tl.load(similarity + rows, mask=rows < B, other=0.0)
        if STATIONARY:
            zi = row_tile(z, i, B, stride, BLOCK_M, BLOCK_K)
    r = tl.zeros([BLOCK_M], tl.float32)
    exceeding = tl.zeros([BLOCK_M], tl.float32)
    top = r + maximum if m_parts is None else r + LOWEST
    if o_parts is not None:
        o = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for j in range(split * span, tl.minimum(split * span + span, K), BLOCK_N):
        if STATIONARY:
            cj = candidate_tile(c, inv_c, j, 0, K, D, NORMALIZE, SOME, DTYPE, BLOCK_N, BLOCK_K)
            s = tl.dot(zi, tl.trans(cj), input_precision=PRECISION)
        else:
            s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for k in range(0, stride, BLOCK_K):
                a = row_tile(z + k, i, B, stride, BLOCK_M, BLOCK_K)
                b = candidate_tile(c, inv_c, j, k, K, D, NORMALIZE, SOME, DTYPE, BLOCK_N, BLOCK_K)
                s = tl.dot(a, tl.trans(b), s, input_precision=PRECISION)
        others = (j + BLOCK_N > K) | (IN_BATCH & (j < first + i + BLOCK_M) & (first + i < j + BLOCK_N))
        if SOME | (query_ids is not None) | others:
            s = of_negatives(
                s, float("-inf"), rows[:, None], j + tl.arange(0, BLOCK_N)[None, :], j, query_ids, negative_ids,
                bits, words, inv_c, B, K, first, IN_BATCH, SOME, BLOCK_N,
            )  # fmt: skip
        exceeding += tl.sum(tl.where(s > positive[:, None], 1.0, 0.0), 1)
        if m_parts is not None:
            higher = tl.maximum(top, tl.max(s, 1))
            shrink = tl.exp2((top - higher) * scale)
            top = higher
            r = r * shrink
            if o_parts is not None:
                o = o * shrink[:, None]
        e = tl.exp2((s - top[:, None]) * scale)
        r += tl.sum(e, 1)
        if o_parts is not None:
            if not STATIONARY:
                cj = candidate_tile(c, inv_c, j, column, K, D, NORMALIZE, SOME, DTYPE, BLOCK_N, BLOCK_K)
            o = tl.dot((e * WEIGHT).to(DTYPE), cj, o, input_precision=PRECISION)
    part = tl.cast(split, tl.int64) * B
    mask = rows < tl.where(column == 0, B, 0)
    tl.store(r_parts + part + rows, r, mask=mask)
    tl.store(exceeding_parts + part + rows, exceeding, mask=mask)
    if m_parts is not None:
        tl.store(m_parts + part + rows, top, mask=mask)
    if o_parts is not None:
        at = tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_K)[None, :]
        tl.store(o_parts + (part + i) * stride + column + at, o, mask=(rows < B)[:, None])


@triton.jit(do_not_specialize=SIZES)
def _join(
    query, key, inv_norm, similarity, weights, r_parts, m_parts, exceeding_parts, o_parts, temperature, scale,
    maximum, losses, exceeding, dquery, dtemperature, stats, B, D, stride, splits,
    DECOUPLED: tl.constexpr, NORMALIZE: tl.constexpr, WEIGHT: tl.constexpr,
    PARTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """losses, exceeding [B], stats [3, B]; from o_parts, used up: dquery [B, D] and dtemperature [B]"""
    scale = log2_of(temperature, scale)
    i = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    at = part.to(tl.int64) * B + i
    r = tl.load(r_parts + at, mask=part < splits, other=0.0)
    positive = tl.load(similarity + i)
    m = positive * 0.0 + maximum
    if m_parts is not None:
        tops = tl.load(m_parts + at, mask=part < splits, other=LOWEST)
        m = tl.max(tops, 0)
        if not DECOUPLED:
            m = tl.maximum(m, positive)
        r = r * tl.exp2((tops - m) * scale)
    if DECOUPLED:
        share = tl.load(weights + i) if weights is not None else 1.0
        r, loss = close_decoupled(tl.sum(r, 0), (m - share * positive) * scale * LN2)
    else:
        r, share, loss = close(tl.sum(r, 0), tl.exp2((positive - m) * scale), (m - positive) * scale * LN2)
    tl.store(losses + i, loss)
    tl.store(exceeding + i, tl.sum(tl.load(exceeding_parts + at, mask=part < splits, other=0.0), 0))
    tl.store(stats + i, m)
    tl.store(stats + B + i, tl.div_rn(1.0, r))
    tl.store(stats + 2 * tl.cast(B, tl.int64) + i, share)
    if o_parts is not None:
        inv, inv_key, weight = tl.load(inv_norm + i), tl.load(inv_norm + B + i), tl.div_rn(1.0, r * WEIGHT)
        dot = 0.0
        for k in range(0, D, BLOCK_D):
            columns = k + tl.arange(0, BLOCK_D)
            o = tl.zeros([BLOCK_D], tl.float32)
            for span in range(0, splits, CHUNK):
                spans = span + tl.arange(0, CHUNK)
                these = spans.to(tl.int64) * B + i
                mask = (spans < splits)[:, None] & (columns < D)[None, :]
                terms = tl.load(o_parts + these[:, None] * stride + columns[None, :], mask=mask, other=0.0)
                if m_parts is not None:
                    highest = tl.load(m_parts + these, mask=spans < splits, other=LOWEST)
                    terms = terms * tl.exp2((highest - m) * scale)[:, None]
                o += tl.sum(terms, 0)
            v = (o * weight - share * unit_row(key, inv_key, i, k, D, BLOCK_D)) * (scale * LN2)
            dot += tl.sum(v * unit_row(query, inv, i, k, D, BLOCK_D), 0)
            tl.store(o_parts + i * stride + columns, v, mask=columns < D)
        store_gradient(o_parts, query, inv, dot, dquery, i, D, stride, NORMALIZE, False, BLOCK_D)
        tl.store(dtemperature + i, -dot * (scale * LN2))  # dL/d(1/tau) = tau <q, dq>


@triton.jit(do_not_specialize=SIZES)
def _weigh_back(
    z, c, inv_c, query_ids, negative_ids, bits, words, grad, stats, w_scale, parts, temperature, scale,
    B, K, D, stride, first, span,
    IN_BATCH: tl.constexpr, NORMALIZE: tl.constexpr, PRECISION: tl.constexpr, STATIONARY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts [splits, K, stride], BLOCK_K columns a program: sum_i w_ij q_i over a span of rows.

    w_ij = e_ij g_i / r_i, times w_scale.
    Exact float32 has the forward pass's BLOCK_K: s is rounded as there, and in e / r most of that error cancels.
    """
    DTYPE: tl.constexpr = z.dtype.element_ty
    SOME: tl.constexpr = bits is not None
    scale = log2_of(temperature, scale)
    j, split, column = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2) * BLOCK_K
    stride = BLOCK_K if STATIONARY else stride
    columns = j + tl.arange(0, BLOCK_M)
    if STATIONARY:
        cj = candidate_tile(c, inv_c, j, 0, K, D, NORMALIZE, SOME, DTYPE, BLOCK_M, BLOCK_K)
    dc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for i in range(split * span, tl.minimum(split * span + span, B), BLOCK_N):
        if STATIONARY:
            zi = row_tile(z, i, B, stride, BLOCK_N, BLOCK_K)
            s = tl.dot(cj, tl.trans(zi), input_precision=PRECISION)
        else:
            s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for k in range(0, stride, BLOCK_K):
                b = candidate_tile(c, inv_c, j, k, K, D, NORMALIZE, SOME, DTYPE, BLOCK_M, BLOCK_K)
                s = tl.dot(b, tl.trans(row_tile(z + k, i, B, stride, BLOCK_N, BLOCK_K)), s, input_precision=PRECISION)
        rows = i + tl.arange(0, BLOCK_N)
        top = tl.load(stats + rows, mask=rows < B, other=0.0)
        weight = tl.load(grad + rows, mask=rows < B, other=0.0)
        weight = weight * tl.load(stats + B + rows, mask=rows < B, other=0.0)
        if w_scale is not None:
            weight = weight * tl.load(w_scale)
        w = tl.exp2((s - top[None, :]) * scale) * weight[None, :]
        others = (i + BLOCK_N > B) | (IN_BATCH & (j < first + i + BLOCK_N) & (first + i < j + BLOCK_M))
        if SOME | (query_ids is not None) | others:
            w = of_negatives(
                w, 0.0, rows[None, :], columns[:, None], j, query_ids, negative_ids,
                bits, words, inv_c, B, K, first, IN_BATCH, SOME, BLOCK_M,
            )  # fmt: skip
        if not STATIONARY:
            zi = row_tile(z + column, i, B, stride, BLOCK_N, BLOCK_K)
        dc = tl.dot(w.to(DTYPE), zi, dc, input_precision=PRECISION)
    at = tl.arange(0, BLOCK_M)[:, None] * stride + tl.arange(0, BLOCK_K)[None, :]
    parts += (tl.cast(split, tl.int64) * K + j) * stride + column
    tl.store(parts + at, dc, mask=(columns < K)[:, None])


@triton.jit(do_not_specialize=SIZES)
def _join_back(
    x, inv_x, query, inv_query, grad, stats, parts, w_scale, temperature, scale, dx,
    B, K, D, stride, first, splits,
    PULLED: tl.constexpr, SOME: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx [K, D] from parts [splits, K, stride], used up, over w_scale; pulled: x first + i is row i's positive"""
    inv_tau = log2_of(temperature, scale) * LN2
    j = tl.program_id(0).to(tl.int64)
    inv = tl.load(inv_x + j) if inv_x is not None else 1.0
    i = tl.minimum(tl.maximum(j - first, 0), B - 1)
    strength = tl.load(grad + i) * tl.load(stats + 2 * tl.cast(B, tl.int64) + i)
    inv_positive = tl.load(inv_query + i)
    strength = tl.where((j == i + first) & PULLED, strength, 0.0)
    dot = 0.0
    for k in range(0, D, BLOCK_D):
        columns = k + tl.arange(0, BLOCK_D)
        v = tl.zeros([BLOCK_D], tl.float32)
        for span in range(0, splits, CHUNK):
            spans = span + tl.arange(0, CHUNK)
            mask = (spans < splits)[:, None] & (columns < D)[None, :]
            at = (spans.to(tl.int64) * K + j)[:, None] * stride + columns[None, :]
            v += tl.sum(tl.load(parts + at, mask=mask, other=0.0), 0)
        if w_scale is not None:
            v = v / tl.load(w_scale)
        v = (v - strength * unit_row(query, inv_positive, i, k, D, BLOCK_D)) * inv_tau
        along = v * unit_row(x, inv, j, k, D, BLOCK_D)
        dot += tl.sum(tl.where(v == 0.0, 0.0, along) if SOME else along, 0)
        tl.store(parts + j * stride + columns, v, mask=columns < D)
    store_gradient(parts, x, inv, dot, dx, j, D, stride, inv_x is not None, SOME, BLOCK_D)


def _spans(blocks: int, length: int, step: int) -> tuple[int, int]:
    """How long, in multiples of step, and how many: PROGRAMS programs in all if `length` allows"""
    return launch.spans(max(length, 1), step, min(PROGRAMS // max(blocks, 1), PARTS))


def _dtype(x: torch.dtype) -> tl.dtype:
    return getattr(tl, str(x).removeprefix("torch."))


def forward(x: Arguments, part: Part | None = None) -> tuple[Tensor, ...]:
    query, key, paired = x.query, x.key, x.paired_negatives
    temperature, normalize, operand_dtype = x.temperature, x.normalize, x.operand_dtype
    b, d = query.shape
    c, in_batch, first = (key, True, part.first if part else 0) if x.negatives is None else (x.negatives, False, 0)
    wide: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    losses, logged, stats = torch.empty(b, **wide), torch.empty(2, b, **wide), torch.empty(3, b, **wide)
    similarity, exceeding = logged
    graded = b if x.needs_grad[0] or x.needs_grad[3] else 0
    dquery, dtemperature = torch.empty(graded, d, **wide), torch.empty(graded, **wide)
    if b == 0:
        return losses, logged, dquery, dtemperature, stats
    config = launch.nearest("info_nce", query.device, operand_dtype, d)["forward"]
    own = 0 if paired is None else paired.shape[1]
    half = operand_dtype == torch.float16  # 5 bits of exponent: weights up to 2**14, the largest of a row that high
    maximum = None if half else fixed_maximum(temperature, normalize, len(c) + own)
    scale, dtype = launch.scale_of(temperature), _dtype(operand_dtype)
    top, weight = 0.0 if maximum is None else maximum * temperature, 2.0**14 if half else 1.0
    with launch.on(query.device):
        positives, step = key[first : first + b], config["BLOCK_K"]
        blocks, slices = triton.cdiv(b, config["BLOCK_M"]), triton.cdiv(d, step)
        stride = slices * step
        whole = slices == 1 and d % 16 == 0 and config["BLOCK_M"] * step <= WHOLE
        z, inv_norm = None, torch.empty(2 * b, **wide)
        if not whole:
            z, inv_norm, logged[0] = operand(query, positives, normalize, operand_dtype, step)
        some = x.negative_mask is not None
        inv_c = None if whole and blocks <= OWN_NORMS and not some else inverse(c, normalize or some)
        span, splits = _spans(blocks, len(c), config["BLOCK_N"])
        parts = splits + (own > 0)  # the last is the paired ones'
        r_parts, exceeding_parts = torch.empty(2, parts, b, **wide)
        m_parts = torch.empty_like(r_parts) if maximum is None else None
        o_parts = torch.empty(parts, b, stride, **wide) if graded else None
        found = (r_parts, m_parts, exceeding_parts, o_parts, *scale, top)
        _weigh[blocks, splits, slices if graded else 1](
            query, positives, z, inv_norm, similarity, c, inv_c, x.query_ids, x.negative_ids, *packed(x.negative_mask),
            *found, b, len(c), d, stride, first, span,
            in_batch, normalize, weight, dtype, launch.precision("info_nce", operand_dtype), slices == 1, **config,
        )  # fmt: skip
        if own:
            add_paired[b,](
                query, inv_norm, similarity, paired, *strided(x.paired_mask), *found, splits, b, own, d, stride,
                normalize, weight, dtype, **tiles(own, d),
            )  # fmt: skip
        _join[b,](
            query, positives, inv_norm, similarity, x.positive_weights, *found,
            losses, exceeding, dquery, dtemperature, stats, b, d, stride, parts,
            x.decoupled, normalize, weight, PARTS, CHUNK, **launch.row_a_program(d),
        )  # fmt: skip
    return losses, logged, dquery, dtemperature, stats


def backward(grad: Tensor, x: Arguments, stats: Tensor, part: Part | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """dkey, dnegatives, dpaired in their inputs' dtypes, [0] for what is not wanted"""
    query, key, negatives, paired = x.query, x.key, x.negatives, x.paired_negatives
    normalize, operand_dtype = x.normalize, x.operand_dtype
    _, key_grad, negatives_grad, _, paired_grad = x.needs_grad
    (b, d), first = query.shape, part.first if part else 0
    config = launch.nearest("info_nce", query.device, operand_dtype, d)["backward"]
    scale, w_scale = launch.scale_of(x.temperature), None
    if b:  # what a row's weights add up to: of the decoupled form 1, whatever its positive's is
        w_scale = launch.half_scale(operand_dtype, lambda: grad if x.decoupled else grad * stats[2])

    def gradient(c: Tensor, with_pull: bool, with_weights: bool) -> Tensor:
        if b == 0 or (k := len(c)) == 0:
            return torch.zeros_like(c)
        some, out = with_weights and x.negative_mask is not None, torch.empty_like(c)
        inv_c = inverse(c, normalize or some)
        blocks, slices = triton.cdiv(k, config["BLOCK_M"]), stride // config["BLOCK_K"]
        span, splits = _spans(blocks, b, config["BLOCK_N"])
        parts = c.new_empty((splits, k, stride), dtype=torch.float32)
        if with_weights:
            _weigh_back[blocks, splits, slices](
                z, c, inv_c, x.query_ids, x.negative_ids, *packed(x.negative_mask), grad, stats, w_scale, parts,
                *scale,
                b, k, d, stride, first, span,
                with_pull, normalize, launch.precision("info_nce", operand_dtype), slices == 1, **config,
            )  # fmt: skip
        _join_back[k,](
            c, inv_c if normalize else None, query, inv_norm, grad, stats, parts, w_scale, *scale, out,
            b, k, d, stride, first, splits if with_weights else 0, with_pull, some, CHUNK, **launch.row_a_program(d),
        )  # fmt: skip
        return out

    dkey, dnegatives, dpaired = ((key if c is None else c).new_empty(0) for c in (key, negatives, paired))
    with launch.on(query.device):
        if b:
            z, inv_norm, _ = operand(query, key[first : first + b], normalize, operand_dtype, config["BLOCK_K"])
            stride = z.shape[1]
        if key_grad:
            dkey = gradient(key, True, negatives is None)
        if negatives is not None and negatives_grad:
            dnegatives = gradient(negatives, False, True)
        if paired is not None and paired_grad:
            dpaired = torch.empty_like(paired)
            if dpaired.numel():
                options = tiles(paired.shape[1], d)
                paired_gradient[b, triton.cdiv(paired.shape[1], options["BLOCK_R"])](
                    query, inv_norm, paired, *strided(x.paired_mask), grad, stats, dpaired, *scale,
                    b, paired.shape[1], d, normalize, _dtype(operand_dtype), **options,
                )  # fmt: skip
    return dkey, dnegatives, dpaired
