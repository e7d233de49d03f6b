"""The momentum update on the CPU: one native call. It is no part of a graph, so there is no backward."""

import torch
from torch import Tensor

from sslops import _C


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def forward(
    work: _C.EmaWork,
    device: torch.device,
    momentum: float | Tensor,
    seed: int | Tensor | None,
    memory: dict[str, object],
) -> None:
    """Updates the targets of `work`. `memory` is for what a backend keeps from step to step: nothing here."""
    _C.ema_update(work, float(momentum), None if seed is None else int(seed) % 2**64)
