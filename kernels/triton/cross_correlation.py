"""The cross-correlation matrix in Triton: the views are normalised into the operands of the library's matmuls."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import columns, launch
from .launch import refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.ops.cross_correlation import Arguments


def forward(x: Arguments) -> Tensor:
    n, d = x.z_a.shape
    with launch.on(x.z_a.device):
        operands, _ = columns.operands(x.z_a, x.z_b, x.operand_dtype, x.eps, by_columns=False)
        c = operands.new_empty((d, d), dtype=torch.float32)
        launch.multiply(c, operands[0, :n, :d].t(), operands[1, :n, :d], alpha=1 / n)
    return c


def backward(grad: Tensor, x: Arguments) -> tuple[Tensor, ...]:
    n, d = x.z_a.shape
    with launch.on(x.z_a.device):
        parts = columns.moments_of(x.z_a, x.z_b)
        operands, _ = columns.operands(x.z_a, x.z_b, x.operand_dtype, x.eps, by_columns=False, parts=parts)
        scale = launch.half_scale(x.operand_dtype, lambda: grad)
        dc = (grad if scale is None else grad * scale).to(x.operand_dtype)
        t = grad.new_empty((2, n, d))
        launch.multiply(t[0], operands[1, :n, :d], dc.t())
        launch.multiply(t[1], operands[0, :n, :d], dc)
        dz = columns.normalize_backward(x.z_a, x.z_b, t, x.eps, n / 2, t_scale=scale, parts=parts)
    return launch.wanted(dz, x.needs_grad)
