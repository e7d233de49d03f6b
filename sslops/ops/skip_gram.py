"""Word2Vec's skip-gram with negative sampling: a word tells the words around it from others, by two tables."""

from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, distributed
from .._check import Of
from .._contrastive import REDUCTIONS
from .._library import Out, is_traced, register


class Arguments(NamedTuple):
    input_weight: Annotated[Tensor, Of("V D")]
    output_weight: Annotated[Tensor, Of("W D", like="input_weight")]
    centers: Annotated[Tensor, Of("B", _check.ID_DTYPES, below=lambda x: len(x.input_weight))]
    contexts: Annotated[Tensor, Of("B", _check.ID_DTYPES, below=lambda x: len(x.output_weight))]
    negatives: Annotated[Tensor, Of("B N", _check.ID_DTYPES, below=lambda x: len(x.output_weight))]
    sparse: bool
    reduction: str
    backend: str = ""
    needs_grad: list[bool] = []  # noqa: RUF012


class Outputs(NamedTuple):
    loss: Out
    slopes: Out  # of each pair's terms by their products; empty if no gradient will be wanted
    d_center: Out  # of each pair under a gradient of 1; empty if it will not be wanted


def outputs(x: Arguments) -> Outputs:
    pairs = len(x.centers)
    slopes = (pairs if any(x.needs_grad) else 0, 1 + x.negatives.shape[1])
    d_center = (pairs if x.needs_grad[0] else 0, x.input_weight.shape[1])
    return Outputs(Out((pairs,) if x.reduction == "none" else ()), Out(slopes), Out(d_center))


def reference(x: Arguments) -> tuple[Tensor]:
    """loss [] or [B]: float32 (float64 for float64)"""
    wide = torch.promote_types(x.input_weight.dtype, torch.float32)
    ids = torch.cat([x.contexts[:, None], x.negatives], 1)
    centers = F.embedding(x.centers, x.input_weight, sparse=x.sparse).to(wide)
    logits = (F.embedding(ids, x.output_weight, sparse=x.sparse).to(wide) @ centers[:, :, None])[..., 0]
    negatives = logits[:, 1:].masked_fill(x.negatives == x.contexts[:, None], -torch.inf)
    losses = F.softplus(-logits[:, 0]) + F.softplus(negatives).sum(1)
    return (losses if x.reduction == "none" else losses.mean() if x.reduction == "mean" else losses.sum(),)


def _check_options(x: Arguments) -> None:
    _check.choice("skip_gram", "reduction", x.reduction, REDUCTIONS)
    _check.flag("skip_gram", "sparse", x.sparse)


_run = register(
    "skip_gram",
    Arguments,
    outputs,
    reference=reference,
    check=_check_options,
    gradients=("input_weight", "output_weight"),
)


@distributed.in_step
def skip_gram(
    input_weight: Tensor,
    output_weight: Tensor,
    centers: Tensor,
    contexts: Tensor,
    negatives: Tensor,
    *,
    sparse: bool = False,
    reduction: str = "mean",
    group: distributed.Group = None,
    backend: str | None = None,
) -> Tensor:
    """Word2Vec's loss of pairs of words that stood near each other, each beside some that were drawn.

    With u = input_weight[center] and v_k = output_weight[k], a pair's loss is
    -log sigmoid(<u, v_context>) - sum_n log sigmoid(-<u, v_n>), n over its negatives; one that is the context itself is
    left out, as word2vec.c has it. Rows are read where they lie: of [B, N, D] nothing is written, and of a gradient
    with sparse=True the rows that were looked at only.

    Args:
        input_weight: [V, D], of the words in the middle: nn.Embedding's weight, say. float32, float16, bfloat16 or
            float64 (float64 runs the eager reference); autocast has no say. Products and sums are float32.
        output_weight: [W, D], of the words around them, of the same dtype.
        centers: [B] int64 or int32, rows of input_weight. This and the other ids' range is checked on the CPU.
        contexts: [B] int64 or int32, rows of output_weight.
        negatives: [B, N] int64 or int32, rows of output_weight; `NegativeSampler.draw` draws them.
        sparse: gradients are sparse tensors, as nn.Embedding(sparse=True) has them and torch.optim.SparseAdam, SGD and
            Adagrad take them, of each id once, in ascending order (coalesced, though .grad does not say so: torch drops
            the mark). Not for use under torch.compile and torch.func.
        reduction: "mean" or "sum" over the pairs, or "none": [B].
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies: a mean or a sum is that of all
            ranks' pairs, however many each has, the same on every rank, and so must be what is built on it. Gradients
            are W times the rank's share, which DDP's averaging makes those of the whole batch.
        backend: "cpu" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss in float32 (float64 for float64 input). The mean of no pairs is NaN.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; other options on other ranks, or an error there (on a GPU some ranks notice choices at their
            next call, and have NaN until then, and numbers and errors not at all).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Mikolov et al., Distributed Representations of Words and Phrases and their Compositionality,
    arXiv:1310.4546, Eq. 4.
    """
    op = "skip_gram"
    group = distributed.name(op, group)
    if sparse is True and is_traced():
        _check.bad_value(
            op, "sparse", "False under torch.compile and torch.func: they know no sparse gradients", sparse
        )
    centers, contexts, negatives = map(_check.ids64, (centers, contexts, negatives))
    x = Arguments(input_weight, output_weight, centers, contexts, negatives, sparse, reduction)
    of_ranks = bool(group) and reduction == "mean"
    loss: Tensor = _run(x._replace(reduction="sum") if of_ranks else x, backend)[0]
    if not group:
        return loss
    pairs = loss.new_full((), len(centers))  # of a rank, on average
    pairs = distributed.mean(pairs, group, op, distributed.options(x._asdict()))
    if reduction == "none":
        return loss
    return distributed.mean(loss / pairs if of_ranks else loss * distributed.size(group), group)
