"""Candidates that pass by in tiles as they are stored, rows that have one program each: what InfoNCE's kernels share.

A candidate that a mask (SOME) leaves out may be anything. If it is not finite, which its inverse norm says, it is
zeros and its products are NaN: that is for those who look at it, and the others are given nothing of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .rows import ragged_tile, tile_inv_norms


@triton.jit
def candidate_tile(
    c, inv_c, j, k, K, D,
    NORMALIZE: tl.constexpr, SOME: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Operands [BLOCK, BLOCK_K] of the rows of c from j: columns from k, times inv_c; or all of them, made unit here"""
    tile = ragged_tile(c, j, k, K, D, BLOCK, BLOCK_K)
    if inv_c is not None:
        rows = j + tl.arange(0, BLOCK)
        inv = tl.load(inv_c + rows, mask=rows < K, other=0.0)[:, None]
        if NORMALIZE:
            tile = tile.to(tl.float32) * inv
        if SOME:
            tile = tl.where(inv > 0.0, tile, 0.0)
    elif NORMALIZE:
        tile = tile.to(tl.float32)
        tile = tile * tile_inv_norms(tile)[:, None]
    return tile.to(DTYPE)


@triton.jit
def unit_tile(x, i, N, D, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """The rows of x [N, D] from i, unit and in float32, and their inverse norms"""
    x = ragged_tile(x, i, 0, N, D, BLOCK, BLOCK_K).to(tl.float32)
    inv = tile_inv_norms(x) if NORMALIZE else tl.full([BLOCK], 1.0, tl.float32)
    return x * inv[:, None], inv


@triton.jit(do_not_specialize=("along_row", "K", "words"))
def _pack(mask, along_row, along_column, bits, K, words, BLOCK: tl.constexpr):
    """bits [B, words], bit c of word k being mask[:, 32 k + c]"""
    i, place = tl.program_id(0).to(tl.int64), tl.arange(0, 32)[None, :]
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = word[:, None] * 32 + place
    given = tl.load(mask + i * along_row + column.to(tl.int64) * along_column, mask=column < K, other=0)
    tl.store(bits + i * words + word, tl.sum(tl.where(given != 0, 1 << place, 0), 1), mask=word < words)


@triton.jit
def of_negatives(
    x, other, rows, columns, j, query_ids, negative_ids, bits, words, inv_c, B, K, first,
    IN_BATCH: tl.constexpr, SOME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x, and `other` where rows and the BLOCK columns from j, one across the other, are no pair"""
    negative = (rows < B) & (columns < K)
    if IN_BATCH:
        negative = negative & (columns != rows + first)
    if query_ids is not None:
        ids = tl.load(query_ids + rows, mask=rows < B, other=0)
        negative = negative & ((ids != tl.load(negative_ids + columns, mask=columns < K, other=0)) | (ids < 0))
    if bits is not None:
        at, place = rows.to(tl.int64) * words + j // 32, columns - j
        word = tl.load(bits + at, mask=rows < B, other=0)
        for k in tl.static_range(1, BLOCK // 32):
            later = tl.load(bits + at + k, mask=rows < tl.where(j // 32 + k < words, B, 0), other=0)
            word = tl.where(place < k * 32, word, later)
        negative = negative & ((word >> (place % 32) & 1) != 0)
    if SOME:
        x = tl.where(tl.load(inv_c + columns, mask=columns < K, other=0.0) > 0.0, x, float("nan"))
    return tl.where(negative, x, other)


@triton.jit
def unit_row(x, inv, i, k, D, BLOCK_D: tl.constexpr):
    """inv x[i, k : k + BLOCK_D] in float32"""
    columns = k + tl.arange(0, BLOCK_D)
    return tl.load(x + i * D + columns, mask=columns < D, other=0.0).to(tl.float32) * inv


@triton.jit
def store_gradient(
    v, x, inv, dot, out, i, D, stride, NORMALIZE: tl.constexpr, SOME: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out[i] from v[i], the gradient of the unit row inv x[i], and dot, their product"""
    along = tl.where(inv < 1e12, dot, 0.0)  # a row shorter than 1e-12 is scaled and no more, as F.normalize does
    tl.debug_barrier()  # v was written by other threads
    for k in range(0, D, BLOCK_D):
        columns = k + tl.arange(0, BLOCK_D)
        g = tl.load(v + i * stride + columns, mask=columns < D, other=0.0)
        if NORMALIZE:
            projected = (g - unit_row(x, inv, i, k, D, BLOCK_D) * along) * inv
            g = tl.where(tl.abs(g) + tl.abs(along) == 0.0, 0.0, projected) if SOME else projected
        tl.store(out + i * D + columns, g.to(out.dtype.element_ty), mask=columns < D)


def strided(mask: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Its bytes and its strides"""
    return (None, 0, 0) if mask is None else (mask.view(torch.uint8), mask.stride(0), mask.stride(1))


def packed(mask: Tensor | None) -> tuple[Tensor | None, int]:
    """Its bits, and how many words a row has: in tiles of a product, bytes would have to change their places"""
    if mask is None:
        return None, 0
    b, k = mask.shape
    words = triton.cdiv(k, 32)
    bits = mask.new_empty((b, words), dtype=torch.int32)
    if bits.numel():
        _pack[b, triton.cdiv(words, 64)](*strided(mask), bits, k, words, 64, num_warps=8, **launch.FUSED)
    return bits, words
