"""Patches of images on CUDA: one launch each way; see csrc/cuda/gather_patches.h."""

from typing import Any

import torch
from torch import Tensor

from sslops import _C

from . import device as on

_CODES = on.DTYPE_CODES | {torch.uint8: 4}


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return on.refuses(device, dtype) if dtype == torch.uint8 else on.refuses_but_floats(device, dtype)


def _patches(x: Tensor, ids: Tensor, height: int, width: int, layout: str) -> tuple[Any, ...]:
    grid = _C.Patches(x.shape, x.stride(), height, width)
    return x.data_ptr(), _CODES[x.dtype], grid, ids.data_ptr(), ids.shape[1], ("chw", "hwc").index(layout)


def forward(
    images: Tensor,
    ids: Tensor,
    height: int,
    width: int,
    layout: str,
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
) -> Tensor:
    """[B, K, C * height * width] in `dtype`"""
    if len(scale) > _C.CUDA_MAX_CHANNELS:
        raise ValueError(f"gather_patches: mean, std: wanted at most {_C.CUDA_MAX_CHANNELS} channels, got {len(scale)}")
    out = images.new_empty(*ids.shape, images.shape[1] * height * width, dtype=dtype)
    patches = _patches(images, ids, height, width, layout)
    on.launch(images.device, _C.cuda_gather_patches, *patches, scale, shift, out.data_ptr(), _CODES[dtype])
    return out


def backward(
    grad: Tensor,
    images: Tensor,
    ids: Tensor,
    height: int,
    width: int,
    layout: str,
    scale: list[float],
    shift: list[float],
) -> Tensor:
    """d_images [B, C, H, W], contiguous"""
    d_images = images.new_empty(images.shape)
    patches = _patches(d_images, ids, height, width, layout)
    native = _C.cuda_gather_patches_backward
    on.launch(images.device, native, *patches, scale, grad.data_ptr(), _CODES[grad.dtype])
    return d_images
