"""The loss of MAE: the squared error on masked patches of images."""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .. import _check, _patches
from .._check import Of
from .._library import Out, register


class Arguments(NamedTuple):
    pred: Annotated[Tensor, Of("B L P", strided=True)]
    images: Annotated[Tensor, Of("B C ...", _patches.PIXEL_DTYPES, strided=True)]
    mask: Annotated[Tensor, Of("B M")]  # M = L, as the images say
    patch_size: list[int]  # one for each size of the images
    mean: list[float]  # [C], or none
    std: list[float]
    norm_pix: bool
    eps: float
    ahead: bool  # d_pred in forward, for a backward under a gradient of 1; on the CPU
    backend: str = ""


class Outputs(NamedTuple):
    loss: Out
    inverse: Out  # one over the sum of the weights; 0 if they are
    d_pred: Out  # under a gradient of 1, if ahead


def outputs(x: Arguments) -> Outputs:
    ahead = x.ahead and x.backend == "cpu"
    return Outputs(Out(()), Out(()), Out(tuple(x.pred.shape) if ahead else (0,), x.pred.dtype))


def reference(x: Arguments) -> tuple[Tensor]:
    """loss [], as MAE computes it, in float32 (float64 for float64); 0 where MAE's is 0 / 0"""
    wide = torch.promote_types(x.pred.dtype, torch.float32)
    target = _patches.patchify(_patches.pixels(x.images.detach(), x.mean, x.std, wide), x.patch_size, "hwc")
    if x.norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + x.eps).sqrt()
    weight = x.mask.to(wide)
    # where: a patch that is not masked does not count, whatever it holds
    difference = torch.where(weight[..., None] != 0, x.pred.to(wide) - target, 0.0)
    total = weight.sum()
    return ((difference.square().mean(-1) * weight).sum() / torch.where(total == 0, 1.0, total),)


def _check_shapes(x: Arguments) -> None:
    op = "masked_patch_mse"
    _patches.check(op, x.images, x.patch_size, x.mean, x.std)
    wanted = [len(x.images), _patches.count(x.images, x.patch_size), x.images.shape[1] * math.prod(x.patch_size)]
    for name, tensor, shape in (("pred", x.pred, wanted), ("mask", x.mask, wanted[:2])):
        if list(tensor.shape) != shape:
            _check.bad_value(op, name, f"shape {shape}", list(tensor.shape))
    _check.non_negative(op, eps=x.eps)


_run = register(
    "masked_patch_mse",
    Arguments,
    outputs,
    reference=reference,
    check=_check_shapes,
    gradients=("pred",),
    unit="d_pred",
)


def masked_patch_mse(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    patch_size: int | tuple[int, ...],
    *,
    norm_pix: bool = True,
    eps: float = 1e-6,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """The loss of MAE: the squared error between predicted and true patches, averaged over the masked ones.

    Only masked patches are read. The gradient goes to `pred`; the images are the target and get none.

    Args:
        pred: [B, L, p * p * C], the predicted pixels of each patch in MAE's order: (frames,) rows, columns, channels.
            float32, float16, bfloat16 or float64 (which runs the eager reference). `decoded[:, 1:]` is taken as it is.
        images: [B, C, H, W], or signals [B, C, W], or videos and volumes [B, C, T, H, W]; floating point, or uint8,
            which is divided by 255; of any strides (channels_last too).
        mask: [B, L], 1 or True where a patch was masked; of any dtype. Other weights give a weighted mean.
        patch_size: in pixels, one number or one for each size of the images: (height, width); patches must tile them.
        norm_pix: predict each patch less its mean, over sqrt(its unbiased variance + eps).
        eps: added to the variance, at least 0.
        mean, std: C numbers each; a pixel x of the images becomes (x - mean) / std. On CUDA, for at most 16 channels.
        backend: "cpu", "cuda" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss in float32 (float64 for float64 pred), 0-d. With nothing masked it is 0, and so is its gradient (MAE's
        own code gives NaN). norm_pix of patches of a single value gives NaN.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value.
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377, section 3.
    """
    op = "masked_patch_mse"
    sides = _patches.sides(op, "patch_size", patch_size, images)
    means, stds = _patches.numbers(op, "mean", mean), _patches.numbers(op, "std", std)
    _check.flag(op, "norm_pix", norm_pix)
    if isinstance(mask, Tensor) and isinstance(pred, Tensor) and not mask.is_complex():
        mask = mask.to(torch.promote_types(pred.dtype, torch.float32))
    needs_grad = torch.is_grad_enabled() and isinstance(pred, Tensor) and pred.requires_grad
    ahead = needs_grad and not torch.compiler.is_compiling()
    x = Arguments(pred, images, mask, sides, means, stds, norm_pix, eps, ahead)
    loss: Tensor = _run(x, backend)[0]
    return loss
