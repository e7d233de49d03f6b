"""RELIC on the CPU: symmetric tiles in both directions, of which few are held until the losses are known
(csrc/cpu/relic.h). Pairs one by one.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, empty, refuses  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sslops.ops.relic import Arguments


def _common(x: Arguments) -> tuple[object, ...]:
    weights = float(x.temperature), x.alpha, x.beta, x.negatives
    return x.online, x.target, *weights, x.normalize, x.operand_dtype


def forward(x: Arguments, factor: float = 0.0) -> tuple[Tensor, ...]:
    """losses and stats; with a factor also the gradients of that times the losses' sum, in float32"""
    b, crops = x.online.shape[-2], x.crops
    losses = (torch.empty if x.order is None else torch.zeros)(*crops, b, **FLOAT32)  # an order may lack rows
    stats = empty(*crops, 8, b)
    if not crops:
        return losses, stats, *_forward(x, losses, stats, factor)
    of_pairs = zip(x.pairs(), losses.flatten(0, 1), stats.flatten(0, 1), strict=True)
    if factor:
        gradients = (_forward(*of_pair, factor) for of_pair in of_pairs)  # one pair's at a time
        return losses, stats, *_together(x, gradients, torch.float32)
    for of_pair in of_pairs:
        _forward(*of_pair, factor)
    return losses, stats


def _forward(x: Arguments, losses: Tensor, stats: Tensor, factor: float) -> tuple[Tensor, ...]:
    found = losses if x.order is None else torch.empty_like(losses)
    gradients = _memory(x, torch.float32) if factor else ()
    options = x.count_exceeding, found, stats, factor
    _C.relic_forward(*_common(x.in_order()), *options, *(gradients or (None, None, None)))
    if x.order is not None:
        losses[x.order[0]] = found
    return _as_they_came(x, *gradients) if factor else ()


def backward(grad: Tensor, x: Arguments, stats: Tensor) -> tuple[Tensor, ...]:
    if not x.crops:
        return _backward(grad, x, stats)
    of_pairs = zip(grad.flatten(0, 1), x.pairs(), stats.flatten(0, 1), strict=True)
    return _together(x, (_backward(*of_pair) for of_pair in of_pairs), x.online.dtype)


def _backward(grad: Tensor, x: Arguments, stats: Tensor) -> tuple[Tensor, ...]:
    found = _memory(x, x.online.dtype)
    g = grad if x.order is None else grad.index_select(0, x.order[0])
    _C.relic_backward(g, *_common(x.in_order()), stats, *found)
    return _as_they_came(x, *found)


def _memory(x: Arguments, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of a pair's gradients: online's, target's if it will be wanted, and the temperature's"""
    donline = torch.empty_like(x.online, dtype=dtype)
    return donline, donline.new_empty(x.target.shape if x.gradients == 2 else 0), torch.empty((), **FLOAT32)


def _as_they_came(x: Arguments, *gradients: Tensor) -> tuple[Tensor, ...]:
    """Those of rows, which are in the order that was drawn"""
    if x.order is None:
        return gradients
    return *(
        torch.zeros_like(each).index_copy_(0, x.order[0], each) if each.numel() else each for each in gradients[:2]
    ), gradients[2]


def _together(x: Arguments, of_pairs: Iterable[tuple[Tensor, ...]], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Of all crops, from those of each pair"""
    dtarget = torch.zeros_like(x.target, dtype=dtype) if x.gradients == 2 else x.target.new_empty(0)
    donline, dtemperature = torch.zeros_like(x.online, dtype=dtype), torch.zeros((), **FLOAT32)
    pairs = itertools.product(*map(range, x.crops))
    for (i, j), (of_online, of_target, of_temperature) in zip(pairs, of_pairs, strict=True):
        donline[i] += of_online
        if x.gradients == 2:
            dtarget[j] += of_target
        dtemperature += of_temperature
    return donline, dtarget, dtemperature
