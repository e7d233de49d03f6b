"""VICReg in Triton: no [D, D] matrix. Z: a view, centred; S = Z^T Z; cov = S / (N - 1).

The variance and the invariance terms come from the columns, the covariances by a route of off_diagonal.py. The gram
route is exact while variances are of one size; nothing is read on the host, so it is not left where they are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import columns, launch, off_diagonal
from .launch import refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.ops.vicreg import Arguments

BLOCK = 256
TILE = {"BLOCK_R": 32, "BLOCK_D": 64, "num_warps": 4, **launch.FUSED}


@triton.jit(do_not_specialize=columns.SIZES)
def _terms(
    dots, moments, terms, invariance, variance, covariance, N, D, splits,
    GRAM: tl.constexpr, VIEWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """S_ii into moments [V, 3, D]; terms [programs]: variance and invariance, on the gram route less S_ii^2"""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < D
    term = tl.zeros([BLOCK], tl.float64)
    n = tl.cast(N, tl.float64)
    inverse = 1.0 / (n * (n - 1.0) * D)  # the one division in float64
    for view in tl.static_range(VIEWS):
        own = tl.zeros([BLOCK], tl.float64)
        for split in range(0, splits):
            own += tl.load(dots + (view * splits + split) * D + i, mask=inside, other=0.0)
        tl.store(moments + (3 * view + 2) * D + i, own.to(tl.float32), mask=inside)
        std = tl.load(moments + (3 * view + 1) * D + i, mask=inside, other=1.0).to(tl.float64)
        term += tl.where(std >= 1.0, 0.0, (1.0 - std) * (0.5 * variance))  # NaN stays
        if GRAM:
            own = own * (inverse * n * D)
            term -= own * own * covariance
    if VIEWS == 2:
        apart = tl.zeros([BLOCK], tl.float64)
        for split in range(0, splits):
            apart += tl.load(dots + (2 * splits + split) * D + i, mask=inside, other=0.0)
        term += apart * (inverse * (n - 1.0) * D) * invariance
    tl.store(terms + tl.program_id(0), tl.sum(tl.where(inside, term, 0.0), 0) * (inverse * n * (n - 1.0)))


@triton.jit
def _view_gradient(
    x, other, z, t, moments, t_scale, grad, dx, invariance, variance, covariance, N, D, stride,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx [N, D] of the view x from its t, z and moments"""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    mask = (rows < N)[:, None] & inside[None, :]
    at = rows.to(tl.int64)[:, None] * D + columns[None, :]
    off = tl.load(t + at, mask=mask, other=0.0)
    if t_scale is not None:
        off = off * (1.0 / tl.load(t_scale))
    if z is not None:
        own = tl.load(z + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        off -= own * tl.load(moments + 2 * D + columns, mask=inside, other=0.0)[None, :]
    n = tl.cast(N, tl.float64)
    scale = tl.load(grad) / (n * (n - 1.0) * (n - 1.0) * D)  # the one division in float64
    std = tl.load(moments + D + columns, mask=inside, other=1.0)
    spread = tl.where(std < 1.0, (scale * n * (n - 1.0) * (-0.5 * variance)).to(tl.float32) / std, 0.0)
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    g = off * (scale * n * (4.0 * covariance)).to(tl.float32)
    g += (value - tl.load(moments + columns, mask=inside, other=0.0)[None, :]) * spread[None, :]
    if other is not None:
        pull = (scale * (n - 1.0) * (n - 1.0) * (2.0 * invariance)).to(tl.float32)
        g += (value - tl.load(other + at, mask=mask, other=0.0).to(tl.float32)) * pull
    tl.store(dx + at, g.to(dx.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=(*columns.SIZES, "rows"))
def _gradient(
    x, y, z, t, moments, t_scale, grad, dx, dy, invariance, variance, covariance, N, D, rows, stride,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dx and dy [N, D] from t = Z S [V, N, D]: all of it where the operands z [V, rows, stride] are given, else off the
    diagonal
    """
    if tl.program_id(2) == 0:
        _view_gradient(
            x, y, z, t, moments, t_scale, grad, dx, invariance, variance, covariance, N, D, stride, BLOCK_R, BLOCK_D
        )
    elif y is not None:
        if z is not None:
            z += tl.cast(rows, tl.int64) * stride
        t += tl.cast(N, tl.int64) * D
        _view_gradient(
            y, x, z, t, moments + 3 * D, t_scale, grad, dy, invariance, variance, covariance, N, D, stride,
            BLOCK_R, BLOCK_D,
        )  # fmt: skip


def forward(x: Arguments) -> tuple[Tensor, ...]:
    """loss []; moments [V, 3, D] = (mean, standard deviation, S_ii); Grams [V, N, N] or products with S [V, N, D]"""
    (n, d), views, keep = x.z_a.shape, 1 if x.z_b is None else 2, any(x.needs_grad)
    gram = x.route == "gram"
    with launch.on(x.z_a.device):
        moments = x.z_a.new_empty((views, 3, d), dtype=torch.float32)
        operands, dots = columns.operands(x.z_a, x.z_b, x.operand_dtype, x.eps, by_columns=not gram, moments=moments)
        terms = dots.new_empty(triton.cdiv(d, BLOCK))
        _terms[len(terms),](
            dots, moments, terms, x.invariance, x.variance, x.covariance, n, d, dots.shape[1],
            gram, views, BLOCK, num_warps=4, **launch.FUSED,
        )  # fmt: skip
        if gram:
            squares, kept = off_diagonal.grams(operands, n, d, paired=False, keep=keep)
        else:
            kept = moments.new_empty((views, n, d)) if keep else None
            scale = launch.half_scale(x.operand_dtype, lambda: moments[:, 2])
            products = [()] * views if kept is None else [(t,) for t in kept]
            squares = torch.stack(
                [
                    off_diagonal.panels(z, z, n, d, products=p, scale=scale)
                    for z, p in zip(operands, products, strict=True)
                ]
            )
        loss = columns.total(terms, squares, x.covariance, d, n - 1)
    return loss, moments, moments.new_empty(0) if kept is None else kept


def backward(grad: Tensor, x: Arguments, moments: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    n, d = x.z_a.shape
    views = [z for z in (x.z_a, x.z_b) if z is not None]
    out = [torch.empty_like(z) for z in views]
    with launch.on(x.z_a.device):
        operands: Tensor | None = None
        t, scale = kept, launch.half_scale(x.operand_dtype, lambda: moments[:, 2])
        if x.route == "gram":
            operands, _ = columns.operands(
                x.z_a, x.z_b, x.operand_dtype, x.eps, by_columns=False, moments=torch.empty_like(moments)
            )
            t, scale = off_diagonal.gram_products(kept, operands, n, d)
        _gradient[triton.cdiv(n, TILE["BLOCK_R"]), triton.cdiv(d, TILE["BLOCK_D"]), len(views)](
            x.z_a, x.z_b, operands, t, moments, scale, grad, out[0], None if x.z_b is None else out[1],
            x.invariance, x.variance, x.covariance, n, d, columns.padded(n), columns.padded(d), **TILE,
        )  # fmt: skip
    return launch.wanted(out if x.z_b is not None else [*out, grad], x.needs_grad)
