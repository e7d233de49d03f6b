"""The masked patches' error: on the CPU one native call, which finds the gradient on its way.

The CPU's backward is the same over again, where that gradient is not at hand any more: with another gradient of the
loss than 1, a power of two, the last bit may differ. CUDA takes two launches forward, and one for the gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..cpu import memory
from . import patches
from .call import call, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.ops.masked_prediction import Arguments

# In the order of csrc/common/masked_prediction.h
LOSSES = ("squared", "l1", "smooth_l1", "cosine")
NORMS = ("", "patch", "channel", "layer")


def _operands(x: Arguments) -> tuple[Any, ...]:
    # A decoder's output without its class token is no contiguous tensor, but its patches are.
    pred = x.pred if x.pred.stride(2) == 1 else x.pred.contiguous()
    pixels = *patches.sizes(x.patch_size), x.layout == "hwc", patches.factors(x.target, x.mean, x.std)
    return pred, x.target, x.mask.float(), *pixels, NORMS.index(x.norm), x.eps, LOSSES.index(x.loss), x.beta


def forward(x: Arguments) -> tuple[Tensor, ...]:
    errors = torch.empty_like(x.mask, dtype=torch.float32)
    loss, inverse = (errors.new_empty(()) if x.reduction == "mean" else None), errors.new_empty(())
    if x.pred.is_cuda:
        call(x.pred.device, "masked_prediction", *_operands(x), errors, loss, inverse)
        return (errors if loss is None else loss), inverse
    d_pred = memory.empty(*(x.pred.shape if x.ahead else (0,)), dtype=x.pred.dtype)
    call(x.pred.device, "masked_prediction", *_operands(x), errors, loss, inverse, d_pred)
    return (errors if loss is None else loss), inverse, d_pred


def backward(grad: Tensor, x: Arguments, inverse: Tensor) -> Tensor:
    shape, dtype = x.pred.shape, x.pred.dtype
    d_pred = x.pred.new_empty(shape) if x.pred.is_cuda else memory.empty(*shape, dtype=dtype)
    call(x.pred.device, "masked_prediction_backward", *_operands(x), grad, inverse, d_pred)
    return d_pred
