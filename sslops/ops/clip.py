"""CLIP: every image must find its text among those of the batch, and every text its image."""

from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, distributed
from .._check import Of
from .._contrastive import (
    REDUCTIONS,
    check_options,
    exceeding,
    exceeding_pairs,
    factor,
    gradient_over_ranks,
    is_whole,
    left_out,
    of_whole,
    pair_metrics,
    reduce,
    reduction_of_op,
    scaled,
    wanted,
)
from .._library import Out, register
from ..backend import kernel


class Arguments(NamedTuple):
    image: Annotated[Tensor, Of("N D", spread=True)]
    text: Annotated[Tensor, Of("N D", like="image", spread=True)]
    logit_scale: float | Tensor
    normalize: bool
    count_exceeding: bool  # whether to count the texts that exceed an image's own, and the images that exceed a text's
    group: str
    reduction: str  # if not "none", the losses of all ranks have the same gradient on all; else each knows its own's
    operand_dtype: torch.dtype = torch.float32
    backend: str = ""
    needs_grad: list[bool] = []  # noqa: RUF012


class Outputs(NamedTuple):
    """Of all ranks. s_ij = <image_i, text_j>, the rows unit if normalize and rounded to operand_dtype."""

    losses: Out
    logged: Out  # s_ii, how many s_ij exceed it and how many s_ji, if that is to be counted
    # m_i, any number that keeps exp(logit_scale (s_ij - m_i)) in range; 1 / their sum over j; the same of the columns;
    # the share of i's negatives in its row's sum and in its column's, added
    stats: Out
    texts: Out  # of all ranks, if there are others
    dimage: Out  # these instead of stats where `losses` is their whole, a number
    dtext: Out
    dlogit_scale: Out


def outputs(x: Arguments) -> Outputs:
    own, d = x.image.shape
    n = own * distributed.size(x.group)
    losses, *gradients = of_whole(x, (n,), tuple(x.image.shape), tuple(x.text.shape), ())
    return Outputs(
        losses,
        Out((3 if x.count_exceeding else 0, n)),
        Out((0,) if is_whole(x) else (5, n)),
        Out((n, d) if x.group else (0,), x.text.dtype),
        *gradients,
    )


def reference(x: Arguments) -> tuple[Tensor, Tensor]:
    """losses [N] and what is logged: the maths as it is written, float32 (float64 for float64) around a matmul in
    operand_dtype.
    """
    wide = torch.promote_types(x.image.dtype, torch.float32)
    image, text = x.image.to(wide), x.text.to(wide)
    if x.normalize:
        image, text = F.normalize(image), F.normalize(text)
    similarity = (image.to(x.operand_dtype) @ text.to(x.operand_dtype).t()).to(wide)
    logits, own = similarity * x.logit_scale, torch.arange(len(image), device=image.device)
    losses = F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.t(), own, reduction="none")
    return losses / 2, exceeding(similarity) if x.count_exceeding else similarity.detach()[:0]


# A kernel with a distributed form takes all ranks' texts, the Part that the images are, and what gathers the sums.
def _forward(x: Arguments) -> tuple[Tensor, ...]:
    none = x.text.new_empty(0)
    if is_whole(x):
        losses, *gradients = _with_gradients(x)
        return reduce(losses, x.reduction), exceeding_pairs(x), losses.new_empty(0), none, *wanted(gradients, x)
    run = kernel(x.backend, "clip").forward
    if not x.group:
        losses, stats = run(x)
        return losses, exceeding_pairs(x), stats, none, *left_out(x)
    texts, part = distributed.all_gather(x.text, x.group), distributed.part(x.group, len(x.image))
    losses, stats = run(x._replace(text=texts), part, lambda sums: distributed.all_gather(sums[None], x.group))
    return losses, exceeding_pairs(x), stats, texts


def _with_gradients(x: Arguments) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = kernel(x.backend, "clip").with_gradients(x, factor(x, len(x.image)))
    return found


def _backward(grad: Tensor, x: Arguments, _: Tensor, stats: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
    if is_whole(x):
        return wanted(scaled(_with_gradients(x)[1:], grad, x), x)
    run = kernel(x.backend, "clip").backward
    if not x.group:
        return wanted(run(grad, x, stats, None), x)
    part = distributed.part(x.group, len(x.image))
    dimage, dtext, dlogit_scale = run(gradient_over_ranks(grad, x, 1), x._replace(text=texts), stats, part)
    if x.needs_grad[1]:
        dtext = distributed.reduce_scatter(dtext, x.group, 0)
    return wanted((dimage, dtext.to(x.text.dtype), dlogit_scale), x)


_run = register(
    "clip",
    Arguments,
    outputs,
    reference=reference,
    check=lambda x: _check.choice("clip", "reduction", x.reduction, REDUCTIONS),
    gradients=("image", "text", "logit_scale"),
    forward=_forward,
    backward=_backward,
    unit=("dimage", "dtext", "dlogit_scale"),
)


@distributed.in_step
def clip(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: float | Tensor = 1 / 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    return_metrics: bool = False,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Any:
    """CLIP's loss: the cross entropy of each image's own text among all texts, and of each text's own image.

    Pair i's loss is the mean of two: -log softmax over j of logit_scale <image_i, text_j> at j = i, and the same of
    logit_scale <image_j, text_i>. Memory is linear in N: no [N, N] matrix, or none beyond 16 MB.
    One product serves both directions, 2 N^2 D FLOP forward and 8 N^2 D with both gradients; for a frozen tower, whose
    embeddings require none, 6 N^2 D. (On a CPU forward makes the gradients of a mean or a sum, which are held in
    float32 until backward, and up to N = 2048 from a product that it holds: 6 and 4 N^2 D.)

    Args:
        image, text: [N, D] each, row i of one being the partner of row i of the other; float32, float16, bfloat16 or
            float64 (float64 runs the eager reference). Under autocast the matmul operands have its dtype.
        logit_scale: what multiplies the cosines, one over a temperature: a positive number, or a tensor of one element
            on the embeddings' device, which gets its gradient and is not checked (the fused backends give NaN if it is
            not positive). Of a model that learns its logarithm, `log_scale.exp()`; to clamp it is left to you.
        normalize: scale every row to unit length first (F.normalize, eps 1e-12).
        reduction: "mean" or "sum" over the pairs, or "none": the losses [N].
        return_metrics: return (loss, PairMetrics): `image_to_text` and `text_to_image`, each with top-1 and top-5
            accuracy of the partner among all, and the pairs' mean similarity. A pass of its own, 2 N^2 D FLOP.
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies, N / W pairs on each: all ranks'
            texts and images are candidates. A mean or a sum is that of all pairs, the same on every rank, and so must
            be what is built on it; "none" gives the rank's own losses. Gradients, logit_scale's too, are W times the
            rank's share, which DDP's averaging makes those of the whole batch. Each rank takes its images' rows of the
            logits, 8 N^2 D / W FLOP; texts travel, and their gradients back. (open_clip's local_loss=True,
            gather_with_grad=True is this loss's gradient.)
        backend: "cpu", "triton" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss in float32 (float64 for float64 input): 0-d, or [N] for reduction="none". NaN for the mean of no pairs.
        With return_metrics, the pair of both.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; other shapes or options on other ranks, or an error there (on a GPU some ranks notice shapes at
            their next call, and have NaN until then, and numbers and errors not at all).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, arXiv:2103.00020,
    Fig. 3.
    """
    check_options("clip", normalize, reduction, return_metrics)
    group = distributed.name("clip", group)
    x = Arguments(image, text, logit_scale, normalize, return_metrics, group, reduction_of_op(reduction, group))
    losses, logged, *_ = _run(x, backend)
    loss = reduce(losses, reduction, group)
    return (loss, pair_metrics(logged)) if return_metrics else loss
