"""Losses of masked prediction: the error of what was predicted of masked patches, pixels or features."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, _patches
from .._check import Of
from .._library import Out, register


class Arguments(NamedTuple):
    pred: Annotated[Tensor, Of("B L P", strided=True)]
    target: Annotated[Tensor, Of("B C ...", _patches.PIXEL_DTYPES, strided=True)]  # features: [B, 1, L, P]
    mask: Annotated[Tensor, Of("B M")]  # M = L, as the target says
    patch_size: list[int]  # one for each size of the target
    layout: str
    mean: list[float]  # [C], or none
    std: list[float]
    norm: str  # or ""
    eps: float
    loss: str
    beta: float
    reduction: str
    ahead: bool  # d_pred in forward, for a backward under a gradient of 1; on the CPU
    backend: str = ""


class Outputs(NamedTuple):
    loss: Out
    inverse: Out  # one over the sum of the weights; 0 if they are
    d_pred: Out  # under a gradient of 1, if ahead


def outputs(x: Arguments) -> Outputs:
    ahead = x.ahead and x.backend == "cpu"
    loss = Out(() if x.reduction == "mean" else tuple(x.mask.shape))
    return Outputs(loss, Out(()), Out(tuple(x.pred.shape) if ahead else (0,), x.pred.dtype))


def reference(x: Arguments) -> tuple[Tensor]:
    """loss [], or errors [B, L], in float32 (float64 for float64); 0 where MAE's is 0 / 0"""
    wide = torch.promote_types(x.pred.dtype, torch.float32)
    pixels = _patches.pixels(x.target.detach(), x.mean, x.std, wide)
    target = _patches.patchify(pixels, x.patch_size, x.layout)
    if x.norm:
        mean, scale = _patches.moments(target, x.target.shape[1], x.layout, x.norm, x.eps)
        target = (target - mean) / scale
    weight = x.mask.to(wide)
    # where: a patch that is not masked does not count, whatever it holds
    pred, target = (torch.where(weight[..., None] != 0, each, 0.0) for each in (x.pred.to(wide), target))
    if x.loss == "cosine":
        errors = 1 - (F.normalize(pred, dim=-1) * F.normalize(target, dim=-1)).sum(-1)
    elif x.loss == "smooth_l1":
        errors = F.smooth_l1_loss(pred, target, beta=x.beta, reduction="none").mean(-1)
    else:
        difference = pred - target
        errors = (difference.square() if x.loss == "squared" else difference.abs()).mean(-1)
    if x.reduction == "none":
        return (errors * weight,)
    total = weight.sum()
    return ((errors * weight).sum() / torch.where(total == 0, 1.0, total),)


def _check_options(x: Arguments) -> None:
    op = "masked_prediction"
    _patches.check(op, x.target, x.patch_size, x.mean, x.std, "target")
    wanted = [len(x.target), _patches.count(x.target, x.patch_size), x.target.shape[1] * math.prod(x.patch_size)]
    for name, tensor, shape in (("pred", x.pred, wanted), ("mask", x.mask, wanted[:2])):
        if list(tensor.shape) != shape:
            _check.bad_value(op, name, f"shape {shape}", list(tensor.shape))
    _check.choice(op, "layout", x.layout, ("chw", "hwc"))
    _check.choice(op, "norm", x.norm, ("", "patch", "channel", "layer"))
    _check.choice(op, "loss", x.loss, ("squared", "l1", "smooth_l1", "cosine"))
    _check.choice(op, "reduction", x.reduction, ("mean", "none"))
    _check.non_negative(op, eps=x.eps)
    _check.positive(op, beta=x.beta)
    if x.ahead and x.reduction == "none":
        _check.bad_value(op, "ahead", "False beside reduction='none'", x.ahead)


_run = register(
    "masked_prediction",
    Arguments,
    outputs,
    reference=reference,
    check=_check_options,
    gradients=("pred",),
    unit="d_pred",
)


def _is_real(x: Any) -> bool:
    return isinstance(x, Tensor) and not (x.is_complex() or x.is_quantized)


def masked_prediction(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    patch_size: int | tuple[int, ...] | None = None,
    *,
    loss: str = "squared",
    beta: float = 1.0,
    norm: str | None = None,
    eps: float = 1e-6,
    layout: str = "hwc",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """The error between predicted and true patches, or features, averaged over the masked ones.

    MAE and SparK: norm="patch". VideoMAE: norm="channel". SimMIM: loss="l1", of a convolution's pixels layout="chw".
    data2vec: loss="smooth_l1" on a teacher's features; I-JEPA: with norm="layer", eps=1e-5. EVA and others that predict
    features of CLIP: loss="cosine". Only masked patches are read. The gradient goes to `pred`; the target gets none.

    Args:
        pred: [B, L, P], the P values predicted of each patch. float32, float16, bfloat16 or float64 (which runs the
            eager reference). `decoded[:, 1:]` is taken as it is.
        target: with a patch_size, images [B, C, H, W], or signals [B, C, W], or videos and volumes [B, C, T, H, W];
            without, patches or features [B, L, P]. Floating point, or uint8, which is divided by 255; of any strides.
        mask: [B, L], 1 or True where a patch was masked; of any dtype. Other weights give a weighted mean.
        patch_size: in pixels, one number or one for each size of the images: (height, width); patches must tile them.
        loss: "squared", "l1", "smooth_l1" or "cosine": the mean over the P values of (pred - target)^2, of
            |pred - target|, of F.smooth_l1_loss with its `beta`; or one minus the cosine (of lengths at least 1e-12).
        norm: what the target is normalised over. "patch": each patch less its mean, over sqrt(its unbiased variance +
            eps), as in MAE; "channel": each channel of a patch less its mean, over (its unbiased deviation + eps), as
            in VideoMAE; "layer": as F.layer_norm does, with the biased variance. None: nothing.
        eps: at least 0.
        layout: the order of the values in pred, as `gather_patches` has it: "hwc", MAE's, or "chw".
        mean, std: C numbers each; a pixel x of the images becomes (x - mean) / std. On CUDA, for at most 16 channels.
        reduction: "mean": sum w_i error_i / sum w_i, w being the mask; "none": w_i error_i, [B, L].
        backend: "cpu", "cuda" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Returns:
        The loss in float32 (float64 for float64 pred): 0-d, or [B, L] for reduction="none". With nothing masked it is
        0, and so is its gradient (MAE's own code gives NaN). A norm of a single value gives NaN.

    Raises:
        TypeError, ValueError: arguments of the wrong type, shape, dtype, device or value.
        RuntimeError: the backend that was asked for cannot run here; a second derivative of a fused backend.

    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377, section 3; Tong et al.,
    VideoMAE, arXiv:2203.12602; Baevski et al., data2vec, arXiv:2202.03555; Assran et al., I-JEPA, arXiv:2301.08243.
    """
    op = "masked_prediction"
    if patch_size is not None:
        sides = _patches.sides(op, "patch_size", patch_size, target)
    elif not isinstance(target, Tensor):
        _check.bad_type(op, "target", "a tensor [B, L, P]", type(target).__name__)
    elif target.dim() != 3:
        _check.bad_value(op, "target", "shape [B, L, P], without a patch_size", list(target.shape))
    else:  # the rows of an image of one channel are its patches
        target, sides = target.unsqueeze(1), [1, target.shape[2]]
    means, stds = _patches.numbers(op, "mean", mean), _patches.numbers(op, "std", std)
    if _is_real(mask) and isinstance(pred, Tensor) and pred.is_floating_point():  # all else is refused below
        mask = mask.to(torch.promote_types(pred.dtype, torch.float32))
    needs_grad = torch.is_grad_enabled() and isinstance(pred, Tensor) and pred.requires_grad
    ahead = needs_grad and reduction == "mean" and not torch.compiler.is_compiling()
    options = (layout, means, stds, "" if norm is None else norm, eps, loss, beta, reduction, ahead)
    found: Tensor = _run(Arguments(pred, target, mask, sides, *options), backend)[0]
    return found


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
    """MAE's loss, under MAE's names: `masked_prediction` with norm="patch", or None unless norm_pix.

    Returns:
        [], in float32 (float64 for float64 pred).

    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377, section 3.
    """
    _check.flag("masked_patch_mse", "norm_pix", norm_pix)
    norm = "patch" if norm_pix else None
    return masked_prediction(pred, images, mask, patch_size, norm=norm, eps=eps, mean=mean, std=std, backend=backend)
