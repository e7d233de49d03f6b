"""What exceeds pairs in Triton: how many a tile holds for its rows and for its columns; 2 B N D FLOP.

Beside the sums of a loss there are no registers left for it. Scratch beside the operands, in bytes: 4 PANELS a row and
a column (pairs.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from . import launch
from .pairs import has_others, operand, panels, products

if TYPE_CHECKING:
    from torch import Tensor

# These change from batch to batch: no compilation for each.
SIZES = ("B", "N", "first", "high", "wide")


@triton.jit(do_not_specialize=SIZES)
def _exceeding(
    left, right, of_left, of_right, row_counts, column_counts, B, N, stride, first, high, wide,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of panel (a, b), `high` rows and `wide` columns: part b of its rows' counts [.., B], a of its columns' [.., N]"""
    begin, b = tl.program_id(0) * high, tl.program_id(1)
    of_rows, of_columns = tl.cast(b, tl.int64) * B, tl.cast(tl.program_id(0), tl.int64) * N
    for i in range(begin, tl.minimum(begin + high, B), BLOCK_M):
        rows = i + tl.arange(0, BLOCK_M)
        bar = tl.load(of_left + rows, mask=rows < B, other=0.0)
        r = tl.zeros([BLOCK_M], tl.float32)
        for j in range(b * wide, tl.minimum(b * wide + wide, N), BLOCK_N):
            columns = j + tl.arange(0, BLOCK_N)
            s = products(left, right, i, j, B, N, stride, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
            if has_others(i, j, B, N, first, BLOCK_M, BLOCK_N):
                pair = (first + rows)[:, None] == columns[None, :]
                s = tl.where((rows < B)[:, None] & (columns < N)[None, :] & ~pair, s, float("-inf"))
            r += tl.sum(tl.where(s > bar[:, None], 1.0, 0.0), 1)
            bar_c = tl.load(of_right + columns, mask=columns < N, other=0.0)
            c = tl.load(column_counts + of_columns + columns, mask=columns < tl.where(i > begin, N, 0), other=0.0)
            c += tl.sum(tl.where(s > bar_c[None, :], 1.0, 0.0), 0)
            tl.store(column_counts + of_columns + columns, c, mask=columns < N)
        tl.store(row_counts + of_rows + rows, r, mask=rows < B)
        tl.debug_barrier()  # the columns' parts are read again by other threads


@triton.jit(do_not_specialize=("B",))
def _similarity(
    left, right, out, B, stride,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B]: what the tiles hold for the pairs"""
    i = tl.program_id(0) * BLOCK_M
    rows = i + tl.arange(0, BLOCK_M)
    own = tl.zeros([BLOCK_M], tl.float32)
    for j in range(i, tl.minimum(i + BLOCK_M, B), BLOCK_N):
        columns = j + tl.arange(0, BLOCK_N)
        s = products(left, right, i, j, B, B, stride, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
        own += tl.sum(tl.where(rows[:, None] == columns[None, :], s, 0.0), 1)
    tl.store(out + rows, own, mask=rows < B)


def _operands(x: Any) -> tuple[Tensor, Tensor, dict[str, int]]:
    """And the launch config: by it the kernels have the same numbers in their tiles"""
    config = launch.nearest("pairs", x.image.device, x.operand_dtype, x.image.shape[1])["sums"]
    left, right = (operand(z, x.normalize, x.operand_dtype, config["BLOCK_K"])[0] for z in (x.image, x.text))
    return left, right, config


def similarity(x: Any) -> Tensor:
    """[B]: of each image and its text, the very numbers that the tiles hold: where all pairs are alike, none exceeds"""
    b = len(x.image)
    out = x.image.new_empty(b, dtype=torch.float32)
    if b:
        with launch.on(x.image.device):
            left, right, config = _operands(x)
            _similarity[triton.cdiv(b, config["BLOCK_M"]),](
                left, right, out, b, left.shape[1], launch.precision("pairs", x.operand_dtype), **config
            )
    return out


def count(x: Any, first: int, of_images: Tensor, of_texts: Tensor) -> tuple[Tensor, Tensor]:
    """[B] and [N]: to how many texts an image is closer than of_images [B], and how many images to a text than of_texts
    [N]. Image i's text is row first + i, and does not count, or not among these.
    """
    b, n = len(x.image), len(x.text)
    if not b * n:
        return of_images.new_zeros(b), of_texts.new_zeros(n)
    with launch.on(x.image.device):
        left, right, config = _operands(x)
        high, wide = panels(b, n, config)
        grid = triton.cdiv(b, high), triton.cdiv(n, wide)
        rows, columns = of_images.new_empty(grid[1], b), of_texts.new_empty(grid[0], n)
        _exceeding[grid](
            left, right, of_images, of_texts, rows, columns, b, n, left.shape[1], first, high, wide,
            launch.precision("pairs", x.operand_dtype), **config,
        )  # fmt: skip
    return rows.sum(0), columns.sum(0)
