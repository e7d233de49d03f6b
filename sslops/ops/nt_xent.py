"""NT-Xent, the loss of SimCLR: every embedding must find its other view among all 2N."""

from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import distributed
from .._check import Of
from .._contrastive import check_options, metrics, reduce
from .._library import Out, register
from ..backend import kernel


class Arguments(NamedTuple):
    z0: Annotated[Tensor, Of("N D", spread=True)]
    z1: Annotated[Tensor, Of("N D", like="z0", spread=True)]
    temperature: float | Tensor
    normalize: bool
    count_exceeding: bool  # whether to count the negatives that exceed a positive
    group: str
    shared: bool  # the losses of all ranks have the same gradient on all of them; else each knows that of its own
    operand_dtype: torch.dtype = torch.float32
    backend: str = ""


class Outputs(NamedTuple):
    """Of all ranks. s_ij = <z_i, z_j>, the rows unit if normalize and rounded to operand_dtype."""

    losses: Out
    logged: Out  # the positive's s, of rounded rows or not, and how many negatives exceed it, if that is to be counted
    inv_norm: Out  # 1 without normalize
    stats: Out  # m_i, any maximum that keeps exp((s_ij - m_i) / tau) in range; 1 / r_i, their sum over all j != i; the
    # negatives' share of r_i
    views: Out  # the embeddings of all ranks, if there are others


def outputs(x: Arguments) -> Outputs:
    n, d = x.z0.shape[0] * distributed.size(x.group), x.z0.shape[1]
    return Outputs(
        losses=Out((2 * n,)),
        logged=Out((2 if x.count_exceeding else 0, 2 * n)),
        inv_norm=Out((2 * n,)),
        stats=Out((3, 2 * n)),
        views=Out((2, n, d) if x.group else (0,), x.z0.dtype),
    )


def reference(x: Arguments) -> tuple[Tensor, Tensor]:
    """losses [2N] and what is logged: the maths as it is written, float32 (float64 for float64) around a matmul in
    operand_dtype.
    """
    n = len(x.z0)
    wide = torch.promote_types(x.z0.dtype, torch.float32)
    z = torch.cat([x.z0.to(wide), x.z1.to(wide)])
    if x.normalize:
        z = F.normalize(z)
    operand = z.to(x.operand_dtype)
    similarity = (operand @ operand.t()).to(wide)
    rows = torch.arange(2 * n, device=z.device)
    logged = z.new_empty(0, 2 * n)
    if x.count_exceeding:
        positive = similarity.detach()[rows, rows.roll(n)]
        exceeding = (similarity > positive[:, None]).fill_diagonal_(False).sum(1)
        logged = torch.stack([positive, exceeding.to(wide)])
    logits = similarity / x.temperature
    del similarity
    logits.fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, rows.roll(n), reduction="none"), logged


# A kernel with a distributed form also takes a Part: of its examples it gives the losses, what is logged and the stats
# [.., 2B], or from those of all the gradients [B, D].
def _forward(x: Arguments) -> tuple[Tensor, ...]:
    run = kernel(x.backend, "nt_xent").forward
    if not x.group:
        return run(x)
    views = distributed.gather_views([x.z0, x.z1], x.group)
    part = distributed.part(x.group, len(x.z0))
    losses, logged, inv_norm, stats = run(x._replace(z0=views[0], z1=views[1]), part)
    rows = torch.cat([losses[None], stats, logged]).unflatten(1, (2, -1))
    losses, stats, logged = distributed.all_gather(rows, x.group, 2).flatten(1).split([1, 3, len(logged)])
    return losses[0].clone(), logged.clone(), inv_norm, stats.clone(), views


def _backward(grad: Tensor, x: Arguments, *saved: Tensor) -> tuple[Tensor, ...]:
    _, inv_norm, stats, views = saved
    run = kernel(x.backend, "nt_xent").backward
    if not x.group:
        return run(grad, x, inv_norm, stats)
    if x.shared:
        grad = grad * distributed.size(x.group)
    else:
        own = distributed.own_rows(grad, x.group, parts=2)
        grad = distributed.all_gather(own.view(2, -1), x.group, 1).view(-1)
    part = distributed.part(x.group, len(x.z0))
    return run(grad, x._replace(z0=views[0], z1=views[1]), inv_norm, stats, part)


_run = register(
    "nt_xent",
    Arguments,
    outputs,
    reference=reference,
    gradients=("z0", "z1", "temperature"),
    forward=_forward,
    backward=_backward,
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
    check_options("nt_xent", normalize, reduction, return_metrics)
    group = distributed.name("nt_xent", group)
    shared = reduction != "none"
    x = Arguments(z0, z1, temperature, normalize, count_exceeding=return_metrics, group=group, shared=shared)
    losses, logged, *_ = _run(x, backend)
    loss = reduce(losses, reduction, group, parts=2)
    return (loss, metrics(*logged)) if return_metrics else loss
