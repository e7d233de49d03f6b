"""The masked patches' squared error on the CPU: one native call, which finds the gradient on its way.

Backward is the same call over again, where that gradient is not at hand any more: with another gradient of the loss
than 1, a power of two, the last bit may differ. See csrc/cpu/masked_patch_mse.h.
"""

import torch
from torch import Tensor

from sslops import _C

from . import memory
from .tiles import DTYPE_CODES, FLOAT32, refuses  # noqa: F401


def _loss(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    height: int,
    width: int,
    norm: bool,
    eps: float,
    grad: float | None,
) -> tuple[float, float, Tensor]:
    """The errors' weighted sum, the weights' sum, and d_pred in the dtype of pred, or [0] if grad is None"""
    d_pred = memory.empty(*((0,) if grad is None else pred.shape), dtype=pred.dtype)
    errors = torch.empty(mask.shape, **FLOAT32)
    grid = _C.Patches(images.shape, images.stride(), height, width)
    error, weight = _C.masked_patch_mse(
        _C.PatchPrediction(pred.data_ptr(), DTYPE_CODES[pred.dtype], *pred.stride()[:2]),
        _C.PatchTarget(images.data_ptr(), DTYPE_CODES[images.dtype], grid, norm, eps),
        mask.data_ptr(), grad or 0.0, errors.data_ptr(), 0 if grad is None else d_pred.data_ptr(),
    )  # fmt: skip
    return error, weight, d_pred


def forward(
    pred: Tensor, images: Tensor, mask: Tensor, height: int, width: int, norm: bool, eps: float, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and one over the sum of the weights (0 if they are): both float32, 0-d. d_pred, or [0] if not needed"""
    operands = (pred, images, mask, height, width, norm, eps)
    error, weight, d_pred = _loss(*operands, 1.0 if needs_grad else None)
    inverse = 1 / weight if weight else 0.0
    return torch.tensor(error * inverse, **FLOAT32), torch.tensor(inverse, **FLOAT32), d_pred


def backward(
    grad: Tensor,
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    height: int,
    width: int,
    norm: bool,
    eps: float,
    inverse: Tensor,
) -> Tensor:
    """d_pred [B, L, C * height * width] in the dtype of pred"""
    return _loss(pred, images, mask, height, width, norm, eps, float(grad))[2]
