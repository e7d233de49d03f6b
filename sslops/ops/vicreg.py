"""VICReg: views that agree, columns that vary, and columns that do not covary."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, distributed
from .._library_old import register
from .._precision import compute_dtype
from ..backend import is_distributed, kernel, resolve

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


def cheaper_route(n: int, d: int, backend: str | None = None) -> str:
    """The cheaper of two exact ways, for each view: 3 N^2 D FLOP by a Gram matrix, 4 N D^2 by panels of Z^T Z.

    What the former spends besides matmuls was measured to be worth 700 N D FLOP more. On a GPU panels: whether a Gram
    matrix keeps its digits is known there, and not waited for.
    """
    return "gram" if 3 * n + 700 < 4 * d and backend != "triton" else "panels"


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
    group: str
    backend: str


def _options(x: _Arguments) -> tuple[Any, ...]:
    _check_views(x.z_a, x.z_b)
    _check.batch("vicreg", "z_a", x.z_a, distributed.size(x.group))
    _check.choice("vicreg", "route", x.route, ROUTES)
    return x.invariance, x.variance, x.covariance, x.eps, x.operand_dtype, x.route


def _views(x: _Arguments) -> list[Tensor]:
    return [z.contiguous() for z in (x.z_a, x.z_b) if z is not None]


def _saved_shapes(x: _Arguments) -> tuple[tuple[int, ...], ...]:
    """Of the moments, the Grams or the products with S, and the views of all ranks."""
    (rows, d), n = x.z_a.shape, x.z_a.shape[0] * distributed.size(x.group)
    v = 1 if x.z_b is None else 2
    if x.route == "panels":
        return (v, 3, d), (v, rows, d), (0,)
    return (v, 3, d), (v, rows, n), (v, n, d) if x.group else (0,)


def _forward(x: _Arguments) -> tuple[Tensor, ...]:
    options, views, gathered = _options(x), _views(x), x.z_a.new_empty(0)
    if x.group and x.route == "gram":
        gathered = distributed.gather_views(views, x.group)
        views = list(gathered)
    z_b = views[1] if len(views) == 2 else None
    outputs = kernel(x.backend, "vicreg").forward(views[0], z_b, *options, x.needs_grad, **distributed.spread(x.group))
    return *outputs, gathered


def _forward_fake(x: _Arguments) -> tuple[Tensor, ...]:
    loss = x.z_a.new_empty((), dtype=torch.float32)
    moments, kept, gathered = _saved_shapes(x)
    return loss, loss.new_empty(moments), loss.new_empty(kept if x.needs_grad else (0,)), x.z_a.new_empty(gathered)


def _backward(grad: Tensor, x: _Arguments, moments: Tensor, kept: Tensor, gathered: Tensor) -> tuple[Tensor, ...]:
    options, views, shapes = _options(x), _views(x), _saved_shapes(x)
    _check.scratch("vicreg", x.z_a.device, grad=(grad, ()), moments=(moments, shapes[0]), kept=(kept, shapes[1]))
    _check.like("vicreg", "gathered", gathered, x.z_a, shapes[2])
    if len(gathered):
        views = list(gathered.contiguous())
    z_b = views[1] if len(views) == 2 else None
    gradients: tuple[Tensor, ...] = kernel(x.backend, "vicreg").backward(
        grad * distributed.size(x.group),
        views[0],
        z_b,
        *options,
        moments.contiguous(),
        kept.contiguous(),
        **distributed.spread(x.group),
    )
    return gradients


def _backward_fake(grad: Tensor, x: _Arguments, *_: Tensor) -> tuple[Tensor, ...]:
    return x.z_a.new_empty(x.z_a.shape), x.z_a.new_empty(0 if x.z_b is None else x.z_b.shape)


register(
    "vicreg",
    _Arguments,
    saved=("moments", "kept", "gathered"),
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
    group: distributed.Group = None,
    backend: str | None = None,
) -> Tensor:
    """VICReg's loss: invariance MSE(z_a, z_b) + variance (v_a + v_b) / 2 + covariance (c_a + c_b).

    v is the mean over columns of max(0, 1 - sqrt(var + eps)), var unbiased; c the sum of the squared off-diagonal
    covariances over D, divided by N - 1. The [D, D] matrices are never stored.
    For solo-learn's loss, which does not halve the variance term, double `variance`.

    Args:
        z_a, z_b: two views, [N, D] each, N at least 2; float32, float16, bfloat16 or float64 (float64 runs the eager
            reference). Without z_b: variance v_a / 2 + covariance c_a. Under autocast matmul operands have its dtype.
        invariance, variance, covariance: weights, at least 0.
        eps: added to the variances; at least 0.
        route: "gram" goes by [N, N] matrices, 6 N^2 D FLOP for two views; "panels" by rows of Z^T Z, 8 N D^2. The
            cheaper if None. A view whose variance sits in few columns takes panels anyway, to keep its digits; but a
            GPU is not waited for to find out: None is "panels" there, and "gram" exact for variances of one size.
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies, N / W rows on each: the loss is
            that of all N rows, the same on every rank, and so must be what is built on it. Gradients are W times the
            rank's share, which DDP's averaging makes those of the whole batch.
        backend: "cpu", "triton" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss, 0-d, in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; views of other shapes on other ranks (on a GPU some ranks notice at their next call, and have
            NaN until then).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Bardes et al., VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning,
    arXiv:2105.04906, Eq. 6, with the weights' shares of the authors' code; ||Z^T Z|| = ||Z Z^T||.
    """
    _check_views(z_a, z_b)
    group = distributed.name("vicreg", group)
    ranks = distributed.size(group)
    _check.batch("vicreg", "z_a", z_a, ranks)
    _check.non_negative("vicreg", invariance=invariance, variance=variance, covariance=covariance, eps=eps)
    operand_dtype = compute_dtype(z_a)
    backend = resolve("vicreg", z_a.device, z_a.dtype, backend)
    if route is None:
        route = cheaper_route(len(z_a) * ranks, z_a.shape[1], backend)
    _check.choice("vicreg", "route", route, ROUTES)
    weights = (invariance, variance, covariance, eps)
    if group and not is_distributed(backend, "vicreg"):
        z_a, *other = distributed.gathered("vicreg", group, *(z for z in (z_a, z_b) if z is not None))
        z_b, group = other[0] if other else None, ""
    if backend == "eager":
        return reference(z_a, z_b, *weights, operand_dtype)
    needs_grad = torch.is_grad_enabled() and (z_a.requires_grad or (z_b is not None and z_b.requires_grad))
    options = (operand_dtype, route, needs_grad, group, backend)
    loss: Tensor = torch.ops.sslops.vicreg(z_a, z_b, *weights, *options)[0]
    return loss
