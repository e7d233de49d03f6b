"""What the CPU kernels take, and the memory they make: large tensors on huge pages, whose first touch costs a sixth of
what it does on 4 KB pages.
"""

import math
import mmap
import sys
from typing import Any

import torch
from torch import Tensor

from sslops import _C

# Not what the user may have set as defaults: the native core reads these through pointers.
FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
FLOAT64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}

WORTH_IT: int = _C.WORTH_HUGE_PAGES  # bytes; here too, as a call for each small tensor would cost more


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the CPU kernels cannot take such tensors; None if they can."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no {dtype} kernel: float32, float16 and bfloat16"
    return None


def on_huge_pages(x: Tensor) -> Tensor:
    """The same tensor, contiguous and not yet touched"""
    if x.nbytes >= WORTH_IT:
        _C.advise_huge_pages(x.data_ptr(), x.nbytes)
    return x


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A contiguous CPU tensor, not initialised"""
    return on_huge_pages(torch.empty(shape, dtype=dtype, device="cpu"))


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A contiguous CPU tensor; a large one from the system, which has cleared its pages: no second time"""
    size = math.prod(shape) * dtype.itemsize
    if size < WORTH_IT or sys.platform != "linux":
        return torch.zeros(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return on_huge_pages(torch.frombuffer(memory, dtype=dtype).view(shape))
