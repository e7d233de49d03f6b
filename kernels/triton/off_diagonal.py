"""S = X^T Y [D, D] without its diagonal: the sum of its squares and its products with X and Y. Two exact routes.

- gram (N^2 D FLOP for half of each X X^T, 2 N^2 D a product): sum S^2 = <X X^T, Y Y^T>, S's diagonal included.
- panels (2 N D^2 for S, half of that where Y is X; 2 N D^2 a product): PANEL rows of S at a time, squared and stored as
  the next matmul's operand.

X, Y: operands of columns.py, [rows, stride], for the panels stored by columns. No result depends on the order in which
programs run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

SIZES = ("N", "D", "splits", "views", "row1")  # not those whose being multiples of 16 lets loads be wide

PANEL = 4096  # rows of S: 64 MiB at D = 8192 in bf16; fewer would read and write the products in float32 more often
SPLIT = 256  # columns that a program of the Gram matrix has at least
BLOCKS = 2  # of the Gram matrix, on each multiprocessor
SQUARE = 64  # of the Gram matrix that a program of _inner takes; divides every BLOCK_M


@triton.jit
def _rows(x, row, rows, column, stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """x[row : row + BLOCK, column : column + BLOCK_K], zeros from row `rows` on"""
    r = tl.arange(0, BLOCK)[:, None]
    at = x + tl.cast(row, tl.int64) * stride + column + (r * stride + tl.arange(0, BLOCK_K)[None, :])
    return tl.load(at, mask=row + r < rows, other=0.0)


@triton.jit
def _rows_transposed(x, row, rows, column, stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """_rows as [BLOCK_K, BLOCK]"""
    r = tl.arange(0, BLOCK)[None, :]
    at = x + tl.cast(row, tl.int64) * stride + column + (r * stride + tl.arange(0, BLOCK_K)[:, None])
    return tl.load(at, mask=row + r < rows, other=0.0)


@triton.jit
def _inner_products(
    x, y, i, j, rows, stride, first, last,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] of the rows of x from i with the rows of y from j, over the columns from first to last"""
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(first, last, BLOCK_K):
        a = _rows(x, i, rows, k, stride, BLOCK_M, BLOCK_K)
        b = _rows_transposed(y, j, rows, k, stride, BLOCK_N, BLOCK_K)
        s = tl.dot(a, b, s, input_precision=PRECISION)
    return s


@triton.jit(do_not_specialize=SIZES)
def _gram(
    x, parts, N, rows, stride, span, splits,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts [V, splits, N, N]: X X^T of each view over a span of columns each; no tiles below the diagonal"""
    i, j = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    view, split = tl.program_id(2) // splits, tl.program_id(2) % splits
    x += tl.cast(view, tl.int64) * rows * stride
    upper = tl.minimum(tl.maximum(j + BLOCK_N - i, 0), 1)  # 0: nothing to do below the diagonal
    last = tl.minimum(split * span + span, stride) * upper
    g = _inner_products(x, x, i, j, rows, stride, split * span, last, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    r, c = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    to = parts + (tl.cast(tl.program_id(2), tl.int64) * N + i) * N + j + (r * N + c)
    tl.store(to, g, mask=(i + r < N) & (j + c < upper * N))


@triton.jit(do_not_specialize=SIZES)
def _inner(parts, grams, sums, N, views, splits, PAIRED: tl.constexpr, SQUARE: tl.constexpr):
    """sums [V, tiles]: <G, G> of each view; or paired <G_x, G_y>, twice. grams [V, N, N]: G, or paired the other's"""
    i, j, view = tl.program_id(0) * SQUARE, tl.program_id(1) * SQUARE, tl.program_id(2)
    r, c = i + tl.arange(0, SQUARE)[:, None], j + tl.arange(0, SQUARE)[None, :]
    mask = (r < N) & (c < tl.where(j >= i, N, 0))
    size = tl.cast(N, tl.int64) * N
    other = views - 1 - view if PAIRED else view
    at = r.to(tl.int64) * N + c
    g = tl.zeros([SQUARE, SQUARE], tl.float32)
    h = g
    for split in range(0, splits):
        g += tl.load(parts + (view * splits + split) * size + at, mask=mask, other=0.0)
        if PAIRED:
            h += tl.load(parts + (other * splits + split) * size + at, mask=mask, other=0.0)
    if not PAIRED:
        h = g
    if grams is not None:
        grams += view * size
        tl.store(grams + at, h, mask=mask)
        tl.store(grams + c.to(tl.int64) * N + r, h, mask=mask & (r < tl.where(i != j, N, 0)))
    products = tl.sum(tl.sum(g.to(tl.float64) * h.to(tl.float64), 1), 0)
    tile = (view * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1)
    tl.store(sums + tile, tl.where(i == j, products, 2.0 * products))


@triton.jit(do_not_specialize=SIZES)
def _panel(
    x, y, w, sums, scale, weight, corner, N, D, rows, stride, row0, row1,
    SYMMETRIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of the rows of S from row0 to row1: sums [tiles] of squares off the diagonal, and w [.., rows] for the products.

    x, y [rows, stride] are X^T and Y^T. w is weight S, corner (S - N) on the diagonal, times scale [] if there is one,
    in the operands' dtype. SYMMETRIC: no tiles below the diagonal, whose squares count as those above it; w has what is
    above, and below it what lies in the columns from row0 to row1.
    """
    i, j = row0 + tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    last = stride
    if SYMMETRIC:
        last = stride * tl.minimum(tl.maximum(j + BLOCK_N - i, 0), 1)
    s = _inner_products(x, y, i, j, rows, stride, 0, last, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    r, c = i + tl.arange(0, BLOCK_M)[:, None], j + tl.arange(0, BLOCK_N)[None, :]
    off = tl.where(r == c, 0.0, s)
    counted = tl.where(r < c, 2.0 * s * s, 0.0) if SYMMETRIC else off * off
    # flat: Triton 3.6 has no layout for a sum of sums of what tcgen05 gives
    squares = tl.sum(tl.reshape(counted, [BLOCK_M * BLOCK_N]), 0).to(tl.float64)
    tl.store(sums + (i // BLOCK_M) * tl.num_programs(1) + tl.program_id(1), squares)
    if w is not None:
        value = tl.where(r == c, (s - N) * corner, off * weight)
        if scale is not None:
            value = value * tl.load(scale)
        value = value.to(w.dtype.element_ty)
        to = w + tl.cast(i - row0, tl.int64) * rows + j + ((r - i) * rows + (c - j))
        mask = (r < D) & (c < D)
        if SYMMETRIC:
            mask = mask & (r <= c)
        tl.store(to, value, mask=mask)
        if SYMMETRIC:
            r, c = i + tl.arange(0, BLOCK_M)[None, :], j + tl.arange(0, BLOCK_N)[:, None]
            to = w + (tl.cast(j, tl.int64) - row0) * rows + i + ((c - j) * rows + (r - i))
            tl.store(to, tl.trans(value), mask=(r < c) & (c < row1))


def grams(x: Tensor, n: int, d: int, *, paired: bool, keep: bool) -> tuple[Tensor, Tensor | None]:
    """Sums [V, ..] that add up to <G, G> of each view, paired to <G_0, G_1>; and, to keep, G [V, N, N], paired swapped.

    x [V, rows, stride]
    """
    views, rows, stride = x.shape
    config = launch.nearest("off_diagonal", x.device, x.dtype, d)["gram"]
    high, wide = triton.cdiv(n, config["BLOCK_M"]), triton.cdiv(n, config["BLOCK_N"])
    programs = BLOCKS * launch.processors(x.device)
    splits = max(1, min(programs // (triton.cdiv(high * (wide + 1), 2)), stride // SPLIT))
    span = triton.cdiv(stride, splits * config["BLOCK_K"]) * config["BLOCK_K"]
    splits = triton.cdiv(stride, span)
    parts = x.new_empty((views, splits, n, n), dtype=torch.float32)
    tiles = triton.cdiv(n, SQUARE)
    sums = x.new_empty((views, tiles * tiles), dtype=torch.float64)
    kept = x.new_empty((views, n, n), dtype=torch.float32) if keep else None
    _gram[high, wide, views * splits](
        x, parts, n, rows, stride, span, splits, launch.precision("off_diagonal", x.dtype), **config
    )  # fmt: skip
    _inner[tiles, tiles, views](parts, kept, sums, n, views, splits, paired, SQUARE, num_warps=8, **launch.FUSED)
    return sums, kept


def gram_products(grams: Tensor, x: Tensor, n: int, d: int) -> tuple[Tensor, Tensor | None]:
    """t [V, N, D] = G X of each view, times a scale [] if there is one, as `panels` gives it"""
    scale = launch.half_scale(x.dtype, lambda: grams)
    g = (grams if scale is None else grams * scale).to(x.dtype)
    t = x.new_empty((len(x), n, d), dtype=torch.float32)
    for out, left, right in zip(t, g, x, strict=True):
        launch.multiply(out, left, right[:n, :d])
    return t, scale


def panels(
    x: Tensor,
    y: Tensor,
    n: int,
    d: int,
    *,
    products: tuple[Tensor, ...] = (),
    weight: float = 1.0,
    corner: float = 0.0,
    scale: Tensor | None = None,
) -> Tensor:
    """Sums [tiles] of S's squares off the diagonal; and into `products`, [N, D] each, Y W^T and, if asked, X W.

    x, y [rows, stride], stored by columns. W is weight S, corner (S - N) on the diagonal, all times scale []. Where
    y is x only what is above the diagonal is computed, and there is one product at most.
    """
    rows, stride = x.shape
    config = launch.nearest("off_diagonal", x.device, x.dtype, d)["panel"]
    wide = triton.cdiv(d, config["BLOCK_N"])
    sums = x.new_empty(triton.cdiv(d, config["BLOCK_M"]) * wide, dtype=torch.float64)
    panel = PANEL if products else d
    w = x.new_empty((min(panel, d), stride)) if products else None
    for first in range(0, d, panel):
        p = min(panel, d - first)
        end = first + p
        _panel[triton.cdiv(p, config["BLOCK_M"]), wide](
            x.t(), y.t(), w, sums, scale, weight, corner, n, d, stride, rows, first, end, y is x,
            launch.precision("off_diagonal", x.dtype), **config,
        )  # fmt: skip
        if w is None:
            continue
        before, part = float(first > 0), w[:p, :d]
        if y is x:
            launch.multiply(products[0][:, first:end], y[:n, first:d], part[:, first:].t(), beta=before)
            if end < d:
                launch.multiply(products[0][:, end:], x[:n, first:end], part[:, end:], beta=before)
            continue
        launch.multiply(products[0][:, first:end], y[:n, :d], part.t())
        for out in products[1:]:
            launch.multiply(out, x[:n, first:end], part, beta=before)
    return sums
