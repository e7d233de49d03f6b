"""I-JEPA's masks in one native call. They have no gradient, so there is no backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .call import call, unsupported

if TYPE_CHECKING:
    from sslops.ops.multi_block_mask import Arguments


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return unsupported(device)


def forward(x: Arguments) -> tuple[Tensor, ...]:
    ids_context, ids_targets = x.key.new_empty((x.batch, x.most_context)), x.key.new_empty((x.targets, x.batch, x.most))
    context_counts, target_counts = x.key.new_empty(x.batch), x.key.new_empty((x.targets, x.batch))
    ranges = torch.tensor(x.ranges, dtype=torch.int64, device="cpu")
    given = x.key, x.height, x.width, x.targets, x.min_keep, ranges
    call(x.key.device, "multi_block_mask", *given, ids_context, context_counts, ids_targets, target_counts)
    return ids_context, context_counts, ids_targets, target_counts
