"""CLIP on the CPU: tiles of the logits for their rows and their columns, of which few are held until the losses are
known (csrc/cpu/clip.h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, refuses  # noqa: F401

if TYPE_CHECKING:
    from collections.abc import Callable

    from sslops.distributed import Part
    from sslops.ops.clip import Arguments

DISTRIBUTED = True


def forward(
    x: Arguments, part: Part | None = None, gather: Callable[[Tensor], Tensor] = lambda sums: sums[None]
) -> tuple[Tensor, ...]:
    """losses [N] and stats [5, N] of all; gather: the sums [..] of this part, as [W, ..] of all W"""
    n = len(x.text)
    rows, columns = torch.empty(3, len(x.image), **FLOAT32), torch.empty(2, n, **FLOAT32)
    _C.clip_sums(*_common(x), part.first if part else 0, rows, columns)
    rows, columns = gather(rows).transpose(0, 1).reshape(3, n).contiguous(), gather(columns)
    losses, stats = torch.empty(n, **FLOAT32), torch.empty(5, n, **FLOAT32)
    _C.clip_close(rows, columns, float(x.logit_scale), x.normalize, losses, stats)
    return losses, stats


def with_gradients(x: Arguments, factor: float) -> tuple[Tensor, ...]:
    """losses [N], and the gradients of that factor times their sum, in float32"""
    losses, found = torch.empty(len(x.text), **FLOAT32), _gradients(x, torch.float32, torch.float32)
    _C.clip_with_gradients(*_common(x), factor, losses, *found)
    return losses, *found


def backward(grad: Tensor, x: Arguments, stats: Tensor, part: Part | None) -> tuple[Tensor, ...]:
    """Of a part: its images' gradients, what its rows add to the texts', in float32, and to logit_scale's"""
    found = _gradients(x, x.image.dtype, torch.float32 if part else x.text.dtype)
    _C.clip_backward(grad, *_common(x), part.first if part else 0, stats, *found)
    return found


def _common(x: Arguments) -> tuple[object, ...]:
    return x.image, x.text, float(x.logit_scale), x.normalize, x.operand_dtype


def _gradients(x: Arguments, of_image: torch.dtype, of_text: torch.dtype) -> tuple[Tensor, ...]:
    """Memory for those of image and text that will be wanted, or one of them for logit_scale's"""
    image, text, scale = x.needs_grad
    dimage = x.image.new_empty(x.image.shape if image or (scale and not text) else 0, dtype=of_image)
    dtext = x.text.new_empty(x.text.shape if text else 0, dtype=of_text)
    return dimage, dtext, torch.empty((), **FLOAT32)
