"""Random masks on the CPU: one native call. They have no gradient, so there is no backward."""

import torch
from torch import Tensor

from sslops import _C


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return "no torch.float64 kernel" if dtype == torch.float64 else None


def forward(
    source: Tensor, num_prefix: int, ids_keep: Tensor, ids_mask: Tensor, mask: Tensor, ids_restore: Tensor
) -> None:
    """Fills ids_keep [B, K], ids_mask [B, L-K], mask, ids_restore [B, L]. source: float32 noise [B, L], or a key []"""
    noise, key = (source.data_ptr(), 0) if source.dim() else (0, source.data_ptr())
    _C.random_mask(
        noise, key, *mask.shape, num_prefix, ids_keep.shape[1],
        ids_keep.data_ptr(), ids_mask.data_ptr(), ids_restore.data_ptr(), mask.data_ptr(),
    )  # fmt: skip
