"""The cross-correlation matrix of two views, to look at or to build a loss on."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._library import register
from .._precision import compute_dtype
from ..backend import kernel, resolve


def reference(z_a: Tensor, z_b: Tensor, eps: float, operand_dtype: torch.dtype) -> Tensor:
    """C [D, D], the maths as it is written: float32 (float64 for float64) around a matmul in operand_dtype"""
    wide = torch.promote_types(z_a.dtype, torch.float32)
    a, b = (F.batch_norm(z.to(wide), None, None, training=True, eps=eps) for z in (z_a, z_b))
    return (a.to(operand_dtype).t() @ b.to(operand_dtype)).to(wide) / len(z_a)


class _Arguments(NamedTuple):
    z_a: Tensor
    z_b: Tensor
    eps: float
    operand_dtype: torch.dtype
    backend: str


def _kernel_arguments(x: _Arguments) -> tuple[Any, ...]:
    _check.embeddings("cross_correlation", z_a=x.z_a, z_b=x.z_b)
    _check.batch("cross_correlation", "z_a", x.z_a)
    return x.z_a.contiguous(), x.z_b.contiguous(), x.eps, x.operand_dtype


def _forward(x: _Arguments) -> Tensor:
    c: Tensor = kernel(x.backend, "cross_correlation").forward(*_kernel_arguments(x))
    return c


def _forward_fake(x: _Arguments) -> Tensor:
    d = x.z_a.shape[1]
    return x.z_a.new_empty((d, d), dtype=torch.float32)


def _backward(grad: Tensor, x: _Arguments) -> tuple[Tensor, ...]:
    d = x.z_a.shape[1]
    _check.scratch("cross_correlation", x.z_a.device, grad=(grad, (d, d)))
    gradients: tuple[Tensor, ...] = kernel(x.backend, "cross_correlation").backward(
        grad.contiguous(), *_kernel_arguments(x)
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


def cross_correlation(z_a: Tensor, z_b: Tensor, *, eps: float = 1e-5, backend: str | None = None) -> Tensor:
    """C = A^T B / N, A and B the views batch-normalised over N (biased variance, no affine part).

    Args:
        z_a, z_b: two views, [N, D] each, N at least 2; float32, float16, bfloat16 or float64 (float64 runs the eager
            reference). Under autocast the matmul operands have its dtype.
        eps: added to the variances, as F.batch_norm does; positive.
        backend: "cpu" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        C [D, D] in float32 (float64 for float64 input), with gradients to both views. Row i belongs to z_a's column i.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value.
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Zbontar et al., Barlow Twins: Self-Supervised Learning via Redundancy Reduction, arXiv:2103.03230, Eq. 2.
    """
    _check.embeddings("cross_correlation", z_a=z_a, z_b=z_b)
    _check.batch("cross_correlation", "z_a", z_a)
    _check.positive("cross_correlation", eps=eps)
    operand_dtype = compute_dtype(z_a)
    backend = resolve("cross_correlation", z_a.device, z_a.dtype, backend)
    if backend == "eager":
        return reference(z_a, z_b, eps, operand_dtype)
    c: Tensor = torch.ops.sslops.cross_correlation(z_a, z_b, eps, operand_dtype, backend)
    return c
