"""SupCon: every embedding must find all others of its class among those of the whole batch."""

from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, distributed
from .._check import Of
from .._contrastive import IDS, by_views, check_options, classes, reduce
from .._library import Out, register

WHERE = ("out", "in")


class Arguments(NamedTuple):
    z: Annotated[Tensor, Of("...", spread=True)]  # [M, D] or [V, N, D]
    labels: Annotated[Tensor, Of("N", IDS, spread=True)]  # [M] or [N]
    temperature: float | Tensor
    normalize: bool
    where: str
    group: str
    shared: bool  # the losses of all ranks have the same gradient on all of them; else each knows that of its own
    operand_dtype: torch.dtype = torch.float32
    backend: str = ""


class Outputs(NamedTuple):
    """Of all ranks, view by view. s_ij = <z_i, z_j>, the rows unit if normalize and rounded to operand_dtype."""

    losses: Out
    positives: Out  # how many a row has
    inv_norm: Out  # 1 without normalize
    stats: (
        Out  # m_i, any number that keeps exp((s_ij - m_i) / tau) in range; 1 / r_i, their sum over j != i, 0 of a row
    )
    # without a positive; for "in" the same over its positives, for "out" 0 and one over their number
    views: Out  # the embeddings of all ranks, if there are others


def _sizes(x: Arguments) -> tuple[int, int, int]:
    """V, N, D; [M, D] is one view"""
    return (x.z.shape[:-2].numel(), *x.z.shape[-2:])


def outputs(x: Arguments) -> Outputs:
    v, own, _ = _sizes(x)
    m = v * own * distributed.size(x.group)
    *views, _, d = x.z.shape
    return Outputs(
        losses=Out((m,)),
        positives=Out((1, m)),
        inv_norm=Out((m,)),
        stats=Out((4, m)),
        views=Out((*views, own * distributed.size(x.group), d) if x.group else (0,), x.z.dtype),
    )


def _check_views(x: Arguments) -> None:
    if x.z.dim() not in (2, 3):
        _check.bad_value("supcon", "z", "shape [M, D] or [V, N, D]", list(x.z.shape))
    if not _sizes(x)[0]:
        _check.bad_value("supcon", "z", "at least one view [V, N, D]", list(x.z.shape))
    if x.labels.shape != x.z.shape[-2:-1]:
        _check.bad_value("supcon", "labels", f"shape {list(x.z.shape[-2:-1])}", list(x.labels.shape))
    _check.choice("supcon", "where", x.where, WHERE)


def reference(x: Arguments) -> tuple[Tensor, Tensor]:
    """losses and positives [V N]: the maths as it is written, float32 (float64 for float64) around a matmul in
    operand_dtype.
    """
    v, n, _ = _sizes(x)
    z = x.z.flatten(0, -2).to(torch.promote_types(x.z.dtype, torch.float32))
    if x.normalize:
        z = F.normalize(z)
    operand = z.to(x.operand_dtype)
    logits = (operand @ operand.t()).to(z.dtype) / x.temperature
    logits.fill_diagonal_(-torch.inf)
    example, labels = torch.arange(v * n, device=z.device) % max(n, 1), x.labels.repeat(v)
    same = ((labels[:, None] == labels) & (labels >= 0)) | (example[:, None] == example)
    same.fill_diagonal_(False)
    positives = same.sum(1).to(z.dtype)
    alone = (positives == 0)[:, None]
    logits, same = logits.masked_fill(alone, 0), same | alone  # 0 then, and no gradient
    count = same.sum(1)
    if x.where == "out":
        losses = -logits.log_softmax(1).masked_fill(~same, 0).sum(1) / count
    else:
        losses = logits.logsumexp(1) - logits.masked_fill(~same, -torch.inf).logsumexp(1) + count.log()
    return losses.masked_fill(alone[:, 0], 0), positives[None]


def _to_kernel(x: Arguments, views: Tensor | None = None) -> Arguments:
    """The arguments of a kernel: labels as classes, with a group those and the embeddings of all ranks"""
    if views is None:
        return x._replace(labels=classes(x.labels))
    return x._replace(z=views, labels=classes(distributed.all_gather(x.labels, x.group)))


def _gather(x: Arguments) -> Tensor:
    return distributed.all_gather(x.z, x.group, x.z.dim() - 2)


_forward, _backward = by_views("supcon", _sizes, _gather, _to_kernel)
_run = register(
    "supcon",
    Arguments,
    outputs,
    reference=reference,
    check=_check_views,
    gradients=("z", "temperature"),
    forward=_forward,
    backward=_backward,
)


class SupConMetrics(NamedTuple):
    """0-d tensors without a gradient: they can be logged later, without a synchronisation."""

    without_positive: Tensor  # share of the rows that have none: their loss is 0
    positives: Tensor  # how many a row has, the mean over all


@distributed.in_step
def supcon(
    z: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    where: str = "out",
    reduction: str = "mean",
    return_metrics: bool = False,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Any:
    """Supervised contrastive loss: a cross entropy with several positives, all other rows of the same label.

    With P(i) the rows of i's label but for i, and p_ij the softmax over j != i of <z_i, z_j> / temperature, row i's
    loss is the mean over P(i) of -log p_ij ("out", outside the logarithm), or -log of the mean over P(i) of p_ij
    ("in"). A row without a positive has loss 0 and is one of those that a mean is over. Memory is linear: no [M, M]
    matrix.

    Args:
        z: [M, D], or V views [V, N, D] of N examples; float32, float16, bfloat16 or float64 (float64 runs the eager
            reference). Under autocast the matmul operands have its dtype.
        labels: int64 or int32, [M] or [N]. A label below 0 is none: such an example's other views are its only
            positives.
        temperature: a positive number, or a 0-d tensor on the embeddings' device, which gets its gradient and is not
            checked (the fused backends give NaN if it is not positive). A schedule inside a compiled step should be a
            tensor: a number that changes recompiles.
        normalize: scale every row to unit length first (F.normalize, eps 1e-12).
        where: "out", which the paper recommends, or "in": where the mean over the positives is.
        reduction: "mean" or "sum" over all rows, or "none": the losses [M] or [V, N].
        return_metrics: return (loss, SupConMetrics): the share of rows without a positive, and the mean number of them.
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies, M / W rows or N / W examples on
            each: positives and negatives come from all of them. A mean or a sum is that of all rows, and so are the
            metrics, the same on every rank, and so must be what is built on it; "none" gives the rank's own losses.
            Gradients, the temperature's too, are W times the rank's share, which DDP's averaging makes those of the
            whole batch.
        backend: "cpu" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss in float32 (float64 for float64 input): 0-d, or the losses for reduction="none". NaN for the mean of no
        rows. With return_metrics, the pair.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; other shapes or options on other ranks, or an error there (on a GPU some ranks notice shapes at
            their next call, and have NaN until then, and numbers and errors not at all).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Khosla et al., Supervised Contrastive Learning, arXiv:2004.11362, Eq. 2 and 3.
    """
    check_options("supcon", normalize, reduction, return_metrics)
    group = distributed.name("supcon", group)
    shared = reduction != "none"
    losses, positives, *_ = _run(Arguments(z, labels, temperature, normalize, where, group, shared), backend)
    loss = reduce(losses, reduction, group, parts=z.shape[:-2].numel())
    if not shared:
        loss = loss.view(z.shape[:-1])
    if not return_metrics:
        return loss
    return loss, SupConMetrics((positives == 0).to(positives.dtype).mean(), positives.mean())
