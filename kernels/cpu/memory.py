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

HUGE = 2 << 20  # bytes of a huge page
ALWAYS_MAPPED = 32 << 20  # bytes: glibc, for one, keeps no larger memory for the next who asks
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


def _mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros of the system's, which has cleared their pages; whole huge pages, whose boundaries it then begins at: what
    comes before the first one and after the last would be 4 KB pages, a third of the time of 38 MB"""
    size = math.prod(shape)
    whole = -(-size * dtype.itemsize // HUGE) * HUGE
    try:
        memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:
        return torch.zeros(shape, dtype=dtype, device="cpu")  # torch says it in its own words
    return on_huge_pages(torch.frombuffer(memory, dtype=dtype))[:size].view(shape)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A contiguous CPU tensor, not initialised; one that malloc would ask the system for anew, from the system, unless
    torch is to fill it (it cannot be resized)
    """
    large = math.prod(shape) * dtype.itemsize > ALWAYS_MAPPED
    if large and sys.platform == "linux" and not torch.are_deterministic_algorithms_enabled():
        return _mapped(shape, dtype)
    return on_huge_pages(torch.empty(shape, dtype=dtype, device="cpu"))


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A contiguous CPU tensor; a large one from the system: no second time"""
    if math.prod(shape) * dtype.itemsize < WORTH_IT or sys.platform != "linux":
        return torch.zeros(shape, dtype=dtype, device="cpu")
    return _mapped(shape, dtype)
