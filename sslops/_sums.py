"""Sums and means whose bits do not depend on the number of threads."""

import torch
from torch import Tensor

_WHOLE = 2**15  # terms: torch cuts a longer sum among its threads
_BLOCK = 1024


def total(x: Tensor) -> Tensor:
    """x.sum()"""
    if not _is_cut(x):
        return x.sum()
    whole = x.numel() // _BLOCK * _BLOCK
    blocks, rest = x.flatten().split([whole, x.numel() - whole])
    return total(blocks.view(-1, _BLOCK).sum(1)) + rest.sum()


def mean(x: Tensor) -> Tensor:
    """x.mean()"""
    return total(x) / x.numel() if _is_cut(x) else x.mean()


def _is_cut(x: Tensor) -> bool:
    return x.is_cpu and not torch.compiler.is_compiling() and x.numel() >= _WHOLE
