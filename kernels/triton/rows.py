"""Rows of embeddings, as they are stored, unit and as operands: what the contrastive losses' Triton kernels share.

A chip's float32 `/` is up to 2 ulp off (div.full), so what divides once a row does so by tl.div_rn, as eager does.
tl.exp2 is too (ex2.approx.ftz: 2 ulp, no subnormal results), and stays: it is in the inner loops. With u = 2^-22, its
relative error, it adds at most u to a sum r of exponentials, u to a loss log(r / e_pos) that is about 1 or larger, 2 u
of itself to a small one (log1p), and 2 u of itself to a weight e / r of a gradient, less where e's and r's errors are
alike. Eager rounds the logits s / tau, which are up to 1 / tau: u / 4 tau in all of these, and the promise is twice
that and u. At tau = 0.5 this is 2 u, the worst case there, which no sum over a row's pairs reaches.
tests/triton_kernels/gpu_arithmetic.py puts these errors into the interpreter: the promise is tested with them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HUGE = tl.constexpr(2.0**60)  # from where on an element's square may overflow
SHRINK, GROW = tl.constexpr(2.0**-70), tl.constexpr(2.0**70)
LOWEST = tl.constexpr(-1e38)  # below every logit, and finite: LOWEST - LOWEST is no NaN


@triton.jit
def row_tile(z, row, M, stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """z[row : row + BLOCK, : BLOCK_K], zeros from row M on"""
    r = tl.arange(0, BLOCK)[:, None]
    tile = z + tl.cast(row, tl.int64) * stride + (r * stride + tl.arange(0, BLOCK_K)[None, :])
    return tl.load(tile, mask=row + r < M, other=0.0)


@triton.jit
def ragged_tile(x, i, k, N, D, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """x[i : i + BLOCK, k : k + BLOCK_K] of x [N, D], zeros outside"""
    rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_K)[None, :]
    at = x + tl.cast(i, tl.int64) * D + k + (rows * D + columns)
    return tl.load(at, mask=(i + rows < N) & (k + columns < D), other=0.0)


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
    norm = tl.sqrt_rn(squares) * tl.where(shrink < 1.0, GROW, 1.0)
    return tl.div_rn(1.0, tl.where(norm < 1e-12, 1e-12, norm))  # tl.maximum would swallow a NaN


@triton.jit
def address(x, rows, columns, stride):
    return x + rows.to(tl.int64)[:, None] * stride + columns[None, :]


@triton.jit
def load_at(x, rows, columns, N, D):
    """x[rows, columns] of x [N, D] in float32, zeros outside"""
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    return tl.load(address(x, rows, columns, D), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load(x, rows, k, N, D, BLOCK_D: tl.constexpr):
    """x[rows, k : k + BLOCK_D], so"""
    return load_at(x, rows, k + tl.arange(0, BLOCK_D), N, D)


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
    """z [2N, stride], the matmuls' operand: both views normalised, rounded, padded; s_pos [N], not of the rounded"""
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
def _gradient_tile(
    x, other, dz, inv, inv_other, pull, inv_tau, w_inverse, rows, first, k, N, M, D, stride, splits,
    PULLED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The unit row and its gradient [rows, k : k + BLOCK_D]: the splits' sum less the positive's share, over tau"""
    columns = k + tl.arange(0, BLOCK_D)
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    total = tl.load(address(dz, first + rows, columns, stride), mask=mask, other=0.0)
    for split in range(1, splits):
        at = address(dz, tl.cast(split, tl.int64) * M + first + rows, columns, stride)
        total += tl.load(at, mask=mask, other=0.0)
    if w_inverse is not None:
        total = total * w_inverse
    own = load(x, rows, k, N, D, BLOCK_D) * inv[:, None]
    if PULLED:
        total = total - pull[:, None] * (load(other, rows, k, N, D, BLOCK_D) * inv_other[:, None])
    return own, total * inv_tau


@triton.jit
def _view_gradient(
    x, other, dz, inv_norm, inv_other, pull, w_inverse, inv_tau, dx, dots, rows, first, N, M, D, stride, splits,
    PULLED: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx [N, D] of the view x, whose dz starts at row `first`, 0 or N"""
    inside = rows < N
    inv = tl.load(inv_norm + rows, mask=inside, other=0.0)
    inv_other = tl.load(inv_other + rows, mask=inside, other=0.0) if PULLED else inv
    dot = tl.zeros_like(pull)
    if NORMALIZE or dots is not None:
        for k in range(0, D, BLOCK_D):
            own, d = _gradient_tile(
                x, other, dz, inv, inv_other, pull, inv_tau, w_inverse, rows, first, k, N, M, D, stride, splits,
                PULLED, BLOCK_D,
            )  # fmt: skip
            dot += tl.sum(own * d, 1)
    if dots is not None:
        tl.store(dots + first + rows, dot, mask=inside)
    along = tl.where(inv < 1e12, dot, 0.0)  # a row shorter than 1e-12 is scaled and no more, as F.normalize does
    for k in range(0, D, BLOCK_D):
        own, d = _gradient_tile(
            x, other, dz, inv, inv_other, pull, inv_tau, w_inverse, rows, first, k, N, M, D, stride, splits,
            PULLED, BLOCK_D,
        )  # fmt: skip
        if NORMALIZE:
            d = (d - own * along[:, None]) * inv[:, None]
        columns = k + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (columns < D)[None, :]
        tl.store(address(dx, rows, columns, D), d.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("N", "M", "splits"))
def _gradient(
    x0, x1, dz, inv_norm, inv_other, pull, grad, w_scale, temperature, scale, dx0, dx1, dots,
    N, M, D, stride, splits,
    PULLS: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx0 and, unless it is None, dx1 [N, D] of the views; dz [splits, M, stride]; dots [M] = <row, gradient>, or None.

    pull [PULLS, N] is added up, each times its grad, if that is given. inv_norm [N] and inv_other [N] of the views, or
    inv_norm [2N] and None.
    """
    PULLED: tl.constexpr = PULLS > 0
    if inv_other is None:
        inv_other = inv_norm + N
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    pulls = tl.zeros([BLOCK_R], tl.float32)
    for k in tl.static_range(PULLS):
        share = tl.load(pull + k * N + rows, mask=rows < N, other=0.0)
        if grad is not None:
            share = share * tl.load(grad + k * N + rows, mask=rows < N, other=0.0)
        pulls += share
    inv_tau = log2_of(temperature, number(scale)) * LN2
    w_inverse = 1.0 / tl.load(w_scale) if w_scale is not None else None
    if tl.program_id(1) == 0:
        _view_gradient(
            x0, x1, dz, inv_norm, inv_other, pulls, w_inverse, inv_tau, dx0, dots, rows, 0, N, M, D, stride, splits,
            PULLED, NORMALIZE, BLOCK_D,
        )  # fmt: skip
    elif dx1 is not None:
        _view_gradient(
            x1, x0, dz, inv_other, inv_norm, pulls, w_inverse, inv_tau, dx1, dots, rows, N, N, M, D, stride, splits,
            PULLED, NORMALIZE, BLOCK_D,
        )  # fmt: skip


@triton.jit
def atanh_series(u):
    """(atanh(t) / t - 1) / u, u = t^2 <= 1 / 9, to float32's last bit"""
    p = u * (1 / 13) + 1 / 11
    p = p * u + 1 / 9
    p = p * u + 1 / 7
    p = p * u + 1 / 5
    return p * u + 1 / 3


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x < 1, to float32's last bit: 2 atanh(x / (2 + x)); the chips' own log is not exact near 1"""
    t = tl.div_rn(x, 2.0 + x)
    u = t * t
    return 2.0 * t * (atanh_series(u) * u + 1.0)


@triton.jit
def close(rest, positive, above):
    """Of the sum `rest` over a row's negatives and its positive's term, whose logit the top is `above`: all of the sum,
    the negatives' share of it, and the loss, -log of the positive's, in which a small share keeps its digits.
    """
    total = rest + positive
    small = rest < positive
    loss = tl.where(small, log1p(tl.div_rn(rest, tl.where(small, positive, 1.0))), tl.log(total) + above)
    return total, tl.div_rn(rest, total), loss


@triton.jit
def guarded(scale):
    """log2(e) / tau: never 0, as an infinite temperature weighs all pairs alike, and NaN for what is no temperature"""
    return tl.where(scale >= 0, tl.where(scale < 1.2e-38, 1.2e-38, scale), float("nan"))


@triton.jit
def number(x):
    """A number, or the one that lies there on the device"""
    if isinstance(x, tl.tensor):  # noqa: SIM102, both sides of a jitted `and` are read
        if x.dtype.is_ptr():
            x = tl.load(x)
    return x


@triton.jit
def log2_of(temperature, scale):
    """log2(e) / tau; of a tau on the device guarded, so -inf stays -inf at an infinite one"""
    if temperature is not None:
        scale = guarded(tl.div_rn(LOG2E, tl.load(temperature)))
    return scale


@triton.jit
def close_decoupled(rest, above):
    """close of a sum over negatives only: all of it, infinite where there is none, and the loss; above: by how much the
    top's logit exceeds the positive's, which may be weighted.
    """
    return tl.where(rest == 0.0, float("inf"), rest), tl.log(rest) + above


@triton.jit
def own_rows(k, N, count, first):
    """Which of all rows the own rows k are: examples first .. first + count of each view"""
    return k // count * N + first + k % count


def logits_range(temperature: float | Tensor, normalize: bool) -> float:
    """How far s / tau may be from the largest: |s| <= 1.01, whatever rounding did to unit rows; inf where unknown"""
    return float("inf") if isinstance(temperature, Tensor) or not normalize else 2.02 / temperature


def fixed_maximum(temperature: float | Tensor, normalize: bool, rows: int) -> float | None:
    """An m that keeps every exp(s / tau - m) and the sums of `rows` of them normal float32; None where there is none.

    float32 is normal from exp(-87) to exp(88).
    """
    reach = logits_range(temperature, normalize)
    if isinstance(temperature, Tensor) or reach > 86 + 75:
        return None
    if reach <= 86:
        return 1 / temperature
    return 1 / temperature - 75 if rows <= 200_000 else None


def row_blocks(d: int) -> dict[str, int]:
    """A launch of about 1024 elements a program for the kernels that go over rows"""
    block_d = min(triton.next_power_of_2(d), 256)
    return {"BLOCK_R": min(1024 // block_d, 128), "BLOCK_D": block_d, "num_warps": 8, **launch.FUSED}


def operand(
    z0: Tensor, z1: Tensor, normalize: bool, compute_dtype: torch.dtype, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """z [2N, D up to a multiple of step] in compute_dtype, inv_norm [2N], s_pos [N] before rounding"""
    n, d = z0.shape
    stride = triton.cdiv(d, step) * step
    z = z0.new_empty((2 * n, stride), dtype=compute_dtype)
    inv_norm, s_pos = z0.new_empty(2 * n, dtype=torch.float32), z0.new_empty(n, dtype=torch.float32)
    blocks = row_blocks(stride)
    _prepare[triton.cdiv(n, blocks["BLOCK_R"]),](z0, z1, z, inv_norm, s_pos, n, d, stride, normalize, **blocks)
    return z, inv_norm, s_pos


def input_gradients(
    views: tuple[Tensor, ...],
    count: int,
    dz: Tensor,
    inv_norm: Tensor,
    pull: Tensor | None,
    w_scale: Tensor | None,
    scale: tuple[Tensor | None, float | Tensor],
    normalize: bool,
    dtype: torch.dtype | None = None,
    grad: Tensor | None = None,
    dotted: bool = True,
    inv_other: Tensor | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Of the first `count` views [N, D], in their dtype or another; dots [count * N] of unit rows and their gradients,
    if `dotted`.

    dz [splits, count * N, stride]: what adds up to the unit rows' gradients, times tau and w_scale, but for the
    positives' share: the other view's row, not rounded, times pull [N], or the sum of pull [2N] over its halves; times
    grad, of pull's shape, if it is given. Without pull there is none, and one view will do. inv_norm: of all views, or
    of the first, beside inv_other of the second. scale: launch.scale_of's.
    """
    n, d = views[0].shape
    blocks, dots = row_blocks(d), dz.new_empty(count * n if dotted else 0)
    pulls = 0 if pull is None else pull.numel() // n
    found = [torch.empty_like(x, dtype=dtype) for x in views[:count]]
    _gradient[triton.cdiv(n, blocks["BLOCK_R"]), count](
        views[0], views[-1], dz, inv_norm, inv_other, pull, grad, w_scale, *scale,
        found[0], found[1] if count == 2 else None, dots if dotted else None,
        n, count * n, d, dz.shape[2], len(dz), pulls, normalize, **blocks,
    )  # fmt: skip
    return found, dots


def inverse(x: Tensor, normalize: bool) -> Tensor | None:
    """inv_norms of all rows [N]; None without normalisation"""
    if not normalize:
        return None
    n, d = x.shape
    out, blocks = x.new_empty(n, dtype=torch.float32), row_blocks(d)
    if n:
        _inv_norms[triton.cdiv(n, blocks["BLOCK_R"]),](x, out, n, d, **blocks)
    return out
