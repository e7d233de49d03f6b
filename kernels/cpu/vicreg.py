"""VICReg on the CPU: no [D, D] matrix. Z: a view, centred; S = Z^T Z; cov = S / (N - 1). Two exact routes a view:

- gram (4 N^2 D FLOP): ||S||^2 = ||Z Z^T||^2 and Z S = (Z Z^T) Z. The off-diagonal part is then a difference, which
  drowns where few columns hold most of the variance: there the view goes by panels, at 6 N D^2.
- panels (4 N D^2): rows of S without their diagonal, summed, and at once multiplied back.
"""

import torch
from torch import Tensor

from sslops import _C

from .columns import PANEL, centre, diagonal, inner, panels, rounded
from .tiles import DTYPE_CODES, FLOAT32, refuses  # noqa: F401

# Of ||S||^2: above it the difference loses more than a digit.
LARGEST_DIAGONAL_SHARE = 0.9


def _gram(z: Tensor, operand: torch.dtype, moments: Tensor, gram: Tensor) -> None:
    """Z Z^T into gram [N, N]; mean, biased variance and diagonal of S into moments [3, D]"""
    n, d = z.shape
    for first, p in panels(d):
        a, mean, var = centre(z, first, p)
        a = rounded(a, operand)
        for row, values in zip(moments, (mean, var, diagonal(a, a) * n), strict=True):
            row[first : first + p] = values
        gram.addmm_(a, a.t())


def _off_diagonal_by_gram(moments: Tensor, gram: Tensor) -> float | None:
    """Sum of S_ij^2 off the diagonal; None where the diagonal is too large a share"""
    total, own = inner(gram, gram), inner(moments[2], moments[2])
    return total - own if own <= LARGEST_DIAGONAL_SHARE * total else None


def _by_panels(z: Tensor, operand: torch.dtype, moments: Tensor, t: Tensor | None) -> float:
    """Sum of S_ij^2 off the diagonal; Z times that part of S into t [N, D]; moments as _gram, 0 for the diagonal"""
    n, d = z.shape
    a, moments[0], moments[1] = centre(z, 0, d)
    a = rounded(a, operand)
    moments[2] = 0
    s, total = torch.empty(min(PANEL, d), d, **FLOAT32), 0.0
    for first, p in panels(d):
        rows = torch.mm(a[:, first : first + p].t(), a, out=s[:p])
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
) -> tuple[Tensor, Tensor, Tensor]:
    """loss []; moments [V, 3, D] of the V views; Grams [V, N, N] or products with S [V, N, D]"""
    n, d = z_a.shape
    views = [z_a] if z_b is None else [z_a, z_b]
    moments = torch.empty(len(views), 3, d, **FLOAT32)
    kept = torch.zeros(len(views), n, n if route == "gram" else d, **FLOAT32) if needs_grad or route == "gram" else None
    off = 0.0
    for k, z in enumerate(views):
        if route == "gram":
            assert kept is not None
            _gram(z, operand, moments[k], kept[k])
            by_gram = _off_diagonal_by_gram(moments[k], kept[k])
            off += _by_panels(z, operand, torch.empty(3, d, **FLOAT32), None) if by_gram is None else by_gram
        else:
            off += _by_panels(z, operand, moments[k], None if kept is None else kept[k])
    hinge = (1 - _std(moments, n, eps)).clamp(min=0).sum()
    loss = variance * hinge / (2 * d) + covariance * off / (d * (n - 1) ** 2)
    if z_b is not None:
        code = DTYPE_CODES[z_a.dtype]
        loss += invariance * _C.vicreg_squared_distance(z_a.data_ptr(), z_b.data_ptr(), code, n, d) / (n * d)
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
) -> tuple[Tensor, Tensor]:
    """dz_a, dz_b [N, D] in the inputs' dtype; the second is empty for one view"""
    n, d = z_a.shape
    views = [z_a] if z_b is None else [z_a, z_b]
    gradients = []
    for k, z in enumerate(views):
        std = _std(moments[k], n, eps)
        spread = torch.where(std < 1, -variance / (2 * d * (n - 1)) / std, 0.0).float()
        t = kept[k]
        by_gram = route == "gram" and _off_diagonal_by_gram(moments[k], t) is not None
        if route == "gram" and not by_gram:
            t = torch.empty(n, d, **FLOAT32)
            _by_panels(z, operand, torch.empty(3, d, **FLOAT32), t)
        out = torch.empty_like(z)
        other = views[1 - k].data_ptr() if len(views) == 2 else 0
        for first, p in panels(d):
            a = rounded(centre(z, first, p)[0], operand) if by_gram else None
            columns = t[:, first : first + p] if a is None else torch.mm(t, a)
            _C.vicreg_finish(
                columns.data_ptr(), columns.stride(0), 4 * covariance / (d * (n - 1) ** 2),
                0 if a is None else a.data_ptr(), moments[k, 2, first:].data_ptr(),
                z.data_ptr(), moments[k, 0, first:].data_ptr(), spread[first:].data_ptr(),
                other, 2 * invariance / (n * d), float(grad), n, d, first, p, DTYPE_CODES[z.dtype], out.data_ptr(),
            )  # fmt: skip
        gradients.append(out)
    return gradients[0], gradients[1] if len(views) == 2 else z_a.new_empty(0)
