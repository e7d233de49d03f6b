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

from .columns import LARGEST_DIAGONAL_SHARE, all_reduce, moments_of, operand, own_rows, panels
from .memory import FLOAT32, FLOAT64, empty, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.vicreg import Arguments

DISTRIBUTED = True


def forward(x: Arguments, part: Part | None = None) -> tuple[Tensor, ...]:
    """loss []; moments [V, 3, D] of the V views; rows of the Grams [V, B, N] or products with S [V, B, D]"""
    views = _views(x)
    own = [own_rows(z, x.route, part) for z in views]
    (rows, d), n = own[0].shape, _size(own[0], part)
    moments = torch.empty(len(views), 3, d, **FLOAT32)
    by_gram, keeps = x.route == "gram", any(x.needs_grad)
    kept = empty(len(views), rows, n if by_gram else d) if by_gram or keeps else None
    off = 0.0
    for k, z in enumerate(views):
        if kept is not None and by_gram:
            total = _C.vicreg_forward_gram(z, x.operand_dtype, part.first if part else 0, moments[k], kept[k])
            share = _off_diagonal(total, moments[k], part)
            off += _panels(own[k], x, torch.empty_like(moments[k]), None, part) if share is None else share
        else:
            off += _panels(z, x, moments[k], None if kept is None else kept[k], part)
    hinge = (1 - _std(moments, n, x.eps)).clamp(min=0).sum()
    loss = x.variance * hinge / (2 * d) + x.covariance * off / (d * (n - 1) ** 2)
    if len(own) == 2:
        apart = torch.tensor(_C.vicreg_squared_distance(*own), **FLOAT64)
        loss += x.invariance * all_reduce(apart, part) / (n * d)
    return loss.float(), moments, kept if kept is not None and keeps else moments.new_empty(0)


def backward(grad: Tensor, x: Arguments, moments: Tensor, kept: Tensor, part: Part | None = None) -> tuple[Tensor, ...]:
    views = _views(x)
    own = [own_rows(z, x.route, part) for z in views]
    d, n = views[0].shape[1], _size(own[0], part)
    std = _std(moments, n, x.eps)
    # A constant column's standard deviation has 0 among its subgradients.
    spread = torch.where((std < 1) & (std > 0), -x.variance / (2 * d * (n - 1)) / std, 0.0).float()
    weight, pull = 4 * x.covariance / (d * (n - 1) ** 2), 2 * x.invariance / (n * d)
    gradients = []
    for k, wanted in enumerate(x.needs_grad):
        if not wanted:
            gradients.append((views[k] if k < len(views) else grad).new_empty(0))
            continue
        t: Tensor | None
        z, t, gram, of_all = own[k], kept[k], None, None
        if x.route == "gram":
            if _off_diagonal(_C.columns_inner(kept[k], kept[k]), moments[k], part) is not None:
                z, t, gram = views[k], None, kept[k]
            else:
                t = empty(*z.shape)
                _panels(z, x, torch.empty_like(moments[k]), t, part)
        if gram is None and part is not None:
            of_all = moments_of(z, part)
        dz = empty(*own[k].shape, dtype=z.dtype)
        other = None if len(views) == 1 else views[1 - k] if gram is not None else own[1 - k]
        _C.vicreg_backward(
            float(grad), z, other, x.operand_dtype, part.first if part and gram is not None else 0, of_all, t, gram,
            moments[k], weight, spread[k], pull, dz,
        )  # fmt: skip
        gradients.append(dz)
    return tuple(gradients)


def _views(x: Arguments) -> list[Tensor]:
    return [z for z in (x.z_a, x.z_b) if z is not None]


def _size(own: Tensor, part: Part | None) -> int:
    """N, of all ranks"""
    return len(own) * (part.group.size() if part else 1)


def _off_diagonal(total: float, moments: Tensor, part: Part | None) -> float | None:
    """Sum of S_ij^2 off the diagonal, total over the rows of a Gram; None where the diagonal is too large a share"""
    total = float(all_reduce(torch.tensor(total, **FLOAT64), part))
    own = _C.columns_inner(moments[2], moments[2])
    return total - own if own <= LARGEST_DIAGONAL_SHARE * total else None


def _panels(z: Tensor, x: Arguments, moments: Tensor, t: Tensor | None, part: Part | None) -> float:
    """Sum of S_ij^2 off the diagonal; Z times that part of S into t [B, D]; mean, variance and 0 into moments [3, D]"""
    if part is None:
        total: float = _C.vicreg_forward_panels(z, x.operand_dtype, moments, t)
        return total
    of_all = moments_of(z, part)
    moments[:2], moments[2] = of_all, 0
    a, total = operand(z, -1.0, of_all, x.operand_dtype), 0.0
    for first, p in panels(a.shape[1]):
        s = all_reduce(a[:, first : first + p].t() @ a, part)
        total += _C.vicreg_off_diagonal(s, first)
        if t is not None:
            torch.mm(a, s.t(), out=t[:, first : first + p])
    return total


def _std(moments: Tensor, n: int, eps: float) -> Tensor:
    """[V, D]: sqrt of the unbiased variance + eps"""
    return (moments[:, 1].double() * (n / (n - 1)) + eps).sqrt()
