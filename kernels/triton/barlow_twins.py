"""Barlow Twins in Triton: no [D, D] matrix. A, B: the views [N, D], batch-normalised; C = A^T B / N.

The diagonal comes from the columns, what lies off it by a route of off_diagonal.py:
- gram: dL/dA = (2 / N^2) (lambd (B B^T) A + B * share), where the share takes lambd's part of the diagonal back;
- panels: dL/dA = B (dL/dC)^T, the diagonal included.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import columns, launch, off_diagonal
from .launch import refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.ops.barlow_twins import Arguments

BLOCK = 256


@triton.jit(do_not_specialize=columns.SIZES)
def _diagonal(dots, share, terms, lambd, N, D, splits, GRAM: tl.constexpr, BLOCK: tl.constexpr):
    """terms [programs], float64: sums of (1 - c)^2, on the gram route less lambd c^2; share [D]: there B's in dL/dA.

    c is exact in the former; where a Gram matrix's diagonal is taken back, it is that of the operands.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < D
    c = tl.zeros([BLOCK], tl.float64)
    rounded = c
    for split in range(0, splits):
        c += tl.load(dots + split * D + i, mask=inside, other=0.0)
        rounded += tl.load(dots + (splits + split) * D + i, mask=inside, other=0.0)
    c = 1.0 - c / N
    term = c * c
    if GRAM:
        term -= lambd * (rounded / N) * (rounded / N)
    of_b = -N * c - lambd * rounded if GRAM else tl.zeros([BLOCK], tl.float64)
    tl.store(share + i, of_b.to(tl.float32), mask=inside)
    tl.store(terms + tl.program_id(0), tl.sum(tl.where(inside, term, 0.0), 0))


def _scale(lambd: float, n: int) -> float:
    """The power of two that takes (N^2 / 2) dL/dC, at most 2 N or lambd N, near the top of float16"""
    return 2.0 ** (14 - math.frexp(max(1.0, lambd) * n)[1])


def forward(x: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """loss []; share [D] and B B^T, A A^T [2, N, N], or on the panels route no share and dL/dA, dL/dB [2, N, D]

    The latter times _scale N^2 / 2. Without needs_grad neither matrices nor gradients.
    """
    n, d = x.z_a.shape
    gram, keep = x.route == "gram", any(x.needs_grad)
    kept = None
    with launch.on(x.z_a.device):
        operands, dots = columns.operands(x.z_a, x.z_b, x.operand_dtype, x.eps, by_columns=not gram)
        if gram:
            squares, kept = off_diagonal.grams(operands, n, d, paired=True, keep=keep)
            squares = squares[0]
        else:
            if keep:
                kept = dots.new_empty((2, n, d), dtype=torch.float32)
            scale = _scale(x.lambd, n)
            products = () if kept is None else tuple(kept)
            a, b = operands
            squares = off_diagonal.panels(a, b, n, d, products=products, weight=scale * x.lambd, corner=scale)
        share = squares.new_empty(d, dtype=torch.float32)
        terms = squares.new_empty(triton.cdiv(d, BLOCK))
        _diagonal[len(terms),](
            dots, share, terms, x.lambd, n, d, dots.shape[1], gram, BLOCK, num_warps=4, **launch.FUSED
        )
        loss = columns.total(terms, squares, x.lambd, 1, n)
    return loss, share, share.new_empty(0) if kept is None else kept


def backward(grad: Tensor, x: Arguments, share: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    n, d = x.z_a.shape
    with launch.on(x.z_a.device):
        if x.route == "panels":
            dz = columns.normalize_backward(x.z_a, x.z_b, kept, x.eps, 1 / _scale(x.lambd, n), grad=grad)
        else:
            parts = columns.moments_of(x.z_a, x.z_b)
            operands, _ = columns.operands(x.z_a, x.z_b, x.operand_dtype, x.eps, by_columns=False, parts=parts)
            t, scale = off_diagonal.gram_products(kept, operands, n, d)
            dz = columns.normalize_backward(
                x.z_a, x.z_b, t, x.eps, x.lambd, t_scale=scale, grad=grad, share=share, parts=parts
            )
    return launch.wanted(dz, x.needs_grad)
