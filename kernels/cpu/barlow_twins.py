"""Barlow Twins on the CPU: no [D, D] matrix, and neither view normalised in full where the batch is small.

A, B: the views [N, D], batch-normalised; C = A^T B / N. Two exact routes:
- gram (6 N^2 D FLOP, by symmetry): sum C^2 = <A A^T, B B^T> / N^2, dA = (2 lambd / N^2) (B B^T) A + B * slope.
  Columns are independent once the [N, N] Gram matrices are there: all happens in panels of columns, normalised on the
  fly.
- panels (6 N D^2): rows of C, their loss and dL/dC in one pass, and at once what they add to dA and dB.

With a process group the batch is that of all ranks. gram: the views come gathered, a rank has its own rows of the Gram
matrices, in full (8 N^2 D); panels: its own rows of the views, and C is summed over the ranks. Unless synced, each
rank's rows are normalised by statistics of their own.
"""

import torch
from torch import Tensor

from sslops import _C

from .columns import (
    LARGEST_DIAGONAL_SHARE,
    PANEL,
    WIDE_PANEL,
    Group,
    add_gram,
    all_reduce,
    batch,
    centre,
    diagonal,
    inner,
    mirror,
    moments_of,
    normalize_backward,
    panels,
    ranks,
    rounded,
)
from .memory import empty
from .tiles import FLOAT32, refuses  # noqa: F401


def forward(
    z_a: Tensor,
    z_b: Tensor,
    lambd: float,
    eps: float,
    operand: torch.dtype,
    route: str,
    needs_grad: bool,
    group: Group = None,
    synced: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss []; diagonal of C [D] and Grams [2, B, N], or on the panels route nothing and dL/dA, dL/dB [2, B, D]"""
    run = _forward_gram if route == "gram" else _forward_panels
    return run(z_a, z_b, lambd, eps, operand, needs_grad, group, synced)


def _by_gram(total: float, c: Tensor) -> bool:
    """Whether the off-diagonal part of total = sum C^2 keeps its digits; false where few columns are alive."""
    return float(c.double().square().sum()) <= LARGEST_DIAGONAL_SHARE * total


def _normalized(
    x: Tensor, first: int, p: int, eps: float, own: slice, synced: bool, moments: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A panel of a view: all rows, the rows `own` and the variance that these were normalised by"""
    rows = own.stop - own.start
    if synced or rows == len(x):
        a, _, var = centre(x, first, p, scale_eps=eps, moments=moments)
        return a, a[own], var
    parts = [centre(part, first, p, scale_eps=eps) for part in x.split(rows)]
    mine = parts[own.start // rows]
    return torch.cat([part[0] for part in parts]), mine[0], mine[2]


def _forward_gram(
    z_a: Tensor,
    z_b: Tensor,
    lambd: float,
    eps: float,
    operand: torch.dtype,
    needs_grad: bool,
    group: Group,
    synced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (n, d), (_, own) = z_a.shape, batch(z_a, True, group)
    grams, c = torch.zeros(2, n // ranks(group), n, **FLOAT32), torch.empty(d, **FLOAT32)
    for first, p in panels(d):
        a, b = (rounded(_normalized(x, first, p, eps, own, synced)[0], operand) for x in (z_a, z_b))
        c[first : first + p] = diagonal(a, b)
        for gram, x in zip(grams, (a, b), strict=True):
            add_gram(gram, x, own)
    for gram in grams:
        mirror(gram)
    total, wide = inner(grams[0], grams[1], group) / n**2, c.double()
    if _by_gram(total, c):
        loss = ((1 - wide).square().sum() + lambd * (total - wide.square().sum())).float()
    else:
        loss = _forward_panels(z_a[own], z_b[own], lambd, eps, operand, False, group, synced)[0]
    return loss, c, grams if needs_grad else grams.new_empty(0)


def _forward_panels(
    z_a: Tensor,
    z_b: Tensor,
    lambd: float,
    eps: float,
    operand: torch.dtype,
    needs_grad: bool,
    group: Group,
    synced: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = z_a.shape
    moments_a, moments_b = moments_of([z_a, z_b], group if synced else None)
    b = rounded(centre(z_b, 0, d, scale_eps=eps, moments=moments_b)[0], operand)
    grads = empty(2, n, d) if needs_grad else torch.empty(0, **FLOAT32)
    s, loss = empty(min(WIDE_PANEL, d), d), 0.0
    for first, p in panels(d, WIDE_PANEL):
        a = rounded(centre(z_a, first, p, scale_eps=eps, moments=moments_a)[0], operand)
        c = all_reduce(torch.mm(a.t(), b, out=s[:p]), group)
        loss += _C.barlow_twins_panel(c.data_ptr(), n * ranks(group), d, first, p, lambd)
        if needs_grad:
            torch.mm(b, c.t(), out=grads[0, :, first : first + p])
            torch.addmm(grads[1], a, c, beta=float(first > 0), out=grads[1])
    return torch.tensor(loss, **FLOAT32), torch.empty(0, **FLOAT32), grads


def backward(
    grad: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    lambd: float,
    eps: float,
    operand: torch.dtype,
    route: str,
    c: Tensor,
    kept: Tensor,
    group: Group = None,
    synced: bool = True,
) -> tuple[Tensor, Tensor]:
    """dz_a, dz_b [B, D] in the inputs' dtype"""
    gathered, over = route == "gram", group if synced else None
    (n, own), d = batch(z_a, gathered, group), z_a.shape[1]
    by_gram = gathered and _by_gram(inner(kept[0], kept[1], group) / n**2, c)
    if gathered and not by_gram:
        kept = _forward_panels(z_a[own], z_b[own], lambd, eps, operand, True, group, synced)[2]
    moments = [None, None] if gathered else moments_of([z_a, z_b], over)
    out = [empty(own.stop - own.start, d, dtype=z_a.dtype) for _ in range(2)]
    slope = (-2 * (1 - c) - 2 * lambd * c) / n  # of the gram route
    t = torch.empty(len(out[0]), min(PANEL, d), **FLOAT32)
    for first, p in panels(d):
        views = [_normalized(x, first, p, eps, own, synced, m) for x, m in zip((z_a, z_b), moments, strict=True)]
        for k, dx in enumerate(out):
            (x, mine, var), (_, other, _) = views[k], views[1 - k]
            if by_gram:
                g = torch.mm(kept[1 - k], rounded(x, operand), out=t[:, :p])
                terms = (g, 2 * lambd / n**2, rounded(other, operand), slope[first:])
                normalize_backward(dx, first, mine, var, eps, float(grad), *terms, group=over)
            else:
                normalize_backward(dx, first, mine, var, eps, float(grad), kept[k, :, first:], group=over)
    return out[0], out[1]
