"""CLIP on the CPU: tiles of the logits for their rows and their columns, nothing of size N x N (csrc/cpu/clip.h)."""

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


def _common(x: Arguments, part: Part | None) -> tuple[object, ...]:
    return x.image, x.text, float(x.logit_scale), x.normalize, x.operand_dtype, part.first if part else 0


def forward(
    x: Arguments, part: Part | None = None, gather: Callable[[Tensor], Tensor] = lambda sums: sums[None]
) -> tuple[Tensor, ...]:
    """losses [N] and stats [5, N] of all, similarity; gather: the sums [..] of this part, as [W, ..] of all W"""
    n = len(x.text)
    similarity = torch.empty(x.kept(n), **FLOAT32)
    rows, columns = torch.empty(3, len(x.image), **FLOAT32), torch.empty(2, n, **FLOAT32)
    _C.clip_sums(*_common(x, part), similarity, rows, columns)
    rows, columns = gather(rows).transpose(0, 1).reshape(3, n).contiguous(), gather(columns)
    losses, stats = torch.empty(n, **FLOAT32), torch.empty(5, n, **FLOAT32)
    _C.clip_close(rows, columns, float(x.logit_scale), x.normalize, losses, stats)
    return losses, stats, similarity


def backward(
    grad: Tensor, x: Arguments, stats: Tensor, part: Part | None, similarity: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of a part: its images' gradients, what its rows add to the texts', in float32, and to logit_scale's"""
    image, text, scale = x.needs_grad
    dimage = torch.empty_like(x.image) if image or (scale and not text) else x.image.new_empty(0)
    dtext = x.text.new_empty(x.text.shape if text else 0, dtype=torch.float32 if part else x.text.dtype)
    dlogit_scale = torch.empty((), **FLOAT32)
    _C.clip_backward(grad, *_common(x, part), similarity, stats, dimage, dtext, dlogit_scale)
    return dimage if image else dimage.new_empty(0), dtext, dlogit_scale if scale else dlogit_scale.new_empty(0)
