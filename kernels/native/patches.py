"""What native code takes of patches and pixels."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sizes(patch_size: Sequence[int]) -> tuple[int, ...]:
    """Frames, height and width: an image is a video of one frame, a signal an image of one row."""
    return (*(1 for _ in range(3 - len(patch_size))), *patch_size)


def factors(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor | None:
    """What a pixel of each channel is multiplied by and what is added then, [2, C]; None if it stays as it is"""
    unit, channels = 255.0 if images.dtype == torch.uint8 else 1.0, images.shape[1]
    if not mean and not std and unit == 1:
        return None
    means, stds = mean or [0.0] * channels, std or [1.0] * channels
    scale, shift = [1 / (unit * s) for s in stds], [-m / s for m, s in zip(means, stds, strict=True)]
    return torch.tensor([scale, shift], dtype=torch.float32, device="cpu")
