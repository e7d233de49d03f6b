"""NT-Xent, the loss of SimCLR: every embedding must find its other view among all 2N."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._library import register
from .._precision import compute_dtype
from ..backend import kernel, resolve


def reference(
    z0: Tensor, z1: Tensor, temperature: float | Tensor, normalize: bool, operand_dtype: torch.dtype
) -> Tensor:
    """losses [2N], the maths as it is written: float32 (float64 for float64) around a matmul in operand_dtype"""
    n = len(z0)
    wide = torch.promote_types(z0.dtype, torch.float32)
    z = torch.cat([z0.to(wide), z1.to(wide)])
    if normalize:
        z = F.normalize(z)
    operand = z.to(operand_dtype)
    logits = (operand @ operand.t()).to(wide) / temperature
    logits.fill_diagonal_(float("-inf"))
    positives = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(logits, positives, reduction="none")


class _Arguments(NamedTuple):
    z0: Tensor
    z1: Tensor
    temperature: Tensor | None
    tau: float
    normalize: bool
    operand_dtype: torch.dtype
    backend: str


def _kernel_arguments(x: _Arguments) -> tuple[Any, ...]:
    _check.embeddings("nt_xent", z0=x.z0, z1=x.z1)
    if x.temperature is not None:
        _check.scratch("nt_xent", x.z0.device, temperature=(x.temperature, ()))
    tau = x.tau if x.temperature is None else x.temperature
    return x.z0.contiguous(), x.z1.contiguous(), tau, x.normalize, x.operand_dtype


def _forward(x: _Arguments) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = kernel(x.backend, "nt_xent").forward(*_kernel_arguments(x))
    return outputs


def _forward_fake(x: _Arguments) -> tuple[Tensor, ...]:
    m = 2 * x.z0.shape[0]
    losses = x.z0.new_empty(m, dtype=torch.float32)
    return losses, torch.empty_like(losses), losses.new_empty(3, m)


def _backward(grad: Tensor, x: _Arguments, inv_norm: Tensor, stats: Tensor) -> tuple[Tensor, ...]:
    m = 2 * len(x.z0)
    _check.scratch("nt_xent", x.z0.device, grad=(grad, (m,)), inv_norm=(inv_norm, (m,)), stats=(stats, (3, m)))
    gradients: tuple[Tensor, ...] = kernel(x.backend, "nt_xent").backward(
        grad.contiguous(), *_kernel_arguments(x), inv_norm.contiguous(), stats.contiguous()
    )
    return gradients


def _backward_fake(grad: Tensor, x: _Arguments, *_: Tensor) -> tuple[Tensor, ...]:
    return x.z0.new_empty(x.z0.shape), x.z1.new_empty(x.z1.shape), grad.new_empty(())


register(
    "nt_xent",
    _Arguments,
    saved=("inv_norm", "stats"),
    gradients=("z0", "z1", "temperature"),
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
)


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Normalised temperature-scaled cross entropy over 2N embeddings, the loss of SimCLR.

    With z = [z0; z1] and p(i) the other view of i, row i's loss is -log softmax over j != i of
    <z_i, z_j> / temperature, at j = p(i). Memory is linear in N: no [2N, 2N] matrix.

    Args:
        z0, z1: two views, [N, D] each, row k of one being the positive of row k of the other; float32, float16,
            bfloat16 or float64 (float64 runs the eager reference). Under autocast the matmul operands have its dtype.
        temperature: a positive number, or a 0-d tensor on the embeddings' device, which gets its gradient and is not
            checked (the fused backends give NaN if it is not positive). A schedule inside a compiled step should be a
            tensor: a number that changes recompiles.
        normalize: scale every row to unit length first (F.normalize, eps 1e-12).
        reduction: "mean" or "sum" over the 2N rows, or "none": the losses [2N], rows of z0 first.
        backend: "cpu", "cuda", "triton" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss in float32 (float64 for float64 input): 0-d, or [2N] for reduction="none". NaN for the mean of no rows.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value.
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, arXiv:2002.05709, Eq. 1.
    """
    _check.embeddings("nt_xent", z0=z0, z1=z1)
    _check.temperature("nt_xent", temperature, z0.device)
    _check.flag("nt_xent", "normalize", normalize)
    _check.choice("nt_xent", "reduction", reduction, ("mean", "sum", "none"))
    operand_dtype = compute_dtype(z0)
    backend = resolve("nt_xent", z0.device, z0.dtype, backend)
    if backend == "eager":
        losses = reference(z0, z1, temperature, normalize, operand_dtype)
    elif isinstance(temperature, Tensor):
        losses, _, _ = torch.ops.sslops.nt_xent(z0, z1, temperature.float(), 0.0, normalize, operand_dtype, backend)
    else:
        losses, _, _ = torch.ops.sslops.nt_xent(z0, z1, None, temperature, normalize, operand_dtype, backend)
    if reduction == "mean":
        return losses.mean()
    return losses.sum() if reduction == "sum" else losses
