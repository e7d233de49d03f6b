"""The cross-correlation matrix on the CPU: one view normalised in full, the other a panel of columns at a time."""

import torch
from torch import Tensor

from .columns import centre, normalize_backward, panels, rounded
from .tiles import FLOAT32, refuses  # noqa: F401


def forward(z_a: Tensor, z_b: Tensor, eps: float, operand: torch.dtype) -> Tensor:
    """C [D, D] float32"""
    n, d = z_a.shape
    b = rounded(centre(z_b, 0, d, scale_eps=eps)[0], operand)
    c = torch.empty(d, d, **FLOAT32)
    for first, p in panels(d):
        a = rounded(centre(z_a, first, p, scale_eps=eps)[0], operand)
        torch.mm(a.t(), b, out=c[first : first + p]).div_(n)
    return c


def backward(grad: Tensor, z_a: Tensor, z_b: Tensor, eps: float, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    """dz_a, dz_b [N, D] in the inputs' dtype, from grad [D, D]"""
    n, d = z_a.shape
    dz_a, dz_b = torch.empty_like(z_a), torch.empty_like(z_b)
    b, _, var_b = centre(z_b, 0, d, scale_eps=eps)
    db, operand_b = torch.zeros(n, d, **FLOAT32), rounded(b, operand)
    for first, p in panels(d):
        a, _, var_a = centre(z_a, first, p, scale_eps=eps)
        dc = grad[first : first + p]
        normalize_backward(dz_a, first, a, var_a, eps, 1 / n, torch.mm(operand_b, dc.t()))
        db.addmm_(rounded(a, operand), dc)
    normalize_backward(dz_b, 0, b, var_b, eps, 1 / n, db)
    return dz_a, dz_b
