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
    options = (x.mask_token_id, x.vocab_size, *x.odds)
    call(x.ids.device, "random_token_corruption", x.ids, x.special_tokens_mask, x.key, *options, corrupted, labels)
    return corrupted, labels
