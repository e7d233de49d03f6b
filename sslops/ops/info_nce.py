"""InfoNCE: every query must find its key among shared negatives, a queue's or the other keys."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, distributed
from .._contrastive import autograd_wanted, check_options, metrics, reduce
from .._library_old import register
from .._precision import compute_dtype
from ..backend import kernel, resolve


def reference(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None,
    query_ids: Tensor | None,
    negative_ids: Tensor | None,
    temperature: float | Tensor,
    first: int,
    normalize: bool,
    operand_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """losses [B], <query, key> [B], negatives above it [B]: float32 (float64 for float64) around a matmul in
    operand_dtype. In-batch (negatives None) the positive of row i is key first + i of [K, D].
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k = query.to(wide), key.to(wide)
    # A queue may be written before backward: autograd keeps a copy, which normalising makes anyway.
    candidates = k if negatives is None else negatives.to(wide, copy=not normalize)
    if normalize:
        q, k, candidates = F.normalize(q), F.normalize(k), F.normalize(candidates)
    positive = (q * k[first : first + len(q)]).sum(1)
    similarity = (q.to(operand_dtype) @ candidates.to(operand_dtype).t()).to(wide)
    left_out = []
    if negatives is None:
        columns = torch.arange(len(k), device=q.device)
        left_out.append(columns == first + columns[: len(q), None])
    if query_ids is not None and negative_ids is not None:
        left_out.append(query_ids[:, None] == negative_ids)
    logits = similarity / temperature
    for mask in left_out:  # after the division: the temperature's gradient would be NaN
        similarity, logits = (x.masked_fill(mask, float("-inf")) for x in (similarity, logits))
    logits = torch.cat([positive[:, None] / temperature, logits], 1)
    losses = F.cross_entropy(logits, torch.zeros_like(positive, dtype=torch.int64), reduction="none")
    return losses, positive, (similarity > positive[:, None]).sum(1).to(wide)


class _Arguments(NamedTuple):
    query: Tensor  # [B, D]
    key: Tensor  # [B, D]; in-batch [K, D], and the positive of row i is key first + i
    negatives: Tensor | None  # [K, D], of a dtype of their own; None: in-batch
    query_ids: Tensor | None  # [B] int64, given both or neither
    negative_ids: Tensor | None  # [K] int64
    temperature: Tensor | None  # 0-d float32, in place of tau
    tau: float
    first: int
    normalize: bool
    operand_dtype: torch.dtype
    query_grad: bool  # which gradients will be wanted: the query's or the temperature's,
    key_grad: bool  # the key's,
    negatives_grad: bool  # the negatives'
    version: int  # of the negatives, to know them again in backward
    group: str  # all of the above but the negatives and their ids are the rank's; in-batch its ids for both
    shared: bool  # all ranks' losses have the same gradient on all ranks; else each knows that of its own
    backend: str


# A backend's kernel, kernels/<backend>/info_nce.py, has two functions. `common` stands for
#   query, key, negatives, query_ids, negative_ids, temperature (float | Tensor), first, normalize, operand_dtype
# as in _Arguments, contiguous; C = key if negatives is None else negatives; q, k, c unit rows if normalize.
#
# forward(*common, needs_grad) -> losses [B], similarity [B], above [B], dquery [B, D], dtemperature [B], stats [3, B]
#   all float32. similarity is s_i = <q_i, k_first+i> of unrounded rows, above the number of negatives that exceed it.
#   Negatives of row i: all j in C but those with equal ids and, in-batch, first + i. r_neg = sum over them of
#   exp((<q_i, c_j> - m_i) / tau), m_i any maximum that keeps it in range, e_pos alike from s_i, r their sum.
#   losses = log1p(r_neg / e_pos) where r_neg < e_pos. dquery, of the raw rows, and dtemperature are the derivatives of
#   each row's loss; where needs_grad is false dquery is [0, D] and dtemperature is [0]. stats = m, 1 / r, r_neg / r.
# backward(grad [B], stats, *common, key_grad, negatives_grad) -> dkey, dnegatives
#   in their inputs' dtypes; [0] for what is not asked for. Only called where one of them is.
def _common(x: _Arguments) -> tuple[Any, ...]:
    tensors = (x.query, x.key, x.negatives, x.query_ids, x.negative_ids)
    temperature = x.tau if x.temperature is None else x.temperature
    return *(t if t is None else t.contiguous() for t in tensors), temperature, x.first, x.normalize, x.operand_dtype


def _check_ids(query: Tensor, candidates: Tensor, query_ids: Tensor | None, negative_ids: Tensor | None) -> None:
    if query_ids is None and negative_ids is None:
        return
    for name, x, rows in (("query_ids", query_ids, query), ("negative_ids", negative_ids, candidates)):
        if x is None:
            _check.bad_type("info_nce", name, "an int64 tensor, beside the other ids", "None")
        _check.ids("info_nce", "[N]", **{name: x})
        if len(x) != len(rows):
            _check.bad_value("info_nce", name, f"shape [{len(rows)}]", list(x.shape))
        _check.same_device("info_nce", "query", query, **{name: x})


def _check_pointers(x: _Arguments) -> None:
    b = len(x.query)
    candidates = x.key if x.negatives is None else x.negatives
    _check.rows("info_nce", query=x.query, key=x.key, negatives=candidates)
    if not 0 <= x.first <= len(x.key) - b or (x.negatives is not None and (x.first, len(x.key)) != (0, b)):
        _check.bad_value("info_nce", "key", f"{b} rows from {x.first} on", list(x.key.shape))
    _check_ids(x.query, candidates, x.query_ids, x.negative_ids)
    for name, tensor in (("key", x.key), ("negatives", candidates)):
        if tensor.dtype == torch.float64:
            _check.bad_type("info_nce", name, "float32, float16 or bfloat16", tensor.dtype)
    if x.temperature is not None:
        _check.scratch("info_nce", x.query.device, temperature=(x.temperature, ()))


def _with_all_keys(x: _Arguments) -> _Arguments:
    """In-batch, the ranks' keys are one another's negatives"""
    if not x.group or x.negatives is not None:
        return x
    ids = None if x.query_ids is None else distributed.all_gather(x.query_ids, x.group)
    first = distributed.rank(x.group) * len(x.key)
    return x._replace(key=distributed.all_gather(x.key, x.group), negative_ids=ids, first=first)


def _forward(x: _Arguments) -> tuple[Tensor, ...]:
    _check_pointers(x)
    *rows, dquery, dtemperature, stats = kernel(x.backend, "info_nce").forward(
        *_common(_with_all_keys(x)), x.query_grad
    )
    if x.group:
        rows = [row.clone() for row in distributed.all_gather(torch.stack(rows), x.group, 1)]
    return *rows, dquery, dtemperature, stats, x.query.new_empty(0, x.version)


def _shapes(x: _Arguments) -> dict[str, tuple[int, ...]]:
    """Of what forward keeps, besides the version"""
    b, d = x.query.shape
    graded, n = b if x.query_grad else 0, b * distributed.size(x.group)
    return {
        "similarity": (n,), "above": (n,), "dquery": (graded, d), "dtemperature": (graded,), "stats": (3, b),
    }  # fmt: skip


def _forward_fake(x: _Arguments) -> tuple[Tensor, ...]:
    shapes = _shapes(x)
    losses = x.query.new_empty(shapes["similarity"], dtype=torch.float32)
    kept = (losses.new_empty(shape) for shape in shapes.values())
    return losses, *kept, x.query.new_empty(0, x.version)


def _kept_for_backward(x: _Arguments) -> _Arguments:
    """The query's gradient is there after forward: negatives that it came from may change before backward."""
    return x if x.key_grad or x.negatives_grad else x._replace(negatives=None, query_ids=None, negative_ids=None)


def _backward(
    grad: Tensor,
    x: _Arguments,
    similarity: Tensor,
    above: Tensor,
    dquery: Tensor,
    dtemperature: Tensor,
    stats: Tensor,
    seen_version: Tensor,
) -> tuple[Tensor, ...]:
    if seen_version.shape[1] != x.version:
        raise RuntimeError(
            "info_nce: negatives: wanted those of the forward pass, got changed ones in its recomputation "
            "(activation checkpointing): enqueue after backward"
        )
    shapes = _shapes(x)
    kept = {"dquery": dquery, "dtemperature": dtemperature, "stats": stats}
    checked = {name: (tensor, shapes[name]) for name, tensor in kept.items()}
    _check.scratch("info_nce", x.query.device, grad=(grad, shapes["similarity"]), **checked)
    if x.group:
        grad = distributed.own_rows(grad, x.group) * (distributed.size(x.group) if x.shared else 1)
    found = _backward_fake(grad, x)
    if x.query_grad:
        torch.mul(dquery, grad[:, None], out=found[0])
        found = (*found[:3], (grad * dtemperature).sum())
    if x.key_grad or x.negatives_grad:
        _check_pointers(x)
        common, wanted = _common(_with_all_keys(x)), (x.key_grad, x.negatives_grad)
        dkey, dnegatives = kernel(x.backend, "info_nce").backward(
            grad.contiguous(), stats.contiguous(), *common, *wanted
        )
        if x.group and x.key_grad and x.negatives is None:
            dkey = distributed.reduce_scatter(dkey.float(), x.group, 0).to(x.key.dtype)
        found = (found[0], dkey, dnegatives, found[3])
    return found


def _backward_fake(grad: Tensor, x: _Arguments, *_: Tensor) -> tuple[Tensor, ...]:
    def like(tensor: Tensor | None, wanted: bool) -> Tensor:
        return tensor.new_empty(tensor.shape) if wanted and tensor is not None else grad.new_empty(0)

    return (
        like(x.query, x.query_grad), like(x.key, x.key_grad), like(x.negatives, x.negatives_grad), grad.new_empty(()),
    )  # fmt: skip


register(
    "info_nce",
    _Arguments,
    saved=("similarity", "above", "dquery", "dtemperature", "stats", "seen_version"),
    gradients=("query", "key", "negatives", "temperature"),
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
    kept=_kept_for_backward,
)


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
    return_metrics: bool = False,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Any:
    """InfoNCE: the cross entropy of each query's own key among shared negatives, the loss of CPC and MoCo.

    Row i's loss is -log of exp(<q_i, k_i> / temperature) over itself plus the sum of exp(<q_i, n_j> / temperature)
    over the negatives n_j: the rows of `negatives`, or in-batch (None) all other keys. Memory is linear in B and K: no
    [B, K] matrix. Where only the query (and the temperature) has a gradient, one pass over the negatives finds it,
    4 B K D FLOP, and nothing of them is kept for backward: a queue may be updated before. Keys and negatives that
    require a gradient get it from a second pass, 8 B K D FLOP in all; changed in between, they raise.

    Args:
        query, key: [B, D] each, row i of one being the positive of row i of the other; float32, float16, bfloat16 or
            float64 (float64 runs the eager reference). Under autocast the matmul operands have its dtype.
        negatives: [K, D], of the same dtype (under autocast of any), K = 0 included; `NegativeQueue.negatives`, say.
        temperature: a positive number, or a 0-d tensor on the embeddings' device, which gets its gradient and is not
            checked (the fused backends give NaN if it is not positive). A schedule inside a compiled step should be a
            tensor: a number that changes recompiles.
        normalize: scale every row, the negatives' too, to unit length first (F.normalize, eps 1e-12).
        reduction: "mean" or "sum" over the B rows, or "none": the losses [B].
        query_ids, negative_ids: int64 [B] and [K]; a negative with its query's id is left out (the same sample in the
            queue, say). In-batch, query_ids are the keys' too.
        return_metrics: return (loss, Metrics): top-1 and top-5 accuracy of the positive, and its mean similarity.
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies, B rows on each: in-batch, all
            ranks' keys are negatives; given negatives are replicated. A mean or a sum is that of all rows, and so are
            the metrics, the same on every rank, and so must be what is built on it; "none" gives the rank's own losses.
            Gradients are W times the rank's share, which DDP's averaging makes those of the whole batch. Backward
            communicates only for in-batch keys that require a gradient.
        backend: "cpu", "triton" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss in float32 (float64 for float64 input): 0-d, or [B] for reduction="none". NaN for the mean of no rows.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; inputs of other shapes on other ranks (on a GPU some ranks notice at their next call, and have
            NaN until then).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend; trainable
            negatives, or under activation checkpointing (not the reentrant one) any, that changed before backward.

    Source: van den Oord et al., Representation Learning with Contrastive Predictive Coding, arXiv:1807.03748, Eq. 4;
    He et al., Momentum Contrast for Unsupervised Visual Representation Learning, arXiv:1911.05722, Eq. 1.
    """
    _check.embeddings("info_nce", query=query, key=key)
    if negatives is not None:
        _check.rows("info_nce", query=query, negatives=negatives)
        mixed = torch.is_autocast_enabled(query.device.type) and torch.float64 not in (query.dtype, negatives.dtype)
        if negatives.dtype != query.dtype and not mixed:
            _check.bad_value("info_nce", "negatives", f"the dtype of query, {query.dtype}", negatives.dtype)
    if negatives is None:
        if negative_ids is not None:
            _check.bad_value("info_nce", "negative_ids", "None in-batch, where query_ids are the keys' too", "ids")
        negative_ids = query_ids
    _check_ids(query, key if negatives is None else negatives, query_ids, negative_ids)
    _check.temperature("info_nce", temperature, query.device)
    check_options("info_nce", normalize, reduction, return_metrics)
    group = distributed.name("info_nce", group)
    operand_dtype = compute_dtype(query)
    backend = resolve("info_nce", query.device, query.dtype, backend, group)
    if backend == "eager":
        query, key = distributed.gathered("info_nce", group, query, key)
        query_ids = distributed.gathered_ids("info_nce", group, query_ids)
        ids = query_ids, query_ids if negatives is None else negative_ids
        outputs = reference(query, key, negatives, *ids, temperature, 0, normalize, operand_dtype)
    else:
        tensors = (query, key, negatives, query_ids, negative_ids)
        learnt = temperature.float() if isinstance(temperature, Tensor) else None
        tau = 0.0 if isinstance(temperature, Tensor) else temperature
        wanted = autograd_wanted(query, temperature), autograd_wanted(key), autograd_wanted(negatives)
        outputs = torch.ops.sslops.info_nce(
            *tensors, learnt, tau, 0, normalize, operand_dtype, *wanted, _version(negatives),
            group, reduction != "none", backend,
        )[:3]  # fmt: skip
    losses, similarity, above = outputs
    loss = reduce(losses, reduction, group)
    return (loss, metrics(similarity, above)) if return_metrics else loss


def _version(negatives: Tensor | None) -> int:
    """Counts in-place changes. A compiled graph keeps what it needs by itself."""
    if negatives is None or torch.compiler.is_compiling() or negatives.is_inference():
        return 0
    return negatives._version
