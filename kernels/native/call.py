"""One native function on two kinds of device: `_C.<name>` on the CPU, `_C.cuda_<name>` on a GPU's current stream."""

from typing import Any

import torch

from sslops import _C

from ..cpu import memory
from ..cuda import device as gpu


def unsupported(device: torch.device) -> str | None:
    """Why nothing native runs there; None if it does."""
    return gpu.refuses(device, torch.float32) if device.type == "cuda" else None


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why kernels of float32, float16 and bfloat16 cannot take such tensors; None if they can."""
    return memory.refuses(device, dtype) or unsupported(device)


def call(device: torch.device, name: str, *arguments: Any) -> None:
    """The native `name` of tensors on `device`; what it writes are the last ones."""
    if device.type != "cuda":
        return getattr(_C, name)(*arguments)
    with torch.cuda.device(device):
        return getattr(_C, f"cuda_{name}")(*arguments, torch.cuda.current_stream().cuda_stream)
