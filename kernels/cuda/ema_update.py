"""The momentum update on CUDA: one launch on the current stream, after those that upload a table that changed.

It is no part of a graph, so there is no backward.
"""

from typing import Any

import torch
from torch import Tensor

from sslops import _C


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    archs = _C.build_info()["cuda_archs"]
    if archs is None:
        return "this build of sslops has no CUDA code"
    major, minor = torch.cuda.get_device_capability(device)
    for kind, _, arch in (name.partition("_") for name in archs.split(",")):
        built = divmod(int(arch), 10)
        if built <= (major, minor) and (kind == "compute" or built[0] == major):  # PTX, or code for this generation
            return None
    return f"this build of sslops has code for {archs}, not for sm_{major}{minor}"


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
