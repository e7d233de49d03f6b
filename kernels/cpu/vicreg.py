"""VICReg on the CPU: no [D, D] matrix. Z: a view, centred; S = Z^T Z; cov = S / (N - 1). Two exact routes a view:

- gram (3 N^2 D FLOP, by symmetry): ||S||^2 = ||Z Z^T||^2 and Z S = (Z Z^T) Z. The off-diagonal part is then a
  difference, which drowns where few columns hold most of the variance: there the view goes by panels, at 6 N D^2.
- panels (4 N D^2): rows of S without their diagonal, summed, and at once multiplied back.

With a process group the batch is that of all ranks. gram: the views come gathered, a rank has its own rows of the Gram
matrices; panels: its own rows of the views, and S is summed over the ranks.
"""

import torch
from torch import Tensor

from sslops import _C

from .columns import (
    LARGEST_DIAGONAL_SHARE,
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
    panels,
    ranks,
    rounded,
)
from .memory import empty
from .tiles import DTYPE_CODES, FLOAT32, refuses  # noqa: F401


def _gram(z: Tensor, operand: torch.dtype, moments: Tensor, gram: Tensor, own: slice) -> None:
    """Rows `own` of Z Z^T into gram [B, N]; mean, biased variance and diagonal of S into moments [3, D]"""
    n, d = z.shape
    for first, p in panels(d):
        a, mean, var = centre(z, first, p)
        a = rounded(a, operand)
        for row, values in zip(moments, (mean, var, diagonal(a, a) * n), strict=True):
            row[first : first + p] = values
        add_gram(gram, a, own)
    mirror(gram)


def _off_diagonal_by_gram(moments: Tensor, gram: Tensor, group: Group) -> float | None:
    """Sum of S_ij^2 off the diagonal; None where the diagonal is too large a share"""
    total, own = inner(gram, gram, group), inner(moments[2], moments[2])
    return total - own if own <= LARGEST_DIAGONAL_SHARE * total else None


def _by_panels(z: Tensor, operand: torch.dtype, moments: Tensor, t: Tensor | None, group: Group) -> float:
    """Sum of S_ij^2 off the diagonal; Z times that part of S into t [B, D]; moments as _gram, 0 for the diagonal"""
    n, d = z.shape
    a, moments[0], moments[1] = centre(z, 0, d, moments=moments_of([z], group)[0])
    a = rounded(a, operand)
    moments[2] = 0
    s, total = empty(min(WIDE_PANEL, d), d), 0.0
    for first, p in panels(d, WIDE_PANEL):
        rows = all_reduce(torch.mm(a[:, first : first + p].t(), a, out=s[:p]), group)
        total += _C.vicreg_off_diagonal(rows.data_ptr(), n, d, first, p)
        if t is not None:
            torch.mm(a, rows.t(), out=t[:, first : first + p])
    return total


def _std(moments: Tensor, n: int, eps: float) -> Tensor:
    """[.., D]: sqrt of the unbiased variance + eps"""
    return (moments[..., 1, :].double() * (n / (n - 1)) + eps).sqrt()


def forward(
    z_a: Tensor,
    z_b: Tensor | None,
    invariance: float,
    variance: float,
    covariance: float,
    eps: float,
    operand: torch.dtype,
    route: str,
    needs_grad: bool,
    group: Group = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss []; moments [V, 3, D] of the V views; Grams [V, B, N] or products with S [V, B, D]"""
    n, own = batch(z_a, route == "gram", group)
    rows, d = n // ranks(group), z_a.shape[1]
    views = [z_a] if z_b is None else [z_a, z_b]
    moments = torch.empty(len(views), 3, d, **FLOAT32)
    kept = None
    if needs_grad or route == "gram":
        kept = empty(len(views), rows, n if route == "gram" else d)
    off = 0.0
    for k, z in enumerate(views):
        if route == "gram":
            assert kept is not None
            _gram(z, operand, moments[k], kept[k].zero_(), own)
            part = _off_diagonal_by_gram(moments[k], kept[k], group)
            if part is None:
                part = _by_panels(z[own], operand, torch.empty(3, d, **FLOAT32), None, group)
            off += part
        else:
            off += _by_panels(z, operand, moments[k], None if kept is None else kept[k], group)
    hinge = (1 - _std(moments, n, eps)).clamp(min=0).sum()
    loss = variance * hinge / (2 * d) + covariance * off / (d * (n - 1) ** 2)
    if z_b is not None:
        total = _C.vicreg_squared_distance(z_a[own].data_ptr(), z_b[own].data_ptr(), DTYPE_CODES[z_a.dtype], rows, d)
        loss += invariance * all_reduce(torch.tensor(total, dtype=torch.float64, device="cpu"), group) / (n * d)
    return loss.float(), moments, kept if needs_grad and kept is not None else torch.empty(0, **FLOAT32)


def backward(
    grad: Tensor,
    z_a: Tensor,
    z_b: Tensor | None,
    invariance: float,
    variance: float,
    covariance: float,
    eps: float,
    operand: torch.dtype,
    route: str,
    moments: Tensor,
    kept: Tensor,
    group: Group = None,
) -> tuple[Tensor, Tensor]:
    """dz_a, dz_b [B, D] in the inputs' dtype; the second is empty for one view"""
    n, own = batch(z_a, route == "gram", group)
    rows, d = n // ranks(group), z_a.shape[1]
    views = [z_a] if z_b is None else [z_a, z_b]
    mine = [z[own] for z in views]
    gradients = []
    for k, z in enumerate(views):
        std = _std(moments[k], n, eps)
        spread = torch.where(std < 1, -variance / (2 * d * (n - 1)) / std, 0.0).float()
        t = kept[k]
        by_gram = route == "gram" and _off_diagonal_by_gram(moments[k], t, group) is not None
        if route == "gram" and not by_gram:
            t = empty(rows, d)
            _by_panels(mine[k], operand, torch.empty(3, d, **FLOAT32), t, group)
        out = empty(rows, d, dtype=z.dtype)
        other = mine[1 - k].data_ptr() if len(views) == 2 else 0
        for first, p in panels(d):
            a = rounded(centre(z, first, p)[0], operand) if by_gram else None
            columns = t[:, first : first + p] if a is None else torch.mm(t, a)
            _C.vicreg_finish(
                columns.data_ptr(), columns.stride(0), 4 * covariance / (d * (n - 1) ** 2),
                0 if a is None else a[own].data_ptr(), moments[k, 2, first:].data_ptr(),
                mine[k].data_ptr(), moments[k, 0, first:].data_ptr(), spread[first:].data_ptr(),
                other, 2 * invariance / (n * d), float(grad), rows, d, first, p, DTYPE_CODES[z.dtype], out.data_ptr(),
            )  # fmt: skip
        gradients.append(out)
    return gradients[0], gradients[1] if len(views) == 2 else z_a.new_empty(0)
