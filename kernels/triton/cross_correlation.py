"""The cross-correlation matrix in Triton: the views are normalised into the operands of the library's matmuls."""

import torch
from torch import Tensor

from . import columns, launch
from .launch import refuses  # noqa: F401


def forward(z_a: Tensor, z_b: Tensor, eps: float, operand: torch.dtype) -> Tensor:
    """C [D, D] float32"""
    n, d = z_a.shape
    with launch.on(z_a.device):
        x, _ = columns.operands(z_a, z_b, operand, eps, by_columns=False)
        c = z_a.new_empty((d, d), dtype=torch.float32)
        launch.multiply(c, x[0, :n, :d].t(), x[1, :n, :d], alpha=1 / n)
    return c


def backward(grad: Tensor, z_a: Tensor, z_b: Tensor, eps: float, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    """dz_a, dz_b [N, D] in the inputs' dtype, from grad [D, D]"""
    n, d = z_a.shape
    with launch.on(z_a.device):
        x, _ = columns.operands(z_a, z_b, operand, eps, by_columns=False)
        scale = launch.half_scale(operand, grad)
        dc = (grad if scale is None else grad * scale).to(operand)
        t = grad.new_empty((2, n, d))
        launch.multiply(t[0], x[1, :n, :d], dc.t())
        launch.multiply(t[1], x[0, :n, :d], dc)
        return columns.normalize_backward(z_a, z_b, t, eps, n / 2, t_scale=scale)
