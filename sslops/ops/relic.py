"""RELIC and RELICv2: embeddings find their other view, and two views see the rest of the batch in the same way."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, distributed
from .._contrastive import Metrics, autograd_wanted, check_options, metrics, reduce
from .._library_old import register
from .._precision import compute_dtype
from ..backend import kernel, resolve


def reference(
    online: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    alpha: float,
    beta: float,
    num_negatives: int | None,
    normalize: bool,
    operand_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """losses [B], the positives' similarities [B], how many negatives exceed them [B], the maths as it is written:
    float32 (float64 for float64) around a matmul in operand_dtype. Negatives: the next rows, in cyclic order.
    """
    n = len(online)
    wide = torch.promote_types(online.dtype, torch.float32)
    o, t = online.to(wide), target.to(wide)
    if normalize:
        o, t = F.normalize(o), F.normalize(t)
    s = (o.to(operand_dtype) @ t.to(operand_dtype).t()).to(wide)
    rows = torch.arange(n, device=s.device)
    steps = (rows - rows[:, None]).remainder(n)
    left_out = steps > (n if num_negatives is None else num_negatives)

    def log_softmax(similarities: Tensor) -> Tensor:
        return (similarities / temperature).masked_fill(left_out, float("-inf")).log_softmax(1).masked_fill(left_out, 0)

    log_p, log_q = log_softmax(s), log_softmax(s.t())
    p = log_p.exp().masked_fill(left_out, 0)
    divergence = (p * log_p).sum(1).detach() - (p * log_q).sum(1)
    positives = s.diagonal().detach()
    exceeded = (s > positives[:, None]) & (steps > 0) & ~left_out
    return beta * divergence - alpha * log_p.diagonal(), positives, exceeded.sum(1).to(wide)


class _Arguments(NamedTuple):
    online: Tensor  # [B, D]
    target: Tensor  # [B, D]
    temperature: Tensor | None  # 0-d float32, in place of tau
    tau: float
    alpha: float
    beta: float
    num_negatives: int | None  # None: all others
    normalize: bool
    operand_dtype: torch.dtype
    count_exceeding: bool  # whether to count the negatives that exceed a positive
    gradients: int  # which will be wanted: 0: none, 1: of online and temperature, 2: of target as well
    backend: str


# A backend's kernel, kernels/<backend>/relic.py, has two functions. `common` stands for
#   online, target (contiguous), temperature (float | Tensor), alpha, beta, num_negatives, normalize, operand_dtype.
# a_ij = <o_i, t_j> / tau, b_ij = <t_i, o_j> / tau, s_i = <o_i, t_i>: unit rows if normalize, rounded to operand_dtype.
# Row i's negatives are rows i + 1 .. i + num_negatives, modulo B; x = sum over them of exp(a_ij - s_i / tau), z of
# exp(b_ij - s_i / tau): p_ii = 1 / (1 + x), q_ii = 1 / (1 + z). Y_i = sum over them of p_ij (b_ij - s_i / tau).
#
# forward(*common, count_exceeding, gradients) -> losses [B], stats [8, B], of_sum, temperature_of_sum, float32:
#   losses = alpha log(1 + x) + beta KL(p_i || q_i), of_sum [gradients, B, D] and temperature_of_sum [] the gradients of
#   their sum, where the CPU has them from small batches ([0, B, D] elsewhere), and stats
#   0, 1: m_i, any maximum that keeps exp(a_ij - m_i / tau) in range, and 1 / their sum over negatives and positive
#   2, 3: the same of b
#   4: alpha + beta Y_i
#   5: pull_i = -dloss_i/d(s_i / tau) = alpha (1 - p_ii) - beta (p_ii Y_i + q_ii - p_ii)
#   6: s_i     7: how many a_ij of negatives exceed s_i / tau (0 where not asked for)
# backward(grad [B], *common, gradients, stats, of_sum, temperature_of_sum) -> donline, dtarget, dtemperature:
#   in the inputs' dtype, dtarget [0] where it is not asked for, dtemperature [] float32. Of S = o t^T / tau, off its
#   diagonal,
#   dL/dS_ij = grad_i p_ij (alpha + beta (Y_i + s_i / tau - b_ij)) where j is a negative of i
#            + grad_j beta (q_ji - p_ji) where i is a negative of j.
def _common(x: _Arguments) -> tuple[Any, ...]:
    _check.embeddings("relic", online=x.online, target=x.target)
    if x.temperature is not None:
        _check.scratch("relic", x.online.device, temperature=(x.temperature, ()))
    if x.num_negatives is not None:
        _check.count("relic", "num_negatives", x.num_negatives, 1, len(x.online) - 1)
    _check.count("relic", "gradients", x.gradients, 0, 2)
    tau = x.tau if x.temperature is None else x.temperature
    inputs = x.online.contiguous(), x.target.contiguous()
    return *inputs, tau, x.alpha, x.beta, x.num_negatives, x.normalize, x.operand_dtype


def _forward(x: _Arguments) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = kernel(x.backend, "relic").forward(*_common(x), x.count_exceeding, x.gradients)
    return outputs


def _saved_shapes(x: _Arguments) -> dict[str, tuple[int, ...]]:
    b, d = x.online.shape
    return {"stats": (8, b), "of_sum": (x.gradients if x.backend == "cpu" else 0, b, d), "temperature_of_sum": ()}


def _forward_fake(x: _Arguments) -> tuple[Tensor, ...]:
    losses = x.online.new_empty(x.online.shape[0], dtype=torch.float32)
    return losses, *(losses.new_empty(shape) for shape in _saved_shapes(x).values())


def _backward(grad: Tensor, x: _Arguments, *saved: Tensor) -> tuple[Tensor, ...]:
    _check.scratch("relic", x.online.device, grad=(grad, (len(x.online),)))
    for kept, (name, shape) in zip(saved, _saved_shapes(x).items(), strict=True):
        _check.scratch("relic", x.online.device, **{name: (kept, shape)})
    gradients: tuple[Tensor, ...] = kernel(x.backend, "relic").backward(
        grad.contiguous(), *_common(x), x.gradients, *(kept.contiguous() for kept in saved)
    )
    return gradients


def _backward_fake(grad: Tensor, x: _Arguments, *_: Tensor) -> tuple[Tensor, ...]:
    dtarget = x.target.new_empty(x.target.shape if x.gradients == 2 else 0)
    return x.online.new_empty(x.online.shape), dtarget, grad.new_empty(())


register(
    "relic",
    _Arguments,
    saved=("stats", "of_sum", "temperature_of_sum"),
    gradients=("online", "target", "temperature"),
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
)


def _check_all(
    op: str,
    embeddings: dict[str, Tensor],
    temperature: float | Tensor,
    alpha: float,
    beta: float,
    num_negatives: int | None,
    generator: torch.Generator | None,
    ranks: int,
) -> None:
    _check.embeddings(op, **embeddings)
    online = next(iter(embeddings.values()))
    _check.temperature(op, temperature, online.device)
    _check.non_negative(op, alpha=alpha, beta=beta)
    if num_negatives is not None:
        _check.count(op, "num_negatives", num_negatives, 1, len(online) * ranks - 1)
    if generator is not None and not isinstance(generator, torch.Generator):
        _check.bad_type(op, "generator", "a torch.Generator", type(generator).__name__)


def _rows(
    online: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    alpha: float,
    beta: float,
    num_negatives: int | None,
    generator: torch.Generator | None,
    normalize: bool,
    count: bool,
    operand_dtype: torch.dtype,
    group: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference`, by any backend, its negatives drawn here alike for all. Only losses are in the batch's order.

    With a group, B rows are those of all its ranks, and the order is that which rank 0 drew.
    """
    n, order = online.shape[0], None  # len() would fix it in torch.export
    if num_negatives == n - 1:
        num_negatives = None
    if num_negatives is not None:
        order = torch.randperm(n, generator=generator, device=online.device)
        if group:
            order = torch.ops.sslops.all_gather(order, group, 0, "relic's order")[:n]
        online, target = online.index_select(0, order), target.index_select(0, order)
    weights = (float(alpha), float(beta), num_negatives, normalize, operand_dtype)
    if backend == "eager":
        losses, similarity, exceeded = reference(online, target, temperature, *weights)
    else:
        tau = (temperature.float(), 0.0) if isinstance(temperature, Tensor) else (None, float(temperature))
        gradients = 2 if autograd_wanted(target) else int(autograd_wanted(online, temperature))
        losses, stats, *_ = torch.ops.sslops.relic(online, target, *tau, *weights, count, gradients, backend)
        similarity, exceeded = stats[6], stats[7]
    if order is not None:
        losses = losses.index_select(0, order.argsort())
    return losses, similarity, exceeded


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
    runs over i, its positive, and the negatives. Memory is linear in B: no [B, B] matrix.

    The divergence is sg[E_p log p] - E_p log q, sg being the stop-gradient: the value of the KL divergence, without the
    gradient of its first term. What flows is the gradient of the cross entropy -E_p log q, through p as well as through
    q, to both inputs; hence it is not zero where the views agree. For the paper's target network call this with a
    target that needs no gradient, whose work is then saved.

    Args:
        online, target: two views, [B, D] each, row k of one being the positive of row k of the other; float32, float16,
            bfloat16 or float64 (float64 runs the eager reference). Under autocast the matmul operands have its dtype.
        temperature: a positive number, or a 0-d tensor on the embeddings' device, which gets its gradient and is not
            checked (the fused backends give NaN if it is not positive). A schedule inside a compiled step should be a
            tensor: a number that changes recompiles.
        alpha, beta: weights of the contrastive term and of the divergence, at least 0.
        num_negatives: how many of the other rows are drawn as negatives, 1 to B - 1; None or B - 1: all of them, and
            nothing is drawn. One random cyclic order of the batch is drawn, and a row's negatives are those that follow
            it there: of one row, each subset is as likely as any other; the subsets of different rows depend on each
            other. Only the drawn part of the [B, B] matrix is computed.
        generator: draws the order, on the embeddings' device; the default one if None. All backends draw the same. It
            cannot be an argument of a function compiled with fullgraph=True.
        normalize: scale every row to unit length first (F.normalize, eps 1e-12).
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

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; inputs of other shapes on other ranks (on a GPU some ranks notice at their next call, and have
            NaN until then).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Mitrovic et al., Representation Learning via Invariant Causal Mechanisms, arXiv:2010.07922, Eq. 3, in the
    form of Tomasev et al., Pushing the limits of self-supervised ResNets (RELICv2), arXiv:2201.05119.
    """
    group = distributed.name("relic", group)
    inputs, ranks = {"online": online, "target": target}, distributed.size(group)
    _check_all("relic", inputs, temperature, alpha, beta, num_negatives, generator, ranks)
    check_options("relic", normalize, reduction, return_metrics)
    backend = resolve("relic", online.device, online.dtype, backend)
    operand_dtype = compute_dtype(online)
    online, target = distributed.gathered("relic", group, online, target)
    losses, *logged = _rows(
        online, target, temperature, alpha, beta, num_negatives, generator, normalize, return_metrics,
        operand_dtype, group, backend,
    )  # fmt: skip
    loss = reduce(losses, reduction, group)
    return (loss, metrics(*logged)) if return_metrics else loss


def relic_multicrop(
    online_large: Sequence[Tensor],
    online_small: Sequence[Tensor],
    target_large: Sequence[Tensor],
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
    by (L + S) L for L large and S small crops. Negatives are drawn anew for each pair.

    Args:
        online_large: the L large crops from the online network, [B, D] each.
        online_small: the S small ones, [B, D] each; may be empty.
        target_large: the large crops from the target network, in the same order, [B, D] each.
        temperature, alpha, beta, num_negatives, generator, normalize, group, backend: as `relic` has them.
        return_metrics: return (loss, Metrics), the means over all pairs.

    Returns, raises: as `relic`.

    Source: Tomasev et al., Pushing the limits of self-supervised ResNets (RELICv2), arXiv:2201.05119, the pseudocode.
    """
    op = "relic_multicrop"
    crops = {"online_large": online_large, "online_small": online_small, "target_large": target_large}
    for name, list_ in crops.items():
        if isinstance(list_, Tensor) or not isinstance(list_, Sequence):
            _check.bad_type(op, name, "a sequence of tensors [B, D]", type(list_).__name__)
    if not online_large:
        _check.bad_value(op, "online_large", "at least one crop", "none")
    if len(target_large) != len(online_large):
        _check.bad_value(op, "target_large", f"{len(online_large)} crops, as online_large has", len(target_large))
    named = {f"{name}[{k}]": x for name, list_ in crops.items() for k, x in enumerate(list_)}
    group = distributed.name(op, group)
    _check_all(op, named, temperature, alpha, beta, num_negatives, generator, distributed.size(group))
    check_options(op, normalize, "mean", return_metrics)
    backend = resolve("relic", online_large[0].device, online_large[0].dtype, backend)
    operand_dtype = compute_dtype(online_large[0])
    all_crops = distributed.gathered(op, group, *online_large, *online_small, *target_large)
    online, target = all_crops[: -len(target_large)], all_crops[-len(target_large) :]
    options = (temperature, alpha, beta, num_negatives, generator, normalize, return_metrics)
    pairs = [_rows(o, t, *options, operand_dtype, group, backend) for o, t in itertools.product(online, target)]
    losses, *logged = (torch.stack(values) for values in zip(*pairs, strict=True))
    return (losses.mean(), metrics(*logged)) if return_metrics else losses.mean()
