"""Masked autoencoders, on top of the ops: the masking of tokens, and pictures of what was predicted."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import _check, _patches
from ._check import Of
from .ops.gather_tokens import gather_tokens
from .ops.random_mask import draw


def random_masking(
    tokens: Tensor,
    mask_ratio: float,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """MAE's random_masking: `random_mask` of the tokens' batch and length, and `gather_tokens` of those it keeps.

    Args:
        tokens: [B, L, D] float32, float16, bfloat16 or float64.
        mask_ratio, noise, generator, backend: as for `random_mask`.

    Returns:
        visible [B, K, D] with K = int(L * (1 - mask_ratio)), mask [B, L] (float32, 1 for masked), ids_restore [B, L].

    Raises:
        TypeError, ValueError, RuntimeError: as `random_mask` and `gather_tokens` do.

    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377.
    """
    op = "random_masking"
    wanted = {"tokens": Of("B L D"), "noise": Of("B L", optional=True)}
    _check.tensors(op, {"tokens": tokens, "noise": noise}, wanted)
    _check.fraction(op, mask_ratio=mask_ratio)
    batch, length, _ = tokens.shape
    ids_keep, _, mask, ids_restore = draw(op, batch, length, mask_ratio, 0, noise, generator, tokens.device, backend)
    return gather_tokens(tokens, ids_keep, unique=True, backend=backend), mask, ids_restore


def unpatchify(
    patches: Tensor, patch_size: int | tuple[int, ...], size: int | tuple[int, ...], *, layout: str = "hwc"
) -> Tensor:
    """Images of their patches, all of them in row-major order of the grid.

    Args:
        patches: [B, L, P], of any dtype.
        patch_size, size: of a patch and of the images, in pixels: (height, width), (length,) or (frames, height,
            width); a number stands for as many as the other one has, or for (height, width).
        layout: the order of a patch's values, as `gather_patches` has it: "hwc", MAE's, or "chw".

    Returns:
        [B, C, *size], with C = P / the pixels of a patch.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape or value.
    """
    op = "unpatchify"
    axes = next((len(given) for given in (size, patch_size) if isinstance(given, (tuple, list))), 2)
    sides, sizes = _patches.sides(op, "patch_size", patch_size, axes), _patches.sides(op, "size", size, axes)
    _check.choice(op, "layout", layout, ("chw", "hwc"))
    if not isinstance(patches, Tensor):
        _check.bad_type(op, "patches", "a tensor [B, L, P]", type(patches).__name__)
    if len(sides) != len(sizes) or any(side % patch for side, patch in zip(sizes, sides, strict=True)):
        _check.bad_value(op, "size", f"a size that patches of {tuple(sides)} tile", tuple(sizes))
    grid = [side // patch for side, patch in zip(sizes, sides, strict=True)]
    count, pixels = math.prod(grid), math.prod(sides)
    if patches.dim() != 3 or patches.shape[1] != count or patches.shape[2] % pixels:
        _check.bad_value(op, "patches", f"shape [B, {count}, C * {pixels}]", list(patches.shape))
    return _patches.unpatchify(patches, sides, grid, layout)


def denormalize_patches(
    pred: Tensor,
    images: Tensor,
    patch_size: int | tuple[int, ...],
    *,
    norm: str = "patch",
    eps: float = 1e-6,
    layout: str = "hwc",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Pixels of what `masked_prediction` with this norm wants predicted, by the moments of the true patches.

    Args:
        pred: [B, L, P], the predicted values of all patches; floating point.
        images, patch_size, norm, eps, layout: as for `masked_prediction`.
        mean, std: as well; the pixels are (x - mean) / std.

    Returns:
        [B, L, P], for `unpatchify`; in float32 (float64 for float64 pred). No gradient goes to the images.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value.
    """
    op = "denormalize_patches"
    wanted = {"pred": Of("B L P"), "images": Of("B C ...", _patches.PIXEL_DTYPES)}
    _check.tensors(op, {"pred": pred, "images": images}, wanted)
    sides = _patches.sides(op, "patch_size", patch_size, images)
    means, stds = _patches.numbers(op, "mean", mean), _patches.numbers(op, "std", std)
    _patches.check(op, images, sides, means, stds)
    _check.choice(op, "norm", norm, ("patch", "channel", "layer"))
    _check.choice(op, "layout", layout, ("chw", "hwc"))
    _check.non_negative(op, eps=eps)
    wide = torch.promote_types(pred.dtype, torch.float32)
    true = _patches.patchify(_patches.pixels(images.detach(), means, stds, wide), sides, layout)
    if pred.shape != true.shape:
        _check.bad_value(op, "pred", f"shape {list(true.shape)}", list(pred.shape))
    center, scale = _patches.moments(true, images.shape[1], layout, norm, eps)
    return pred.to(wide) * scale + center
