"""Nearest neighbours by the inner product, without the matrix of all; and KoLeo, the loss of their distances."""

from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, distributed
from .._check import Of
from .._library import Out, register
from .._sums import mean


class Arguments(NamedTuple):
    query: Annotated[Tensor, Of("B D")]
    support: Annotated[Tensor, Of("K D")]  # of a dtype of its own
    k: int
    normalize: bool
    first: int  # query i is row first + i of the support, which it is not to find; below 0: it is none
    operand_dtype: torch.dtype = torch.float32
    backend: str = ""


def outputs(x: Arguments) -> Out:
    return Out((x.query.shape[0], x.k), torch.int64)


def reference(x: Arguments) -> Tensor:
    wide = torch.promote_types(x.query.dtype, torch.float32)
    q, s = x.query.to(wide), x.support.to(wide)
    if x.normalize:
        q, s = F.normalize(q), F.normalize(s)
    scores = (q.to(x.operand_dtype) @ s.to(x.operand_dtype).t()).to(wide)
    lowest = torch.finfo(wide).min
    scores = scores.nan_to_num(nan=lowest, neginf=lowest, posinf=torch.inf)
    if x.first >= 0:
        rows = torch.arange(len(q), device=q.device)
        scores = scores.index_put((rows, rows + x.first), scores.new_tensor(-torch.inf))
    found = [scores.argmax(1, keepdim=True)]  # of equal ones the first
    while len(found) < x.k:
        scores = scores.scatter(1, found[-1], -torch.inf)
        found.append(scores.argmax(1, keepdim=True))
    return torch.cat(found, 1)


def _check_candidates(x: Arguments) -> None:
    if (x.query.dtype == torch.float64) != (x.support.dtype == torch.float64):
        _check.bad_value("nearest", "support", f"the dtype of query, {x.query.dtype}", x.support.dtype)
    if x.first >= 0 and x.first + x.query.shape[0] > x.support.shape[0]:
        _check.bad_value("nearest", "support", "a row for each query, to exclude_self", list(x.support.shape))
    candidates = x.support.shape[0] - (x.first >= 0)
    if candidates < 1:
        _check.bad_value("nearest", "support", "at least one candidate", list(x.support.shape))
    _check.count("nearest", "k", x.k, 1, candidates)


_run = register("nearest", Arguments, outputs, reference=reference, check=_check_candidates)


class Nearest(NamedTuple):
    ids: Tensor
    values: Tensor


@distributed.in_step
def nearest(
    query: Tensor,
    support: Tensor,
    *,
    k: int = 1,
    normalize: bool = False,
    exclude_self: bool = False,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Nearest:
    """The rows of the support that have the largest inner products with each query, as NNCLR looks them up in a queue.

    The candidates pass by, and each query keeps its best: nothing is of size [B, K], and without a group the support
    is neither copied nor written, normalised or not; the values of k > 1 come from the found rows, [B, k, D]. 2 B K D
    FLOP. Which rows they are has no gradient; `values` have the query's and the support's, that of a row being summed
    in a fixed order.

    Args:
        query: [B, D]; float32, float16, bfloat16 or float64 (float64 runs the eager reference). Under autocast the
            matmul operands have its dtype.
        support: [K, D], of any of these dtypes (float64 goes with float64 only); `NegativeQueue.negatives`, say.
        k: how many of each query's, at most as many as there are; the others cost more as k grows.
        normalize: by the cosine: every row is scaled to unit length first (F.normalize, eps 1e-12).
        exclude_self: query i is row i of the support, and not its own neighbour.
        group: None, or "world" or a ProcessGroup over whose ranks the support lies, K rows on each, gathered in float32
            (float64): ids count the rows of all ranks in their order, and query i is row i of the own ones. The queries
            are the rank's own, and so are the results; gradients of values are those of all ranks' together. A support
            that is replicated, as a queue is, needs no group.
        backend: "cpu", "triton" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        (ids, values), [B] each, or for k > 1 [B, k], best first. ids: int64, the lowest of equal ones first; NaN and
        -inf come last, as the lowest number, among them the lowest ids. values: the inner products, of unrounded rows,
        in float32 (float64 for float64 input).

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; fewer than k candidates;
            torch.distributed not initialised; other shapes on other ranks (see `info_nce`).
        RuntimeError: the backend that was asked for cannot run here.

    Source: Dwibedi et al., With a Little Help from My Friends: Nearest-Neighbor Contrastive Learning of Visual
    Representations, arXiv:2104.14548, Eq. 2.
    """
    for name, flag in (("normalize", normalize), ("exclude_self", exclude_self)):
        _check.flag("nearest", name, flag)
    group, first = distributed.name("nearest", group), 0
    if group:
        _check.tensors("nearest", {"query": query, "support": support}, _check.declared(Arguments))
        first = distributed.rank(group) * support.shape[0]
        if exclude_self and query.shape[0] > support.shape[0]:
            _check.bad_value("nearest", "support", "a row for each query, to exclude_self", list(support.shape))
        (support,) = distributed.gathered("nearest", group, support)
    ids = _ids(query, support, k, normalize, first if exclude_self else -1, backend)
    wide = torch.promote_types(query.dtype, torch.float32)
    q, rows = query.to(wide).contiguous(), F.embedding(ids, support).to(wide)
    if normalize:
        q, rows = F.normalize(q), F.normalize(rows, dim=-1)
    return Nearest(ids, (q * rows if k == 1 else q[:, None] * rows).sum(-1))


def _ids(query: Tensor, support: Tensor, k: int, normalize: bool, first: int, backend: str | None) -> Tensor:
    """[B] or [B, k]"""
    query, support = (x.detach() if isinstance(x, Tensor) else x for x in (query, support))
    ids: Tensor = _run(Arguments(query, support, k, normalize, first), backend)
    return ids[:, 0] if k == 1 else ids


@distributed.in_step
def koleo(x: Tensor, *, eps: float = 1e-8, group: distributed.Group = None, backend: str | None = None) -> Tensor:
    """KoLeo, the regulariser that spreads a batch: -log of each row's distance to its nearest other one, the mean.

    Rows are scaled to unit length first; the gradient goes through both ends of each distance, d, whose loss is
    -log(d + eps). Equal rows have the loss -log(eps) and no gradient of their distance. Memory is linear: no [N, N]
    matrix.

    Args:
        x: [N, D], at least two rows; float32, float16, bfloat16 or float64 (float64 runs the eager reference). All is
            float32 but for the matmul operands under autocast, which have its dtype: they decide which row is nearest.
        eps: a positive number.
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies, N rows on each: neighbours come
            from all of them. The value is that of all rows, the same on every rank, and so must be what is built on
            it; gradients are W times the rank's share, which DDP's averaging makes those of the whole batch.
        backend: "cpu", "triton" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss in float32 (float64 for float64 input), 0-d.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; other shapes or another eps on other ranks (see `info_nce`).
        RuntimeError: the backend that was asked for cannot run here.

    Source: Sablayrolles et al., Spreading Vectors for Similarity Search, arXiv:1806.03198, Eq. 2.
    """
    _check.tensors("koleo", {"x": x}, {"x": Of("N D")})
    _check.positive("koleo", eps=eps)
    group = distributed.name("koleo", group)
    if x.shape[0] * distributed.size(group) < 2:
        _check.bad_value("koleo", "x", "at least 2 rows", list(x.shape))
    unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)).contiguous())
    options = distributed.options({"x": x, "eps": eps}) if group else ""
    (rows,) = distributed.gathered("koleo", group, unit, options=options)
    ids = _ids(unit, rows, 1, False, distributed.rank(group) * x.shape[0], backend)
    distance = torch.linalg.vector_norm(unit - F.embedding(ids, rows), dim=1)
    return distributed.mean(mean(-(distance + eps).log()), group)
