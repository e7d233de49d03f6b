"""open_clip 3's ClipLoss and SigLipLoss on our ops: `patch_open_clip()` exchanges their forward methods.

Losses that exist already take part, and so does CoCaLoss, whose contrastive half is ClipLoss's. Over ranks ClipLoss has
their values and gradients for every local_loss and gather_with_grad but local_loss=True alone, whose gradient is not
that of any loss of the batch: refused, as horovod is. The gradient of logit_scale is the rank's share, times the ranks:
DDP's average is theirs. SigLipLoss gathers the texts whatever dist_impl says, and its value is that of all ranks, where
theirs is each rank's own, of which ours is the mean; the gradients are the same.

What differs: losses are float32 for bf16 and float16 features and under autocast, where theirs round the logits.
DistillClipLoss, which is of the logits themselves, stays open_clip's.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _check
from ..ops.clip import clip
from ..ops.siglip import siglip
from ._rebind import Patch, parameters, theirs

__all__ = ["patch_open_clip"]


def _found(loss: Tensor, output_dict: bool) -> Any:
    return {"contrastive_loss": loss} if output_dict else loss


def clip_loss(
    self: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    output_dict: bool = False,
) -> Any:
    """ClipLoss.forward"""
    if self.use_horovod:
        _check.bad_value("ClipLoss", "use_horovod", "False", True)
    features, group = [image_features, text_features], "world" if self.world_size > 1 else None
    if group and not self.gather_with_grad:
        if self.local_loss:
            _check.bad_value("ClipLoss", "gather_with_grad", "True beside local_loss=True", False)
        # Theirs have one rank's loss by its own rows for a gradient, not that of all ranks' losses: the same values.
        features = [torch.lerp(x.detach(), x, 1 / self.world_size) for x in features]
    reduction = "none" if self.local_loss else "mean"
    loss = clip(*features, logit_scale=logit_scale, normalize=False, reduction=reduction, group=group).mean()
    if logit_bias is not None:  # which no softmax sees
        loss = loss + 0 * logit_bias.sum()
    return _found(loss, output_dict)


def siglip_loss(
    self: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    output_dict: bool = False,
) -> Any:
    """SigLipLoss.forward"""
    bias, group = 0.0 if logit_bias is None else logit_bias, "world" if self.world_size > 1 else None
    loss = siglip(image_features, text_features, logit_scale=logit_scale, bias=bias, normalize=False, group=group)
    return _found(loss, output_dict)


_OURS: dict[str, Callable[..., Any]] = {"ClipLoss": clip_loss, "SigLipLoss": siglip_loss}


def patch_open_clip() -> Patch:
    """Puts our ops into the forward of open_clip's ClipLoss and SigLipLoss; losses that exist already take part.

    Returns:
        A handle: `unpatch()` undoes it, as does the end of a `with` block. Patching again is harmless.

    Raises:
        ImportError: open_clip is not there, or its losses are not those of version 3; nothing is patched then.
    """
    wanted = "patch_open_clip: wanted open_clip_torch 3"
    try:
        home = importlib.import_module("open_clip.loss")
    except ImportError as error:
        raise ImportError(f"{wanted}, whose losses do not import: {error}") from error
    there = {name: getattr(getattr(home, name, None), "forward", None) for name in _OURS}
    for name, ours in _OURS.items():
        found = there[name]
        if found is not ours and (found is None or parameters(found) != parameters(ours)):
            raise ImportError(f"{wanted}, got one with another {name}.forward")
    theirs.update({ours: there[name] for name, ours in _OURS.items() if there[name] is not ours})
    return Patch(lambda: [getattr(home, name) for name in _OURS], list(_OURS.values()))
