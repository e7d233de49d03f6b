"""Sequences put back together on the CPU, and the gradient's ways: a native call for each."""

import torch
from torch import Tensor

from sslops import _C

from .memory import on_huge_pages
from .tiles import DTYPE_CODES, FLOAT32, refuses  # noqa: F401


def _array(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.data_ptr(), DTYPE_CODES[x.dtype])


def forward(
    visible: Tensor, mask_token: Tensor, ids_restore: Tensor, pos_embed: Tensor | None, num_prefix: int, out: Tensor
) -> None:
    """out [B, P + L, D] from visible [B, P + K, D], mask_token [D], ids_restore [B, L], pos_embed [P + L, D] or None"""
    b, length = ids_restore.shape
    _C.restore_tokens(
        *_array(visible), *_array(mask_token), *_array(pos_embed), ids_restore.data_ptr(),
        b, num_prefix, visible.shape[1] - num_prefix, length, visible.shape[2], *_array(on_huge_pages(out)),
    )  # fmt: skip


def backward(
    grad: Tensor, ids_restore: Tensor, num_prefix: int, visible: Tensor, mask_token: Tensor, pos_embed: Tensor
) -> None:
    """Fills the gradients of visible [B, P + K, D], mask_token [D] and pos_embed [P + L, D], of none if it is empty"""
    (b, rows, d), kept = grad.shape, visible.shape[1] - num_prefix
    visible[:, :num_prefix] = grad[:, :num_prefix]
    size, out_size = grad.element_size() * d, visible.element_size() * d
    _C.gather_tokens_backward(
        grad.data_ptr() + num_prefix * size, rows * size, size, DTYPE_CODES[grad.dtype],
        ids_restore.data_ptr(), *ids_restore.shape, kept, d,
        visible.data_ptr() + num_prefix * out_size, visible.shape[1] * out_size, out_size, DTYPE_CODES[visible.dtype],
    )  # fmt: skip
    token, parts = torch.empty(d, **FLOAT32), torch.empty(rows, d, dtype=torch.float64, device="cpu")
    positions = torch.empty(rows, d, **FLOAT32) if pos_embed.numel() else None
    _C.restore_tokens_reduce(
        *_array(grad), ids_restore.data_ptr(), b, num_prefix, kept, rows - num_prefix, d,
        parts.data_ptr(), token.data_ptr(), 0 if positions is None else positions.data_ptr(),
    )  # fmt: skip
    mask_token.copy_(token)
    if positions is not None:
        pos_embed.copy_(positions)
