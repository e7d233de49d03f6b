"""Random masks in one native call. They have no gradient, so there is no backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .call import call, unsupported

if TYPE_CHECKING:
    from sslops.ops.random_mask import Arguments


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return "no torch.float64 kernel" if dtype == torch.float64 else unsupported(device)


def forward(x: Arguments) -> tuple[Tensor, ...]:
    noise = x.noise.float() if x.noise.is_floating_point() else x.noise
    ids_keep, ids_mask, ids_restore = (
        noise.new_empty((x.batch, columns), dtype=torch.int64) for columns in (x.keep, x.length - x.keep, x.length)
    )
    mask = noise.new_empty((x.batch, x.length), dtype=torch.float32)
    given = noise, x.num_prefix, x.lengths, x.counts, x.blocks, x.block_size, x.width, x.blocks_first
    call(noise.device, "random_mask", *given, ids_keep, ids_mask, mask, ids_restore)
    return ids_keep, ids_mask, mask, ids_restore
