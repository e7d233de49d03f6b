"""Barlow Twins: the cross-correlation of two views should be the identity."""

from typing import Any, NamedTuple

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


class _Arguments(NamedTuple):
    z_a: Tensor
    z_b: Tensor
    lambd: float
    eps: float
    operand_dtype: torch.dtype
    route: str
    needs_grad: bool
    backend: str


def _kernel_arguments(x: _Arguments) -> tuple[Any, ...]:
    _check.embeddings("barlow_twins", z_a=x.z_a, z_b=x.z_b)
    _check.batch("barlow_twins", "z_a", x.z_a)
    _check.choice("barlow_twins", "route", x.route, ROUTES)
    return x.z_a.contiguous(), x.z_b.contiguous(), x.lambd, x.eps, x.operand_dtype, x.route


def _kept_shapes(x: _Arguments) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of what forward keeps for backward: the diagonal of C, and the Grams or the gradients of A and B."""
    n, d = x.z_a.shape
    return ((d,), (2, n, n)) if x.route == "gram" else ((0,), (2, n, d))


def _forward(x: _Arguments) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = kernel(x.backend, "barlow_twins").forward(*_kernel_arguments(x), x.needs_grad)
    return outputs


def _forward_fake(x: _Arguments) -> tuple[Tensor, ...]:
    loss = x.z_a.new_empty((), dtype=torch.float32)
    diagonal, kept = _kept_shapes(x)
    return loss, loss.new_empty(diagonal), loss.new_empty(kept if x.needs_grad else (0,))


def _backward(grad: Tensor, x: _Arguments, diagonal: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    arguments = _kernel_arguments(x)
    shapes = _kept_shapes(x)
    _check.scratch(
        "barlow_twins", x.z_a.device, grad=(grad, ()), diagonal=(diagonal, shapes[0]), kept=(kept, shapes[1])
    )
    gradients: tuple[Tensor, ...] = kernel(x.backend, "barlow_twins").backward(
        grad, *arguments, diagonal.contiguous(), kept.contiguous()
    )
    return gradients


def _backward_fake(grad: Tensor, x: _Arguments, *_: Tensor) -> tuple[Tensor, ...]:
    return x.z_a.new_empty(x.z_a.shape), x.z_b.new_empty(x.z_b.shape)


register(
    "barlow_twins",
    _Arguments,
    saved=("diagonal", "kept"),
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
