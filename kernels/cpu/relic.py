"""RELIC on the CPU: symmetric tiles in both directions, nothing of size B x B (csrc/cpu/relic.h). Pairs one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.ops.relic import Arguments


def _common(x: Arguments) -> tuple[object, ...]:
    weights = float(x.temperature), x.alpha, x.beta, x.negatives
    return x.online, x.target, *weights, x.normalize, x.operand_dtype


def forward(x: Arguments) -> tuple[Tensor, ...]:
    (*_, b, d), crops = x.online.shape, x.crops
    losses, stats = torch.empty(*crops, b, **FLOAT32), torch.empty(*crops, 8, b, **FLOAT32)
    of_sum = torch.zeros(*crops, x.gradients, b, d, **FLOAT32), torch.zeros(*crops, 1, **FLOAT32)
    for pair, of_pair, *kept in zip(x.pairs(), *(_by_pairs(each, x) for each in (losses, stats, *of_sum)), strict=True):
        found = of_pair if pair.order is None else torch.empty_like(of_pair)
        _C.relic_forward(*_common(pair.in_order()), x.count_exceeding, found, *kept)
        if pair.order is not None:
            of_pair[pair.order[0]] = found
    return losses, stats, *of_sum


def _by_pairs(x: Tensor, of: Arguments) -> Tensor:
    return x.flatten(0, 1) if of.crops else x[None]


def backward(grad: Tensor, x: Arguments, *saved: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    crops, alone = x.crops or (1, 1), x.order is None and x.crops in ((), (1, 1))
    new, views = torch.empty_like if alone else torch.zeros_like, (x.online, x.target)[: x.gradients]
    gradients = [new(each) for each in views]
    of_crops = [each if x.crops else each[None] for each in gradients]
    dtemperature = torch.zeros((), **FLOAT32)
    for k, (pair, g, *kept) in enumerate(zip(x.pairs(), *(_by_pairs(each, x) for each in (grad, *saved)), strict=True)):
        into = [each[of] for each, of in zip(of_crops, divmod(k, crops[1]), strict=False)]
        found, of_temperature = into if alone else [torch.empty_like(each) for each in into], torch.empty((), **FLOAT32)
        g = g if pair.order is None else g.index_select(0, pair.order[0])
        of_target = found[1] if x.gradients == 2 else None
        _C.relic_backward(g, *_common(pair.in_order()), *kept, found[0], of_target, of_temperature)
        dtemperature += of_temperature
        if not alone:
            for each, share in zip(into, found, strict=True):
                each += share if pair.order is None else torch.empty_like(share).index_copy_(0, pair.order[0], share)
    return gradients[0], gradients[1] if x.gradients == 2 else x.target.new_empty(0), dtemperature
