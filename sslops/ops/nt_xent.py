"""NT-Xent, the loss of SimCLR: every embedding must find its other view among all 2N."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, distributed
from .._contrastive import check_options, metrics, reduce
from .._library import register
from .._precision import compute_dtype
from ..backend import kernel, resolve


def reference(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor,
    normalize: bool,
    operand_dtype: torch.dtype,
    count_exceeding: bool = True,
) -> tuple[Tensor, ...]:
    """losses [2N] and, if count_exceeding, the positives' similarities and how many negatives exceed them, [2N] each:
    the maths as it is written, float32 (float64 for float64) around a matmul in operand_dtype.
    """
    n = len(z0)
    wide = torch.promote_types(z0.dtype, torch.float32)
    z = torch.cat([z0.to(wide), z1.to(wide)])
    if normalize:
        z = F.normalize(z)
    operand = z.to(operand_dtype)
    similarity = (operand @ operand.t()).to(wide)
    rows = torch.arange(2 * n, device=z.device)
    logged: tuple[Tensor, ...] = ()
    if count_exceeding:
        positive = similarity.detach()[rows, rows.roll(n)]
        exceeding = (similarity > positive[:, None]).fill_diagonal_(False).sum(1)
        logged = (positive, exceeding.to(wide))
    logits = similarity / temperature
    del similarity
    logits.fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, rows.roll(n), reduction="none"), *logged


class _Arguments(NamedTuple):
    z0: Tensor
    z1: Tensor
    temperature: Tensor | None
    tau: float
    normalize: bool
    group: str
    shared: bool  # the losses of all ranks have the same gradient on all of them; else each knows that of its own
    operand_dtype: torch.dtype
    count_exceeding: bool  # whether to count the negatives that exceed a positive
    backend: str


# A backend's kernel, kernels/<backend>/nt_xent.py, has two functions. `common` stands for
#   z0, z1 (contiguous), temperature (float | Tensor), normalize, operand_dtype.
# s_ij = <z_i, z_j>, the rows unit if normalize and rounded to operand_dtype.
#
# forward(*common, count_exceeding) -> losses [2N], inv_norm [2N], stats [3, 2N] or, if count_exceeding, [5, 2N]:
#   0: m_i, any maximum that keeps exp((s_ij - m_i) / tau) in range  1: 1 / r_i, their sum over all j != i
#   2: share of the negatives in r_i     3: the positive's s, of rounded rows or not     4: how many negatives exceed it
# backward(grad [2N], *common, inv_norm, stats) -> dz0, dz1, dtemperature
# own=slice: of the examples of a slice only, losses and stats [.., 2B], gradients [B, D] from all rows' grad and stats.
def _options(x: _Arguments) -> tuple[Any, ...]:
    _check.embeddings("nt_xent", z0=x.z0, z1=x.z1)
    if x.temperature is not None:
        _check.scratch("nt_xent", x.z0.device, temperature=(x.temperature, ()))
    return x.tau if x.temperature is None else x.temperature, x.normalize, x.operand_dtype


def _own(x: _Arguments) -> slice:
    first = distributed.rank(x.group) * len(x.z0)
    return slice(first, first + len(x.z0))


def _forward(x: _Arguments) -> tuple[Tensor, ...]:
    options, run = (*_options(x), x.count_exceeding), kernel(x.backend, "nt_xent").forward
    if not x.group:
        losses, inv_norm, stats = run(x.z0.contiguous(), x.z1.contiguous(), *options)
        return losses, inv_norm, stats, x.z0.new_empty(0)
    views = distributed.gather_views([x.z0, x.z1], x.group)
    losses, inv_norm, stats = run(views[0], views[1], *options, own=_own(x))
    rows = torch.cat([losses[None], stats]).unflatten(1, (2, -1))
    losses, *stats = distributed.all_gather(rows, x.group, 2).flatten(1)
    return losses.clone(), inv_norm, torch.stack(stats), views


def _shapes(x: _Arguments) -> tuple[tuple[int, ...], ...]:
    """Of the losses and of what is saved: of all ranks, and their views if there are others"""
    n, d = x.z0.shape[0] * distributed.size(x.group), x.z0.shape[1]
    return (2 * n,), (2 * n,), (5 if x.count_exceeding else 3, 2 * n), (2, n, d) if x.group else (0,)


def _forward_fake(x: _Arguments) -> tuple[Tensor, ...]:
    *float32, views = _shapes(x)
    return *(x.z0.new_empty(shape, dtype=torch.float32) for shape in float32), x.z0.new_empty(views)


def _backward(grad: Tensor, x: _Arguments, inv_norm: Tensor, stats: Tensor, views: Tensor) -> tuple[Tensor, ...]:
    options, run = _options(x), kernel(x.backend, "nt_xent").backward
    shapes = _shapes(x)
    saved = {"grad": (grad, shapes[0]), "inv_norm": (inv_norm, shapes[1]), "stats": (stats, shapes[2])}
    _check.scratch("nt_xent", x.z0.device, **saved)
    _check.like("nt_xent", "views", views, x.z0, shapes[3])
    statistics = inv_norm.contiguous(), stats.contiguous()
    gradients: tuple[Tensor, ...]
    if not x.group:
        gradients = run(grad.contiguous(), x.z0.contiguous(), x.z1.contiguous(), *options, *statistics)
        return gradients
    if x.shared:
        grad = grad * distributed.size(x.group)
    else:
        own = distributed.own_rows(grad, x.group, parts=2)
        grad = distributed.all_gather(own.view(2, -1), x.group, 1).view(-1)
    z0, z1 = views.contiguous()
    gradients = run(grad.contiguous(), z0, z1, *options, *statistics, own=_own(x))
    return gradients


def _backward_fake(grad: Tensor, x: _Arguments, *_: Tensor) -> tuple[Tensor, ...]:
    return x.z0.new_empty(x.z0.shape), x.z1.new_empty(x.z1.shape), grad.new_empty(())


register(
    "nt_xent",
    _Arguments,
    saved=("inv_norm", "stats", "views"),
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
    return_metrics: bool = False,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Any:
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
        return_metrics: return (loss, Metrics): top-1 and top-5 accuracy of the positive among all other rows, and its
            mean similarity. In Triton a pass of its own, 2 M^2 D FLOP for M = 2N.
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies, N / W rows on each: the
            negatives come from all of them. A mean or a sum is that of all rows, and so are the metrics, the same on
            every rank, and so must be what is built on it; "none" gives the rank's own losses. Gradients, the
            temperature's too, are W times the rank's share, which DDP's averaging makes those of the whole batch.
            Backward communicates only after "none".
        backend: "cpu", "triton" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss in float32 (float64 for float64 input): 0-d, or [2N] for reduction="none". NaN for the mean of no rows.
        With return_metrics, the pair.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; embeddings of other shapes on other ranks (on a GPU some ranks notice at their next call, and
            have NaN until then).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, arXiv:2002.05709, Eq. 1.
    """
    _check.embeddings("nt_xent", z0=z0, z1=z1)
    _check.temperature("nt_xent", temperature, z0.device)
    check_options("nt_xent", normalize, reduction, return_metrics)
    group = distributed.name("nt_xent", group)
    operand_dtype = compute_dtype(z0)
    backend = resolve("nt_xent", z0.device, z0.dtype, backend, group)
    if backend == "eager":
        z0, z1 = distributed.gathered("nt_xent", group, z0, z1)
        losses, *logged = reference(z0, z1, temperature, normalize, operand_dtype, return_metrics)
    else:
        tau = (temperature.float(), 0.0) if isinstance(temperature, Tensor) else (None, temperature)
        options = (normalize, group, reduction != "none", operand_dtype, return_metrics, backend)
        losses, _, stats, _ = torch.ops.sslops.nt_xent(z0, z1, *tau, *options)
        logged = stats[3:].unbind()
    loss = reduce(losses, reduction, group, parts=2)
    return (loss, metrics(*logged)) if return_metrics else loss
