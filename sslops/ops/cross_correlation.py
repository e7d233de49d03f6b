"""The cross-correlation matrix of two views, to look at or to build a loss on."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _check, distributed
from .._columns import batch_norm
from .._library_old import register
from .._precision import compute_dtype
from ..backend import is_distributed, kernel, resolve


def reference(z_a: Tensor, z_b: Tensor, eps: float, operand_dtype: torch.dtype, batches: int = 1) -> Tensor:
    """C [D, D], the maths as it is written: float32 (float64 for float64) around a matmul in operand_dtype

    batches: of equal size, one after the other in the views, each normalised by itself.
    """
    wide = torch.promote_types(z_a.dtype, torch.float32)
    a, b = (batch_norm(z.to(wide), eps, batches) for z in (z_a, z_b))
    return (a.to(operand_dtype).t() @ b.to(operand_dtype)).to(wide) / len(z_a)


class _Arguments(NamedTuple):
    z_a: Tensor
    z_b: Tensor
    eps: float
    operand_dtype: torch.dtype
    group: str
    synced: bool
    backend: str


def _kernel_arguments(x: _Arguments) -> tuple[Any, ...]:
    _check.embeddings("cross_correlation", z_a=x.z_a, z_b=x.z_b)
    _check.batch("cross_correlation", "z_a", x.z_a, distributed.size(x.group) if x.synced else 1)
    return x.z_a.contiguous(), x.z_b.contiguous(), x.eps, x.operand_dtype


def _forward(x: _Arguments) -> Tensor:
    c: Tensor = kernel(x.backend, "cross_correlation").forward(
        *_kernel_arguments(x), **distributed.spread(x.group, synced=x.synced)
    )
    return c


def _forward_fake(x: _Arguments) -> Tensor:
    d = x.z_a.shape[1]
    return x.z_a.new_empty((d, d), dtype=torch.float32)


def _backward(grad: Tensor, x: _Arguments) -> tuple[Tensor, ...]:
    d = x.z_a.shape[1]
    _check.scratch("cross_correlation", x.z_a.device, grad=(grad, (d, d)))
    gradients: tuple[Tensor, ...] = kernel(x.backend, "cross_correlation").backward(
        grad.contiguous(), *_kernel_arguments(x), **distributed.spread(x.group, synced=x.synced)
    )
    return gradients


def _backward_fake(grad: Tensor, x: _Arguments) -> tuple[Tensor, ...]:
    return x.z_a.new_empty(x.z_a.shape), x.z_b.new_empty(x.z_b.shape)


register(
    "cross_correlation",
    _Arguments,
    gradients=("z_a", "z_b"),
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
)


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
            initialised; views of other shapes on other ranks (on a GPU some ranks notice at their next call, and have
            NaN until then).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, arXiv:2103.03230, Eq. 2.
    """
    _check.embeddings("cross_correlation", z_a=z_a, z_b=z_b)
    _check.flag("cross_correlation", "synced", synced)
    group = distributed.name("cross_correlation", group)
    ranks = distributed.size(group)
    _check.batch("cross_correlation", "z_a", z_a, ranks if synced else 1)
    _check.positive("cross_correlation", eps=eps)
    operand_dtype = compute_dtype(z_a)
    backend = resolve("cross_correlation", z_a.device, z_a.dtype, backend, "" if synced else group)
    if group and not is_distributed(backend, "cross_correlation"):
        z_a, z_b = distributed.gathered("cross_correlation", group, z_a, z_b)
        group = ""
    if backend == "eager":
        return reference(z_a, z_b, eps, operand_dtype, 1 if synced else ranks)
    c: Tensor = torch.ops.sslops.cross_correlation(z_a, z_b, eps, operand_dtype, group, synced, backend)
    return c
