"""RELIC on the CPU: symmetric tiles in both directions, nothing of size B x B (csrc/cpu/relic.h). Pairs one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, empty, refuses, zeros  # noqa: F401

if TYPE_CHECKING:
    from sslops.ops.relic import Arguments


def _common(x: Arguments) -> tuple[object, ...]:
    weights = float(x.temperature), x.alpha, x.beta, x.negatives
    return x.online, x.target, *weights, x.normalize, x.operand_dtype


def forward(x: Arguments) -> tuple[Tensor, ...]:
    (*_, b, d), crops = x.online.shape, x.crops
    losses = (torch.empty if x.order is None else torch.zeros)(*crops, b, **FLOAT32)  # an order may lack rows
    found = losses, empty(*crops, 8, b), zeros(*crops, x.gradients, b, d), zeros(*crops, 1)
    if not crops:
        _forward(x, *found)
        return found
    for pair, *of_pair in zip(x.pairs(), *(each.flatten(0, 1) for each in found), strict=True):
        _forward(pair, *of_pair)
    return found


def _forward(x: Arguments, losses: Tensor, *kept: Tensor) -> None:
    found = losses if x.order is None else torch.empty_like(losses)
    _C.relic_forward(*_common(x.in_order()), x.count_exceeding, found, *kept)
    if x.order is not None:
        losses[x.order[0]] = found


def backward(grad: Tensor, x: Arguments, *saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not x.crops:
        gradients, dtemperature = _backward(grad, x, *saved)
    else:
        gradients = [torch.zeros_like(each) for each in (x.online, x.target)[: x.gradients]]
        dtemperature = torch.zeros((), **FLOAT32)
        of_pairs = zip(x.pairs(), *(each.flatten(0, 1) for each in (grad, *saved)), strict=True)
        for k, (pair, of_pair, *kept) in enumerate(of_pairs):
            shares, of_temperature = _backward(of_pair, pair, *kept)
            dtemperature += of_temperature
            for total, crop, share in zip(gradients, divmod(k, x.crops[1]), shares, strict=False):
                total[crop] += share
    return gradients[0], gradients[1] if x.gradients == 2 else x.target.new_empty(0), dtemperature


def _backward(grad: Tensor, x: Arguments, *saved: Tensor) -> tuple[list[Tensor], Tensor]:
    found = [torch.empty_like(each) for each in (x.online, x.target)[: x.gradients]]
    of_target, dtemperature = found[1] if x.gradients == 2 else None, torch.empty((), **FLOAT32)
    g = grad if x.order is None else grad.index_select(0, x.order[0])
    _C.relic_backward(g, *_common(x.in_order()), *saved, found[0], of_target, dtemperature)
    if x.order is not None:
        found = [torch.zeros_like(each).index_copy_(0, x.order[0], each) for each in found]
    return found, dtemperature
