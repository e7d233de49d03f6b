"""Sinkhorn's normalisation of scores to balanced assignments, as one potential per prototype."""

from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .. import _check, distributed
from .._check import Of
from .._library import Out, register
from .._prototypes import check_prototypes, count, detached, project
from ..backend import kernel

STARTS = ("scores", "probabilities")


class Arguments(NamedTuple):
    scores: Annotated[Tensor, Of("V B D")]  # or features that are to be multiplied first
    prototypes: Annotated[Tensor | None, Of("K D")]
    unit_prototypes: bool
    temperature: float | Tensor
    iterations: int
    balanced: bool  # begins with the columns of exp(scores / temperature); else with those of each row's softmax
    ranks: str  # the group that has the other rows
    operand_dtype: torch.dtype = torch.float32
    backend: str = ""


def outputs(x: Arguments) -> Out:
    return Out((len(x.scores), count(x)))


def potentials(
    x: Arguments, columns: Callable[[Arguments], tuple[Tensor, Tensor]], mass: Callable[[Arguments, Tensor], Tensor]
) -> Tensor:
    """b [V, K] from one pass over the own rows an iteration: exp(x_i + b) is balanced over the rows i, then over k

    columns(x): a maximum of each column and the sum of exp(x - maximum). mass(x, b): the sums of each row's softmax.
    """

    def of_all(values: Tensor, how: str, first: bool = False) -> Tensor:
        if not x.ranks:
            return values
        if not first:
            return torch.ops.sslops.all_reduce(values, x.ranks, how, "")
        options = distributed.options({k: v for k, v in x._asdict().items() if k != "ranks"})
        return torch.ops.sslops.all_reduce(values, x.ranks, how, "sinkhorn", options)

    if x.balanced:
        own, sums = columns(x)
        top = of_all(own, "max", first=True)
        if x.ranks:
            sums = of_all(sums * (own - top).exp(), "sum")
        b = torch.where(sums == 0, 0.0, -top - sums.log())  # 0: no rows
    else:
        b = x.scores.new_zeros(outputs(x).shape, dtype=torch.promote_types(x.scores.dtype, torch.float32))
    for k in range(x.iterations - x.balanced):
        sums = of_all(mass(x, b), "sum", first=k == 0 and not x.balanced)
        b = b - torch.where(sums == 0, 0.0, sums.log())
    return b - b.mean(1, keepdim=True)  # small numbers have small roundings


def reference(x: Arguments) -> Tensor:
    scores = project(x.scores, x.prototypes, x.unit_prototypes, x.operand_dtype)
    logits = scores.to(torch.promote_types(scores.dtype, torch.float32)) / x.temperature

    def columns(x: Arguments) -> tuple[Tensor, Tensor]:
        lowest = logits.new_full((len(logits), 1, logits.shape[2]), torch.finfo(logits.dtype).min)
        top = torch.cat([logits, lowest], 1).amax(1)
        return top, (logits - top[:, None]).exp().sum(1)

    return potentials(x, columns, lambda x, b: (logits + b[:, None]).softmax(2).sum(1))


def _check_arguments(x: Arguments) -> None:
    _check.count("sinkhorn", "iterations", x.iterations, 1, 2**31 - 1)
    check_prototypes("sinkhorn", "scores", x)
    if x.ranks and not distributed.is_known(x.ranks):
        _check.bad_value("sinkhorn", "ranks", "the name of a process group", repr(x.ranks))


def _forward(x: Arguments) -> Tensor:
    found: Tensor = kernel(x.backend, "sinkhorn").forward(x, potentials)
    return found


_run = register("sinkhorn", Arguments, outputs, reference=reference, check=_check_arguments, forward=_forward)


@distributed.in_step
@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    *,
    temperature: float | Tensor = 0.05,
    iterations: int = 3,
    start: str = "scores",
    prototypes: Tensor | None = None,
    unit_prototypes: bool = False,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Tensor:
    """Sinkhorn's balanced assignment of a batch to K prototypes, as one potential b per prototype.

    The assignment that SwAV, DINOv2 and DINOv3 compute, exp(scores / temperature) scaled to equal column and row sums
    in turn, is softmax(scores / temperature + b): its last step scales each row to the sum 1. So `dino`, `ibot` and
    `swav` take b, and nothing of size [B, K] is written. Scores may be of any size: nothing overflows.

    Args:
        scores: [B, K], or [V, B, K] for a b each; float32, float16, bfloat16 or float64 (float64 runs the eager
            reference). They get no gradient. Rows of a queue belong below those of the batch: they count in the sums.
            With prototypes features, [B, D] or [V, B, D].
        temperature: a positive number, or a 0-d tensor on the scores' device, which is not checked (the fused backends
            give NaN if it is not positive).
        iterations: at least 1, each over prototypes and then over rows.
        start: "scores" begins with the columns of exp(scores / temperature); "probabilities" with those of each row's
            softmax, as MSN does. There a prototype without mass keeps its b, and the mass that all rows give it counts
            as none if it is below e^-87, float32's smallest normal number (e^-103 in the reference).
        prototypes [K, D], unit_prototypes: as `dino` has them: the scores are scores @ prototypes.T, of which only a
            chunk of rows is in memory. They are made again in each iteration, a product each.
        group: None, or "world" or a ProcessGroup over whose ranks the batch lies; ranks may have different numbers of
            rows. K numbers travel in an iteration, and in the first one twice.
        backend: "cpu", "triton" or "eager"; the fastest that can run if None (see `sslops.explain`).

    Returns:
        b, [K] or [V, K] in float32 (float64 for float64 input), up to a constant that cancels in the softmax: its mean
        is 0. All 0 for no rows, and all NaN if a score is.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; other K or options on other ranks, or an error there (on a GPU some ranks notice K and choices
            at their next call, and have NaN until then, and numbers and errors not at all).
        RuntimeError: the backend that was asked for cannot run here.

    Source: Caron et al., Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, arXiv:2006.09882,
    Section 3.
    """
    _check.choice("sinkhorn", "start", start, STARTS)
    ranks = distributed.name("sinkhorn", group)
    single = isinstance(scores, Tensor) and scores.dim() == 2
    _check.flag("sinkhorn", "unit_prototypes", unit_prototypes)
    layer = detached(prototypes), unit_prototypes
    x = Arguments(scores[None] if single else scores, *layer, temperature, iterations, start == "scores", ranks)
    b: Tensor = _run(x, backend)
    return b[0] if single else b
