"""Barlow Twins: the cross-correlation of two views should be the identity."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _check, distributed
from .._columns import batch_norm
from .._library_old import register
from .._precision import compute_dtype
from ..backend import is_distributed, kernel, resolve

ROUTES = ("gram", "panels")


def reference(
    z_a: Tensor, z_b: Tensor, lambd: float, eps: float, operand_dtype: torch.dtype, batches: int = 1
) -> Tensor:
    """loss [], the maths as it is written: float32 (float64 for float64) around a matmul in operand_dtype

    batches: of equal size, one after the other in the views, each normalised by itself.
    """
    wide = torch.promote_types(z_a.dtype, torch.float32)
    a, b = (batch_norm(z.to(wide), eps, batches) for z in (z_a, z_b))
    c = (a.to(operand_dtype).t() @ b.to(operand_dtype)).to(wide) / len(z_a)
    diagonal = c.diagonal()
    off_diagonal = c - torch.diag(diagonal)
    return (1 - diagonal).square().sum() + lambd * off_diagonal.square().sum()


def cheaper_route(n: int, d: int, backend: str | None = None) -> str:
    """The cheaper of two exact ways: 6 N^2 D FLOP by Gram matrices, which are symmetric, 6 N D^2 by panels of C."""
    return "gram" if n < d else "panels"


class _Arguments(NamedTuple):
    z_a: Tensor
    z_b: Tensor
    lambd: float
    eps: float
    operand_dtype: torch.dtype
    route: str
    needs_grad: bool
    group: str
    synced: bool
    backend: str


def _options(x: _Arguments) -> tuple[Any, ...]:
    _check.embeddings("barlow_twins", z_a=x.z_a, z_b=x.z_b)
    _check.batch("barlow_twins", "z_a", x.z_a, distributed.size(x.group) if x.synced else 1)
    _check.choice("barlow_twins", "route", x.route, ROUTES)
    return x.lambd, x.eps, x.operand_dtype, x.route


def _kept_shapes(x: _Arguments) -> tuple[tuple[int, ...], ...]:
    """Of what backward needs: the diagonal of C, the Grams or the gradients of A and B, the views of all ranks."""
    (rows, d), n = x.z_a.shape, x.z_a.shape[0] * distributed.size(x.group)
    if x.route == "panels":
        return (0,), (2, rows, d), (0,)
    return (d,), (2, rows, n), (2, n, d) if x.group else (0,)


def _forward(x: _Arguments) -> tuple[Tensor, ...]:
    options, z_a, z_b, views = _options(x), x.z_a.contiguous(), x.z_b.contiguous(), x.z_a.new_empty(0)
    if x.group and x.route == "gram":
        z_a, z_b = views = distributed.gather_views([x.z_a, x.z_b], x.group)
    outputs = kernel(x.backend, "barlow_twins").forward(
        z_a, z_b, *options, x.needs_grad, **distributed.spread(x.group, synced=x.synced)
    )
    return *outputs, views


def _forward_fake(x: _Arguments) -> tuple[Tensor, ...]:
    loss = x.z_a.new_empty((), dtype=torch.float32)
    diagonal, kept, views = _kept_shapes(x)
    return loss, loss.new_empty(diagonal), loss.new_empty(kept if x.needs_grad else (0,)), x.z_a.new_empty(views)


def _backward(grad: Tensor, x: _Arguments, diagonal: Tensor, kept: Tensor, views: Tensor) -> tuple[Tensor, ...]:
    options, z_a, z_b, shapes = _options(x), x.z_a.contiguous(), x.z_b.contiguous(), _kept_shapes(x)
    saved = {"grad": (grad, ()), "diagonal": (diagonal, shapes[0]), "kept": (kept, shapes[1])}
    _check.scratch("barlow_twins", x.z_a.device, **saved)
    _check.like("barlow_twins", "views", views, x.z_a, shapes[2])
    if len(views):
        z_a, z_b = views.contiguous()
    gradients: tuple[Tensor, ...] = kernel(x.backend, "barlow_twins").backward(
        grad * distributed.size(x.group),
        z_a,
        z_b,
        *options,
        diagonal.contiguous(),
        kept.contiguous(),
        **distributed.spread(x.group, synced=x.synced),
    )
    return gradients


def _backward_fake(grad: Tensor, x: _Arguments, *_: Tensor) -> tuple[Tensor, ...]:
    return x.z_a.new_empty(x.z_a.shape), x.z_b.new_empty(x.z_b.shape)


register(
    "barlow_twins",
    _Arguments,
    saved=("diagonal", "kept", "views"),
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
    group: distributed.Group = None,
    synced: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Barlow Twins' loss: (1 - C_ii)^2 summed over the diagonal, plus lambd C_ij^2 summed off it.

    C = A^T B / N is the cross-correlation of the two views, batch-normalised over N (biased variance, no affine part).
    The [D, D] matrix is never stored.

    Args:
        z_a, z_b: two views, [N, D] each, N at least 2; float32, float16, bfloat16 or float64 (float64 runs the eager
            reference). Under autocast the matmul operands have its dtype.
        lambd: weight of the off-diagonal terms, at least 0.
        scale: factor of the whole loss (0.024 in the authors' code, 0.1 or 0.025 in others).
        eps: added to the variances, as F.batch_norm does; positive.
        route: "gram" goes by two [N, N] matrices, 6 N^2 D FLOP; "panels" by rows of C, 6 N D^2 FLOP. The cheaper if
            None. (With a group "gram" is 8 N^2 D, but "panels" has to sum C over the ranks.) On the CPU, "gram" goes by
            panels after all where the diagonal holds nearly all of C (few columns alive); a GPU is not waited for to
            find out.
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies, N / W rows on each: the loss is
            that of all N rows, the same on every rank, and so must be what is built on it. Gradients are W times the
            rank's share, which DDP's averaging makes those of the whole batch.
        synced: whether a group's columns are normalised by statistics of all rows, as the authors' SyncBatchNorm does,
            or each rank's rows by their own (synced=False, N / W at least 2); nothing without a group.
        backend: "cpu", "triton" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss, 0-d, in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; views of other shapes on other ranks (on a GPU some ranks notice at their next call, and have
            NaN until then).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, arXiv:2103.03230, Eq. 1;
    the gram route is the identity ||A^T B||^2 = <A A^T, B B^T>.
    """
    _check.embeddings("barlow_twins", z_a=z_a, z_b=z_b)
    _check.flag("barlow_twins", "synced", synced)
    group = distributed.name("barlow_twins", group)
    ranks = distributed.size(group)
    _check.batch("barlow_twins", "z_a", z_a, ranks if synced else 1)
    _check.non_negative("barlow_twins", lambd=lambd, scale=scale)
    _check.positive("barlow_twins", eps=eps)
    if route is None:
        route = cheaper_route(len(z_a) * ranks, z_a.shape[1])
    _check.choice("barlow_twins", "route", route, ROUTES)
    operand_dtype = compute_dtype(z_a)
    backend = resolve("barlow_twins", z_a.device, z_a.dtype, backend, "" if synced else group)
    if group and not is_distributed(backend, "barlow_twins"):
        z_a, z_b = distributed.gathered("barlow_twins", group, z_a, z_b)
        group = ""
    if backend == "eager":
        loss = reference(z_a, z_b, lambd, eps, operand_dtype, 1 if synced else ranks)
    else:
        needs_grad = torch.is_grad_enabled() and (z_a.requires_grad or z_b.requires_grad)
        options = (lambd, eps, operand_dtype, route, needs_grad, group, synced, backend)
        loss = torch.ops.sslops.barlow_twins(z_a, z_b, *options)[0]
    return loss * scale
