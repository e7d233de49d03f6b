"""BERT's masking in one native call. It has no gradient, so there is no backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .call import call, unsupported

if TYPE_CHECKING:
    from sslops.ops.random_token_corruption import Arguments


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return unsupported(device)


def forward(x: Arguments) -> tuple[Tensor, Tensor]:
    corrupted, labels = x.ids.new_empty(x.ids.shape), x.ids.new_empty(x.ids.shape)
    runs, begun = (torch.tensor(values, dtype=torch.int64, device="cpu") for values in (x.runs, x.begun))
    tensors, numbers = (x.ids, x.kept, x.units, x.key, runs, begun), (x.row, x.drawn, x.mask_token_id, *x.odds)
    call(x.ids.device, "random_token_corruption", *tensors, *numbers, corrupted, labels)
    return corrupted, labels
