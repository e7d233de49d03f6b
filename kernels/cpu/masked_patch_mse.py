"""The masked patches' squared error on the CPU: one native call each way; see csrc/cpu/masked_patch_mse.h."""

from typing import Any

import torch
from torch import Tensor

from sslops import _C

from . import memory
from .tiles import DTYPE_CODES, FLOAT32, refuses  # noqa: F401


def _operands(pred: Tensor, images: Tensor, mask: Tensor, height: int, width: int, norm: bool, eps: float) -> Any:
    grid = _C.Patches(images.shape, images.stride(), height, width)
    return (
        _C.PatchPrediction(pred.data_ptr(), DTYPE_CODES[pred.dtype], *pred.stride()[:2]),
        _C.PatchTarget(images.data_ptr(), DTYPE_CODES[images.dtype], grid, norm, eps),
        mask.data_ptr(),
    )


def forward(
    pred: Tensor, images: Tensor, mask: Tensor, height: int, width: int, norm: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """The loss, and one over the sum of the weights (0 if they are): both float32, 0-d."""
    errors = torch.empty(mask.shape, **FLOAT32)
    operands = _operands(pred, images, mask, height, width, norm, eps)
    error, weight = _C.masked_patch_mse(*operands, errors.data_ptr())
    inverse = 1 / weight if weight else 0.0
    return torch.tensor(error * inverse, **FLOAT32), torch.tensor(inverse, **FLOAT32)


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
    d_pred = memory.empty(*pred.shape, dtype=pred.dtype)
    coefficient = 2 / pred.shape[2] * float(grad) * float(inverse)
    operands = _operands(pred, images, mask, height, width, norm, eps)
    _C.masked_patch_mse_backward(*operands, coefficient, d_pred.data_ptr())
    return d_pred
