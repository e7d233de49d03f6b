"""Barlow Twins on the CPU: no [D, D] matrix, and neither view normalised in full where the batch is small.

A, B: the views [N, D], batch-normalised; C = A^T B / N. Two exact routes:
- gram (8 N^2 D FLOP): sum C^2 = <A A^T, B B^T> / N^2, dA = (2 lambd / N^2) (B B^T) A + B * slope. Columns are
  independent once the [N, N] Gram matrices are there: all happens in panels of columns, normalised on the fly.
- panels (6 N D^2): rows of C, their loss and dL/dC in one pass, and at once what they add to dA and dB.
"""

import torch
from torch import Tensor

from sslops import _C

from .columns import PANEL, centre, diagonal, inner, normalize_backward, panels, rounded
from .tiles import FLOAT32, refuses  # noqa: F401

# Of the squares of C: above it the off-diagonal part, a difference on the gram route, loses more than a digit.
LARGEST_DIAGONAL_SHARE = 0.9


def forward(
    z_a: Tensor, z_b: Tensor, lambd: float, eps: float, operand: torch.dtype, route: str, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """loss []; diagonal of C [D] and Grams [2, N, N], or on the panels route nothing and dL/dA, dL/dB [2, N, D]"""
    return (_forward_gram if route == "gram" else _forward_panels)(z_a, z_b, lambd, eps, operand, needs_grad)


def _by_gram(total: float, c: Tensor) -> bool:
    """Whether the off-diagonal part of total = sum C^2 keeps its digits; false where few columns are alive."""
    return float(c.double().square().sum()) <= LARGEST_DIAGONAL_SHARE * total


def _forward_gram(
    z_a: Tensor, z_b: Tensor, lambd: float, eps: float, operand: torch.dtype, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = z_a.shape
    grams, c = torch.zeros(2, n, n, **FLOAT32), torch.empty(d, **FLOAT32)
    for first, p in panels(d):
        a, b = (rounded(centre(x, first, p, scale_eps=eps)[0], operand) for x in (z_a, z_b))
        c[first : first + p] = diagonal(a, b)
        for gram, x in zip(grams, (a, b), strict=True):
            gram.addmm_(x, x.t())
    total, wide = inner(grams[0], grams[1]) / n**2, c.double()
    if _by_gram(total, c):
        loss = ((1 - wide).square().sum() + lambd * (total - wide.square().sum())).float()
    else:
        loss = _forward_panels(z_a, z_b, lambd, eps, operand, needs_grad=False)[0]
    return loss, c, grams if needs_grad else grams.new_empty(0)


def _forward_panels(
    z_a: Tensor, z_b: Tensor, lambd: float, eps: float, operand: torch.dtype, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = z_a.shape
    b = rounded(centre(z_b, 0, d, scale_eps=eps)[0], operand)
    grads = torch.zeros(2, n, d, **FLOAT32) if needs_grad else torch.empty(0, **FLOAT32)
    s, loss = torch.empty(min(PANEL, d), d, **FLOAT32), 0.0
    for first, p in panels(d):
        a = rounded(centre(z_a, first, p, scale_eps=eps)[0], operand)
        c = torch.mm(a.t(), b, out=s[:p])
        loss += _C.barlow_twins_panel(c.data_ptr(), n, d, first, p, lambd)
        if needs_grad:
            torch.mm(b, c.t(), out=grads[0, :, first : first + p])
            grads[1].addmm_(a, c)
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
) -> tuple[Tensor, Tensor]:
    """dz_a, dz_b [N, D] in the inputs' dtype"""
    n, d = z_a.shape
    out = torch.empty_like(z_a), torch.empty_like(z_b)
    by_gram = route == "gram" and _by_gram(inner(kept[0], kept[1]) / n**2, c)
    if route == "gram" and not by_gram:
        kept = _forward_panels(z_a, z_b, lambd, eps, operand, needs_grad=True)[2]
    slope = (-2 * (1 - c) - 2 * lambd * c) / n  # of the gram route
    t = torch.empty(n, min(PANEL, d), **FLOAT32)
    for first, p in panels(d):
        views = [centre(x, first, p, scale_eps=eps) for x in (z_a, z_b)]
        for k, dx in enumerate(out):
            (own, _, var), (other, _, _) = views[k], views[1 - k]
            if by_gram:
                g = torch.mm(kept[1 - k], rounded(own, operand), out=t[:, :p])
                terms = (g, 2 * lambd / n**2, rounded(other, operand), slope[first:])
                normalize_backward(dx, first, own, var, eps, float(grad), *terms)
            else:
                normalize_backward(dx, first, own, var, eps, float(grad), kept[k, :, first:])
    return out
