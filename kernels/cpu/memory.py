"""Large CPU tensors on huge pages: the first touch of a fresh one costs a sixth of what it does on 4 KB pages."""

import torch
from torch import Tensor

from sslops import _C

WORTH_IT = 4 << 20  # bytes: smaller ones come from memory that malloc has kept, or cost little


def on_huge_pages(x: Tensor) -> Tensor:
    """The same tensor, contiguous and not yet touched"""
    if x.nbytes >= WORTH_IT:
        _C.advise_huge_pages(x.data_ptr(), x.nbytes)
    return x


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A contiguous CPU tensor, not initialised"""
    return on_huge_pages(torch.empty(shape, dtype=dtype, device="cpu"))
