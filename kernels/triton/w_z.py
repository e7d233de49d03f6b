"""W z of NT-Xent's backward pass, W_ij = g_i E_ij / r_i + g_j E_ji / r_j, and 0 where the pair is no negative.

`flash` makes the tiles of W where they are used; `panels`, of rows that are wider than a block, writes blocks of W and
multiplies them by the library's matmul. rows: classes, g, stats, temperature, scale, maximum and w_scale, as kernels
take them.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .pairs import products
from .rows import LOG2E, column_tile, log2_of, row_tile
from .views import of_negatives, row_ranges

# These change from batch to batch: no compilation for each.
SIZES = ("N", "M", "span", "row0", "row1", "total", "column0", "width")

BLOCKS = 4  # a multiprocessor: of rows whose sums the flash backward keeps, about and at most
W_BLOCK = 4096  # rows and columns of the panel backward's W: 32 MiB in bf16


@triton.jit
def _row_stats(grad, stats, i, M, maximum, SEARCH: tl.constexpr, BLOCK: tl.constexpr):
    """g / r, zeros from row M on, and the maximum times log2(e) of the rows from i"""
    rows = i + tl.arange(0, BLOCK)
    weight = tl.load(grad + rows, mask=rows < M, other=0.0)
    weight = weight * tl.load(stats + tl.cast(M, tl.int64) + rows, mask=rows < M, other=0.0)
    if SEARCH:
        maximum = tl.load(stats + rows, mask=rows < M, other=0.0)
    return weight, maximum * LOG2E


@triton.jit
def _w_tile(
    s, i, j, weight_i, top_i, weight_j, top_j, scale, w_scale, classes, N, M,
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
    return of_negatives(w, i, j, 0.0, classes, N, M, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=SIZES)
def _flash(
    z, dz, classes, grad, stats, temperature, scale, maximum, w_scale, N, M, span, row0, row1, total,
    SEARCH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dz [splits, total, BLOCK_K]: rows row0 to row1 of W z over the span of columns of each split"""
    scale = log2_of(temperature, scale)
    i = row0 + tl.program_id(0) * BLOCK_M
    split = tl.program_id(1)
    zi = row_tile(z, i, M, BLOCK_K, BLOCK_M, BLOCK_K)
    weight_i, top_i = _row_stats(grad, stats, i, M, maximum, SEARCH, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for j in range(split * span, tl.minimum(split * span + span, M), BLOCK_N):
        s = tl.dot(zi, column_tile(z, j, M, BLOCK_K, BLOCK_N, BLOCK_K), input_precision=PRECISION)
        weight_j, top_j = _row_stats(grad, stats, j, M, maximum, SEARCH, BLOCK_N)
        w = _w_tile(s, i, j, weight_i, top_i, weight_j, top_j, scale, w_scale, classes, N, M, SEARCH, BLOCK_M, BLOCK_N)
        zj = row_tile(z, j, M, BLOCK_K, BLOCK_N, BLOCK_K)
        acc = tl.dot(w.to(z.dtype.element_ty), zj, acc, input_precision=PRECISION)
    r = tl.arange(0, BLOCK_M)[:, None]
    to = dz + (tl.cast(split, tl.int64) * total + i - row0) * BLOCK_K + (r * BLOCK_K + tl.arange(0, BLOCK_K)[None, :])
    tl.store(to, acc, mask=i + r < row1)


@triton.jit(do_not_specialize=SIZES)
def _w_block(
    z, w, classes, grad, stats, temperature, scale, maximum, w_scale, N, M, stride, row0, column0, width,
    SEARCH: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """w [.., width]: W of the rows from row0 and the width columns from column0, in the operands' dtype"""
    scale = log2_of(temperature, scale)
    i = row0 + tl.program_id(0) * BLOCK_M
    j = column0 + tl.program_id(1) * BLOCK_N
    s = products(z, z, i, j, M, M, stride, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    weight_i, top_i = _row_stats(grad, stats, i, M, maximum, SEARCH, BLOCK_M)
    weight_j, top_j = _row_stats(grad, stats, j, M, maximum, SEARCH, BLOCK_N)
    tile = _w_tile(s, i, j, weight_i, top_i, weight_j, top_j, scale, w_scale, classes, N, M, SEARCH, BLOCK_M, BLOCK_N)
    rows = i + tl.arange(0, BLOCK_M)[:, None]
    columns = j + tl.arange(0, BLOCK_N)[None, :]
    to = w + (rows - row0) * width + (columns - column0)
    tl.store(to, tile.to(w.dtype.element_ty), mask=(rows < M) & (columns < M))


@functools.lru_cache(1024)
def _span(m: int, blocks: int, step: int, processors: int) -> int:
    """Of columns, in whole tiles, that take the shortest time: the time of the multiprocessor with the most programs,
    two at once.
    """

    def time(span: int) -> int:
        return triton.cdiv(blocks * triton.cdiv(m, span), 2 * processors) * span

    spans = {
        triton.cdiv(triton.cdiv(m, n), step) * step for n in range(1, triton.cdiv(BLOCKS * processors, blocks) + 1)
    }
    return min(spans, key=lambda span: (time(span), -span))


def flash(
    z: Tensor, v: int, rows: tuple[Any, ...], search: bool, precision: str, config: dict[str, int], own: slice | None
) -> Tensor:
    """[splits, V B, stride] whose sum over the splits is W z"""
    m, stride = z.shape
    n = m // v
    ranges = row_ranges(v, n, own)
    total = sum(row1 - row0 for row0, row1 in ranges)
    span = _span(m, triton.cdiv(total, config["BLOCK_M"]), config["BLOCK_N"], launch.processors(z.device))
    splits = triton.cdiv(m, span)
    dz = z.new_empty((splits, total, stride), dtype=torch.float32)
    written = 0
    for row0, row1 in ranges:
        _flash[triton.cdiv(row1 - row0, config["BLOCK_M"]), splits](
            z, dz.view(-1)[written * stride :], *rows, n, m, span, row0, row1, total, search, precision, **config
        )
        written += row1 - row0
    return dz


def panels(
    z: Tensor, v: int, rows: tuple[Any, ...], search: bool, precision: str, config: dict[str, int], own: slice | None
) -> Tensor:
    """[1, V B, stride]: W z by blocks of W; of all rows those on and above the diagonal, each also used transposed"""
    m, stride = z.shape
    n = m // v
    ranges = row_ranges(v, n, own)
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
                    z, w, *rows, n, m, stride, i, j, len(zj), search, precision, **config
                )
                w = w[: len(zi)]
                launch.multiply(dz[0, written : written + len(zi)], w, zj, beta=1.0)
                if own is None and i != j:
                    launch.multiply(dz[0, j : j + W_BLOCK], w.t(), zi, beta=1.0)
            written += len(zi)
    return dz
