"""SigLIP in Triton: loss and gradients from one pass over tiles, nothing of size N x N in memory; 6 B N D FLOP.

A logit counts by itself: with x = scale s + bias, a tile gives its part of the loss, softplus(x), of W, sigmoid(x)
(pairs.py), and of the gradients of the bias and of the scale. A pair's x has the other sign, and draws by its sigmoid.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import refuses  # noqa: F401
from .pairs import (
    W_BLOCK,
    add_to,
    given,
    has_others,
    input_gradient,
    multiply_blocks,
    number,
    operand,
    positive,
    products,
    spread,
)
from .rows import LOG2E

if TYPE_CHECKING:
    from sslops.ops.siglip import Arguments

DISTRIBUTED = True

# These change from batch to batch: no compilation for each.
SIZES = ("B", "N", "first", "row0", "column0", "tiles", "cells")

LOG2E_REST = tl.constexpr(1.92596298909109e-08)  # of log2(e), what float32 leaves


@triton.jit
def _log1p(u):
    """log(1 + u) for 0 <= u <= 1, to 1.6e-7 of itself: a polynomial, cheaper than rows.log1p's division"""
    p = u * -0.0032440251670777798 + 0.01985146291553974
    p = p * u - 0.05695953220129013
    p = p * u + 0.10603655129671097
    p = p * u - 0.15305592119693756
    p = p * u + 0.1967593878507614
    p = p * u - 0.24954134225845337
    p = p * u + 0.3332996368408203
    p = p * u - 0.4999990165233612
    return u * (p * u + 1.0)


@triton.jit(do_not_specialize=SIZES)
def _weigh(
    left, right, w, parts, pulls, scale, scale_value, bias, bias_value,
    B, N, stride, width, first, row0, column0, tiles, cells,
    WEIGHT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """w [.., width]: WEIGHT W of the rows from row0 and the columns from column0; pulls [B]: what the pairs draw by.

    parts [3, cells], `tiles` a block of rows: sums of the loss, of dL/dx, and of s dL/dx.
    """
    scale, bias = positive(number(scale, scale_value)), number(bias, bias_value)
    i, j = row0 + tl.program_id(0) * BLOCK_M, column0 + tl.program_id(1) * BLOCK_N
    rows, columns = i + tl.arange(0, BLOCK_M), j + tl.arange(0, BLOCK_N)
    s = products(left, right, i, j, B, N, stride, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    x = s * scale + bias
    others = has_others(i, j, B, N, first, BLOCK_M, BLOCK_N)
    if others:
        x = tl.where((first + rows)[:, None] == columns[None, :], -x, x)
    y = x * LOG2E_REST + x * LOG2E
    rest = _log1p(tl.exp2(-tl.abs(y)))  # softplus less its part that is linear
    loss = tl.maximum(x, 0.0) + rest
    slope = tl.exp2(tl.minimum(y, 0.0) - rest * LOG2E)
    weight = slope
    if others:
        inside = (rows < B)[:, None] & (columns < N)[None, :]
        pair = inside & ((first + rows)[:, None] == columns[None, :])
        loss = tl.where(inside, loss, 0.0)
        weight = tl.where(inside & ~pair, slope, 0.0)
        here = (rows < B) & (first + rows >= j) & (first + rows < j + BLOCK_N)
        tl.store(pulls + rows, tl.sum(tl.where(pair, slope, 0.0), 1), mask=here)
        slope = tl.where(pair, -slope, weight)
    if w is not None:
        to = w + ((rows - row0)[:, None] * width + (columns - column0)[None, :])
        tl.store(to, (weight * WEIGHT).to(w.dtype.element_ty), mask=(rows < B)[:, None] & (columns < N)[None, :])
    at = i // BLOCK_M * tiles + tl.program_id(1)
    add_to(parts, at, loss, column0 > 0)
    add_to(parts + cells, at, slope, column0 > 0)
    add_to(parts + 2 * tl.cast(cells, tl.int64), at, tl.where(slope == 0, 0.0, slope * s), column0 > 0)


@triton.jit(do_not_specialize=SIZES)
def _finish(parts, loss, dlogit_scale, dbias, N, cells, BLOCK: tl.constexpr):
    """[] each: the sums of parts [3, cells] over N"""
    k = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float64)
    for cell in range(0, cells, BLOCK):
        at = cell + tl.arange(0, BLOCK)
        total += tl.load(parts + k * tl.cast(cells, tl.int64) + at, mask=at < cells, other=0.0)
    mean = (tl.sum(total, 0) / N).to(tl.float32)
    tl.store(loss, mean, mask=k == 0)
    tl.store(dbias, mean, mask=k == 1)
    tl.store(dlogit_scale, mean, mask=k == 2)


def forward(x: Arguments, first: int = 0) -> tuple[Tensor, ...]:
    """loss and the gradients of image, text, logit_scale and bias, in float32: what these images and texts add to them.

    Image i's text is row first + i, or not among these.
    """
    image, text, operand_dtype, wanted = x.image, x.text, x.operand_dtype, x.needs_grad
    (b, d), n = image.shape, len(text)
    config = launch.nearest("pairs", image.device, operand_dtype, d)["siglip"]
    loss, dlogit_scale, dbias = (image.new_empty((), dtype=torch.float32) for _ in range(3))
    with launch.on(image.device):
        left, inv_left = operand(image, x.normalize, operand_dtype, config["BLOCK_K"])
        right, inv_right = operand(text, x.normalize, operand_dtype, config["BLOCK_K"])
        dleft = left.new_empty(left.shape, dtype=torch.float32) if wanted[0] else None
        dright = right.new_empty(right.shape, dtype=torch.float32) if wanted[1] else None
        tiles = triton.cdiv(min(n, W_BLOCK), config["BLOCK_N"])
        parts = loss.new_empty(3, triton.cdiv(b, config["BLOCK_M"]) * tiles, dtype=torch.float64)
        pull = loss.new_empty(b) if first < n else loss.new_zeros(b)
        numbers = *given(x.logit_scale), *given(x.bias)
        weight = 2.0**14 if operand_dtype == torch.float16 else 1.0  # 5 bits of exponent, and W is at most 1

        def weigh(w: Tensor | None, i: int, j: int, rows: int, columns: int) -> None:
            width = 0 if w is None else w.stride(0)
            _weigh[triton.cdiv(rows, config["BLOCK_M"]), triton.cdiv(columns, config["BLOCK_N"])](
                left, right, w, parts, pull, *numbers, b, n, left.shape[1], width, first, i, j, tiles, parts.shape[1],
                weight, launch.precision("pairs", operand_dtype), **config,
            )  # fmt: skip

        multiply_blocks(left, right, dleft, dright, weigh, 1 / weight)
        _finish[3,](parts, loss, dlogit_scale, dbias, n, parts.shape[1], 1024, **launch.FUSED)
        factor = LOG2E.value / max(n, 1) * x.logit_scale
        at = first if first < n else 0  # those do not draw
        own = slice(at, at + b)
        dimage = dtext = loss.new_empty(0)
        if dleft is not None:
            dimage = input_gradient(
                image.float(), text[own], dleft, inv_left, inv_right[own], pull, None, factor, x.normalize
            )
        if dright is not None:
            others, inv, pulls = (spread(each, at, n) for each in (image, inv_left, pull))
            dtext = input_gradient(text.float(), others, dright, inv_right, inv, pulls, None, factor, x.normalize)
    found = (dimage, dtext, dlogit_scale, dbias)
    return loss, *(each if want else loss.new_empty(0) for each, want in zip(found, wanted, strict=True))
