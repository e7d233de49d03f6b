"""Patches of images: one native call each way; see csrc/cpu/gather_patches.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import call as native
from .call import call

if TYPE_CHECKING:
    from sslops.ops.gather_patches import Arguments


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return native.unsupported(device) if dtype == torch.uint8 else native.refuses(device, dtype)


def _options(x: Arguments) -> tuple[Any, ...]:
    """Of patches; and, if a pixel does not stay as it is, what it is multiplied by and what is added then, [2, C]"""
    unit, channels = 255.0 if x.images.dtype == torch.uint8 else 1.0, x.images.shape[1]
    factors = None
    if x.mean or x.std or unit != 1:
        means, stds = x.mean or [0.0] * channels, x.std or [1.0] * channels
        scale, shift = [1 / (unit * s) for s in stds], [-m / s for m, s in zip(means, stds, strict=True)]
        factors = torch.tensor([scale, shift], dtype=torch.float32, device="cpu")
    return x.height, x.width, x.layout == "hwc", factors


def forward(x: Arguments) -> Tensor:
    out = x.images.new_empty((*x.ids.shape, x.patch_values), dtype=x.dtype)
    call(x.images.device, "gather_patches", x.images, x.ids, *_options(x), out)
    return out


def backward(grad: Tensor, x: Arguments) -> Tensor:
    d_images = x.images.new_empty(x.images.shape)
    call(x.images.device, "gather_patches_backward", grad, x.ids, *_options(x), d_images)
    return d_images
