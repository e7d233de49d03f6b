"""InfoNCE: every query must find its key among shared negatives, a queue's or the other keys, and its own ones."""

from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, distributed
from .._check import Of
from .._contrastive import IDS, check_options, check_version, metrics, reduce, version
from .._library import Out, register
from .._sums import total
from ..backend import kernel

_MASK = (torch.bool,)


class Arguments(NamedTuple):
    query: Annotated[Tensor, Of("B D", spread=True)]
    key: Annotated[Tensor, Of("B D", like="query", spread=True)]
    negatives: Annotated[Tensor | None, Of("K D")]  # of a dtype of their own; None: in-batch
    query_ids: Annotated[Tensor | None, Of("B", IDS, spread=True)]  # in-batch the keys' too
    negative_ids: Annotated[Tensor | None, Of("K", IDS)]
    negative_mask: Annotated[Tensor | None, Of("B K", _MASK, strided=True, spread=True, along=0)]  # in-batch K = W B
    paired_negatives: Annotated[Tensor | None, Of("B M D", spread=True, along=0)]  # of a dtype of their own
    paired_mask: Annotated[Tensor | None, Of("B M", _MASK, strided=True, spread=True, along=0)]
    positive_weights: Annotated[Tensor | None, Of("B", spread=True, along=0)]
    temperature: float | Tensor
    normalize: bool
    decoupled: bool
    version: int  # of the negatives, shared and paired, to know them again in backward
    group: str
    shared: bool  # the losses of all ranks have the same gradient on all of them; else each knows that of its own
    operand_dtype: torch.dtype = torch.float32
    backend: str = ""
    needs_grad: list[bool] = []  # noqa: RUF012


class Outputs(NamedTuple):
    """losses and logged of all ranks, the rest of the rank's queries. s_ij = <q_i, c_j>, the rows unit if normalize and
    rounded to operand_dtype (c's need not be); c: the negatives, or in-batch all ranks' keys, and the query's own ones.
    """

    losses: Out
    logged: Out  # the positive's s, of unrounded rows, and how many negatives exceed it
    dquery: Out  # derivatives of each row's loss, empty if neither will be wanted
    dtemperature: Out
    stats: Out  # m_i, any maximum that keeps exp((s_ij - m_i) / tau) in range; 1 / r_i, their sum over the positive and
    # the negatives (decoupled: over these): all but those of the query's id, those that a mask leaves out, and in-batch
    # the positive; the negatives' share of r_i, decoupled the positive's weight
    seen: Out  # as long as the negatives' version is high


def outputs(x: Arguments) -> Outputs:
    b, d = x.query.shape
    n, graded = b * distributed.size(x.group), b if _learns(x) else 0
    return Outputs(
        losses=Out((n,)),
        logged=Out((2, n)),
        dquery=Out((graded, d)),
        dtemperature=Out((graded,)),
        stats=Out((3, b)),
        seen=Out((0, x.version)),
    )


def _learns(x: Arguments) -> bool:
    """Whether there will be a gradient that forward finds: the query's or the temperature's"""
    return x.needs_grad[0] or x.needs_grad[3]


def reference(x: Arguments) -> tuple[Tensor, Tensor]:
    """losses [B] and what is logged [2, B]: float32 (float64 for float64) around a matmul in operand_dtype."""
    wide = torch.promote_types(x.query.dtype, torch.float32)
    q, k, candidates, candidate_ids = x.query.to(wide), x.key.to(wide), x.negatives, x.negative_ids
    left_out = []
    if candidates is None:
        candidates, candidate_ids = k, x.query_ids
        left_out.append(torch.eye(len(q), dtype=torch.bool, device=q.device))
    else:  # a queue may change before backward
        candidates = candidates.to(wide, copy=not (x.normalize or candidates.requires_grad))
    fault, some = None, []  # that some queries leave out and others do not
    if x.query_ids is not None and candidate_ids is not None:
        some.append((x.query_ids[:, None] == candidate_ids) & (x.query_ids[:, None] >= 0))
    if x.negative_mask is not None:
        some.append(~x.negative_mask)
    if some:
        # NaN for those who do not leave it out: as 0 times it, in the product's gradient, would be for the others.
        fault = (candidates * 0).sum(1)
        candidates = candidates.where(fault[:, None] == 0, 0)
    if x.normalize:
        q, k, candidates = F.normalize(q), F.normalize(k), F.normalize(candidates)
    positive = (q * k).sum(1)
    operand = q.to(x.operand_dtype)
    similarity = (operand @ candidates.to(x.operand_dtype).t()).to(wide)
    if fault is not None:
        similarity = similarity + fault
    similarity, logits = _masked(similarity, x.temperature, left_out + some)
    if x.paired_negatives is not None:
        kept = x.normalize or x.paired_negatives.requires_grad or x.paired_mask is not None
        paired, left_out = x.paired_negatives.to(wide, copy=not kept), []
        if x.paired_mask is not None:
            left_out.append(~x.paired_mask)
            paired = paired.where(x.paired_mask[:, :, None], 0)
        if x.normalize:
            paired = F.normalize(paired, dim=2)
        products = torch.einsum("bd,bmd->bm", operand, paired.to(x.operand_dtype)).to(wide)
        beside = _masked(products, x.temperature, left_out)
        similarity, logits = (torch.cat(each, 1) for each in zip((similarity, logits), beside, strict=True))
    if x.decoupled:
        weighted = positive if x.positive_weights is None else positive * x.positive_weights.detach().to(wide)
        losses = logits.logsumexp(1) - weighted / x.temperature
    else:
        logits = torch.cat([positive[:, None] / x.temperature, logits], 1)
        losses = F.cross_entropy(logits, torch.zeros_like(positive, dtype=torch.int64), reduction="none")
    positive, similarity = positive.detach(), similarity.detach()
    return losses, torch.stack([positive, (similarity > positive[:, None]).sum(1).to(wide)])


def _masked(similarity: Tensor, temperature: float | Tensor, left_out: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Of similarities themselves and the logits, -inf for what is left out"""
    logits = similarity / temperature
    for mask in left_out:  # after the division: the temperature's gradient would be NaN
        similarity, logits = (each.masked_fill(mask, float("-inf")) for each in (similarity, logits))
    return similarity, logits


def _check_pairs(x: Arguments) -> None:
    _check.count("info_nce", "version", x.version, 0, 2**32 - 1)
    for name in ("negatives", "paired_negatives"):
        negatives = getattr(x, name)
        if negatives is not None and (x.query.dtype == torch.float64) != (negatives.dtype == torch.float64):
            _check.bad_value("info_nce", name, f"the dtype of query, {x.query.dtype}", negatives.dtype)
    if x.paired_mask is not None and x.paired_negatives is None:
        _check.bad_value("info_nce", "paired_mask", "None, or paired_negatives beside it", "a mask")
    if x.positive_weights is not None and not x.decoupled:
        _check.bad_value("info_nce", "positive_weights", "None, or decoupled=True beside them", "weights")
    if x.negatives is None:
        if x.negative_ids is not None:
            _check.bad_value("info_nce", "negative_ids", "None in-batch, where query_ids are the keys' too", "ids")
        b = x.query.shape[0]
        shape = [b, b * distributed.size(x.group)]
        if x.negative_mask is not None and list(x.negative_mask.shape) != shape:
            _check.bad_value("info_nce", "negative_mask", f"shape {shape}", list(x.negative_mask.shape))
        return
    for name in ("query_ids", "negative_ids"):
        if getattr(x, name) is None and (x.query_ids is not None or x.negative_ids is not None):
            _check.bad_type("info_nce", name, "an int64 or int32 tensor, beside the other ids", "None")


def _to_kernel(x: Arguments) -> tuple[Any, ...]:
    """The arguments of a kernel: in-batch with all ranks' keys and their ids, ids in int64; the Part that is the rank's

    Candidate j is no negative of query i if their ids are equal and not below 0, if the mask is False, or in-batch if j
    is part.first + i.
    """
    query_ids, negative_ids = (None if ids is None else ids.long() for ids in (x.query_ids, x.negative_ids))
    if x.positive_weights is not None:
        x = x._replace(positive_weights=x.positive_weights.float())
    if x.negatives is not None or not x.group:
        ids = query_ids if x.negatives is None else negative_ids
        return (x._replace(query_ids=query_ids, negative_ids=ids),)
    ids = None if query_ids is None else distributed.all_gather(query_ids, x.group)
    gathered = x._replace(key=distributed.all_gather(x.key, x.group), query_ids=query_ids, negative_ids=ids)
    return gathered, distributed.part(x.group, len(x.query))


# forward gives losses [B], logged [2, B], dquery, dtemperature, stats, backward dkey, dnegatives and dpaired, in their
# inputs' dtypes, [0] for what is not wanted.
def _forward(x: Arguments) -> tuple[Tensor, ...]:
    losses, logged, *kept = kernel(x.backend, "info_nce").forward(*_to_kernel(x))
    if x.group:
        rows = distributed.all_gather(torch.cat([losses[None], logged]), x.group, 1)
        losses, logged = rows[0].clone(), rows[1:].clone()
    return losses, logged, *kept


def _kept(x: Arguments) -> Arguments:
    """The query's gradient is there after forward: negatives that it came from may change before backward."""
    x = x._replace(positive_weights=None)
    _, key_grad, negatives_grad, _, paired_grad = x.needs_grad
    if key_grad or negatives_grad or paired_grad:
        return x
    x = x._replace(negatives=None, query_ids=None, negative_ids=None, negative_mask=None)
    return x._replace(paired_negatives=None, paired_mask=None)


def _backward(
    grad: Tensor, x: Arguments, logged: Tensor, dquery: Tensor, dtemperature: Tensor, stats: Tensor, seen: Tensor
) -> tuple[Tensor, ...]:
    check_version("info_nce", "negatives", x.version, seen)
    if x.group:
        grad = distributed.own_rows(grad, x.group) * (distributed.size(x.group) if x.shared else 1)
    query_grad, key_grad, negatives_grad, temperature_grad, paired_grad = x.needs_grad
    if key_grad or negatives_grad or paired_grad:
        of_kernel, *part = _to_kernel(x if key_grad else x._replace(group=""))  # others' keys are of use to dkey alone
        dkey, dnegatives, dpaired = kernel(x.backend, "info_nce").backward(grad, of_kernel, stats, *part)
        if x.group and key_grad and x.negatives is None:
            dkey = distributed.reduce_scatter(dkey.float(), x.group, 0).to(x.key.dtype)
    else:
        none = (x.key, x.negatives, x.paired_negatives)
        dkey, dnegatives, dpaired = ((grad if z is None else z).new_empty(0) for z in none)
    return (
        (dquery * grad[:, None]).to(x.query.dtype) if query_grad else x.query.new_empty(0),
        dkey,
        dnegatives,
        total(grad * dtemperature) if temperature_grad else grad.new_empty(0),
        dpaired,
    )


_run = register(
    "info_nce",
    Arguments,
    outputs,
    reference=reference,
    check=_check_pairs,
    gradients=("query", "key", "negatives", "temperature", "paired_negatives"),
    forward=_forward,
    backward=_backward,
    kept=_kept,
)


@distributed.in_step
def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
    query_ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    negative_mask: Tensor | None = None,
    paired_negatives: Tensor | None = None,
    paired_mask: Tensor | None = None,
    decoupled: bool = False,
    positive_weights: Tensor | None = None,
    return_metrics: bool = False,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Any:
    """InfoNCE: the cross entropy of each query's own key among shared negatives, the loss of CPC and MoCo.

    Row i's loss is -log of exp(<q_i, k_i> / temperature) over itself plus the sum of exp(<q_i, n_j> / temperature)
    over the negatives n_j: the rows of `negatives`, or in-batch (None) all other keys, and beside them the query's own,
    paired_negatives[i]. Memory is linear in B and K: no [B, K] matrix, and nothing of the paired negatives' size but
    their gradient. Where only the query (and the temperature) has a gradient, one pass over the negatives finds it,
    4 B K D FLOP, and nothing of them is kept for backward: a queue may be updated before. Keys and negatives that
    require a gradient get it from a second pass, 8 B K D FLOP in all; changed in between, they raise.

    Args:
        query, key: [B, D] each, row i of one being the positive of row i of the other; float32, float16, bfloat16 or
            float64 (float64 runs the eager reference). Under autocast the matmul operands have its dtype.
        negatives: [K, D], K = 0 included, of any of these dtypes, the matmul operands having the query's (float64 goes
            with float64 only); `NegativeQueue.negatives`, say.
        temperature: a positive number, or a tensor of one element on the embeddings' device, which gets its gradient
            and is not checked (the fused backends give NaN if it is not positive). A schedule inside a compiled step
            should be a tensor: a number that changes recompiles.
        normalize: scale every row, the negatives' too, to unit length first (F.normalize, eps 1e-12).
        reduction: "mean" or "sum" over the B rows, or "none": the losses [B].
        query_ids, negative_ids: int64 or int32, [B] and [K]; a negative with its query's id is left out (the same
            sample in the queue, say). Ids below 0, as -1 in a queue, are equal to none. In-batch, query_ids are the
            keys' too.
        negative_mask: bool [B, K], of any strides (`queue.valid.expand(B, K)` takes no memory), for what ids cannot
            say: True where row j is a negative of query i, as in scaled_dot_product_attention. What is False is left
            out and not looked at: NaN there leaves no trace. In-batch [B, B], over W ranks [B, W B]; a query's own
            key is no negative whatever it says.
        paired_negatives: [B, M, D], row i being negatives of query i alone (hard ones, say), of any of these dtypes, as
            negatives are; M = 0 included. They join the shared ones; without any but these: `negatives=key[:0]`.
        paired_mask: bool [B, M], True where there is a paired negative: for queries that have fewer than M.
        decoupled: leave the positive out of the sum (DCL, arXiv:2110.06848): -inf where there is no negative.
        positive_weights: [B], with decoupled: row i's <q_i, k_i> / temperature counts this often; without a gradient.
        return_metrics: return (loss, Metrics): top-1 and top-5 accuracy of the positive, and its mean similarity.
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies, B rows on each: in-batch, all
            ranks' keys are negatives; given negatives are replicated, and paired ones the rank's. A mean or a sum is
            that of all rows, and so are the metrics, the same on every rank, and so must be what is built on it; "none"
            gives the rank's own losses. Gradients are W times the rank's share, which DDP's averaging makes those of
            the whole batch. Backward communicates only for in-batch keys that require a gradient.
        backend: "cpu", "triton" or "eager"; the fastest that can run here if None (`sslops.explain`).

    Returns:
        The loss in float32 (float64 for float64 input): 0-d, or [B] for reduction="none". NaN for the mean of no rows.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; other shapes or options on other ranks, or an error there (on a GPU some ranks notice shapes at
            their next call, and have NaN until then, and numbers and errors not at all).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend; trainable
            negatives, or under activation checkpointing (not the reentrant one) any, that changed before backward.

    Source: van den Oord et al., Representation Learning with Contrastive Predictive Coding, arXiv:1807.03748, Eq. 4;
    He et al., Momentum Contrast for Unsupervised Visual Representation Learning, arXiv:1911.05722, Eq. 1; weights: Yeh
    et al., Decoupled Contrastive Learning, arXiv:2110.06848, Eq. 6.
    """
    check_options("info_nce", normalize, reduction, return_metrics)
    _check.flag("info_nce", "decoupled", decoupled)
    group = distributed.name("info_nce", group)
    beside = negative_mask, paired_negatives, paired_mask, positive_weights
    tensors = query, key, negatives, query_ids, negative_ids, *beside
    seen = version(negatives) + version(paired_negatives)
    x = Arguments(*tensors, temperature, normalize, decoupled, seen, group, shared=reduction != "none")
    losses, logged, *_ = _run(x, backend)
    loss = reduce(losses, reduction, group)
    return (loss, metrics(*logged)) if return_metrics else loss
