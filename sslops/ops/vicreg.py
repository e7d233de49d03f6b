"""VICReg: views that agree, columns that vary, and columns that do not covary."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._library import register
from .._precision import compute_dtype
from ..backend import kernel, resolve

ROUTES = ("gram", "panels")


def reference(
    z_a: Tensor,
    z_b: Tensor | None,
    invariance: float,
    variance: float,
    covariance: float,
    eps: float,
    operand_dtype: torch.dtype,
) -> Tensor:
    """loss [], the maths as it is written: float32 (float64 for float64) around matmuls in operand_dtype"""
    wide = torch.promote_types(z_a.dtype, torch.float32)
    n, d = z_a.shape
    views = [z.to(wide) for z in (z_a, z_b) if z is not None]
    loss = views[0].new_zeros(())
    for z in views:
        centred = z - z.mean(0)
        hinge = F.relu(1 - (z.var(0) + eps).sqrt())
        operand = centred.to(operand_dtype)
        cov = (operand.t() @ operand).to(wide) / (n - 1)
        off_diagonal = cov - torch.diag(cov.diagonal())
        loss = loss + variance * hinge.mean() / 2 + covariance * off_diagonal.square().sum() / d
    if len(views) == 2:
        loss = loss + invariance * (views[0] - views[1]).square().mean()
    return loss


def cheaper_route(n: int, d: int) -> str:
    """The cheaper of two exact ways, for each view: 4 N^2 D FLOP by a Gram matrix, 4 N D^2 by panels of Z^T Z."""
    return "gram" if n < d else "panels"


def _check_views(z_a: Tensor, z_b: Tensor | None) -> None:
    if z_b is None:
        _check.embeddings("vicreg", z_a=z_a)
    else:
        _check.embeddings("vicreg", z_a=z_a, z_b=z_b)


class _Arguments(NamedTuple):
    z_a: Tensor
    z_b: Tensor | None
    invariance: float
    variance: float
    covariance: float
    eps: float
    operand_dtype: torch.dtype
    route: str
    needs_grad: bool
    backend: str


def _kernel_arguments(x: _Arguments) -> tuple[Any, ...]:
    _check_views(x.z_a, x.z_b)
    _check.batch("vicreg", "z_a", x.z_a)
    _check.choice("vicreg", "route", x.route, ROUTES)
    z_b = None if x.z_b is None else x.z_b.contiguous()
    return x.z_a.contiguous(), z_b, x.invariance, x.variance, x.covariance, x.eps, x.operand_dtype, x.route


def _saved_shapes(x: _Arguments) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the moments, and of the Grams or the products with S."""
    n, d = x.z_a.shape
    views = 1 if x.z_b is None else 2
    return (views, 3, d), (views, n, n if x.route == "gram" else d)


def _forward(x: _Arguments) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = kernel(x.backend, "vicreg").forward(*_kernel_arguments(x), x.needs_grad)
    return outputs


def _forward_fake(x: _Arguments) -> tuple[Tensor, ...]:
    loss = x.z_a.new_empty((), dtype=torch.float32)
    moments, kept = _saved_shapes(x)
    return loss, loss.new_empty(moments), loss.new_empty(kept if x.needs_grad else (0,))


def _backward(grad: Tensor, x: _Arguments, moments: Tensor, kept: Tensor) -> tuple[Tensor, ...]:
    arguments = _kernel_arguments(x)
    shapes = _saved_shapes(x)
    _check.scratch("vicreg", x.z_a.device, grad=(grad, ()), moments=(moments, shapes[0]), kept=(kept, shapes[1]))
    gradients: tuple[Tensor, ...] = kernel(x.backend, "vicreg").backward(
        grad, *arguments, moments.contiguous(), kept.contiguous()
    )
    return gradients


def _backward_fake(grad: Tensor, x: _Arguments, *_: Tensor) -> tuple[Tensor, ...]:
    return x.z_a.new_empty(x.z_a.shape), x.z_a.new_empty(0 if x.z_b is None else x.z_b.shape)


register(
    "vicreg",
    _Arguments,
    saved=("moments", "kept"),
    gradients=("z_a", "z_b"),
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
)


def vicreg(
    z_a: Tensor,
    z_b: Tensor | None = None,
    *,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
    eps: float = 1e-4,
    route: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """VICReg's loss: invariance MSE(z_a, z_b) + variance (v_a + v_b) / 2 + covariance (c_a + c_b).

    v is the mean over columns of max(0, 1 - sqrt(var + eps)), var unbiased; c the sum of the squared off-diagonal
    covariances over D, divided by N - 1. The [D, D] matrices are never stored. Statistics are those of the local batch.
    For solo-learn's loss, which does not halve the variance term, double `variance`.

    Args:
        z_a, z_b: two views, [N, D] each, N at least 2; float32, float16, bfloat16 or float64 (float64 runs the eager
            reference). Without z_b: variance v_a / 2 + covariance c_a. Under autocast matmul operands have its dtype.
        invariance, variance, covariance: weights, at least 0.
        eps: added to the variances; at least 0.
        route: "gram" goes by [N, N] matrices, 8 N^2 D FLOP for two views; "panels" by rows of Z^T Z, 8 N D^2. The
            cheaper if None. A view whose variance sits in few columns takes panels anyway, to keep its digits.
        backend: "cpu" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss, 0-d, in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value.
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Bardes et al., VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning,
    arXiv:2105.04906, Eq. 6, with the weights' shares of the authors' code; ||Z^T Z|| = ||Z Z^T||.
    """
    _check_views(z_a, z_b)
    _check.batch("vicreg", "z_a", z_a)
    _check.non_negative("vicreg", invariance=invariance, variance=variance, covariance=covariance, eps=eps)
    if route is None:
        route = cheaper_route(*z_a.shape)
    _check.choice("vicreg", "route", route, ROUTES)
    operand_dtype = compute_dtype(z_a)
    backend = resolve("vicreg", z_a.device, z_a.dtype, backend)
    weights = (invariance, variance, covariance, eps)
    if backend == "eager":
        return reference(z_a, z_b, *weights, operand_dtype)
    needs_grad = torch.is_grad_enabled() and (z_a.requires_grad or (z_b is not None and z_b.requires_grad))
    loss: Tensor = torch.ops.sslops.vicreg(z_a, z_b, *weights, operand_dtype, route, needs_grad, backend)[0]
    return loss
