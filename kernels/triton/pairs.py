"""S = left right^T by tiles, nothing of its size in memory: what clip and siglip are epilogues of, and more for others.

left [B, D] and right [N, D] pass as operands: unit if asked, rounded, padded to a multiple of a tile's columns. A
gradient is W right and W^T left, W = dL/dS but for a factor: blocks of W are made by a kernel, 2 B N D FLOP, and
multiplied by the library's matmul, 2 B N D a side. The pairs, row i of left and first + i of right, stay out of W,
where rounding would drown the gradient of aligned ones: input_gradient adds them.

Order of every sum is fixed, so the same input gives the same bits. Scratch, in bytes: the operands, D x 4 a row whose
gradient is wanted, one block of W.
"""

from collections.abc import Callable, Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .rows import address, column_tile, input_gradients, inv_norms, load, row_blocks, row_tile

PANELS = 32  # of rows and of columns: 1024 programs fill 3.9 waves of two on each of an H100's 132 multiprocessors
W_BLOCK = 4096  # rows and columns of a block of W, 32 MiB in bf16; a multiple of every tile's


@triton.jit(do_not_specialize=("N",))
def _unit(x, z, inv_norm, N, D, stride, NORMALIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """z [N, stride]: the operand of x [N, D]"""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inv = tl.full([BLOCK_R], 1.0, tl.float32)
    if NORMALIZE:
        inv = inv_norms(x, rows, N, D, BLOCK_R, BLOCK_D)
    for k in range(0, stride, BLOCK_D):
        columns = k + tl.arange(0, BLOCK_D)
        a = load(x, rows, k, N, D, BLOCK_D) * inv[:, None]
        mask = (rows < N)[:, None] & (columns < stride)[None, :]
        tl.store(address(z, rows, columns, stride), a.to(z.dtype.element_ty), mask=mask)
    tl.store(inv_norm + rows, inv, mask=rows < N)


@triton.jit
def products(
    left, right, i, j, B, N, stride,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s [BLOCK_M, BLOCK_N] of the rows of left from i and of right from j"""
    s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, stride, BLOCK_K):
        a = row_tile(left + k, i, B, stride, BLOCK_M, BLOCK_K)
        b = column_tile(right + k, j, N, stride, BLOCK_N, BLOCK_K)
        s = tl.dot(a, b, s, input_precision=PRECISION)
    return s


@triton.jit
def has_others(i, j, B, N, first, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether the tile at (i, j) holds anything but rows and columns that are no pair"""
    paired = (first + i < j + BLOCK_N) & (j < first + i + BLOCK_M)
    return paired | (i + BLOCK_M > B) | (j + BLOCK_N > N)


@triton.jit
def number(x, value):
    """What `given` gave"""
    if x is not None:
        value = tl.load(x)
    return value


@triton.jit
def positive(scale):
    """NaN for what is no scale"""
    return tl.where(scale > 0, scale, float("nan"))


@triton.jit
def log2_parts(scale):
    """log2(e) scale of a float64 scale, in two parts above 0: exponents are as exact as logits, and -inf stays -inf"""
    exact = scale * 1.4426950408889634
    high = (exact * (1 - 2.0**-22)).to(tl.float32)
    low = (exact - high.to(tl.float64)).to(tl.float32)
    return tl.where(high < 1.2e-38, 1.2e-38, high), tl.where(low < 1.2e-38, 1.2e-38, low)


@triton.jit
def power(x, high, low):
    """exp(scale x)"""
    return tl.exp2(x * high + x * low)


@triton.jit
def add_to(parts, at, tile, before):
    """The sum of a tile, in float64 to what an earlier launch left there, if there was one"""
    # flat: Triton 3.6 has no layout for a sum of sums of what tcgen05 gives
    total = tl.sum(tl.reshape(tile, [tile.shape[0] * tile.shape[1]]), 0).to(tl.float64)
    tl.store(parts + at, total + tl.load(parts + at, mask=before, other=0.0))


def given(x: float | Tensor) -> tuple[Tensor | None, float]:
    """A number on the device stays there; `number` reads either"""
    return (x.float(), 0.0) if isinstance(x, Tensor) else (None, x)


def operand(x: Tensor, normalize: bool, dtype: torch.dtype, step: int) -> tuple[Tensor, Tensor]:
    """z [N, D up to a multiple of step] in dtype, and inv_norm [N]"""
    n, d = x.shape
    stride = max(triton.cdiv(d, step), 1) * step
    z, inv_norm = x.new_empty((n, stride), dtype=dtype), x.new_empty(n, dtype=torch.float32)
    blocks = row_blocks(stride)
    if n:
        _unit[triton.cdiv(n, blocks["BLOCK_R"]),](x, z, inv_norm, n, d, stride, normalize, **blocks)
    return z, inv_norm


def panels(b: int, n: int, config: Mapping[str, int]) -> tuple[int, int]:
    """How many rows and columns, whole tiles, a program takes: PANELS of each, or fewer"""
    return tuple(
        triton.cdiv(triton.cdiv(count, PANELS), config[block]) * config[block]
        for count, block in ((b, "BLOCK_M"), (n, "BLOCK_N"))
    )


def multiply_blocks(
    left: Tensor,
    right: Tensor,
    dleft: Tensor | None,
    dright: Tensor | None,
    weigh: Callable[[Tensor | None, int, int, int, int], None],
    alpha: float = 1.0,
) -> None:
    """dleft = alpha W right, dright = alpha W^T left, [.., stride] in float32, from blocks of W in the operands' dtype.

    weigh(w, i, j, rows, columns): w [rows, columns] of the rows of left from i and of right from j; None if neither
    gradient is wanted.
    """
    for i in range(0, len(left), W_BLOCK):
        for j in range(0, len(right), W_BLOCK):
            zi, zj, w = left[i : i + W_BLOCK], right[j : j + W_BLOCK], None
            if dleft is not None or dright is not None:  # rows of whole 16 elements, for wide loads
                w = left.new_empty((len(zi), triton.cdiv(len(zj), 16) * 16))[:, : len(zj)]
            weigh(w, i, j, len(zi), len(zj))
            if w is not None and dleft is not None:
                launch.multiply(dleft[i : i + W_BLOCK], w, zj, alpha=alpha, beta=float(j > 0))
            if w is not None and dright is not None:
                launch.multiply(dright[j : j + W_BLOCK], w.t(), zi, alpha=alpha, beta=float(i > 0))


def spread(x: Tensor, first: int, n: int) -> Tensor:
    """[n, ..]: x from row `first` on, zeros around it"""
    if len(x) == n:
        return x
    out = x.new_zeros((n, *x.shape[1:]))
    out[first : first + len(x)] = x
    return out


def input_gradient(
    x: Tensor, other: Tensor, dz: Tensor, inv_norm: Tensor, inv_other: Tensor, pull: Tensor, w_scale: Tensor | None,
    factor: float | Tensor, normalize: bool, grad: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dx [N, D]: of the unit rows factor LN2 (dz / w_scale - pull * other's unit row); grad, if given, is times pull"""
    if not len(x):
        return torch.empty_like(x)
    found, _ = input_gradients(
        (x, other), 1, dz[None], inv_norm, pull, w_scale, (None, factor), normalize, grad=grad, dotted=False,
        inv_other=inv_other,
    )  # fmt: skip
    return found[0]
