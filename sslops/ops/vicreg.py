"""VICReg: views that agree, columns that vary, and columns that do not covary."""

from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, distributed
from .._check import Of
from .._columns import ROUTES, by_route, check_batch, kept_width
from .._library import Out, register


class Arguments(NamedTuple):
    z_a: Annotated[Tensor, Of("N D", spread=True)]
    z_b: Annotated[Tensor | None, Of("N D", like="z_a", spread=True)]
    invariance: float
    variance: float
    covariance: float
    eps: float
    route: str
    group: str
    operand_dtype: torch.dtype = torch.float32
    needs_grad: list[bool] = []  # noqa: RUF012
    backend: str = ""


class Outputs(NamedTuple):
    """Of V views, Z each, centred; S = Z^T Z."""

    loss: Out
    moments: Out  # mean, variance (in Triton the standard deviation) and S_ii, which panels do without (on the CPU: -1)
    kept: Out  # gram: rows of Z Z^T; panels: Z times what S has off its diagonal
    gathered: Out  # the embeddings of all ranks, if there are others


def outputs(x: Arguments) -> Outputs:
    (rows, d), views = x.z_a.shape, 1 if x.z_b is None else 2
    of_all = (views, rows * distributed.size(x.group), d) if x.group and _route(x) == "gram" else (0,)
    # In Triton the cheaper route is always the same.
    kept = (views, rows, kept_width(x._replace(route=_route(x)) if x.backend == "triton" else x))
    return Outputs(Out(()), Out((views, 3, d)), Out(kept if any(x.needs_grad) else (0,)), Out(of_all, x.z_a.dtype))


def reference(x: Arguments) -> tuple[Tensor]:
    """loss [], the maths as it is written: float32 (float64 for float64) around matmuls in operand_dtype"""
    wide = torch.promote_types(x.z_a.dtype, torch.float32)
    n, d = x.z_a.shape
    views = [z.to(wide) for z in (x.z_a, x.z_b) if z is not None]
    loss = views[0].new_zeros(())
    for z in views:
        # From the first row on: where rows are nearly equal, a rounded mean is as far off as they are apart.
        near = z - z[0].detach()
        centred = near - near.mean(0)
        var = centred.square().sum(0) / (n - 1)
        # The root's slope at 0 is infinite; a constant column's standard deviation has 0 among its subgradients.
        std = (var + x.eps).clamp(min=torch.finfo(wide).tiny).sqrt()
        operand = centred.to(x.operand_dtype)
        cov = (operand.t() @ operand).to(wide) / (n - 1)
        off_diagonal = cov - torch.diag(cov.diagonal())
        loss = loss + x.variance * F.relu(1 - std).mean() / 2 + x.covariance * off_diagonal.square().sum() / d
    if len(views) == 2:
        loss = loss + x.invariance * (views[0] - views[1]).square().mean()
    return (loss,)


def cheaper_route(n: int, d: int, backend: str | None = None) -> str:
    """The cheaper of two exact ways, for each view: 3 N^2 D FLOP by a Gram matrix, 3 N D^2 by panels of Z^T Z.

    On a GPU panels: whether a Gram matrix keeps its digits is known there, and not waited for.
    """
    return "gram" if backend != "triton" and n < d else "panels"


def _route(x: Arguments) -> str:
    return x.route or cheaper_route(x.z_a.shape[0] * distributed.size(x.group), x.z_a.shape[1], x.backend)


def _check_arguments(x: Arguments) -> None:
    check_batch("vicreg", x)
    weights = {"invariance": x.invariance, "variance": x.variance, "covariance": x.covariance}
    _check.non_negative("vicreg", **weights, eps=x.eps)
    _check.choice("vicreg", "route", x.route, (*ROUTES, ""))
    if x.z_b is None and any(x.needs_grad[1:]):
        _check.bad_value("vicreg", "needs_grad", "no gradient of a view that is not there", x.needs_grad)


_forward, _backward = by_route("vicreg", _route)
_run = register(
    "vicreg",
    Arguments,
    outputs,
    reference=reference,
    check=_check_arguments,
    gradients=("z_a", "z_b"),
    forward=_forward,
    backward=_backward,
)


@distributed.in_step
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
        eps: added to the variances; at least 0. With 0, a constant column has no gradient from its variance.
        route: "gram" goes by [N, N] matrices, 6 N^2 D FLOP for two views; "panels" by Z^T Z in parts, 6 N D^2 (8 on a
            GPU or with a group). The cheaper if None. A view whose variance sits in few columns takes panels anyway, to
            keep its digits; but a GPU is not waited for to find out: None is "panels" there, and "gram" exact for
            variances of one size.
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies, N / W rows on each: the loss is
            that of all N rows, the same on every rank, and so must be what is built on it. Gradients are W times the
            rank's share, which DDP's averaging makes those of the whole batch.
        backend: "cpu", "triton" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss, 0-d, in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; other shapes or options on other ranks, or an error there (on a GPU some ranks notice shapes at
            their next call, and have NaN until then, and numbers and errors not at all).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Bardes et al., VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning,
    arXiv:2105.04906, Eq. 6, with the weights' shares of the authors' code; ||Z^T Z|| = ||Z Z^T||.
    """
    if route is not None:
        _check.choice("vicreg", "route", route, ROUTES)
    group = distributed.name("vicreg", group)
    x = Arguments(z_a, z_b, invariance, variance, covariance, eps, route or "", group)
    loss: Tensor = _run(x, backend)[0]
    return loss
