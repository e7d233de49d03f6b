"""Sequences put back together in one native call. The gradient takes two: a gather, and a sum over the batch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .call import call, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.ops.restore_tokens import Arguments


def forward(x: Arguments) -> Tensor:
    b, rows, d = x.visible.shape
    out = x.visible.new_empty((b, x.num_prefix + x.ids_restore.shape[1], d), dtype=x.dtype)
    kept = rows - x.num_prefix
    call(out.device, "restore_tokens", x.visible, x.mask_token, x.pos_embed, x.ids_restore, x.counts, kept, out)
    return out


def backward(grad: Tensor, x: Arguments) -> tuple[Tensor, ...]:
    (_, rows, d), prefix, kept = grad.shape, x.num_prefix, x.visible.shape[1] - x.num_prefix
    visible, token, positions = (
        grad.new_empty(like.shape if like is not None and wanted else (0,), dtype=getattr(like, "dtype", torch.float32))
        for like, wanted in zip((x.visible, x.mask_token, x.pos_embed), x.needs_grad, strict=True)
    )
    if visible.numel():
        visible[:, :prefix] = grad[:, :prefix]
        call(grad.device, "gather_tokens_backward", grad[:, prefix:], x.ids_restore, None, visible[:, prefix:])
        if x.counts is not None:
            slot = torch.arange(kept, device=grad.device)
            visible[:, prefix:].masked_fill_((slot >= x.counts[:, None])[..., None], 0)
    if token.numel() or positions.numel():
        parts = grad.new_empty((rows, d), dtype=torch.float64)
        sums = parts.new_empty((rows, d), dtype=torch.float32) if positions.numel() else None
        if grad.is_cuda:
            call(grad.device, "restore_tokens_reduce", grad, x.ids_restore, x.counts, kept, parts, sums)
            total = parts.sum(0)
        else:
            total = parts.new_empty(d, dtype=torch.float32)
            call(grad.device, "restore_tokens_reduce", grad, x.ids_restore, x.counts, kept, parts, sums, total)
        if token.numel():
            token.copy_(total)
        if sums is not None:
            positions.copy_(sums)
    return visible, token, positions
