"""SupCon: every embedding must find all others of its class among those of the whole batch, or among keys."""

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
    check_version,
    classes,
    is_whole,
    of_whole,
    reduce,
    reduction_of_op,
    version,
    wanted,
)
from .._library import Out, register
from .._sums import total
from ..backend import kernel

WHERE = ("out", "in")


class Arguments(NamedTuple):
    z: Annotated[Tensor, Of("...", spread=True)]  # [M, D] or [V, N, D]
    labels: Annotated[Tensor, Of("N", IDS, spread=True)]  # [M] or [N]
    keys: Annotated[Tensor | None, Of("K *")]  # of a dtype of their own; None: the other rows
    key_labels: Annotated[Tensor | None, Of("K", IDS)]
    query_ids: Annotated[Tensor | None, Of("N", IDS, spread=True)]  # as the labels
    key_ids: Annotated[Tensor | None, Of("K", IDS)]
    weights: Annotated[Tensor | None, Of("N", spread=True, along=-1)]  # as the labels
    temperature: float | Tensor
    normalize: bool
    where: str
    version: int  # of the keys, to know them again in backward, which has no more of them; -1: there are none
    group: str
    reduction: str  # if not "none", the losses of all ranks have the same gradient on all; else each knows its own's
    operand_dtype: torch.dtype = torch.float32
    backend: str = ""
    needs_grad: list[bool] = []  # noqa: RUF012


class Outputs(NamedTuple):
    """Of all ranks, view by view. s_ij = <z_i, z_j>, or <z_i, k_j>, the rows unit if normalize and rounded to
    operand_dtype (a key's need not be). With keys inv_norm, stats, views and classes are empty, without them what
    follows.
    """

    losses: Out
    positives: Out  # how many a row has
    inv_norm: Out  # 1 without normalize
    stats: (
        Out  # m_i, any number that keeps exp((s_ij - m_i) / tau) in range; weight / r_i, their sum over j != i, 0 of a
    )
    # row without a positive; for "in" the same over its positives, for "out" 0 and weight over their number
    views: Out  # the embeddings of all ranks, if there are others
    classes: Out  # of the labels, and of the ids if there are any, of all ranks
    row_dz: Out  # of the rank's rows, as the next: the derivatives of each one's loss, empty if neither will be wanted
    row_dtemperature: Out
    seen: Out  # as long as the keys' version is high
    dz: Out  # without keys, these instead of inv_norm and stats where `losses` is their whole, a number
    dtemperature: Out


def _sizes(x: Arguments) -> tuple[int, int, int]:
    """V, N, D; [M, D] is one view"""
    return (x.z.shape[:-2].numel(), *x.z.shape[-2:])


def outputs(x: Arguments) -> Outputs:
    v, own, d = _sizes(x)
    *views, _, _ = x.z.shape
    n, keyed = own * distributed.size(x.group), x.version >= 0
    graded, found = v * own if keyed and any(x.needs_grad) else 0, not (keyed or is_whole(x))
    losses, *gradients = of_whole(x, (v * n,), tuple(x.z.shape), ())
    return Outputs(
        Out((v * n,)) if keyed else losses,
        Out((1, v * n)),
        Out((v * n,) if found else (0,)),
        Out((4, v * n) if found else (0,)),
        Out((*views, n, d) if x.group and not keyed else (0,), x.z.dtype),
        Out((0,) if keyed else (1 if x.query_ids is None else 2, n), torch.int32),
        Out((graded, d)),
        Out((graded,)),
        Out((0, max(x.version, 0))),
        *(Out((0,)) if keyed else each for each in gradients),
    )


def _check_views(x: Arguments) -> None:
    if x.z.dim() not in (2, 3):
        _check.bad_value("supcon", "z", "shape [M, D] or [V, N, D]", list(x.z.shape))
    if not _sizes(x)[0]:
        _check.bad_value("supcon", "z", "at least one view [V, N, D]", list(x.z.shape))
    if x.labels.shape != x.z.shape[-2:-1]:
        _check.bad_value("supcon", "labels", f"shape {list(x.z.shape[-2:-1])}", list(x.labels.shape))
    _check.choice("supcon", "where", x.where, WHERE)
    _check.choice("supcon", "reduction", x.reduction, REDUCTIONS)
    _check.count("supcon", "version", x.version, -1, 2**32 - 1)
    if x.keys is None:
        for name, value in (("key_labels", x.key_labels), ("key_ids", x.key_ids)):
            if value is not None:
                _check.bad_value("supcon", name, "None without keys", "a tensor")
        if x.query_ids is not None and x.z.dim() == 3:
            _check.bad_value("supcon", "query_ids", "None, or keys or z [M, D] beside them", "views [V, N, D]")
        return
    if x.version < 0:
        _check.bad_value("supcon", "version", "at least 0, with keys", x.version)
    if x.keys.shape[1] != x.z.shape[-1]:
        _check.bad_value("supcon", "keys", f"shape [K, {x.z.shape[-1]}]", list(x.keys.shape))
    if (x.z.dtype == torch.float64) != (x.keys.dtype == torch.float64):
        _check.bad_value("supcon", "keys", f"the dtype of z, {x.z.dtype}", x.keys.dtype)
    if x.key_labels is None:
        _check.bad_type("supcon", "key_labels", "an int64 or int32 tensor, beside keys", "None")
    for name in ("query_ids", "key_ids"):
        if getattr(x, name) is None and (x.query_ids is not None or x.key_ids is not None):
            _check.bad_type("supcon", name, "an int64 or int32 tensor, beside the other ids", "None")


def reference(x: Arguments) -> tuple[Tensor, Tensor]:
    """losses and positives [V N]: the maths as it is written, float32 (float64 for float64) around a matmul in
    operand_dtype.
    """
    v, n, _ = _sizes(x)
    wide = torch.promote_types(x.z.dtype, torch.float32)
    z = x.z.flatten(0, -2).to(wide)
    keys = z if x.keys is None else x.keys.detach().to(wide, copy=not x.normalize)  # a queue may change before backward
    if x.normalize:
        keys = F.normalize(keys)
        z = keys if x.keys is None else F.normalize(z)
    logits = (z.to(x.operand_dtype) @ keys.to(x.operand_dtype).t()).to(wide) / x.temperature
    pairs: Any = (
        None if ids is None else _equal(ids.repeat(v), ids.repeat(v) if x.keys is None else key_ids)
        for ids, key_ids in ((x.labels, x.key_labels), (x.query_ids, x.key_ids))
    )
    same, left_out = pairs
    if x.keys is None:
        example = torch.arange(v * n, device=z.device) % max(n, 1)
        same = same | (example[:, None] == example)
        same.fill_diagonal_(False)
        logits.fill_diagonal_(-torch.inf)
    if left_out is not None:
        logits, same = logits.masked_fill(left_out, -torch.inf), same & ~left_out
    positives = same.sum(1).to(z.dtype)
    alone = (positives == 0)[:, None]
    if x.weights is not None:
        weights = x.weights.detach().to(z.dtype).repeat(v)
        alone = alone | (weights == 0)[:, None]
    logits, same = logits.masked_fill(alone, 0), same | alone  # 0 then, and no gradient
    count = same.sum(1)
    if x.where == "out":
        losses = -logits.log_softmax(1).masked_fill(~same, 0).sum(1) / count
    else:
        losses = logits.logsumexp(1) - logits.masked_fill(~same, -torch.inf).logsumexp(1) + count.log()
    if x.weights is not None:
        losses = losses * weights
    return losses.masked_fill(alone[:, 0], 0), positives[None]


def _equal(a: Tensor, b: Any) -> Any:
    """[A, B], where they are and are not below 0"""
    return (a[:, None] == b) & (a[:, None] >= 0)


def _to_kernel(x: Arguments, views: Tensor | None = None) -> Arguments:
    """The arguments of a kernel: weights in float32; with a group, and without keys, those and the embeddings of all
    ranks
    """
    weights = None if x.weights is None else x.weights.float()
    if views is None:
        return x._replace(weights=weights)
    return x._replace(z=views, weights=None if weights is None else distributed.all_gather(weights, x.group))


def _classes(x: Arguments) -> Tensor:
    """[1 or 2, N] of all ranks' labels and, if there are any, ids"""
    ids = [each for each in (x.labels, x.query_ids) if each is not None]
    found = [classes(distributed.all_gather(each, x.group) if x.group else each)[None] for each in ids]
    return torch.cat(found) if len(found) > 1 else found[0]


def _of_classes(x: Arguments, rows: Tensor) -> Arguments:
    return x._replace(labels=rows[0], query_ids=None if x.query_ids is None else rows[1])


def _among_keys(x: Arguments) -> Arguments:
    """Labels and ids, the keys' too, as classes"""
    found: dict[str, Any] = {}
    for rows, of_keys in (("labels", "key_labels"), ("query_ids", "key_ids")):
        if (ids := getattr(x, rows)) is not None:
            together = classes(torch.cat([ids, getattr(x, of_keys)]))
            found[rows], found[of_keys] = together.split([len(ids), len(getattr(x, of_keys))])
    return x._replace(**found)


def _gather(x: Arguments) -> Tensor:
    return distributed.all_gather(x.z, x.group, x.z.dim() - 2)


_forward_views, _backward_views = by_views("supcon", _sizes, _gather, _to_kernel)


def _forward(x: Arguments) -> tuple[Tensor, ...]:
    if (x.keys is None) != (x.version < 0):
        _check.bad_value("supcon", "version", "-1 without keys", x.version)
    if x.keys is None:
        rows = _classes(x)
        found = _forward_views(_of_classes(x, rows))
        of_keys = (found[0].new_empty(shape) for shape in ((0, x.z.shape[-1]), 0, (0, 0)))
        return *found[:5], rows, *of_keys, *found[5:]
    losses, positives, *gradients = kernel(x.backend, "supcon").among_keys(_to_kernel(_among_keys(x)))
    if x.group:
        rows = torch.cat([losses[None], positives]).unflatten(1, (_sizes(x)[0], -1))
        losses, positives = distributed.all_gather(rows, x.group, 2).flatten(1).split(1)
        losses, positives = losses[0].clone(), positives.clone()
    empty = losses.new_empty(0)
    return losses, positives, empty, empty.clone(), x.z.new_empty(0), empty.int(), *gradients


def _kept(x: Arguments) -> Arguments:
    """With keys the gradients are there after forward: a queue may change before backward."""
    return x if x.keys is None else x._replace(keys=None, key_labels=None, query_ids=None, key_ids=None, weights=None)


def _backward(grad: Tensor, x: Arguments, *saved: Tensor) -> tuple[Tensor, ...]:
    *of_views, rows, row_dz, row_dtemperature, seen = saved
    check_version("supcon", "keys", x.version, seen)
    if x.version < 0:
        return _backward_views(grad, _of_classes(x, rows), *of_views)
    if x.group:
        own = distributed.own_rows(grad, x.group, parts=_sizes(x)[0])
        grad = own * (1 if x.reduction == "none" else distributed.size(x.group))
    return wanted(((row_dz * grad[:, None]).to(x.z.dtype).view(x.z.shape), total(grad * row_dtemperature)), x)


_run = register(
    "supcon",
    Arguments,
    outputs,
    reference=reference,
    check=_check_views,
    gradients=("z", "temperature"),
    forward=_forward,
    backward=_backward,
    kept=_kept,
    unit=("dz", "dtemperature"),
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
    keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    weights: Tensor | None = None,
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
    matrix, or none beyond 16 MB. On a CPU forward makes the gradients of a mean or a sum, which are held in float32
    until backward.

    With keys, which have no gradient, rows are compared with these instead of each other: j is one of the K keys, P(i)
    those of i's label. Forward finds the gradient, in two passes over the keys (6 M K D FLOP; 2 without a gradient),
    and nothing of them is kept for backward: a queue may be updated before. With MoCo's queue, into which the batch's
    own keys have gone first::

        queue.enqueue(key, labels=labels)
        loss = sslops.supcon(query, labels, keys=queue.negatives, key_labels=queue.labels)

    DetCon: labels are one for each mask of each image, query_ids one for each in each view, so that its other rows in
    that view are left out; weights are 1 over their number. DetConB's targets are keys, which have key_ids. DnC: labels
    are clusters.

    Args:
        z: [M, D], or V views [V, N, D] of N examples; float32, float16, bfloat16 or float64 (float64 runs the eager
            reference). Under autocast the matmul operands have its dtype.
        labels: int64 or int32, [M] or [N]. A label below 0 is none: such an example's other views are its only
            positives, and with keys it has none.
        keys: [K, D], K = 0 included, of any of these dtypes, the matmul operands having z's (float64 goes with float64
            only); `NegativeQueue.negatives`, say.
        key_labels: int64 or int32 [K], beside keys; below 0, as -1 in a queue: positives of none.
        query_ids, key_ids: int64 or int32, [M] or [N] and [K]: what has a row's id is left out, neither positive nor
            negative. Ids below 0 are equal to none. Without keys query_ids are of z's rows [M, D] on both sides, and
            there are none of views.
        weights: floating-point [M] or [N], without a gradient: factors of the rows' losses. A mean is over all rows all
            the same. What has weight 0 counts nothing, whatever its loss is.
        temperature: a positive number, or a tensor of one element on the embeddings' device, which gets its gradient
            and is not checked (the fused backends give NaN if it is not positive). A schedule inside a compiled step
            should be a tensor: a number that changes recompiles.
        normalize: scale every row, the keys' too, to unit length first (F.normalize, eps 1e-12).
        where: "out", which the paper recommends, or "in": where the mean over the positives is.
        reduction: "mean" or "sum" over all rows, or "none": the losses [M] or [V, N].
        return_metrics: return (loss, SupConMetrics): the share of rows without a positive, and the mean number of them.
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies, M / W rows or N / W examples on
            each: positives and negatives come from all of them; keys are replicated. A mean or a sum is that of all
            rows, and so are the metrics, the same on every rank, and so must be what is built on it; "none" gives the
            rank's own losses. Gradients, the temperature's too, are W times the rank's share, which DDP's averaging
            makes those of the whole batch. With keys backward does not communicate.
        backend: "cpu", "triton" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss in float32 (float64 for float64 input): 0-d, or the losses for reduction="none". NaN for the mean of no
        rows. With return_metrics, the pair.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; other shapes or options on other ranks, or an error there (on a GPU some ranks notice shapes at
            their next call, and have NaN until then, and numbers and errors not at all).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend; keys that
            changed before backward under activation checkpointing (not the reentrant one).

    Source: Khosla et al., Supervised Contrastive Learning, arXiv:2004.11362, Eq. 2 and 3; ids and weights: Hénaff et
    al., Efficient Visual Pretraining with Contrastive Detection, arXiv:2103.10957, Eq. 2.
    """
    check_options("supcon", normalize, reduction, return_metrics)
    group = distributed.name("supcon", group)
    tensors = (z, labels, keys, key_labels, query_ids, key_ids, weights)
    of_keys = -1 if keys is None else version(keys)
    made = reduction_of_op(reduction, group)
    losses, positives, *_ = _run(Arguments(*tensors, temperature, normalize, where, of_keys, group, made), backend)
    loss = reduce(losses, reduction, group, parts=z.shape[:-2].numel())
    if reduction == "none":
        loss = loss.view(z.shape[:-1])
    if not return_metrics:
        return loss
    return loss, SupConMetrics((positives == 0).to(positives.dtype).mean(), positives.mean())
