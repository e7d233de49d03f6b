"""The masked patches' squared error on CUDA: two launches, and one for the gradient."""

from typing import Any

import torch
from torch import Tensor

from sslops import _C

from .device import DTYPE_CODES, launch
from .device import refuses_but_floats as refuses  # noqa: F401


def _operands(pred: Tensor, images: Tensor, mask: Tensor, height: int, width: int, norm: bool, eps: float) -> Any:
    grid = _C.Patches(images.shape, images.stride(), height, width)
    return (
        _C.PatchPrediction(pred.data_ptr(), DTYPE_CODES[pred.dtype], *pred.stride()[:2]),
        _C.PatchTarget(images.data_ptr(), DTYPE_CODES[images.dtype], grid, norm, eps),
        mask.data_ptr(),
    )


def forward(
    pred: Tensor, images: Tensor, mask: Tensor, height: int, width: int, norm: bool, eps: float, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and one over the sum of the weights (0 if they are): both float32, 0-d. No gradient yet, but [0]."""
    errors, loss, inverse = torch.empty_like(mask), mask.new_empty(()), mask.new_empty(())
    operands = _operands(pred, images, mask, height, width, norm, eps)
    launch(
        pred.device, _C.cuda_masked_patch_mse, *operands, errors.data_ptr(), loss.data_ptr(), inverse.data_ptr()
    )  # fmt: skip
    return loss, inverse, pred.new_empty(0)


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
    d_pred = pred.new_empty(pred.shape)
    operands = _operands(pred, images, mask, height, width, norm, eps)
    native = _C.cuda_masked_patch_mse_backward
    launch(pred.device, native, *operands, grad.data_ptr(), inverse.data_ptr(), d_pred.data_ptr())
    return d_pred
