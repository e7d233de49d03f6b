"""Each query's own negatives [B, M, D] in Triton: read once in either direction, in blocks of whole rows.

Nothing of their size is kept, and what a mask leaves out is taken for zeros.
"""

import triton
import triton.language as tl

from . import launch
from .candidates import unit_row
from .rows import LN2, LOWEST, address, log2_of, tile_inv_norms

# These change from batch to batch: no compilation for each.
SIZES = ("B", "M", "along_row", "part")


@triton.jit
def _own_tile(
    paired, mask, along_row, along_column, i, j, M, D,
    NORMALIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rows from j that query i has: unit and in float32, zeros for what is none; which there are, inverse norms"""
    rows, columns = j + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    own = rows < M
    at = address(paired, i * M + rows, columns, D)
    unit = tl.load(at, mask=own[:, None] & (columns < D)[None, :], other=0.0).to(tl.float32)
    if mask is not None:
        at = i * along_row + rows.to(tl.int64) * along_column
        own = tl.load(mask + at, mask=own, other=0) != 0
        unit = tl.where(own[:, None], unit, 0.0)
    inv = tile_inv_norms(unit) if NORMALIZE else tl.full([BLOCK_R], 1.0, tl.float32)
    return unit * inv[:, None], own, inv


@triton.jit(do_not_specialize=SIZES)
def add_paired(
    query, inv_norm, similarity, paired, mask, along_row, along_column, r_parts, m_parts, exceeding_parts, o_parts,
    temperature, scale, maximum, part, B, M, D, stride,
    NORMALIZE: tl.constexpr, WEIGHT: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Part `part` of info_nce's parts: of the query's own negatives r, the largest s, how many exceed, and WEIGHT o"""
    scale = log2_of(temperature, scale)
    i = tl.program_id(0).to(tl.int64)
    q = unit_row(query, tl.load(inv_norm + i), i, 0, D, BLOCK_D).to(DTYPE).to(tl.float32)
    positive = tl.load(similarity + i)
    r = tl.zeros([BLOCK_R], tl.float32)  # each row of the blocks has its own sums, as a span of candidates has
    exceeding = r
    top = r + maximum if m_parts is None else r + LOWEST
    o = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for j in range(0, M, BLOCK_R):
        unit, own, _ = _own_tile(paired, mask, along_row, along_column, i, j, M, D, NORMALIZE, BLOCK_R, BLOCK_D)
        operand = unit.to(DTYPE).to(tl.float32)
        s = tl.where(own, tl.sum(operand * q[None, :], 1), float("-inf"))
        exceeding += tl.where(s > positive, 1.0, 0.0)
        if m_parts is not None:
            higher = tl.maximum(top, s)
            shrink = tl.exp2((top - higher) * scale)
            top = higher
            r = r * shrink
            o = o * shrink[:, None]
        e = tl.exp2((s - top) * scale)
        r += e
        o += e[:, None] * operand
    highest = tl.max(top, 0)
    shrink = tl.exp2((top - highest) * scale)
    at = tl.cast(part, tl.int64) * B + i
    tl.store(r_parts + at, tl.sum(r * shrink, 0))
    tl.store(exceeding_parts + at, tl.sum(exceeding, 0))
    if m_parts is not None:
        tl.store(m_parts + at, highest)
    if o_parts is not None:
        columns = tl.arange(0, BLOCK_D)
        o = tl.sum(o * shrink[:, None], 0) * WEIGHT
        tl.store(o_parts + at * stride + columns, o, mask=columns < D)


@triton.jit(do_not_specialize=SIZES)
def paired_gradient(
    query, inv_norm, paired, mask, along_row, along_column, grad, stats, dpaired, temperature, scale, B, M, D,
    NORMALIZE: tl.constexpr, DTYPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dpaired [B, M, D]"""
    scale = log2_of(temperature, scale)
    i, j = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_R
    q = unit_row(query, tl.load(inv_norm + i), i, 0, D, BLOCK_D).to(DTYPE).to(tl.float32)
    unit, own, inv = _own_tile(paired, mask, along_row, along_column, i, j, M, D, NORMALIZE, BLOCK_R, BLOCK_D)
    s = tl.sum(unit.to(DTYPE).to(tl.float32) * q[None, :], 1)
    weight = tl.load(grad + i) * tl.load(stats + B + i)
    w = tl.exp2((s - tl.load(stats + i)) * scale) * (weight * (scale * LN2))
    g = w[:, None] * q[None, :]
    if NORMALIZE:  # a row shorter than 1e-12 is scaled and no more, as F.normalize does
        along = tl.where(inv < 1e12, w * tl.sum(unit * q[None, :], 1), 0.0)
        g = (g - unit * along[:, None]) * inv[:, None]
    g = tl.where(own[:, None], g, 0.0)
    rows, columns = j + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    at = address(dpaired, i * M + rows, columns, D)
    tl.store(at, g.to(dpaired.dtype.element_ty), mask=(rows < M)[:, None] & (columns < D)[None, :])


def tiles(m: int, d: int) -> dict[str, int]:
    """Blocks of 4096 elements, if rows are no longer"""
    block = triton.next_power_of_2(d)
    rows = min(triton.next_power_of_2(m), max(4096 // block, 1))
    return {"BLOCK_R": rows, "BLOCK_D": block, "num_warps": 8, **launch.FUSED}
