"""Barlow Twins on the CPU: no [D, D] matrix, and neither view normalised in full where the batch is small.

A, B: the views [N, D], batch-normalised; C = A^T B / N. Two exact routes:
- gram (8 N^2 D FLOP): sum C^2 = <A A^T, B B^T> / N^2, dA = (2 lambd / N^2) (B B^T) A + B * slope. Columns are
  independent once the [N, N] Gram matrices are there: all happens in panels of columns, normalised on the fly.
- panels (6 N D^2): rows of C, their loss and dL/dC in one pass, and at once what they add to dA and dB.
"""

import torch
from torch import Tensor

from sslops import _C

from .columns import PANEL, centre, diagonal, inner, normalize_backward, panels
from .tiles import refuses  # noqa: F401


def forward(
    z_a: Tensor, z_b: Tensor, lambd: float, eps: float, operand: torch.dtype, route: str, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """loss []; diagonal of C [D] and Grams [2, N, N], or on the panels route nothing and dL/dA, dL/dB [2, N, D]"""
    return (_forward_gram if route == "gram" else _forward_panels)(z_a, z_b, lambd, eps, operand, needs_grad)


def _forward_gram(
    z_a: Tensor, z_b: Tensor, lambd: float, eps: float, operand: torch.dtype, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = z_a.shape
    grams, c = torch.zeros(2, n, n), torch.empty(d)
    for first, p in panels(d):
        a, b = (centre(x, first, p, operand, scale_eps=eps)[0] for x in (z_a, z_b))
        c[first : first + p] = diagonal(a, b)
        for gram, x in zip(grams, (a, b), strict=True):
            gram.addmm_(x, x.t())
    total, wide = inner(grams[0], grams[1]) / n**2, c.double()
    loss = (1 - wide).square().sum() + lambd * (total - wide.square().sum())
    return loss.float(), c, grams if needs_grad else grams.new_empty(0)


def _forward_panels(
    z_a: Tensor, z_b: Tensor, lambd: float, eps: float, operand: torch.dtype, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = z_a.shape
    b, _, _ = centre(z_b, 0, d, operand, scale_eps=eps)
    grads = torch.zeros(2, n, d) if needs_grad else torch.empty(0)
    s, loss = torch.empty(min(PANEL, d), d), 0.0
    for first, p in panels(d):
        a, _, _ = centre(z_a, first, p, operand, scale_eps=eps)
        c = torch.mm(a.t(), b, out=s[:p])
        loss += _C.barlow_twins_panel(c.data_ptr(), n, d, first, p, lambd)
        if needs_grad:
            torch.mm(b, c.t(), out=grads[0, :, first : first + p])
            grads[1].addmm_(a, c)
    return torch.tensor(loss), torch.empty(0), grads


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
    slope = (-2 * (1 - c) - 2 * lambd * c) / n  # of the gram route
    t = torch.empty(n, min(PANEL, d))
    for first, p in panels(d):
        views = [centre(x, first, p, operand, scale_eps=eps) for x in (z_a, z_b)]
        for k, dx in enumerate(out):
            (own, _, var), (other, _, _) = views[k], views[1 - k]
            if route == "gram":
                g = torch.mm(kept[1 - k], own, out=t[:, :p])
                terms = (g, 2 * lambd / n**2, other, slope[first:])
                normalize_backward(dx, first, own, var, eps, float(grad), *terms)
            else:
                normalize_backward(dx, first, own, var, eps, float(grad), kept[k, :, first:])
    return out
