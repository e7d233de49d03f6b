"""SigLIP: each image and text of a batch is a pair or is none, by itself."""

from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, distributed
from .._check import Of
from .._contrastive import exceeding, exceeding_pairs, pair_metrics, scaled
from .._library import Out, register
from .._schema import SIGNED
from ..backend import kernel


class Arguments(NamedTuple):
    image: Annotated[Tensor, Of("N D", spread=True)]
    text: Annotated[Tensor, Of("N D", like="image", spread=True)]
    logit_scale: float | Tensor
    bias: SIGNED
    normalize: bool
    count_exceeding: bool  # whether to count the texts that exceed an image's own, and the images that exceed a text's
    group: str
    operand_dtype: torch.dtype = torch.float32
    backend: str = ""
    needs_grad: list[bool] = []  # noqa: RUF012


class Outputs(NamedTuple):
    loss: Out
    logged: Out  # of all ranks' pairs s_ii, how many s_ij exceed it and how many s_ji, if that is to be counted
    dimage: Out  # under a gradient of 1; empty if it will not be wanted
    dtext: Out
    dlogit_scale: Out
    dbias: Out


def outputs(x: Arguments) -> Outputs:
    shapes = (tuple(x.image.shape), tuple(x.text.shape), (), ())
    graded = (Out(shape if wanted else (0,)) for shape, wanted in zip(shapes, x.needs_grad, strict=True))
    n = x.image.shape[0] * distributed.size(x.group)
    return Outputs(Out(()), Out((3 if x.count_exceeding else 0, n)), *graded)


def reference(x: Arguments) -> tuple[Tensor, Tensor]:
    """loss [] and what is logged: the maths as it is written, float32 (float64 for float64) around a matmul in
    operand_dtype.
    """
    wide = torch.promote_types(x.image.dtype, torch.float32)
    image, text = x.image.to(wide), x.text.to(wide)
    if x.normalize:
        image, text = F.normalize(image), F.normalize(text)
    similarity = (image.to(x.operand_dtype) @ text.to(x.operand_dtype).t()).to(wide)
    logits = similarity * x.logit_scale + x.bias
    sign = 2 * torch.eye(len(image), dtype=wide, device=image.device) - 1
    loss = -F.logsigmoid(sign * logits).sum(1).mean()
    return loss, exceeding(similarity) if x.count_exceeding else similarity.detach()[:0]


# A kernel with a distributed form also takes which text is the first image's: 0, or of another rank's texts len(text),
# none.
def _find(x: Arguments) -> tuple[Tensor, ...]:
    """The loss and its gradients, in float32"""
    run = kernel(x.backend, "siglip").forward
    return _around(run, x) if x.group else tuple(run(x))


def _around(run: Callable[..., tuple[Tensor, ...]], x: Arguments) -> tuple[Tensor, ...]:
    """The ranks' images stay and their texts go round, the next ones on their way while a rank works on these. What
    others add to a text's gradient goes round a step behind it, from the rank after its own until it is home.

    A kernel's sums are over the number of texts that it sees, N / W: gradients are W times the rank's share by that.
    """
    group, behind = x.group, x.text.new_empty(0)
    with distributed.pass_on([x.text], group) as (text,):
        loss, dimage, dtext, *dnumbers = run(x)
    found = [loss, dimage, *dnumbers]
    for left in reversed(range(distributed.size(group) - 1)):
        with distributed.pass_on([text if left else text[:0], behind], group) as come:
            behind = _add(found, run(x._replace(text=text), len(text)))
        text = come[0]
        if come[1].numel():
            behind += come[1]
    with distributed.pass_on([behind], group) as (behind,):
        pass
    loss, dimage, *dnumbers = found
    return distributed.all_reduce(loss, group, "sum") / distributed.size(group), dimage, dtext.add_(behind), *dnumbers


def _add(found: list[Tensor], share: tuple[Tensor, ...]) -> Tensor:
    """To all but the texts' gradient, which is returned"""
    loss, dimage, dtext, *dnumbers = share
    for total, each in zip(found, (loss, dimage, *dnumbers), strict=True):
        total += each
    return dtext


def _forward(x: Arguments) -> tuple[Tensor, ...]:
    loss, *gradients = _find(x)
    return loss, exceeding_pairs(x), *gradients


def _backward(grad: Tensor, x: Arguments, _: Tensor) -> tuple[Tensor, ...]:
    _, *gradients = _find(x)
    return scaled(gradients, grad, x)


_run = register(
    "siglip",
    Arguments,
    outputs,
    reference=reference,
    gradients=("image", "text", "logit_scale", "bias"),
    forward=_forward,
    backward=_backward,
    unit=("dimage", "dtext", "dlogit_scale", "dbias"),
)


@distributed.in_step
def siglip(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    normalize: bool = True,
    return_metrics: bool = False,
    group: distributed.Group = None,
    backend: str | None = None,
) -> Any:
    """SigLIP's loss: for each image and each text a logistic regression of whether they are a pair.

    With x_ij = logit_scale <image_i, text_j> + bias, it is -log sigmoid(x_ii) and -log sigmoid(-x_ij), j != i, summed
    over all pairs, over N. Memory is linear in N: no [N, N] matrix. Each pair counts by itself: forward finds the loss
    and all gradients in one pass, 6 N^2 D FLOP, and backward hands them out.

    Args:
        image, text: [N, D] each, row i of one being the partner of row i of the other; float32, float16, bfloat16 or
            float64 (float64 runs the eager reference). Under autocast the matmul operands have its dtype.
        logit_scale: what multiplies the cosines: a positive number, or a tensor of one element on the embeddings'
            device, which gets its gradient and is not checked (the fused backends give NaN if it is not positive). Of a
            model that learns its logarithm, `log_scale.exp()`.
        bias: any finite number, or a 0-d tensor, which gets its gradient; open_clip's logit_bias. The default is the
            paper's: that at first nearly all are thought to be no pairs.
        normalize: scale every row to unit length first (F.normalize, eps 1e-12).
        return_metrics: return (loss, PairMetrics): `image_to_text` and `text_to_image`, each with top-1 and top-5
            accuracy of the partner among all, and the pairs' mean similarity. A pass of its own, 2 N^2 D FLOP.
        group: None, or "world" or a ProcessGroup over whose W ranks the batch lies, N / W pairs on each: the loss is
            that of all N^2 pairs, the same on every rank, and so must be what is built on it. Gradients, those of
            logit_scale and bias too, are W times the rank's share, which DDP's averaging makes those of the whole
            batch. Each rank keeps its images, and the texts go round from rank to rank in forward, their gradients with
            them: memory is linear in N / W.
        backend: "cpu", "triton" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss, 0-d, in float32 (float64 for float64 input). NaN for no pairs. With return_metrics, the pair of both.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; torch.distributed not
            initialised; other shapes or options on other ranks, or an error there (on a GPU some ranks notice shapes at
            their next call, and have NaN until then, and numbers and errors not at all).
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343, Sec. 3.2.
    """
    _check.flag("siglip", "normalize", normalize)
    _check.flag("siglip", "return_metrics", return_metrics)
    group = distributed.name("siglip", group)
    loss, logged, *_ = _run(Arguments(image, text, logit_scale, bias, normalize, return_metrics, group), backend)
    return (loss, pair_metrics(logged)) if return_metrics else loss
