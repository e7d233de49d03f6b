"""The patches that a mask leaves visible, straight from the images."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _check, _patches
from .._library_old import register
from ..backend import kernel, resolve

_DTYPES = (*_check.FLOAT_DTYPES, torch.uint8)


def reference(
    images: Tensor,
    ids: Tensor,
    height: int,
    width: int,
    layout: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """[B, K, C * height * width]: normalise, patchify, gather, in float32 (float64 for float64)"""
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    if images.dtype == torch.uint8:
        x = x / 255
    if mean is not None:
        x = x - x.new_tensor(mean)[:, None, None]
    if std is not None:
        x = x / x.new_tensor(std)[:, None, None]
    patches = _patches.patchify(x, height, width, layout)
    return patches.gather(1, ids[:, :, None].expand(-1, -1, patches.shape[2])).to(dtype)


class _Arguments(NamedTuple):
    images: Tensor
    ids: Tensor
    height: int
    width: int
    layout: str
    scale: list[float]
    shift: list[float]
    operand_dtype: torch.dtype
    backend: str


def _kernel_arguments(x: _Arguments) -> tuple[Any, ...]:
    patches = _patches.check_images("gather_patches", x.images, x.height, x.width, _DTYPES)
    _check_ids(x.images, x.ids)
    _check.id_range("gather_patches", patches, ids=x.ids)
    _check.choice("gather_patches", "layout", x.layout, ("chw", "hwc"))
    for name, values in (("scale", x.scale), ("shift", x.shift)):
        if len(values) not in {0, x.images.shape[1]} or len(values) != len(x.scale):
            _check.bad_value("gather_patches", name, "one for each channel, or none of both", values)
    return x.images, x.ids.contiguous(), x.height, x.width, x.layout, x.scale, x.shift


def _forward(x: _Arguments) -> Tensor:
    out: Tensor = kernel(x.backend, "gather_patches").forward(*_kernel_arguments(x), x.operand_dtype)
    return out


def _forward_fake(x: _Arguments) -> Tensor:
    size = x.images.shape[1] * x.height * x.width
    return x.images.new_empty((*x.ids.shape, size), dtype=x.operand_dtype)


def _backward(grad: Tensor, x: _Arguments) -> Tensor:
    arguments = _kernel_arguments(x)
    size = x.images.shape[1] * x.height * x.width
    if grad.shape != (*x.ids.shape, size) or grad.dtype != x.operand_dtype or grad.device != x.images.device:
        wanted = f"{x.operand_dtype} {[*x.ids.shape, size]} on {x.images.device}"
        _check.bad_value("gather_patches", "grad", wanted, f"{grad.dtype} {list(grad.shape)} on {grad.device}")
    d_images: Tensor = kernel(x.backend, "gather_patches").backward(grad.contiguous(), *arguments)
    return d_images


def _backward_fake(grad: Tensor, x: _Arguments) -> Tensor:
    return x.images.new_empty(x.images.shape)


register(
    "gather_patches",
    _Arguments,
    gradients=("images",),
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
)


def _check_ids(images: Tensor, ids: Tensor) -> None:
    _check.ids("gather_patches", "[B, K]", ids=ids)
    _check.same_device("gather_patches", "images", images, ids=ids)
    if len(ids) != len(images):
        _check.bad_value("gather_patches", "ids", f"{len(images)} rows, as images has", list(ids.shape))


def _check_factors(name: str, values: Sequence[float] | None, channels: int) -> None:
    if values is None:
        return
    if isinstance(values, (Tensor, str)) or not isinstance(values, Sequence):
        _check.bad_type("gather_patches", name, "a sequence of numbers, one for each channel", type(values).__name__)
    if len(values) != channels:
        _check.bad_value("gather_patches", name, f"{channels} numbers, one for each channel", f"{len(values)}")
    for value in values:
        (_check.positive if name == "std" else _check.finite)("gather_patches", **{name: value})


def _factors(
    images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """For each channel: what a pixel is multiplied by, and what is added then; nothing if it stays as it is."""
    if images.dtype != torch.uint8 and mean is None and std is None:
        return [], []
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    means, stds = (values or [default] * images.shape[1] for values, default in ((mean, 0.0), (std, 1.0)))
    return [1 / (unit * s) for s in stds], [-m / s for m, s in zip(means, stds, strict=True)]


def gather_patches(
    images: Tensor,
    ids: Tensor,
    patch_size: int | tuple[int, int],
    *,
    layout: str = "chw",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """The patches `ids` of each image, each as a row, without touching the others: patchify and gather in one pass.

    Args:
        images: [B, C, H, W], float32, float16, bfloat16, float64 (which runs the eager reference) or uint8, of any
            strides (channels_last too). uint8 pixels are divided by 255.
        ids: [B, K] int64, patches in row-major order of the grid, repeated or not; K may be 0. On a CUDA device they
            are not checked: an id that is no patch gives a row of NaN, and has no gradient.
        patch_size: p, or (height, width), in pixels; patches must tile the image.
        layout: "chw", the order of a convolution's weight, or "hwc", that of MAE's patchify: rows, columns, channels.
        mean, std: C numbers each; a pixel x becomes (x - mean) / std. On CUDA, for at most 16 channels.
        dtype: of the result: float32, float16, bfloat16, or float64; that of the images if None, float32 for uint8.
        backend: "cpu", "cuda" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        [B, K, C * height * width]. Its gradient to the images is zero where no patch is, and the sum over ids that
        repeat; the same bits on every run.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value; on the CPU, ids out of range.
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: the visible patches of He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377.
    """
    height, width = _patches.pair("gather_patches", "patch_size", patch_size)
    patches = _patches.check_images("gather_patches", images, height, width, _DTYPES)
    _check_ids(images, ids)
    _check.choice("gather_patches", "layout", layout, ("chw", "hwc"))
    channels = images.shape[1]
    _check_factors("mean", mean, channels)
    _check_factors("std", std, channels)
    if dtype is None:
        dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    elif dtype not in _check.FLOAT_DTYPES:
        _check.bad_type("gather_patches", "dtype", "a floating-point dtype", dtype)
    chosen_by = torch.float64 if dtype == torch.float64 else images.dtype
    backend = resolve("gather_patches", images.device, chosen_by, backend)
    if backend == "eager":
        if not torch.compiler.is_compiling():
            _check.id_range("gather_patches", patches, ids=ids)
        return reference(images, ids, height, width, layout, mean, std, dtype)
    scale, shift = _factors(images, mean, std)
    return torch.ops.sslops.gather_patches(images, ids, height, width, layout, scale, shift, dtype, backend)
