"""The momentum update on CUDA: one launch on the current stream, after those that upload a table that changed.

It is no part of a graph, so there is no backward.
"""

from typing import Any

import torch
from torch import Tensor

from sslops import _C

from .device import refuses  # noqa: F401


def forward(
    work: _C.EmaWork,
    device: torch.device,
    momentum: float | Tensor,
    seed: int | Tensor | None,
    memory: dict[str, Any],
) -> None:
    """Updates the targets of `work`. `memory` keeps its table on the device, for the stream that it was made on."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        # A graph has a table of its own, filled at each replay: the kept one may go before the graph does.
        capturing = torch.cuda.is_current_stream_capturing()
        if capturing or memory.get("work") is not work or memory["stream"] != stream:
            rows = torch.empty(work.nbytes, dtype=torch.uint8, device=device)
            _C.cuda_ema_upload(work, rows.data_ptr(), stream)
            if not capturing:
                memory.update(rows=rows, work=work, stream=stream)
        else:
            rows = memory["rows"]
        value, value_at, is_double = 0.0, 0, False
        if isinstance(momentum, Tensor):
            value_at, is_double = momentum.data_ptr(), momentum.dtype == torch.float64
        else:
            value = momentum
        key, key_at = (0, seed.data_ptr()) if isinstance(seed, Tensor) else ((seed or 0) % 2**64, 0)
        _C.cuda_ema_update(work, rows.data_ptr(), value, value_at, is_double, seed is not None, key, key_at, stream)
