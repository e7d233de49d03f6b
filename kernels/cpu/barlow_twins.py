"""Barlow Twins on the CPU: no [D, D] matrix, and neither view normalised in full where the batch is small.

A, B: the views [N, D], batch-normalised; C = A^T B / N. Two exact routes:
- gram (8 N^2 D FLOP): sum C^2 = <A A^T, B B^T> / N^2, dA = (2 lambd / N^2) (B B^T) A + B * slope. Columns are
  independent once the [N, N] Gram matrices are there: all happens in panels of columns, normalised on the fly.
- panels (6 N D^2): rows of C, their loss and dL/dC in one pass, and at once what they add to dA and dB.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sslops import _C

from .tiles import DTYPE_CODES

PANEL = 512  # columns: [256, 512] in float32 is 512 kB, a quarter of a core's cache


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPE_CODES:
        return f"no {dtype} kernel: float32, float16 and bfloat16"
    return None


def _panels(d: int) -> Iterator[tuple[int, int]]:
    """(first column, columns)"""
    for first in range(0, d, PANEL):
        yield first, min(PANEL, d - first)


def _normalize(x: Tensor, first: int, p: int, eps: float, operand: torch.dtype) -> tuple[Tensor, Tensor]:
    """a panel [N, P] of the normalised view, in float32, and rstd [P]"""
    n, d = x.shape
    a, rstd = torch.empty(n, p), torch.empty(p)
    _C.barlow_twins_normalize(
        x.data_ptr(), DTYPE_CODES[x.dtype], n, d, first, p, eps, DTYPE_CODES[operand], a.data_ptr(), rstd.data_ptr()
    )
    return a, rstd


def forward(
    z_a: Tensor, z_b: Tensor, lambd: float, eps: float, operand: torch.dtype, route: str, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """loss []; diagonal of C [D] and Grams [2, N, N], or on the panels route nothing and dL/dA, dL/dB [2, N, D]"""
    return (_forward_gram if route == "gram" else _forward_panels)(z_a, z_b, lambd, eps, operand, needs_grad)


def _forward_gram(
    z_a: Tensor, z_b: Tensor, lambd: float, eps: float, operand: torch.dtype, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = z_a.shape
    grams, diagonal = torch.zeros(2, n, n), torch.empty(d)
    for first, p in _panels(d):
        a, b = (_normalize(x, first, p, eps, operand)[0] for x in (z_a, z_b))
        _C.barlow_twins_diagonal(a.data_ptr(), b.data_ptr(), n, p, diagonal[first:].data_ptr())
        for gram, x in zip(grams, (a, b), strict=True):
            gram.addmm_(x, x.t())
    total = _C.barlow_twins_inner(grams[0].data_ptr(), grams[1].data_ptr(), n * n) / n**2
    c = diagonal.double()
    loss = (1 - c).square().sum() + lambd * (total - c.square().sum())
    return loss.float(), diagonal, grams if needs_grad else grams.new_empty(0)


def _forward_panels(
    z_a: Tensor, z_b: Tensor, lambd: float, eps: float, operand: torch.dtype, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    n, d = z_a.shape
    b, _ = _normalize(z_b, 0, d, eps, operand)
    grads = torch.zeros(2, n, d) if needs_grad else torch.empty(0)
    s, loss = torch.empty(min(PANEL, d), d), 0.0
    for first, p in _panels(d):
        a, _ = _normalize(z_a, first, p, eps, operand)
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
    diagonal: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor]:
    """dz_a, dz_b [N, D] in the inputs' dtype"""
    n, d = z_a.shape
    out = torch.empty_like(z_a), torch.empty_like(z_b)
    code, scale = DTYPE_CODES[z_a.dtype], float(grad)
    if route == "gram":
        slope = (-2 * (1 - diagonal) - 2 * lambd * diagonal) / n
    t = torch.empty(n, min(PANEL, d))
    for first, p in _panels(d):
        views = [_normalize(x, first, p, eps, operand) for x in (z_a, z_b)]
        for k, dx in enumerate(out):
            (own, rstd), (other, _) = views[k], views[1 - k]
            if route == "gram":
                g = torch.mm(kept[1 - k], own, out=t[:, :p])
                arguments = (g.stride(0), 2 * lambd / n**2, other.data_ptr(), slope[first:].data_ptr())
            else:
                g = kept[k, :, first:]
                arguments = (g.stride(0), 1.0, 0, 0)
            _C.barlow_twins_finish(
                g.data_ptr(), *arguments, own.data_ptr(), rstd.data_ptr(), scale, n, d, first, p, code, dx.data_ptr()
            )
    return out
