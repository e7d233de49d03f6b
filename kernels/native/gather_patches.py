"""Patches of images: one native call each way; see csrc/cpu/gather_patches.h."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import call as native
from . import patches
from .call import call

if TYPE_CHECKING:
    from sslops.ops.gather_patches import Arguments


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return native.unsupported(device) if dtype == torch.uint8 else native.refuses(device, dtype)


def _options(x: Arguments) -> tuple[Any, ...]:
    return *patches.sizes(x.patch_size), x.layout == "hwc", patches.factors(x.images, x.mean, x.std)


def forward(x: Arguments) -> Tensor:
    out = x.images.new_empty((*x.ids.shape, x.patch_values), dtype=x.dtype)
    call(x.images.device, "gather_patches", x.images, x.ids, *_options(x), out)
    return out


def backward(grad: Tensor, x: Arguments) -> Tensor:
    d_images = x.images.new_empty(x.images.shape)
    call(x.images.device, "gather_patches_backward", grad, x.ids, *_options(x), d_images)
    return d_images
