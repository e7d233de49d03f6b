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

from .columns import all_reduce, gradients_of, moments_of_views, normalize_backward, operand, own_rows, panels, returned
from .memory import FLOAT32, FLOAT64, empty, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.distributed import Part
    from sslops.ops.barlow_twins import Arguments

DISTRIBUTED = True
BY_PANELS = 2  # in c, for a correlation: the way by the Gram matrices was left


def forward(x: Arguments, part: Part | None = None) -> tuple[Tensor, ...]:
    """loss []; C's diagonal [D], or BY_PANELS in it; rows of the Grams [2, B, N] or dL/dA, dL/dB [2, B, D]"""
    (n, d), by_gram, keeps = x.z_a.shape, x.route == "gram", any(x.needs_grad)
    c, sums = torch.zeros(d, **FLOAT32), torch.empty(3, **FLOAT64)
    kept = empty(2, part.rows if part else n, n if by_gram else d) if by_gram or keeps else None
    if part is None:
        loss = _C.barlow_twins_forward(x.z_a, x.z_b, by_gram, x.lambd, x.eps, x.operand_dtype, c, kept, sums)
    elif by_gram:
        _C.barlow_twins_grams(x.z_a, x.z_b, x.eps, x.operand_dtype, *_where(x, part), c, kept, sums)
        all_reduce(sums[:1], part)
        loss = _C.barlow_twins_by_grams(x.lambd, c, sums)
        if c[0] == BY_PANELS:
            loss = _panels(_own(x, part), None, part)
    else:
        loss = _panels(x, kept, part)
    loss = torch.tensor(loss, **FLOAT32)
    return loss, c, kept if kept is not None and keeps else loss.new_empty(0)


def backward(grad: Tensor, x: Arguments, c: Tensor, kept: Tensor, part: Part | None = None) -> tuple[Tensor, ...]:
    own, by_gram = _own(x, part), x.route == "gram"
    views, moments = [own.z_a, own.z_b], moments_of_views(own, part)
    dz = gradients_of(views, x)
    if part is not None and by_gram and c[0] == BY_PANELS:
        x, by_gram, kept = own, False, empty(2, *own.z_a.shape)
        _panels(own, kept, part)
    g = None if moments is None else empty(2, *own.z_a.shape) if by_gram else kept
    if by_gram or g is None:
        options = by_gram, x.lambd, x.eps, x.operand_dtype, *_where(x, part)
        _C.barlow_twins_backward(float(grad), x.z_a, x.z_b, *options, c, kept, g, dz)
    if part is not None and moments is not None and g is not None:
        normalize_backward(float(grad), views, x.eps, moments, list(g), dz, part)
    return returned(dz, x)


def _where(x: Arguments, part: Part | None) -> tuple[int, int]:
    """Runs of rows that are normalised by themselves, and the first of this rank's among those of all"""
    if part is None:
        return 1, 0
    return 1 if x.synced else part.group.size(), part.first


def _own(x: Arguments, part: Part | None) -> Arguments:
    return x._replace(z_a=own_rows(x.z_a, x.route, part), z_b=own_rows(x.z_b, x.route, part))


def _panels(x: Arguments, g: Tensor | None, part: Part) -> float:
    """The loss, and dL/dA, dL/dB into g [2, B, D]"""
    moments = moments_of_views(x, part)
    a, b = (
        operand(z, x.eps, None if moments is None else moments[k], x.operand_dtype)
        for k, z in enumerate((x.z_a, x.z_b))
    )
    n, loss = len(a) * part.group.size(), 0.0
    for first, p in panels(a.shape[1]):
        own = a[:, first : first + p]
        s = all_reduce(own.t() @ b, part)
        loss += _C.barlow_twins_weigh(s, n, first, x.lambd)
        if g is not None:
            torch.mm(b, s.t(), out=g[0, :, first : first + p])
            torch.addmm(g[1], own, s, beta=float(first > 0), out=g[1])
    return loss
