"""What the contrastive losses share: views that lie over ranks, the reduction over rows, and what scripts log."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _check, _torch, distributed
from ._schema import Out
from ._sums import mean, total
from .backend import kernel

REDUCTIONS = ("mean", "sum", "none")
IDS = (torch.int64, torch.int32)


def reduce(losses: Tensor, reduction: str, group: str = "", parts: int = 1) -> Tensor:
    """Of the losses of all ranks, unless it is done; "none": this rank's rows of each of their parts"""
    if not losses.dim():
        return losses
    if reduction == "mean":
        return mean(losses)
    return total(losses) if reduction == "sum" else distributed.own_rows(losses, group, parts)


def classes(ids: Tensor) -> Tensor:
    """int32 [N] of 0 .. N, equal where ids are equal; those below 0 are equal to none. (A GPU's host would wait for
    torch.unique, whose answer has a size of its own.)
    """
    if _torch.readable(ids) == "cpu" and len(ids):
        low, high = torch.aminmax(ids)
        if low.item() >= 0 and high.item() < len(ids):
            return ids.to(torch.int32, copy=True)
    ordered, order = ids.sort()
    new = (ordered != ordered.roll(1)) | (ordered < 0)
    return torch.empty_like(order).scatter(0, order, new.cumsum(0)).int()


def version(x: Tensor | None) -> int:
    """Counts in-place changes. A compiled graph keeps what it needs by itself."""
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or x.is_inference():
        return 0
    return x._version


def check_version(op: str, name: str, version: int, seen: Tensor) -> None:
    """seen: [0, the version that the forward pass saw]"""
    if seen.shape[-1:] != (max(version, 0),):
        raise RuntimeError(
            f"{op}: {name}: wanted those of the forward pass, got changed ones in its recomputation "
            "(activation checkpointing): enqueue after backward"
        )


def reduction_of_op(reduction: str, group: str) -> str:
    """The `reduction` among an op's arguments: "none" where what forward makes with it would be lost, or for nobody"""
    lost = torch.compiler.is_exporting() if torch.compiler.is_compiling() else _torch.in_func()
    return "none" if lost and not group else reduction


def is_whole(x: Any) -> bool:
    """Whether the CPU's forward also reduces the losses and makes the gradients of that"""
    return x.reduction != "none" and x.backend == "cpu" and not getattr(x, "group", "") and any(x.needs_grad)


def of_whole(x: Any, losses: tuple[int, ...], *gradients: tuple[int, ...]) -> list[Out]:
    """The result, of that shape unless it is whole, and then each of the gradients"""
    if not is_whole(x):
        return [Out(losses), *(Out((0,)) for _ in gradients)]
    return [Out(()), *(Out(shape if needed else (0,)) for shape, needed in zip(gradients, x.needs_grad, strict=True))]


def factor(x: Any, losses: int) -> float:
    """Of each loss in the whole"""
    return 1 / max(losses, 1) if x.reduction == "mean" else 1.0


def left_out(x: Any) -> list[Tensor]:
    """In the place of the gradients, where forward makes none: faster than to have them filled in"""
    return [_check.first(x).new_empty(0, dtype=torch.float32) for _ in x.needs_grad]


def scaled(gradients: Sequence[Tensor], grad: Tensor, x: Any) -> tuple[Tensor, ...]:
    """Those of the whole, found again for what forward could not leave, a second use: the same bits"""
    dtype = _check.first(x).dtype
    return tuple((each * grad).to(dtype if each.dim() else each.dtype) for each in gradients)


def wanted(gradients: Sequence[Tensor], x: Any) -> tuple[Tensor, ...]:
    return tuple(each if needed else each.new_empty(0) for each, needed in zip(gradients, x.needs_grad, strict=True))


Direction = Callable[..., tuple[Tensor, ...]]


def by_views(
    op: str,
    sizes: Callable[[Any], tuple[int, int, int]],
    gather: Callable[[Any], Tensor],
    to_kernel: Callable[..., Any],
) -> tuple[Direction, Direction]:
    """forward and backward by an op's kernels, which with a group are given the views of all ranks, the fifth output.
    Behind it are the gradients, if the first is the whole of the losses; the third and the fourth are empty then.

    sizes: V, N, D of the arguments; gather: the views of all ranks; to_kernel: from both a kernel's arguments.
    """

    def forward(x: Any) -> tuple[Tensor, ...]:
        run: Direction = kernel(x.backend, op).forward
        if x.group:
            (v, own, _), views = sizes(x), gather(x)
            return *_over_ranks(run, to_kernel(x, views), v, own), views
        views = _check.first(x).new_empty(0)
        if not is_whole(x):
            return *run(to_kernel(x)), views, *left_out(x)
        losses, logged, *gradients = with_gradients(x)
        none = losses.new_empty(0)
        return reduce(losses, x.reduction), logged, none, none.clone(), views, *wanted(gradients, x)

    def with_gradients(x: Any) -> list[Tensor]:
        v, n, _ = sizes(x)
        losses, logged, _, _, *gradients = kernel(x.backend, op).forward(to_kernel(x), factor=factor(x, v * n))
        return [losses, logged, *gradients]

    def backward(grad: Tensor, x: Any, *saved: Tensor) -> tuple[Tensor, ...]:
        _, inv_norm, stats, views = saved
        run: Direction = kernel(x.backend, op).backward
        if x.group:
            v, own, _ = sizes(x)
            grad = gradient_over_ranks(grad, x, v)
            found = run(grad, to_kernel(x, views), inv_norm, stats, distributed.part(x.group, own))
        elif is_whole(x):
            found = scaled(with_gradients(x)[2:], grad, x)
        else:
            found = run(grad, to_kernel(x), inv_norm, stats)
        return wanted(found, x)

    return forward, backward


def _over_ranks(run: Callable[..., Any], x: Any, views: int, rows: int) -> tuple[Tensor, ...]:
    """losses [V N], logged [.., V N], inv_norm and stats [.., V N] of all ranks, where a kernel's are of a Part"""
    losses, logged, inv_norm, stats = run(x, distributed.part(x.group, rows))
    found = torch.cat([losses[None], stats, logged]).unflatten(1, (views, -1))
    parts = distributed.all_gather(found, x.group, 2).flatten(1).split([1, len(stats), len(logged)])
    losses, stats, logged = (part.clone() for part in parts)
    return losses[0], logged, inv_norm, stats


def gradient_over_ranks(grad: Tensor, x: Any, views: int) -> Tensor:
    """[V N], that of all ranks' losses, from grad [V N] as this rank knows it"""
    if x.reduction != "none":
        return grad * distributed.size(x.group)
    own = distributed.own_rows(grad, x.group, parts=views)
    return distributed.all_gather(own.view(views, -1), x.group, 1).view(-1)


class Metrics(NamedTuple):
    """Means over the rows, 0-d tensors without a gradient: they can be logged later, without a synchronisation."""

    top1: Tensor  # share of the rows whose positive no negative exceeds
    top5: Tensor  # ... and at most four do
    positive_similarity: Tensor  # <query, key>, the cosine where rows are normalised


def metrics(similarity: Tensor, above: Tensor) -> Metrics:
    """From each row's <query, key> and the number of its negatives that exceed it."""
    dtype = similarity.dtype
    return Metrics((above < 1).to(dtype).mean(), (above < 5).to(dtype).mean(), mean(similarity.detach()))


class PairMetrics(NamedTuple):
    image_to_text: Metrics  # of each image's text among all texts
    text_to_image: Metrics  # of each text's image among all images


def pair_metrics(logged: Tensor) -> PairMetrics:
    similarity, of_images, of_texts = logged
    return PairMetrics(metrics(similarity, of_images), metrics(similarity, of_texts))


def exceeding(similarity: Tensor) -> Tensor:
    """[3, N] of [N, N]: the pairs', how many of its row exceed it, and how many of its column"""
    similarity = similarity.detach()
    own = similarity.diagonal()
    above = (similarity > own[:, None]).sum(1), (similarity > own).sum(0)
    return torch.stack([own, *(each.to(own.dtype) for each in above)])


def exceeding_pairs(x: Any) -> Tensor:
    """The same of all ranks by an op's kernels, [0, N] unless x.count_exceeding. Texts go round the ring, the next ones
    on their way while a rank counts, and what was counted of them goes after them, until it is home.
    """
    if not x.count_exceeding:
        return x.image.new_empty((0, len(x.image) * distributed.size(x.group)), dtype=torch.float32)
    run = kernel(x.backend, "exceeding")
    own = run.similarity(x)
    if not x.group:
        return torch.stack([own, *run.count(x, 0, own, own)])
    text, of_texts, of_image, of_text = x.text, own, torch.zeros_like(own), torch.zeros_like(own)
    last = distributed.size(x.group) - 1
    for step in range(last + 1):
        go = [text, of_texts] if step < last else [text[:0], of_texts[:0]]
        with distributed.pass_on(go, x.group) as come:
            found = run.count(x._replace(text=text), len(text) if step else 0, own, of_texts)
        of_image, of_text = of_image + found[0], of_text + found[1]
        with distributed.pass_on([of_text], x.group) as (of_text,):
            pass
        text, of_texts = come
    return distributed.all_gather(torch.stack([own, of_image, of_text]), x.group, 1)


def check_options(op: str, normalize: bool, reduction: str, return_metrics: bool) -> None:
    _check.flag(op, "normalize", normalize)
    _check.choice(op, "reduction", reduction, REDUCTIONS)
    _check.flag(op, "return_metrics", return_metrics)
