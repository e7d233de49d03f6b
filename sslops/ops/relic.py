"""RELIC and RELICv2: embeddings find their other view, and two views see the rest of the batch in the same way."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, distributed
from .._check import Of
from .._contrastive import (
    REDUCTIONS,
    Metrics,
    check_options,
    factor,
    is_whole,
    left_out,
    metrics,
    of_whole,
    reduce,
    reduction_of_op,
    scaled,
    wanted,
)
from .._library import Out, register
from ..backend import BACKENDS, kernel


class Arguments(NamedTuple):
    online: Annotated[Tensor, Of("...")]  # [B, D], or crops [O, B, D], each with
    target: Annotated[Tensor, Of("* ...", like="online")]  # each of these, [T, B, D]
    temperature: float | Tensor
    alpha: float
    beta: float
    num_negatives: int | None  # the rows that follow in cyclic order; None: all others
    order: Annotated[
        Tensor | None, Of("P B", _check.ID_DTYPES, below=lambda x: x.online.shape[-2])
    ]  # of the rows, for each of the pairs; None: as they come
    normalize: bool
    count_exceeding: bool  # whether to count the negatives that exceed a positive
    reduction: str  # of the losses; "none" where their gradients may differ
    operand_dtype: torch.dtype = torch.float32
    needs_grad: list[bool] = []  # noqa: RUF012
    backend: str = ""

    @property
    def gradients(self) -> int:
        """0: none, 1: of online and temperature, 2: of target as well"""
        return 2 if self.needs_grad[1] else int(any(self.needs_grad))

    @property
    def negatives(self) -> int:
        return self.online.shape[-2] - 1 if self.num_negatives is None else self.num_negatives

    @property
    def crops(self) -> tuple[int, int] | tuple[()]:
        """O, T"""
        return () if self.online.dim() == 2 else (len(self.online), len(self.target))

    def pairs(self) -> Iterator["Arguments"]:
        """[B, D] each, with an order [1, B] if they have any"""
        if not self.crops:
            yield self
            return
        for k, (online, target) in enumerate(itertools.product(self.online, self.target)):
            order = None if self.order is None else self.order[k : k + 1]
            yield self._replace(online=online, target=target, order=order)

    def in_order(self) -> "Arguments":
        """Of one pair"""
        if self.order is None:
            return self
        online, target = (x.index_select(0, self.order[0]) for x in (self.online, self.target))
        return self._replace(online=online, target=target, order=None)


class Outputs(NamedTuple):
    """s_ij = <o_i, t_j>, the rows unit if normalize and rounded to operand_dtype; p_i and q_i are the softmax, over row
    i's positive and negatives, of s_i. / tau and of s_.i / tau. All but the losses in the order that was drawn; for
    each pair of crops, [O, T, ..].
    """

    losses: Out  # alpha (-log p_ii) + beta KL(p_i || q_i)
    stats: Out  # what a kernel keeps of a row for its backward, at last s_ii and how many s_ij exceed it, if counted
    donline: Out  # these where `losses` is their whole, a number; stats are the last two then
    dtarget: Out
    dtemperature: Out


def outputs(x: Arguments) -> Outputs:
    b = x.online.shape[-2]
    losses, *gradients = of_whole(x, (*x.crops, b), tuple(x.online.shape), tuple(x.target.shape), ())
    return Outputs(losses, Out((*x.crops, 2 if is_whole(x) else 8, b)), *gradients)


def reference(x: Arguments) -> tuple[Tensor, Tensor]:
    """losses [.., B]; of each row the positive's similarity and how many negatives exceed it [.., 2, B]: the maths as
    it is written, float32 (float64 for float64) around a matmul in operand_dtype.
    """
    losses, logged = zip(*map(_of_pair, x.pairs()), strict=True)
    if not x.crops:
        return losses[0], logged[0]
    return torch.stack(losses).unflatten(0, x.crops), torch.stack(logged).unflatten(0, x.crops)


def _of_pair(given: Arguments) -> tuple[Tensor, Tensor]:
    x = given.in_order()
    n = len(x.online)
    wide = torch.promote_types(x.online.dtype, torch.float32)
    o, t = x.online.to(wide), x.target.to(wide)
    if x.normalize:
        o, t = F.normalize(o), F.normalize(t)
    s = (o.to(x.operand_dtype) @ t.to(x.operand_dtype).t()).to(wide)
    rows = torch.arange(n, device=s.device)
    steps = (rows - rows[:, None]).remainder(n)
    left_out = steps > x.negatives

    def log_softmax(similarities: Tensor) -> Tensor:
        logits = (similarities / x.temperature).masked_fill(left_out, float("-inf"))
        return logits.log_softmax(1).masked_fill(left_out, 0)

    log_p, log_q = log_softmax(s), log_softmax(s.t())
    p = log_p.exp().masked_fill(left_out, 0)
    divergence = (p * log_p).sum(1).detach() - (p * log_q).sum(1)
    positives = s.diagonal().detach()
    exceeding = (s > positives[:, None]) & (steps > 0) & ~left_out
    losses = x.beta * divergence - x.alpha * log_p.diagonal()
    if given.order is not None:
        losses = losses.index_select(0, given.order[0].argsort())
    return losses, torch.stack([positives, exceeding.sum(1).to(wide)])


def _check_arguments(x: Arguments) -> None:
    if x.online.dim() not in (2, 3) or 0 in x.online.shape[:-2]:
        _check.bad_value("relic", "online", "shape [B, D], or crops [O, B, D]", list(x.online.shape))
    if x.target.dim() != x.online.dim() or x.target.shape[-2:] != x.online.shape[-2:] or 0 in x.target.shape[:-2]:
        _check.bad_value("relic", "target", f"as many rows and columns as {list(x.online.shape)}", list(x.target.shape))
    if x.order is not None and x.order.shape != (shape := (math.prod(x.crops), x.online.shape[-2])):
        _check.bad_value("relic", "order", f"shape {list(shape)}", list(x.order.shape))
    _check.non_negative("relic", alpha=x.alpha, beta=x.beta)
    _check.choice("relic", "reduction", x.reduction, REDUCTIONS)
    if x.num_negatives is not None:
        _check.count("relic", "num_negatives", x.num_negatives, 1, x.online.shape[-2] - 1)


def _forward(x: Arguments) -> tuple[Tensor, ...]:
    if not is_whole(x):
        return *kernel(x.backend, "relic").forward(x), *left_out(x)
    losses, stats, *gradients = _with_gradients(x)
    logged = stats[..., -2:, :].clone(memory_format=torch.contiguous_format)
    return reduce(losses, x.reduction), logged, *wanted(gradients, x)


def _with_gradients(x: Arguments) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = kernel(x.backend, "relic").forward(
        x, factor(x, math.prod(x.crops) * x.online.shape[-2])
    )
    return found


def _backward(grad: Tensor, x: Arguments, stats: Tensor) -> tuple[Tensor, ...]:
    if is_whole(x):
        return wanted(scaled(_with_gradients(x)[2:], grad, x), x)
    return wanted(kernel(x.backend, "relic").backward(grad, x, stats), x)


_run = register(
    "relic",
    Arguments,
    outputs,
    reference=reference,
    check=_check_arguments,
    gradients=("online", "target", "temperature"),
    forward=_forward,
    backward=_backward,
    unit=("donline", "dtarget", "dtemperature"),
)


def _losses(
    op: str,
    online: dict[str, Tensor],
    target: dict[str, Tensor],
    options: dict[str, Any],
    generator: torch.Generator | None,
    group: distributed.Group,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Of each online with each target, under its name for messages: losses [O, T, B], of all ranks, and what is logged
    [O, T, 2, B]; of one pair [B] and [2, B].
    """
    crops = online | target
    negatives, together = options["num_negatives"], list(crops.values())
    first = together[0]
    pair = op == "relic" and isinstance(first, Tensor) and first.dim() == 2
    if group or negatives is not None or not pair:  # else the op's own checks come soon enough, and say as much
        _check.tensors(op, crops, dict.fromkeys(crops, Of("N D", like=next(iter(crops)))))
        _check.scalars(op, Arguments(first, first, order=None, **options), ["temperature"])
        _check.non_negative(op, alpha=options["alpha"], beta=options["beta"])
        if negatives is not None:
            _check.count(op, "num_negatives", negatives, 1)
    if generator is not None and not isinstance(generator, torch.Generator):
        _check.bad_type(op, "generator", "a torch.Generator", type(generator).__name__)
    if isinstance(backend, str):
        _check.choice(op, "backend", backend, BACKENDS)
    if group:
        same = distributed.options(options | {"backend": backend})
        together = [x.to(first.dtype) for x in distributed.gathered(op, group, *together, options=same)]
    order = None
    if negatives is not None and negatives >= (n := together[0].shape[0]) - 1:  # len() would fix it in torch.export
        options["num_negatives"] = None
    elif negatives is not None:
        pairs = len(online) * len(target)
        order = torch.stack([torch.randperm(n, generator=generator, device=first.device) for _ in range(pairs)])
        if group:  # that of rank 0
            order = torch.ops.sslops.all_gather(order, group, 0, "relic's order")[:pairs]
    o, t = together[: len(online)], together[len(online) :]
    views = (o[0], t[0]) if len(together) == 2 else (torch.stack(o), torch.stack(t))
    losses, logged, *_ = _run(Arguments(*views, order=order, **options), backend)
    return losses, logged[..., -2:, :] if options["count_exceeding"] else logged


@distributed.in_step
def relic(
    online: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor,
    alpha: float,
    beta: float,
    num_negatives: int | None = None,
    generator: torch.Generator | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Metrics]:
    """RELIC's loss for one pair of views: alpha (-log p_ii) + beta KL(p_i || q_i) for each row i.

    p_i is the softmax over m of <online_i, target_m> / temperature, q_i that of <target_i, online_m> / temperature; m
    runs over i, its positive, and the negatives. Memory is linear in B: no [B, B] matrix, or none beyond 16 MB. On a
    CPU forward makes the gradients of a mean or a sum, which are held in float32 until backward.

    The divergence is sg[E_p log p] - E_p log q, sg being the stop-gradient: the value of the KL divergence, without the
    gradient of its first term. What flows is the gradient of the cross entropy -E_p log q, through p as well as through
    q, to both inputs; hence it is not zero where the views agree. For the paper's target network call this with a
    target that needs no gradient, whose work is then saved.

    Args:
        online, target: two views, [B, D] each, row k of one being the positive of row k of the other; float32, float16,
            bfloat16 or float64 (float64 runs the eager reference). Under autocast the matmul operands have its dtype.
        temperature: a positive number, or a tensor of one element on the embeddings' device, which gets its gradient
            and is not checked (the fused backends give NaN if it is not positive). A schedule inside a compiled step
            should be a tensor: a number that changes recompiles.
        alpha, beta: weights of the contrastive term and of the divergence, at least 0.
        num_negatives: how many of the other rows are drawn as negatives, at least 1; None, or B - 1 and more, as in a
            small last batch: all that there are, and nothing is drawn. One random cyclic order of the batch is drawn,
            and a row's negatives are those that follow it there: of one row, each subset is as likely as any other;
            the subsets of different rows depend on each other. Only the drawn part of the [B, B] matrix is computed.
        generator: draws the order, on the embeddings' device; the default one if None. All backends draw the same. It
            cannot be an argument of a function compiled with fullgraph=True.
        normalize: scale every row to unit length first (F.normalize, eps 1e-12). Without, rows may have logits of
            thousands, beside which float32 rounds a small divergence: one of 2e-3 between logits of 8000 has four
            digits on a CPU, as in the reference, and three with Triton.
        reduction: "mean" or "sum" over the B rows, or "none": the losses [B].
        return_metrics: return (loss, Metrics(top1, top5, positive_similarity)), the accuracy of online_i in finding
            target_i among its negatives.
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies, B / W rows on each. Every rank goes
            through the gathered batch as one process would. A mean or a sum is that of all rows, and so are the
            metrics, the same on every rank, and so must be what is built on it; "none" gives the rank's own losses.
            Gradients are W times the rank's share, which DDP's averaging makes those of the whole batch (the
            temperature's is the whole batch's on every rank). Rank 0 draws the order.
        backend: "cpu", "triton" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss in float32 (float64 for float64 input): 0-d, or [B] for reduction="none". NaN for the mean of no rows.
        With return_metrics, the pair.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; other shapes or options on other ranks, or an error there (on a GPU some ranks notice shapes at
            their next call, and have NaN until then, and numbers and errors not at all).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Mitrovic et al., Representation Learning via Invariant Causal Mechanisms, arXiv:2010.07922, Eq. 3, in the
    form of Tomasev et al., Pushing the limits of self-supervised ResNets (RELICv2), arXiv:2201.05119.
    """
    check_options("relic", normalize, reduction, return_metrics)
    group = distributed.name("relic", group)
    options = {
        "temperature": temperature, "alpha": alpha, "beta": beta, "num_negatives": num_negatives,
        "normalize": normalize, "count_exceeding": return_metrics, "reduction": reduction_of_op(reduction, ""),
    }  # fmt: skip
    losses, logged = _losses("relic", {"online": online}, {"target": target}, options, generator, group, backend)
    loss = reduce(losses, reduction, group)
    return (loss, metrics(*logged)) if return_metrics else loss


@distributed.in_step
def relic_multicrop(
    online_large: Tensor | Sequence[Tensor],
    online_small: Tensor | Sequence[Tensor],
    target_large: Tensor | Sequence[Tensor],
    *,
    temperature: float | Tensor,
    alpha: float,
    beta: float,
    num_negatives: int | None = None,
    generator: torch.Generator | None = None,
    normalize: bool = True,
    return_metrics: bool = False,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Metrics]:
    """RELICv2's loss for multiple crops: `relic` (mean over rows) of every online crop with every large target crop.

    The sum over large x large pairs, a crop with itself in the other network included, and small x large pairs, divided
    by (L + S) L for L large and S small crops. Negatives are drawn anew for each pair. Triton's kernels have all pairs
    at once, and as many gradients [B, D] of theirs beside each other.

    Args:
        online_large: the L large crops from the online network, [B, D] each, or [L, B, D].
        online_small: the S small ones, [B, D] each or [S, B, D]; may be empty.
        target_large: the large crops from the target network, in the same order, [B, D] each or [L, B, D].
        temperature, alpha, beta, num_negatives, generator, normalize, group, backend: as `relic` has them.
        return_metrics: return (loss, Metrics), the means over all pairs.

    Returns, raises: as `relic`.

    Source: Tomasev et al., Pushing the limits of self-supervised ResNets (RELICv2), arXiv:2201.05119, the pseudocode.
    """
    op = "relic_multicrop"
    crops = {"online_large": online_large, "online_small": online_small, "target_large": target_large}
    named = []
    for name, given in crops.items():
        if not (given.dim() == 3 if isinstance(given, Tensor) else isinstance(given, Sequence)):
            got = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            _check.bad_type(op, name, "tensors [B, D] in a sequence, or [V, B, D]", got)
        named.append({f"{name}[{k}]": x for k, x in enumerate(given)})
    if not named[0]:
        _check.bad_value(op, "online_large", "at least one crop", "none")
    if len(named[2]) != len(named[0]):
        _check.bad_value(op, "target_large", f"{len(named[0])} crops, as online_large has", len(named[2]))
    check_options(op, normalize, "mean", return_metrics)
    group = distributed.name(op, group)
    options = {
        "temperature": temperature, "alpha": alpha, "beta": beta, "num_negatives": num_negatives,
        "normalize": normalize, "count_exceeding": return_metrics, "reduction": reduction_of_op("mean", ""),
    }  # fmt: skip
    losses, logged = _losses(op, named[0] | named[1], named[2], options, generator, group, backend)
    loss = reduce(losses, "mean")
    return (loss, metrics(*logged.unbind(-2))) if return_metrics else loss
