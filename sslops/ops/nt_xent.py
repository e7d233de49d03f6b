"""NT-Xent, the loss of SimCLR: every embedding must find its other views among those of all examples."""

from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, distributed
from .._check import Of
from .._contrastive import (
    IDS,
    REDUCTIONS,
    by_views,
    check_options,
    classes,
    is_whole,
    metrics,
    of_whole,
    reduce,
    reduction_of_op,
)
from .._library import Out, register


class Arguments(NamedTuple):
    z0: Annotated[Tensor, Of("...", spread=True)]  # one view [N, D], or without z1 all of them [V, N, D]
    z1: Annotated[Tensor | None, Of("...", like="z0", spread=True)]
    query_ids: Annotated[Tensor | None, Of("N", IDS, spread=True)]
    positive_weights: Annotated[Tensor | None, Of("V N", spread=True, along=-1)]
    temperature: float | Tensor
    normalize: bool
    decoupled: bool
    count_exceeding: bool  # whether to count the negatives that exceed a positive
    group: str
    reduction: str  # if not "none", the losses of all ranks have the same gradient on all; else each knows its own's
    operand_dtype: torch.dtype = torch.float32
    backend: str = ""
    needs_grad: list[bool] = []  # noqa: RUF012


class Outputs(NamedTuple):
    """Of all ranks, view by view. s_ij = <z_i, z_j>, the rows unit if normalize and rounded to operand_dtype."""

    losses: Out
    logged: Out  # each positive's s, of rounded rows or not, and how many negatives exceed it, if that is to be counted
    inv_norm: Out  # 1 without normalize
    stats: Out  # m_i, any number that keeps exp((s_ij - m_i) / tau) in range; with r_ip their sum over the negatives j
    # of row i and its positive p, k views on, the mean of 1 / r_ip and, for k = 1 .., the negatives' share / (V - 1);
    # decoupled, r_ip has no p, and its weight stands for the share
    views: Out  # the embeddings of all ranks, if there are others
    dz0: Out  # these instead of inv_norm and stats where `losses` is their whole, a number
    dz1: Out
    dtemperature: Out


def _sizes(x: Arguments) -> tuple[int, int, int]:
    """V, N, D"""
    return (2, *x.z0.shape[-2:]) if x.z1 is not None else tuple(x.z0.shape)  # type: ignore[return-value]


def outputs(x: Arguments) -> Outputs:
    v, own, d = _sizes(x)
    n = own * distributed.size(x.group)
    of_z0, of_z1 = (tuple(each.shape) if each is not None else (0,) for each in (x.z0, x.z1))
    losses, *gradients = of_whole(x, (v * n,), of_z0, of_z1, ())
    return Outputs(
        losses,
        Out((2 * (v - 1) if x.count_exceeding else 0, v * n)),
        Out((0,) if is_whole(x) else (v * n,)),
        Out((0,) if is_whole(x) else (v + 1, v * n)),
        Out((v, n, d) if x.group else (0,), x.z0.dtype),
        *gradients,
    )


def _check_views(x: Arguments) -> None:
    _check.choice("nt_xent", "reduction", x.reduction, REDUCTIONS)
    if x.z0.dim() != (3 if x.z1 is None else 2):
        _check.bad_value("nt_xent", "z0", "shape [V, N, D] alone or [N, D] beside z1", list(x.z0.shape))
    if x.z1 is None and len(x.z0) < 2:
        _check.bad_value("nt_xent", "z0", "at least 2 views [V, N, D]", list(x.z0.shape))
    if x.query_ids is not None and x.query_ids.shape != x.z0.shape[-2:-1]:
        _check.bad_value("nt_xent", "query_ids", f"shape {list(x.z0.shape[-2:-1])}", list(x.query_ids.shape))
    if x.positive_weights is None:
        return
    if not x.decoupled:
        _check.bad_value("nt_xent", "positive_weights", "None, or decoupled=True beside them", "weights")
    if x.positive_weights.shape != _sizes(x)[:2]:
        shape = list(_sizes(x)[:2])
        _check.bad_value("nt_xent", "positive_weights", f"shape {shape}", list(x.positive_weights.shape))


def reference(x: Arguments) -> tuple[Tensor, Tensor]:
    """losses [V N] and what is logged: the maths as it is written, float32 (float64 for float64) around a matmul in
    operand_dtype.
    """
    v, n, _ = _sizes(x)
    wide = torch.promote_types(x.z0.dtype, torch.float32)
    z = torch.cat([view.to(wide) for view in (x.z0 if x.z1 is None else (x.z0, x.z1))])
    if x.normalize:
        z = F.normalize(z)
    operand = z.to(x.operand_dtype)
    similarity = (operand @ operand.t()).to(wide)
    rows = torch.arange(v * n, device=z.device)
    views = [rows.roll(-k * n) for k in range(v)]  # of the row's example, its own first
    same = None
    if x.query_ids is not None:
        ids = x.query_ids.repeat(v)
        same = (ids[:, None] == ids) & (ids >= 0)
    logged = z.new_empty(0, v * n)
    if x.count_exceeding:
        negatives = similarity.detach().clone()
        positives = [negatives[rows, view] for view in views[1:]]
        for view in views:
            negatives[rows, view] = -torch.inf
        if same is not None:
            negatives.masked_fill_(same, -torch.inf)
        exceeding = [(negatives > positive[:, None]).sum(1).to(wide) for positive in positives]
        logged = torch.stack(positives + exceeding)
    logits = similarity / x.temperature
    del similarity
    if same is not None:
        own = same.new_zeros(same.shape)
        for view in views:
            own[rows, view] = True
        logits = logits.masked_fill(same & ~own, -torch.inf)
    if x.decoupled:
        positive = sum(logits[rows, view] for view in views[1:]) / (v - 1)
        if x.positive_weights is not None:
            positive = positive * x.positive_weights.detach().flatten().to(wide)
        for view in views:
            logits[rows, view] = -torch.inf
        return logits.logsumexp(1) - positive, logged
    losses = z.new_zeros(v * n)
    for positive in views[1:]:
        of_pair = logits if v == 2 else logits.clone()
        for view in views:
            if view is not positive:
                of_pair[rows, view] = -torch.inf
        losses = losses + F.cross_entropy(of_pair, positive, reduction="none")
    return losses / (v - 1), logged


# A kernel with a distributed form also takes a Part: of its examples it gives the losses, what is logged and the stats
# [.., V B], or from those of all the gradients [B, D] or [V, B, D].
def _to_kernel(x: Arguments, views: Tensor | None = None) -> Arguments:
    """The arguments of a kernel: ids as classes, weights in float32, with a group all of them and the embeddings"""
    if x.query_ids is not None:
        x = x._replace(query_ids=classes(distributed.all_gather(x.query_ids, x.group) if x.group else x.query_ids))
    if x.positive_weights is not None:
        weights = x.positive_weights.float()
        x = x._replace(positive_weights=distributed.all_gather(weights, x.group, 1) if x.group else weights)
    if views is None:
        return x
    return x._replace(z0=views) if x.z1 is None else x._replace(z0=views[0], z1=views[1])


def _gather(x: Arguments) -> Tensor:
    if x.z1 is None:
        return distributed.all_gather(x.z0, x.group, 1)
    return distributed.gather_views([x.z0, x.z1], x.group)


_forward, _backward = by_views("nt_xent", _sizes, _gather, _to_kernel)
_run = register(
    "nt_xent",
    Arguments,
    outputs,
    reference=reference,
    check=_check_views,
    gradients=("z0", "z1", "temperature"),
    forward=_forward,
    backward=_backward,
    kept=lambda x: x if is_whole(x) else x._replace(positive_weights=None),  # the stats have them
    unit=("dz0", "dz1", "dtemperature"),
)


@distributed.in_step
def nt_xent(
    z0: Tensor,
    z1: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    reduction: str = "mean",
    query_ids: Tensor | None = None,
    decoupled: bool = False,
    positive_weights: Tensor | None = None,
    return_metrics: bool = False,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Any:
    """Normalised temperature-scaled cross entropy over the embeddings of two views or more, the loss of SimCLR.

    With z = [z0; z1] and p(i) the other view of i, row i's loss is -log softmax over j != i of
    <z_i, z_j> / temperature, at j = p(i). Memory is linear in N: no [2N, 2N] matrix, or none beyond 16 MB. On a CPU
    forward makes the gradients of a mean or a sum, which are held in float32 until backward.

    Of V views, row i has V - 1 positives, the other views of its example, and its loss is the mean over them, one at a
    time: each stands beside the views of all other examples, and its further positives are no negatives of that pair.

    Args:
        z0, z1: two views, [N, D] each, row k of one being the positive of row k of the other; or z0 alone, V views
            [V, N, D], row k of each being of one example (`torch.stack`, or a projector's [V * N, D] viewed so);
            float32, float16, bfloat16 or float64 (float64 runs the eager reference). Under autocast the matmul operands
            have its dtype.
        temperature: a positive number, or a tensor of one element on the embeddings' device, which gets its gradient
            and is not checked (the fused backends give NaN if it is not positive). A schedule inside a compiled step
            should be a tensor: a number that changes recompiles.
        normalize: scale every row to unit length first (F.normalize, eps 1e-12).
        reduction: "mean" or "sum" over all rows, or "none": the losses [2N], rows of z0 first, or [V, N].
        query_ids: int64 or int32 [N], of the examples: the views of another one with an equal id are left out of the
            negatives (the same image twice in a batch, say). Ids below 0 are equal to none.
        decoupled: leave the positive out of the softmax's denominator, so that it no longer weakens the gradient (DCL):
            -inf where there is no negative.
        positive_weights: [V, N] ([2, N] for two views), with decoupled: row i's <z_i, z_p> / temperature counts this
            often (DCLW: `2 - N softmax(<z0, z1> / 0.5)`); without a gradient.
        return_metrics: return (loss, Metrics): top-1 and top-5 accuracy of a positive among the row's negatives, and
            its mean similarity, over all pairs. In Triton V - 1 passes of their own, 2 M^2 D FLOP each for M = V N.
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies, N / W examples on each: the
            negatives come from all of them. A mean or a sum is that of all rows, and so are the metrics, the same on
            every rank, and so must be what is built on it; "none" gives the rank's own losses. Gradients, the
            temperature's too, are W times the rank's share, which DDP's averaging makes those of the whole batch.
            Backward communicates only after "none", or with query_ids.
        backend: "cpu", "triton" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss in float32 (float64 for float64 input): 0-d, or the losses for reduction="none". NaN for the mean of no
        rows. With return_metrics, the pair.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; other shapes or options on other ranks, or an error there (on a GPU some ranks notice shapes at
            their next call, and have NaN until then, and numbers and errors not at all).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, arXiv:2002.05709, Eq. 1;
    of V views, that loss over all pairs of them: Tian et al., Contrastive Multiview Coding, arXiv:1906.05849, Sec. 3.3
    (full graph), with SimCLR's negatives; decoupled: Yeh et al., Decoupled Contrastive Learning, arXiv:2110.06848,
    Eq. 5 and 6.
    """
    check_options("nt_xent", normalize, reduction, return_metrics)
    _check.flag("nt_xent", "decoupled", decoupled)
    group = distributed.name("nt_xent", group)
    tensors = (z0, z1, query_ids, positive_weights)
    x = Arguments(*tensors, temperature, normalize, decoupled, return_metrics, group, reduction_of_op(reduction, group))
    losses, logged, *_ = _run(x, backend)
    views = 2 if z1 is not None else len(z0)
    loss = reduce(losses, reduction, group, parts=views)
    if z1 is None and reduction == "none":
        loss = loss.view(z0.shape[:-1])
    return (loss, metrics(*logged.chunk(2))) if return_metrics else loss
