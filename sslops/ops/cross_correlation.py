"""The cross-correlation matrix of two views, to look at or to build a loss on."""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .. import _check, distributed
from .._check import Of
from .._columns import check_batch, correlation, own_part
from .._library import Out, register
from ..backend import kernel


class Arguments(NamedTuple):
    z_a: Annotated[Tensor, Of("N D", spread=True)]
    z_b: Annotated[Tensor, Of("N D", like="z_a", spread=True)]
    eps: float
    group: str
    synced: bool  # a group's columns are normalised by statistics of all rows, else each rank's rows by their own
    operand_dtype: torch.dtype = torch.float32
    needs_grad: list[bool] = []  # noqa: RUF012
    backend: str = ""


def outputs(x: Arguments) -> Out:
    return Out((x.z_a.shape[1], x.z_a.shape[1]))


def reference(x: Arguments) -> Tensor:
    return correlation(x)


def _check_arguments(x: Arguments) -> None:
    check_batch("cross_correlation", x)
    _check.positive("cross_correlation", eps=x.eps)


def _forward(x: Arguments) -> Tensor:
    c: Tensor = kernel(x.backend, "cross_correlation").forward(x, *own_part(x))
    return c


def _backward(grad: Tensor, x: Arguments) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = kernel(x.backend, "cross_correlation").backward(grad, x, *own_part(x))
    return gradients


_run = register(
    "cross_correlation",
    Arguments,
    outputs,
    reference=reference,
    check=_check_arguments,
    gradients=("z_a", "z_b"),
    forward=_forward,
    backward=_backward,
)


@distributed.in_step
def cross_correlation(
    z_a: Tensor,
    z_b: Tensor,
    *,
    eps: float = 1e-5,
    group: distributed.Group = None,
    synced: bool = True,
    backend: str | None = None,
) -> Tensor:
    """C = A^T B / N, A and B the views batch-normalised over N (biased variance, no affine part).

    Args:
        z_a, z_b: two views, [N, D] each, N at least 2; float32, float16, bfloat16 or float64 (float64 runs the eager
            reference). Under autocast the matmul operands have its dtype.
        eps: added to the variances, as F.batch_norm does; positive.
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies, N / W rows on each: C is
            that of all N rows, the same on every rank, and so must be what is built on it. Gradients are W times the
            rank's share, which DDP's averaging makes those of the whole batch.
        synced: whether a group's columns are normalised by statistics of all rows, as the authors' SyncBatchNorm does,
            or each rank's rows by their own (synced=False, N / W at least 2); nothing without a group.
        backend: "cpu", "triton" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        C [D, D] in float32 (float64 for float64 input), with gradients to both views. Row i belongs to z_a's column i.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; other shapes or options on other ranks, or an error there (on a GPU some ranks notice shapes at
            their next call, and have NaN until then, and numbers and errors not at all).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, arXiv:2103.03230, Eq. 2.
    """
    _check.flag("cross_correlation", "synced", synced)
    group = distributed.name("cross_correlation", group)
    c: Tensor = _run(Arguments(z_a, z_b, eps, group, synced), backend)
    return c
