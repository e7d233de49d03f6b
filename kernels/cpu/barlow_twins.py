"""Barlow Twins on the CPU: no [D, D] matrix. Two exact routes, by Gram matrices and by panels of C = A^T B / N, where A
and B are the normalised views (csrc/cpu/barlow_twins.h).

With a process group the batch is that of all ranks. gram: the views come gathered, a rank has its own rows of the Gram
matrices, in full (8 N^2 D); panels: its own rows of the views, and C is summed over the ranks. Unless synced, each
rank's rows are normalised by statistics of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .columns import LARGEST_DIAGONAL_SHARE, all_reduce, moments_of_views, normalize_backward, operand, own_rows, panels
from .memory import FLOAT32, FLOAT64, empty, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.barlow_twins import Arguments

DISTRIBUTED = True


def forward(x: Arguments, part: Part | None = None) -> tuple[Tensor, ...]:
    """loss []; C's diagonal [D]; rows of the Grams [2, B, N] or dL/dA, dL/dB [2, B, D]"""
    (n, d), keeps = x.z_a.shape, any(x.needs_grad)
    c = torch.zeros(d, **FLOAT32)
    if x.route == "panels":
        g = empty(2, n, d) if keeps else None
        loss = _panels(x, c, g, part)
        return loss, c, loss.new_empty(0) if g is None else g
    grams, sums = empty(2, part.rows if part else n, n), torch.empty(3, **FLOAT64)
    _C.barlow_twins_forward_gram(x.z_a, x.z_b, x.eps, x.operand_dtype, *_where(x, part), c, grams, sums)
    all_reduce(sums[:1], part)
    total, squares, missing = sums.tolist()
    if _by_gram(total, squares):
        loss = torch.tensor(missing + x.lambd * (total - squares), **FLOAT32)
    else:
        loss = _panels(_own(x, part), torch.empty_like(c), None, part)
    return loss, c, grams if keeps else loss.new_empty(0)


def backward(grad: Tensor, x: Arguments, c: Tensor, kept: Tensor, part: Part | None = None) -> tuple[Tensor, ...]:
    own, across = _own(x, part), part if x.synced else None
    g: Tensor | None = kept
    if x.route == "gram":
        total = torch.tensor(_C.columns_inner(*kept) / len(x.z_a) ** 2, **FLOAT64)
        if _by_gram(float(all_reduce(total, part)), float(c.double().square().sum())):
            g = empty(2, *own.z_a.shape) if across else None
            dz = _empties(own) if g is None else [None, None]
            _C.barlow_twins_backward_gram(
                float(grad), x.z_a, x.z_b, x.lambd, x.eps, x.operand_dtype, *_where(x, part), c, kept, g, *dz
            )
            if g is None:
                return tuple(c.new_empty(0, dtype=x.z_a.dtype) if out is None else out for out in dz)
        else:
            g = empty(2, *own.z_a.shape)
            _panels(own, torch.empty_like(c), g, part)
    assert g is not None
    return tuple(
        normalize_backward(float(grad), z, x.eps, each, across) if wanted else z.new_empty(0)
        for z, each, wanted in zip((own.z_a, own.z_b), g, x.needs_grad, strict=True)
    )


def _by_gram(total: float, squares: float) -> bool:
    """Whether the off-diagonal part of total = sum C^2 keeps its digits; false where few columns are alive."""
    return squares <= LARGEST_DIAGONAL_SHARE * total


def _where(x: Arguments, part: Part | None) -> tuple[int, int]:
    """Runs of rows that are normalised by themselves, and the first of this rank's among those of all"""
    if part is None:
        return 1, 0
    return 1 if x.synced else part.group.size(), part.first


def _own(x: Arguments, part: Part | None) -> Arguments:
    return x._replace(z_a=own_rows(x.z_a, x.route, part), z_b=own_rows(x.z_b, x.route, part))


def _empties(x: Arguments) -> list[Tensor | None]:
    return [empty(*x.z_a.shape, dtype=x.z_a.dtype) if wanted else None for wanted in x.needs_grad]


def _panels(x: Arguments, c: Tensor, g: Tensor | None, part: Part | None) -> Tensor:
    """The loss, and dL/dA, dL/dB into g [2, B, D]; without a part the diagonal into c [D]"""
    if part is None:
        loss = _C.barlow_twins_forward_panels(x.z_a, x.z_b, x.lambd, x.eps, x.operand_dtype, c, g)
        return torch.tensor(loss, **FLOAT32)
    moments = zip((x.z_a, x.z_b), moments_of_views(x, part), strict=True)
    a, b = (operand(z, x.eps, m, x.operand_dtype) for z, m in moments)
    n, loss = len(a) * part.group.size(), 0.0
    for first, p in panels(a.shape[1]):
        own = a[:, first : first + p]
        s = all_reduce(own.t() @ b, part)
        loss += _C.barlow_twins_weigh(s, n, first, x.lambd)
        if g is not None:
            torch.mm(b, s.t(), out=g[0, :, first : first + p])
            torch.addmm(g[1], own, s, beta=float(first > 0), out=g[1])
    return torch.tensor(loss, **FLOAT32)
