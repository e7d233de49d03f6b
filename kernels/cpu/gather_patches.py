"""Patches of images on the CPU: one native call each way; see csrc/cpu/gather_patches.h."""

from typing import Any

import torch
from torch import Tensor

from sslops import _C

from . import memory, tiles

_CODES = tiles.DTYPE_CODES | {torch.uint8: 4}


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype in _CODES else tiles.refuses(device, dtype)


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
    out = memory.empty(*ids.shape, images.shape[1] * height * width, dtype=dtype)
    patches = _patches(images, ids, height, width, layout)
    _C.gather_patches(*patches, scale, shift, out.data_ptr(), _CODES[dtype])
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
    d_images = memory.empty(*images.shape, dtype=images.dtype)
    patches = _patches(d_images, ids, height, width, layout)
    _C.gather_patches_backward(*patches, scale, grad.data_ptr(), _CODES[grad.dtype])
    return d_images
