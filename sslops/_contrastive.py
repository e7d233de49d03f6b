"""What the contrastive losses share: the reduction over rows, and what scripts log."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import _check, distributed

REDUCTIONS = ("mean", "sum", "none")
IDS = (torch.int64, torch.int32)


def reduce(losses: Tensor, reduction: str, group: str = "", parts: int = 1) -> Tensor:
    """Of the losses of all ranks; "none": this rank's rows of each of their parts"""
    if reduction == "mean":
        return losses.mean()
    return losses.sum() if reduction == "sum" else distributed.own_rows(losses, group, parts)


def classes(ids: Tensor) -> Tensor:
    """int32 [N] from 0 on, equal where ids are equal; those below 0 are equal to none"""
    found = torch.unique(ids, return_inverse=True)[1]
    return torch.where(ids < 0, len(ids) + torch.arange(len(ids), device=ids.device), found).int()


class Metrics(NamedTuple):
    """Means over the rows, 0-d tensors without a gradient: they can be logged later, without a synchronisation."""

    top1: Tensor  # share of the rows whose positive no negative exceeds
    top5: Tensor  # ... and at most four do
    positive_similarity: Tensor  # <query, key>, the cosine where rows are normalised


def metrics(similarity: Tensor, above: Tensor) -> Metrics:
    """From each row's <query, key> and the number of its negatives that exceed it."""
    dtype = similarity.dtype
    return Metrics((above < 1).to(dtype).mean(), (above < 5).to(dtype).mean(), similarity.detach().mean())


def check_options(op: str, normalize: bool, reduction: str, return_metrics: bool) -> None:
    _check.flag(op, "normalize", normalize)
    _check.choice(op, "reduction", reduction, REDUCTIONS)
    _check.flag(op, "return_metrics", return_metrics)
