"""The cross-correlation matrix on the CPU: one view normalised in full, the other a panel of columns at a time."""

import torch
from torch import Tensor

from .columns import WIDE_PANEL, Group, all_reduce, centre, moments_of, normalize_backward, panels, ranks, rounded
from .memory import empty
from .tiles import refuses  # noqa: F401


def forward(
    z_a: Tensor, z_b: Tensor, eps: float, operand: torch.dtype, group: Group = None, synced: bool = True
) -> Tensor:
    """C [D, D] float32, with a group that of all ranks' rows; synced: and so are the columns' statistics"""
    n, d = z_a.shape
    moments_a, moments_b = moments_of([z_a, z_b], group if synced else None)
    b = rounded(centre(z_b, 0, d, scale_eps=eps, moments=moments_b)[0], operand)
    c = empty(d, d)
    for first, p in panels(d, WIDE_PANEL):
        a = rounded(centre(z_a, first, p, scale_eps=eps, moments=moments_a)[0], operand)
        torch.mm(a.t(), b, out=c[first : first + p]).div_(n * ranks(group))
    return all_reduce(c, group)


def backward(
    grad: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    eps: float,
    operand: torch.dtype,
    group: Group = None,
    synced: bool = True,
) -> tuple[Tensor, Tensor]:
    """dz_a, dz_b [N, D] in the inputs' dtype, from grad [D, D], the same on all ranks"""
    n, d = z_a.shape
    weight, over = 1 / n, group if synced else None  # W / N: the gradient is W times the share of these rows
    moments_a, moments_b = moments_of([z_a, z_b], over)
    dz_a, dz_b = empty(n, d, dtype=z_a.dtype), empty(n, d, dtype=z_b.dtype)
    b, _, var_b = centre(z_b, 0, d, scale_eps=eps, moments=moments_b)
    db, operand_b = empty(n, d), rounded(b, operand)
    for first, p in panels(d, WIDE_PANEL):
        a, _, var_a = centre(z_a, first, p, scale_eps=eps, moments=moments_a)
        dc = grad[first : first + p]
        normalize_backward(dz_a, first, a, var_a, eps, weight, torch.mm(operand_b, dc.t()), group=over)
        torch.addmm(db, rounded(a, operand), dc, beta=float(first > 0), out=db)
    normalize_backward(dz_b, 0, b, var_b, eps, weight, db, group=over)
    return dz_a, dz_b
