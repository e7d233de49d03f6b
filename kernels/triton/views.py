"""Rows of V views [V, N, D] in Triton: which pairs are negatives, and of V > 2 what each row has of its positives, the
further views of its example: rows i + k N, of V N in a circle, for k = 1 .. V - 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from .rows import address, load, own_rows, row_blocks


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
def of_negatives(x, i, j, other, classes, N, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """x, of the tile at (i, j), and `other` for the pairs that are no negatives: of one class, or without classes views
    of one example
    """
    rows = i + tl.arange(0, BLOCK_M)[:, None]
    columns = j + tl.arange(0, BLOCK_N)[None, :]
    inside = (rows < M) & (columns < M)
    if classes is not None:
        of_rows = tl.load(classes + rows, mask=rows < M, other=-1)
        x = tl.where(inside & (of_rows != tl.load(classes + columns, mask=columns < M, other=-1)), x, other)
    elif _has_others(i, j, N, M, BLOCK_M, BLOCK_N):
        paired = (rows == columns) | (rows + N == columns) | (rows == columns + N)
        x = tl.where(inside & ~paired, x, other)
    return x


@triton.jit(do_not_specialize=("N",))
def _products(x, inv_norm, s_pos, N, D, VIEWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """s_pos [VIEWS - 1, VIEWS N], of the unit rows, not rounded"""
    rows, k, M = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(1), VIEWS * N
    others = (rows + (k + 1) * N) % M
    inv = tl.load(inv_norm + rows, mask=rows < M, other=0.0)[:, None]
    inv_others = tl.load(inv_norm + others)[:, None]
    s = tl.zeros([BLOCK_R], tl.float32)
    for column in range(0, D, BLOCK_D):
        a, b = load(x, rows, column, M, D, BLOCK_D) * inv, load(x, others, column, M, D, BLOCK_D) * inv_others
        s += tl.sum(a * b, 1)
    tl.store(s_pos + tl.cast(k, tl.int64) * M + rows, s, mask=rows < M)


@triton.jit(do_not_specialize=("N", "rows", "count", "first"))
def _pull(
    x, inv_norm, grad, shares, w_scale, dz, N, rows, count, first, D, stride,
    VIEWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dz [rows, stride] less w_scale times the positives of the own rows, each as much as both rows of the pair pull:
    each its grad times its share.
    """
    k, M = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), VIEWS * N
    own, inside = own_rows(k, N, count, first), k < rows
    of_own = tl.load(grad + own, mask=inside, other=0.0)
    w = 1.0
    if w_scale is not None:
        w = tl.load(w_scale)
    for column in range(0, D, BLOCK_D):
        total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        for v in range(1, VIEWS):
            other = (own + v * N) % M
            pull = of_own * tl.load(shares + (v - 1) * M + own, mask=inside, other=0.0)
            of_other = tl.load(grad + other, mask=inside, other=0.0)
            pull += of_other * tl.load(shares + (VIEWS - 1 - v) * M + other, mask=inside, other=0.0)
            inv = tl.load(inv_norm + other, mask=inside, other=0.0)
            total += load(x, other, column, M, D, BLOCK_D) * inv[:, None] * (w * pull)[:, None]
        columns = column + tl.arange(0, BLOCK_D)
        at, mask = address(dz, k, columns, stride), inside[:, None] & (columns < D)[None, :]
        tl.store(at, tl.load(at, mask=mask, other=0.0) - total, mask=mask)


def products(x: Tensor, inv_norm: Tensor) -> Tensor:
    """s_pos [V - 1, V N], of x [V, N, D]"""
    v, n, d = x.shape
    s_pos, blocks = inv_norm.new_empty(v - 1, v * n), row_blocks(d)
    _products[triton.cdiv(v * n, blocks["BLOCK_R"]), v - 1](x, inv_norm, s_pos, n, d, v, **blocks)
    return s_pos


def subtract_pulls(
    x: Tensor, inv_norm: Tensor, grad: Tensor, shares: Tensor, w_scale: Tensor | None, dz: Tensor, own: slice
) -> None:
    """From dz [rows, stride] of the examples `own`, each view's; shares [V - 1, V N]: of each row in its positives"""
    (v, n, d), (rows, stride) = x.shape, dz.shape
    blocks = row_blocks(d)
    _pull[triton.cdiv(rows, blocks["BLOCK_R"]),](
        x, inv_norm, grad, shares, w_scale, dz, n, rows, rows // v, own.start, d, stride, v, **blocks
    )  # fmt: skip


def row_ranges(v: int, n: int, own: slice | None) -> list[tuple[int, int]]:
    """Rows of each view's examples `own`; by default all, as one"""
    return [(0, v * n)] if own is None else [(k * n + own.start, k * n + own.stop) for k in range(v)]
