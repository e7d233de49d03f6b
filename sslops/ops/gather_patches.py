"""The patches that a mask leaves visible, straight from the images."""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .. import _check, _patches
from .._check import Of
from .._library import Out, register


class Arguments(NamedTuple):
    images: Annotated[Tensor, Of("B C ...", _patches.PIXEL_DTYPES, strided=True)]
    ids: Annotated[Tensor, Of("B K", _check.ID_DTYPES, below=lambda x: _patches.count(x.images, x.patch_size))]
    patch_size: list[int]  # one for each size of the images
    layout: str
    mean: list[float]  # [C], or none
    std: list[float]
    dtype: torch.dtype  # of the result
    backend: str = ""

    @property
    def patch_values(self) -> int:
        return self.images.shape[1] * math.prod(self.patch_size)


def outputs(x: Arguments) -> Out:
    return Out((*x.ids.shape, x.patch_values), x.dtype)


def reference(x: Arguments) -> Tensor:
    """[B, K, C * patch]: normalise, patchify, gather, in float32 (float64 for float64)"""
    pixels = _patches.pixels(x.images, x.mean, x.std, torch.promote_types(x.images.dtype, torch.float32))
    patches = _patches.patchify(pixels, x.patch_size, x.layout)
    return patches.gather(1, x.ids[:, :, None].expand(-1, -1, patches.shape[2])).to(x.dtype)


def _check_options(x: Arguments) -> None:
    op = "gather_patches"
    _patches.check(op, x.images, x.patch_size, x.mean, x.std)
    _check.choice(op, "layout", x.layout, ("chw", "hwc"))
    if not (isinstance(x.dtype, torch.dtype) and x.dtype in _check.FLOAT_DTYPES):
        _check.bad_type(op, "dtype", "a floating-point dtype", x.dtype)


_run = register("gather_patches", Arguments, outputs, reference=reference, check=_check_options, gradients=("images",))


def gather_patches(
    images: Tensor,
    ids: Tensor,
    patch_size: int | tuple[int, ...],
    *,
    layout: str = "chw",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The patches `ids` of each image, each as a row, without touching the others: patchify and gather in one pass.

    Args:
        images: [B, C, H, W], or signals [B, C, W], or videos and volumes [B, C, T, H, W]; float32, float16, bfloat16,
            float64 (which runs the eager reference) or uint8, of any strides (channels_last too). uint8 pixels are
            divided by 255.
        ids: [B, K] int64 or int32, patches in row-major order of the grid, repeated or not; K may be 0. On a CUDA
            device they are not checked: an id that is no patch gives a row of NaN, and has no gradient.
        patch_size: in pixels, one number or one for each size of the images: (height, width); patches must tile them.
        layout: "chw", the order of a convolution's weight, or "hwc", that of MAE's patchify, channels last: rows,
            columns, channels; in a video frames come before rows.
        mean, std: C numbers each; a pixel x becomes (x - mean) / std. On CUDA, for at most 16 channels.
        dtype: of the result: float32, float16, bfloat16, or float64; that of the images if None, float32 for uint8.
        backend: "cpu", "cuda" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        [B, K, P], P = C * height * width being the values of a patch. Its gradient to the images is zero where no patch
        is, and the sum over ids that repeat; the same bits on every run.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; on the CPU, ids out of range.
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: the visible patches of He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377.
    """
    op = "gather_patches"
    sides = _patches.sides(op, "patch_size", patch_size, images)
    if dtype is None:
        images_dtype = getattr(images, "dtype", torch.float32)
        dtype = torch.float32 if images_dtype == torch.uint8 else images_dtype
    means, stds = _patches.numbers(op, "mean", mean), _patches.numbers(op, "std", std)
    out: Tensor = _run(Arguments(images, _check.ids64(ids), sides, layout, means, stds, dtype), backend)
    return out
