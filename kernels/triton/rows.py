"""Rows of embeddings, as they are stored, unit and as operands: what the contrastive losses' Triton kernels share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HUGE, SHRINK = tl.constexpr(2.0**60), tl.constexpr(2.0**-70)  # of an element whose square may overflow
LOWEST = tl.constexpr(-1e38)  # below every logit, and finite: LOWEST - LOWEST is no NaN


@triton.jit
def row_tile(z, row, M, stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """z[row : row + BLOCK, : BLOCK_K], zeros from row M on"""
    r = tl.arange(0, BLOCK)[:, None]
    tile = z + tl.cast(row, tl.int64) * stride + (r * stride + tl.arange(0, BLOCK_K)[None, :])
    return tl.load(tile, mask=row + r < M, other=0.0)


@triton.jit
def column_tile(z, row, M, stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """row_tile transposed: [BLOCK_K, BLOCK]"""
    r = tl.arange(0, BLOCK)[None, :]
    tile = z + tl.cast(row, tl.int64) * stride + (r * stride + tl.arange(0, BLOCK_K)[:, None])
    return tl.load(tile, mask=row + r < M, other=0.0)


@triton.jit
def inv_norms(x, rows, N, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """1 / max(|x|, 1e-12) of the rows, finite squares or not"""
    top = tl.zeros([BLOCK_R], tl.float32)
    for k in range(0, D, BLOCK_D):
        top = tl.maximum(top, tl.max(tl.abs(load(x, rows, k, N, D, BLOCK_D)), 1))
    shrink = tl.where(top > HUGE, SHRINK, 1.0)
    squares = tl.zeros([BLOCK_R], tl.float32)
    for k in range(0, D, BLOCK_D):
        a = load(x, rows, k, N, D, BLOCK_D) * shrink[:, None]
        squares += tl.sum(a * a, 1)
    return _reciprocal(squares, shrink)


@triton.jit
def tile_inv_norms(x):
    """inv_norms of the float32 rows x, all their columns"""
    shrink = tl.where(tl.max(tl.abs(x), 1) > HUGE, SHRINK, 1.0)
    x = x * shrink[:, None]
    return _reciprocal(tl.sum(x * x, 1), shrink)


@triton.jit
def _reciprocal(squares, shrink):
    norm = tl.sqrt_rn(squares) / shrink
    return tl.div_rn(1.0, tl.where(norm < 1e-12, 1e-12, norm))  # tl.maximum would swallow a NaN


@triton.jit
def address(x, rows, columns, stride):
    return x + rows.to(tl.int64)[:, None] * stride + columns[None, :]


@triton.jit
def load(x, rows, k, N, D, BLOCK_D: tl.constexpr):
    """x[rows, k : k + BLOCK_D] of x [N, D] in float32, zeros outside"""
    columns = k + tl.arange(0, BLOCK_D)
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    return tl.load(address(x, rows, columns, D), mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=("N",))
def _inv_norms(x, out, N, D, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """out [N]"""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    tl.store(out + rows, inv_norms(x, rows, N, D, BLOCK_R, BLOCK_D), mask=rows < N)


@triton.jit(do_not_specialize=("N",))
def _prepare(
    x0, x1, z, inv_norm, s_pos, N, D, stride,
    NORMALIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z [2N, stride], the matmuls' operand: both views normalised, rounded, padded; s_pos [N] of the unrounded"""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = rows < N
    inv0 = tl.full([BLOCK_R], 1.0, tl.float32)
    inv1 = inv0
    if NORMALIZE:
        inv0 = inv_norms(x0, rows, N, D, BLOCK_R, BLOCK_D)
        inv1 = inv_norms(x1, rows, N, D, BLOCK_R, BLOCK_D)
    s = tl.zeros([BLOCK_R], tl.float32)
    for k in range(0, stride, BLOCK_D):
        a = load(x0, rows, k, N, D, BLOCK_D) * inv0[:, None]
        b = load(x1, rows, k, N, D, BLOCK_D) * inv1[:, None]
        s += tl.sum(a * b, 1)
        columns = k + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (columns < stride)[None, :]
        tl.store(address(z, rows, columns, stride), a.to(z.dtype.element_ty), mask=mask)
        tl.store(address(z, rows + N, columns, stride), b.to(z.dtype.element_ty), mask=mask)
    tl.store(inv_norm + rows, inv0, mask=inside)
    tl.store(inv_norm + N + rows, inv1, mask=inside)
    tl.store(s_pos + rows, s, mask=inside)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x < 1, to float32's last bit: 2 atanh(x / (2 + x)); the chips' own log is not exact near 1"""
    t = x / (2.0 + x)
    u = t * t
    p = u * (1 / 13) + 1 / 11
    p = p * u + 1 / 9
    p = p * u + 1 / 7
    p = p * u + 1 / 5
    p = p * u + 1 / 3
    return 2.0 * t * (p * u + 1.0)


def fixed_maximum(temperature: float | Tensor, normalize: bool, rows: int) -> float | None:
    """An m that keeps every exp(s / tau - m) and the sums of `rows` of them normal float32; None where there is none.

    |s| <= 1.01, whatever rounding did to unit rows; float32 is normal from exp(-87) to exp(88).
    """
    if isinstance(temperature, Tensor) or not normalize:
        return None
    if 2.02 / temperature <= 86:
        return 1 / temperature
    if 2.02 / temperature <= 86 + 75 and rows <= 200_000:
        return 1 / temperature - 75
    return None


def row_blocks(d: int) -> dict[str, int]:
    """A launch of about 1024 elements a program for the kernels that go over rows"""
    block_d = min(triton.next_power_of_2(d), 256)
    return {"BLOCK_R": min(1024 // block_d, 128), "BLOCK_D": block_d, "num_warps": 8, **launch.FUSED}


def operand(
    z0: Tensor, z1: Tensor, normalize: bool, compute_dtype: torch.dtype, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """z [2N, D up to a multiple of step] in compute_dtype, inv_norm [2N], s_pos [N]"""
    n, d = z0.shape
    stride = triton.cdiv(d, step) * step
    z = z0.new_empty((2 * n, stride), dtype=compute_dtype)
    inv_norm, s_pos = z0.new_empty(2 * n, dtype=torch.float32), z0.new_empty(n, dtype=torch.float32)
    blocks = row_blocks(stride)
    _prepare[triton.cdiv(n, blocks["BLOCK_R"]),](z0, z1, z, inv_norm, s_pos, n, d, stride, normalize, **blocks)
    return z, inv_norm, s_pos


def inverse(x: Tensor, normalize: bool) -> Tensor | None:
    """inv_norms of all rows [N]; None without normalisation"""
    if not normalize:
        return None
    n, d = x.shape
    out, blocks = x.new_empty(n, dtype=torch.float32), row_blocks(d)
    if n:
        _inv_norms[triton.cdiv(n, blocks["BLOCK_R"]),](x, out, n, d, **blocks)
    return out


def log2_scale(temperature: float | Tensor, z: Tensor) -> Tensor:
    """log2(e) / tau [] on z's device: exp(s / tau) = exp2(s * scale), and nothing is read on the host"""
    if isinstance(temperature, Tensor):
        return LOG2E.value / temperature.float()
    return torch.full((), LOG2E.value / temperature, dtype=torch.float32, device=z.device)
