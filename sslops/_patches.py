"""Patches of images [B, C, ...] with one, two or three sizes: row-major over the grid, and in themselves."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _check

PIXEL_DTYPES = (*_check.FLOAT_DTYPES, torch.uint8)


def sides(op: str, argument: str, value: int | Sequence[int], axes: Any) -> list[int]:
    """A number of pixels, or one for each size, as the latter. axes: how many sizes, or the images that have them."""
    axes = axes.dim() - 2 if isinstance(axes, Tensor) else axes if isinstance(axes, int) else 1
    found: list[Any] = list(value) if isinstance(value, (tuple, list)) else [value] * max(1, min(3, axes))
    if not found or not all(isinstance(side, (int, torch.SymInt)) and not isinstance(side, bool) for side in found):
        _check.bad_type(op, argument, "an int or a tuple of ints", repr(value))
    if min(found) < 1:
        _check.bad_value(op, argument, "at least 1 pixel", repr(value))
    return found


def numbers(op: str, name: str, values: Sequence[float] | None) -> list[float]:
    """mean or std as a list, empty for None"""
    if values is None:
        return []
    if isinstance(values, (Tensor, str)) or not isinstance(values, Sequence):
        _check.bad_type(op, name, "a sequence of numbers, one for each channel", type(values).__name__)
    return list(values)


def grid(images: Tensor, patch_size: Sequence[int]) -> list[int]:
    return [side // patch for side, patch in zip(images.shape[2:], patch_size, strict=True)]


def count(images: Tensor, patch_size: Sequence[int]) -> int:
    """Of the patches in each of the images"""
    return math.prod(grid(images, patch_size))


def check(
    op: str,
    images: Tensor,
    patch_size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    name: str = "images",
) -> None:
    """That the patches tile the images, and that mean and std are there for every channel, or for none."""
    channels, *size = images.shape[1:]
    if not 1 <= len(size) <= 3 or channels < 1:
        _check.bad_value(op, name, "shape [B, C, ...] with a channel and 1 to 3 sizes", list(images.shape))
    if len(patch_size) != len(size):
        _check.bad_value(op, "patch_size", f"{len(size)} numbers of pixels, as the images have", list(patch_size))
    if min(patch_size) < 1:
        _check.bad_value(op, "patch_size", "at least 1 pixel", list(patch_size))
    if any(side % patch or not side for side, patch in zip(size, patch_size, strict=True)):
        _check.bad_value(op, name, f"a size that patches of {_by(patch_size)} tile", _by(size))
    for option, values, each in (("mean", mean, _check.finite), ("std", std, _check.positive)):
        if len(values) not in (0, channels):
            _check.bad_value(op, option, f"{channels} numbers, one for each channel", len(values))
        for value in values:
            each(op, **{option: value})


def _by(sizes: Sequence[int]) -> str:
    return " x ".join(map(str, sizes))


def pixels(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """(x - mean) / std of each channel in `dtype`, bytes over 255"""
    channel = (-1, *(1 for _ in images.shape[2:]))
    values = images.to(dtype)
    if images.dtype == torch.uint8:
        values = values / 255
    if mean:
        values = values - values.new_tensor(mean).view(channel)
    return values / values.new_tensor(std).view(channel) if std else values


def patchify(images: Tensor, patch_size: Sequence[int], layout: str) -> Tensor:
    """[B, L, P]: each patch in the order of a convolution's weight ("chw") or of MAE's ("hwc")."""
    n = len(patch_size)
    for axis, side in enumerate(patch_size, 2):
        images = images.unfold(axis, side, side)  # at last [B, C, *grid, *patch]
    of_grid, of_patch = range(2, 2 + n), range(2 + n, 2 + 2 * n)
    order = (0, *of_grid, 1, *of_patch) if layout == "chw" else (0, *of_grid, *of_patch, 1)
    return images.permute(order).flatten(1 + n).flatten(1, n)


def unpatchify(patches: Tensor, patch_size: Sequence[int], grid: Sequence[int], layout: str) -> Tensor:
    """And back, [B, C, *spatial]"""
    n = len(patch_size)
    channels = patches.shape[2] // math.prod(patch_size)
    values = (channels, *patch_size) if layout == "chw" else (*patch_size, channels)
    x = patches.reshape(len(patches), *grid, *values)  # [B, *grid, C, *patch] or [B, *grid, *patch, C]
    at = 2 + n if layout == "chw" else 1 + n  # of the patch's first size
    pairs = [axis for k in range(n) for axis in (1 + k, at + k)]
    x = x.permute(0, 1 + n if layout == "chw" else 1 + 2 * n, *pairs)
    return x.reshape(len(patches), channels, *(g * p for g, p in zip(grid, patch_size, strict=True)))


def moments(patches: Tensor, channels: int, layout: str, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """What is subtracted from each value of patches [B, L, P] and what they are divided by then"""
    groups, axis = patches, -1
    if norm == "channel":
        groups = patches.unflatten(-1, (-1, channels) if layout == "hwc" else (channels, -1))
        axis = -2 if layout == "hwc" else -1
    mean = groups.mean(axis, keepdim=True)
    variance = groups.var(axis, keepdim=True, correction=0 if norm == "layer" else 1)
    scale = variance.sqrt() + eps if norm == "channel" else (variance + eps).sqrt()
    if norm != "channel":
        return mean, scale
    return mean.expand_as(groups).flatten(-2), scale.expand_as(groups).flatten(-2)
