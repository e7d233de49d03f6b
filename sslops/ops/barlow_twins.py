"""Barlow Twins: the cross-correlation of two views should be the identity."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._library import register
from .._precision import compute_dtype
from ..backend import kernel, resolve

ROUTES = ("gram", "panels")


def reference(z_a: Tensor, z_b: Tensor, lambd: float, eps: float, operand_dtype: torch.dtype) -> Tensor:
    """loss [], the maths as it is written: float32 (float64 for float64) around a matmul in operand_dtype"""
    wide = torch.promote_types(z_a.dtype, torch.float32)
    a, b = (F.batch_norm(z.to(wide), None, None, training=True, eps=eps) for z in (z_a, z_b))
    c = (a.to(operand_dtype).t() @ b.to(operand_dtype)).to(wide) / len(z_a)
    diagonal = c.diagonal()
    off_diagonal = c - torch.diag(diagonal)
    return (1 - diagonal).square().sum() + lambd * off_diagonal.square().sum()


def cheaper_route(n: int, d: int) -> str:
    """The cheaper of two exact ways: 8 N^2 D FLOP by Gram matrices, 6 N D^2 by panels of C."""
    return "gram" if 4 * n < 3 * d else "panels"


def _forward(
    z_a: Tensor,
    z_b: Tensor,
    lambd: float,
    eps: float,
    operand_dtype: torch.dtype,
    route: str,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check.embeddings("barlow_twins", z_a=z_a, z_b=z_b)
    _check.batch("barlow_twins", "z_a", z_a)
    _check.choice("barlow_twins", "route", route, ROUTES)
    outputs: tuple[Tensor, Tensor, Tensor] = kernel(backend, "barlow_twins").forward(
        z_a.contiguous(), z_b.contiguous(), lambd, eps, operand_dtype, route, needs_grad
    )
    return outputs


def _kept_shapes(z_a: Tensor, route: str, needs_grad: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what forward keeps for backward: the diagonal of C, and the Grams or the gradients of A and B."""
    n, d = z_a.shape
    if route == "gram":
        return (d,), (2, n, n) if needs_grad else (0,)
    return (0,), (2, n, d) if needs_grad else (0,)


def _forward_fake(
    z_a: Tensor,
    z_b: Tensor,
    lambd: float,
    eps: float,
    operand_dtype: torch.dtype,
    route: str,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = z_a.new_empty((), dtype=torch.float32)
    diagonal, kept = _kept_shapes(z_a, route, needs_grad)
    return loss, loss.new_empty(diagonal), loss.new_empty(kept)


def _backward(
    grad: Tensor,
    z_a: Tensor,
    z_b: Tensor,
    lambd: float,
    eps: float,
    operand_dtype: torch.dtype,
    route: str,
    needs_grad: bool,
    backend: str,
    diagonal: Tensor,
    kept: Tensor,
) -> tuple[Tensor, Tensor]:
    _check.embeddings("barlow_twins", z_a=z_a, z_b=z_b)
    shapes = _kept_shapes(z_a, route, True)
    _check.scratch("barlow_twins", z_a.device, grad=(grad, ()), diagonal=(diagonal, shapes[0]), kept=(kept, shapes[1]))
    gradients: tuple[Tensor, Tensor] = kernel(backend, "barlow_twins").backward(
        grad, z_a.contiguous(), z_b.contiguous(), lambd, eps, operand_dtype, route,
        diagonal.contiguous(), kept.contiguous(),
    )  # fmt: skip
    return gradients


def _backward_fake(grad: Tensor, z_a: Tensor, z_b: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return z_a.new_empty(z_a.shape), z_b.new_empty(z_b.shape)


register(
    "barlow_twins",
    arguments="Tensor z_a, Tensor z_b, float lambd, float eps, ScalarType operand_dtype, str route, bool needs_grad, "
    "str backend",
    saved="Tensor diagonal, Tensor kept",
    gradients=("z_a", "z_b"),
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
)


def barlow_twins(
    z_a: Tensor,
    z_b: Tensor,
    *,
    lambd: float = 5e-3,
    scale: float = 1.0,
    eps: float = 1e-5,
    route: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Barlow Twins' loss: (1 - C_ii)^2 summed over the diagonal, plus lambd C_ij^2 summed off it.

    C = A^T B / N is the cross-correlation of the two views, batch-normalised over N (biased variance, no affine part).
    The [D, D] matrix is never stored. Statistics are those of the local batch.

    Args:
        z_a, z_b: two views, [N, D] each, N at least 2; float32, float16, bfloat16 or float64 (float64 runs the eager
            reference). Under autocast the matmul operands have its dtype.
        lambd: weight of the off-diagonal terms, at least 0.
        scale: factor of the whole loss (0.024 in the authors' code, 0.1 or 0.025 in others).
        eps: added to the variances, as F.batch_norm does; positive.
        route: "gram" goes by two [N, N] matrices, 8 N^2 D FLOP; "panels" by rows of C, 6 N D^2 FLOP. The cheaper if
            None. Where the diagonal holds nearly all of C (few columns alive), "gram" goes by panels after all.
        backend: "cpu" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss, 0-d, in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value.
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, arXiv:2103.03230, Eq. 1;
    the gram route is the identity ||A^T B||^2 = <A A^T, B B^T>.
    """
    _check.embeddings("barlow_twins", z_a=z_a, z_b=z_b)
    _check.batch("barlow_twins", "z_a", z_a)
    _check.non_negative("barlow_twins", lambd=lambd, scale=scale)
    _check.positive("barlow_twins", eps=eps)
    if route is None:
        route = cheaper_route(*z_a.shape)
    _check.choice("barlow_twins", "route", route, ROUTES)
    operand_dtype = compute_dtype(z_a)
    backend = resolve("barlow_twins", z_a.device, z_a.dtype, backend)
    if backend == "eager":
        loss = reference(z_a, z_b, lambd, eps, operand_dtype)
    else:
        needs_grad = torch.is_grad_enabled() and (z_a.requires_grad or z_b.requires_grad)
        loss, _, _ = torch.ops.sslops.barlow_twins(z_a, z_b, lambd, eps, operand_dtype, route, needs_grad, backend)
    return loss * scale
