"""VICReg on the CPU: no [D, D] matrix. Two exact routes a view, by its Gram matrix and by panels of S = Z^T Z, where Z
is the centred view (csrc/cpu/vicreg.h). The off-diagonal part that a Gram matrix knows of is a difference, which drowns
where few columns hold most of the variance: there the view goes by panels.

With a process group the batch is that of all ranks. gram: the views come gathered, a rank has its own rows of the Gram
matrices; panels: its own rows of the views, and S is summed over the ranks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .columns import all_reduce, gradients_of, moments_of, operand, own_rows, panels, returned
from .memory import FLOAT32, FLOAT64, empty, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.vicreg import Arguments

DISTRIBUTED = True


def forward(x: Arguments, part: Part | None = None) -> tuple[Tensor, ...]:
    """loss []; moments [V, 3, D] of the V views; rows of the Grams [V, B, N] or products with S [V, B, D]"""
    views, own, n = _views(x, part)
    (rows, d), by_gram, keeps = own[0].shape, x.route == "gram", any(x.needs_grad)
    moments, sums = torch.empty(len(views), 3, d, **FLOAT32), torch.empty(len(views) + 1, **FLOAT64)
    kept = empty(len(views), rows, n if by_gram else d) if by_gram or keeps else None
    if part is None:
        loss = _C.vicreg_forward(views, by_gram, *_weights(x), x.operand_dtype, moments, kept, sums)
    else:
        at = (part.first, moments, kept) if by_gram else (0, moments, None)
        _C.vicreg_grams(views, x.operand_dtype, *at, sums)
        _C.vicreg_choose(moments, all_reduce(sums, part))
        if (moments[:, 2, 0] < 0).any():  # one by panels: all
            of_all = moments_of(own, part)
            moments[:, :2], moments[:, 2] = of_all, -1
            for k, z in enumerate(own):
                sums[k] = _panels(z, x, of_all[k], None if by_gram or kept is None else kept[k], part)
        loss = _C.vicreg_loss(*_weights(x), n, moments, sums)
    return torch.tensor(loss, **FLOAT32), moments, kept if kept is not None and keeps else moments.new_empty(0)


def backward(grad: Tensor, x: Arguments, moments: Tensor, kept: Tensor, part: Part | None = None) -> tuple[Tensor, ...]:
    views, own, n = _views(x, part)
    dz, by_gram, first, of_all = gradients_of(own, x), x.route == "gram", 0, None
    if part is not None and by_gram and moments[0, 2, 0] >= 0:
        first = part.first
    elif part is not None:
        of_all = moments_of(own, part)
        if by_gram:
            kept = empty(len(own), *own[0].shape)
            for k, z in enumerate(own):
                _panels(z, x, of_all[k], kept[k], part)
        views, by_gram = own, False
    options = *_weights(x), x.operand_dtype, n, first, of_all
    _C.vicreg_backward(float(grad), views, by_gram, *options, moments, kept, dz)
    return returned(dz, x)


def _views(x: Arguments, part: Part | None) -> tuple[list[Tensor], list[Tensor], int]:
    """All of them, this rank's rows of each, and N, of all ranks"""
    views = [z for z in (x.z_a, x.z_b) if z is not None]
    own = [own_rows(z, x.route, part) for z in views]
    return views, own, len(own[0]) * (part.group.size() if part else 1)


def _weights(x: Arguments) -> tuple[float, ...]:
    return x.invariance, x.variance, x.covariance, x.eps


def _panels(z: Tensor, x: Arguments, of_all: Tensor, t: Tensor | None, part: Part) -> float:
    """Sum of S_ij^2 off the diagonal; Z times that part of S into t [B, D]"""
    a, total = operand(z, -1.0, of_all, x.operand_dtype), 0.0
    for first, p in panels(a.shape[1]):
        s = all_reduce(a[:, first : first + p].t() @ a, part)
        total += _C.vicreg_off_diagonal(s, first)
        if t is not None:
            torch.mm(a, s.t(), out=t[:, first : first + p])
    return total
