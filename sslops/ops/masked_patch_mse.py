"""The loss of MAE: the squared error on masked patches of images."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _check, _patches
from .._library_old import register
from ..backend import kernel, resolve


def reference(
    pred: Tensor, images: Tensor, mask: Tensor, height: int, width: int, norm_pix: bool, eps: float
) -> Tensor:
    """0-d, as MAE computes it, in float32 (float64 for float64); 0 where MAE's is 0 / 0"""
    wide = torch.promote_types(pred.dtype, torch.float32)
    target = _patches.patchify(images.detach().to(wide), height, width, "hwc")
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + eps).sqrt()
    weight = mask.to(wide)
    # where: a patch that is not masked does not count, whatever it holds
    errors = torch.where(weight != 0, (pred.to(wide) - target).square().mean(-1), 0.0)
    total = weight.sum()
    return (errors * weight).sum() / torch.where(total == 0, 1.0, total)


class _Arguments(NamedTuple):
    pred: Tensor
    images: Tensor
    mask: Tensor
    height: int
    width: int
    norm_pix: bool
    eps: float
    needs_grad: bool  # from forward, for a backward under a gradient of 1
    backend: str


def _check_tensors(pred: Tensor, images: Tensor, mask: Tensor, height: int, width: int) -> None:
    count = _patches.check_images("masked_patch_mse", images, height, width, _check.FLOAT_DTYPES)
    shape = [len(images), count, images.shape[1] * height * width]
    _check.floats("masked_patch_mse", "[B, L, P]", pred=pred)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        _check.floats("masked_patch_mse", "[B, L]", mask=mask)
    _check.same_device("masked_patch_mse", "images", images, pred=pred, mask=mask)
    for name, x, wanted in (("pred", pred, shape), ("mask", mask, shape[:2])):
        if list(x.shape) != wanted:
            _check.bad_value("masked_patch_mse", name, f"shape {wanted}", list(x.shape))


def _kernel_arguments(x: _Arguments) -> tuple[Any, ...]:
    _check_tensors(x.pred, x.images, x.mask, x.height, x.width)
    # A decoder's output without its class token is no contiguous tensor, but its patches are.
    pred = x.pred if x.pred.stride(2) == 1 else x.pred.contiguous()
    return pred, x.images, x.mask.float().contiguous(), x.height, x.width, x.norm_pix, x.eps


def _forward(x: _Arguments) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = kernel(x.backend, "masked_patch_mse").forward(*_kernel_arguments(x), x.needs_grad)
    return outputs


def _forward_fake(x: _Arguments) -> tuple[Tensor, ...]:
    loss = x.pred.new_empty((), dtype=torch.float32)
    ahead = x.needs_grad and x.backend == "cpu"
    return loss, torch.empty_like(loss), x.pred.new_empty(x.pred.shape if ahead else (0,))


def _backward(grad: Tensor, x: _Arguments, inverse: Tensor) -> Tensor:
    _check.scratch("masked_patch_mse", x.pred.device, grad=(grad, ()), inverse=(inverse, ()))
    d_pred: Tensor = kernel(x.backend, "masked_patch_mse").backward(grad, *_kernel_arguments(x), inverse)
    return d_pred


def _backward_fake(grad: Tensor, x: _Arguments, inverse: Tensor) -> Tensor:
    return x.pred.new_empty(x.pred.shape)


register(
    "masked_patch_mse",
    _Arguments,
    saved=("inverse", "d_pred"),
    unit="d_pred",
    gradients=("pred",),
    forward=_forward,
    forward_fake=_forward_fake,
    backward=_backward,
    backward_fake=_backward_fake,
)


def masked_patch_mse(
    pred: Tensor,
    images: Tensor,
    mask: Tensor,
    patch_size: int | tuple[int, int],
    *,
    norm_pix: bool = True,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """The loss of MAE: the squared error between predicted and true patches, averaged over the masked ones.

    Only masked patches are read. The gradient goes to `pred`; the images are the target and get none.

    Args:
        pred: [B, L, p * p * C], the predicted pixels of each patch in MAE's order: rows, columns, channels. float32,
            float16, bfloat16 or float64 (which runs the eager reference). `decoded[:, 1:]` is taken as it is.
        images: [B, C, H, W], floating point, of any strides (channels_last too).
        mask: [B, L], 1 or True where a patch was masked; bool or floating point. Other weights give a weighted mean.
        patch_size: p, or (height, width), in pixels; patches must tile the image.
        norm_pix: predict each patch less its mean, over sqrt(its unbiased variance + eps).
        eps: added to the variance, at least 0.
        backend: "cpu", "cuda" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss in float32 (float64 for float64 pred), 0-d. With nothing masked it is 0, and so is its gradient (MAE's
        own code gives NaN). norm_pix of patches of a single value gives NaN.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value.
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377, section 3.
    """
    height, width = _patches.pair("masked_patch_mse", "patch_size", patch_size)
    _check_tensors(pred, images, mask, height, width)
    _check.flag("masked_patch_mse", "norm_pix", norm_pix)
    _check.non_negative("masked_patch_mse", eps=eps)
    chosen_by = torch.float64 if images.dtype == torch.float64 else pred.dtype
    backend = resolve("masked_patch_mse", pred.device, chosen_by, backend)
    if backend == "eager":
        return reference(pred, images, mask, height, width, norm_pix, eps)
    needs_grad = pred.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    options = (height, width, norm_pix, eps, needs_grad, backend)
    loss, _, _ = torch.ops.sslops.masked_patch_mse(pred, images, mask, *options)
    return loss
