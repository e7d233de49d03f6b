"""BERT's loss: the cross entropy of the masked tokens over a vocabulary, from hidden states and the last layer."""

from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, distributed
from .._check import Of
from .._contrastive import REDUCTIONS
from .._library import Out, register


class Arguments(NamedTuple):
    hidden: Annotated[Tensor, Of("N D")]
    weight: Annotated[Tensor, Of("V D")]  # of a dtype of their own, as under autocast
    labels: Annotated[Tensor, Of("N", _check.ID_DTYPES, below=lambda x: len(x.weight), ignored="ignore_index")]
    bias: Annotated[Tensor | None, Of("V")]
    ignore_index: int
    label_smoothing: float
    reduction: str
    operand_dtype: torch.dtype = torch.float32
    backend: str = ""
    needs_grad: list[bool] = []  # noqa: RUF012


class Outputs(NamedTuple):
    loss: Out
    d_hidden: Out  # under a gradient of 1; empty with reduction="none", or if it will not be wanted
    d_weight: Out
    d_bias: Out


def outputs(x: Arguments) -> Outputs:
    shapes = (
        (0,) if value is None or not wanted or x.reduction == "none" else tuple(value.shape)
        for value, wanted in zip((x.hidden, x.weight, x.bias), x.needs_grad, strict=True)
    )
    return Outputs(Out(tuple(x.labels.shape) if x.reduction == "none" else ()), *map(Out, shapes))


def reference(x: Arguments) -> tuple[Tensor]:
    """loss [], or [N] with zeros where there is no label: float32 (float64 for float64) around a matmul"""
    labelled = x.labels != x.ignore_index
    operands = x.hidden[labelled], x.weight, x.bias
    logits = F.linear(*(None if each is None else each.to(x.operand_dtype) for each in operands))  # type: ignore[arg-type]
    logits = logits.to(torch.promote_types(x.operand_dtype, torch.float32))
    options: dict[str, Any] = {"label_smoothing": x.label_smoothing, "reduction": x.reduction}
    loss = F.cross_entropy(logits, x.labels[labelled], **options)
    if x.reduction == "none":
        loss = loss.new_zeros(labelled.shape).masked_scatter(labelled, loss)
    return (loss,)


def _check_options(x: Arguments) -> None:
    op = "masked_token_cross_entropy"
    _check.count(op, "ignore_index", x.ignore_index, -(2**63), 2**63 - 1)
    _check.probability(op, label_smoothing=x.label_smoothing)
    _check.choice(op, "reduction", x.reduction, REDUCTIONS)
    if len(x.weight) == 0:
        _check.bad_value(op, "weight", "at least one row", list(x.weight.shape))


_run = register(
    "masked_token_cross_entropy",
    Arguments,
    outputs,
    reference=reference,
    check=_check_options,
    gradients=("hidden", "weight", "bias"),
    unit=("d_hidden", "d_weight", "d_bias"),
)


@distributed.in_step
def masked_token_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    group: distributed.Group = None,
    backend: str | None = None,
) -> Tensor:
    """The cross entropy of hidden @ weight.T + bias with the labels: BERT's, RoBERTa's and ModernBERT's loss.

    F.cross_entropy(F.linear(hidden, weight, bias), labels), where most labels are `ignore_index`: those rows take no
    part in the product. The logits are made in chunks of at most 256 rows, and the gradients with them, in forward:
    memory is linear in the inputs, no [N, V].

    Args:
        hidden: [N, D] or [B, L, D], any float dtype: of all tokens, masked or not.
        weight: [V, D], any float dtype: of the last layer, or the embedding it is tied to. The product's operands have
            the dtype of hidden, under autocast that of autocast. Everything else is float32 (float64 runs the eager
            reference).
        labels: [N] or [B, L], int64 or int32: in [0, V), or ignore_index: on the CPU the range is checked.
        bias: [V], any float dtype, or None.
        ignore_index: the label of tokens that do not count; `random_token_corruption` gives -100 to those.
        label_smoothing: in [0, 1], as F.cross_entropy has it: a share of each target spread over the vocabulary.
        reduction: "mean" over the labelled, "sum", or "none": the losses in the shape of labels, 0 where there is no
            label. "none" finds its gradients in backward.
        group: None, or "world" or a ProcessGroup over whose ranks the batch lies: a mean or a sum is that of all ranks'
            labelled tokens, however many each has, the same on every rank, and so must be what is built on it.
            Gradients are W times the rank's share, which DDP's averaging makes those of the whole batch.
        backend: "cpu", "cuda" or "eager"; the fastest that can run here if None (see `sslops.explain`). All are made
            of torch's own products. How many labels there are is known on the device only: a GPU is waited for once.

    Returns:
        The loss in float32 (float64 for float64 input). The mean of no labels is NaN, as F.cross_entropy's is, with
        gradients of 0.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; other options on other ranks, or an error there (on a GPU some ranks notice choices at their
            next call, and have NaN until then, and numbers and errors not at all).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Devlin et al., BERT: Pre-training of Deep Bidirectional Transformers, arXiv:1810.04805, Section 3.1.
    """
    ranks, shape = distributed.name("masked_token_cross_entropy", group), getattr(labels, "shape", ())
    labels = _check.ids64(labels)
    flat = len(shape) < 2 or not isinstance(hidden, Tensor) or hidden.shape[:-1] != shape
    if not flat and hidden.layout == labels.layout == torch.strided:  # all else is refused below
        hidden, labels = hidden.flatten(0, -2), labels.flatten()
    x = Arguments(hidden, weight, labels, bias, ignore_index, label_smoothing, reduction)
    summed = bool(ranks) and reduction == "mean"
    loss, *_ = _run(x._replace(reduction="sum") if summed else x, backend)
    if ranks:  # the labels of a rank, on average
        share = (labels != ignore_index).sum().to(loss.dtype)
        share = distributed.mean(share, ranks, "masked_token_cross_entropy", distributed.options(x._asdict()))
    if reduction == "none":
        return loss.view(shape)
    if not ranks:
        return loss
    if reduction == "sum":
        return distributed.mean(loss, ranks) * distributed.size(ranks)
    mean = distributed.mean(loss / torch.where(share == 0, 1.0, share), ranks)
    return mean + torch.where(share == 0, torch.nan, 0.0)
