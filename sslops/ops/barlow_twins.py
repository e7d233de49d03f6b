"""Barlow Twins: the cross-correlation of two views should be the identity."""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .. import _check, distributed
from .._check import Of
from .._columns import ROUTES, by_route, check_batch, correlation, kept_width, off_identity
from .._library import Out, register


class Arguments(NamedTuple):
    z_a: Annotated[Tensor, Of("N D", spread=True)]
    z_b: Annotated[Tensor, Of("N D", like="z_a", spread=True)]
    lambd: float
    eps: float
    route: str
    group: str
    synced: bool  # a group's columns are normalised by statistics of all rows, else each rank's rows by their own
    operand_dtype: torch.dtype = torch.float32
    needs_grad: list[bool] = []  # noqa: RUF012
    backend: str = ""


class Outputs(NamedTuple):
    """A, B: the views, normalised; C = A^T B / N."""

    loss: Out
    diagonal: Out  # what the gram route knows of C's; of a CPU that left it for the panels, the first is 2
    kept: Out  # gram: rows of A A^T and B B^T; panels: dL/dA, dL/dB
    views: Out  # the embeddings of all ranks, if there are others


def outputs(x: Arguments) -> Outputs:
    rows, d = x.z_a.shape
    views = (2, rows * distributed.size(x.group), d) if x.group and _route(x) == "gram" else (0,)
    kept = (2, rows, kept_width(x)) if any(x.needs_grad) else (0,)
    return Outputs(Out(()), Out((d,)), Out(kept), Out(views, x.z_a.dtype))


def reference(x: Arguments) -> tuple[Tensor]:
    """loss [], the maths as it is written"""
    return (off_identity(correlation(x), x.lambd),)


def cheaper_route(n: int, d: int, backend: str | None = None) -> str:
    """The cheaper of two exact ways: 6 N^2 D FLOP by Gram matrices, which are symmetric, 6 N D^2 by panels of C."""
    return "gram" if n < d else "panels"


def _route(x: Arguments) -> str:
    return x.route or cheaper_route(x.z_a.shape[0] * distributed.size(x.group), x.z_a.shape[1])


def _check_arguments(x: Arguments) -> None:
    check_batch("barlow_twins", x)
    _check.non_negative("barlow_twins", lambd=x.lambd)
    _check.positive("barlow_twins", eps=x.eps)
    _check.choice("barlow_twins", "route", x.route, (*ROUTES, ""))


_forward, _backward = by_route("barlow_twins", _route)
_run = register(
    "barlow_twins",
    Arguments,
    outputs,
    reference=reference,
    check=_check_arguments,
    gradients=("z_a", "z_b"),
    forward=_forward,
    backward=_backward,
)


@distributed.in_step
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
            initialised; other shapes or options on other ranks, or an error there (on a GPU some ranks notice shapes at
            their next call, and have NaN until then, and numbers and errors not at all).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, arXiv:2103.03230, Eq. 1;
    the gram route is the identity ||A^T B||^2 = <A A^T, B B^T>.
    """
    _check.flag("barlow_twins", "synced", synced)
    _check.non_negative("barlow_twins", scale=scale)
    if route is not None:
        _check.choice("barlow_twins", "route", route, ROUTES)
    group = distributed.name("barlow_twins", group)
    loss: Tensor = _run(Arguments(z_a, z_b, lambd, eps, route or "", group, synced), backend)[0]
    return loss * float(scale)
