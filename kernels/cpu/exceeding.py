"""What exceeds pairs on the CPU: how many tiles of S hold for rows and for columns (csrc/cpu/exceeding.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sslops import _C

from .memory import FLOAT32

if TYPE_CHECKING:
    from torch import Tensor


def similarity(x: Any) -> Tensor:
    """[B]: of each image and its text, in the operands' dtype"""
    out = torch.empty(len(x.image), **FLOAT32)
    _C.exceeding_similarity(x.image, x.text, x.normalize, x.operand_dtype, out)
    return out


def count(x: Any, first: int, of_images: Tensor, of_texts: Tensor) -> tuple[Tensor, Tensor]:
    """[B] and [N]: to how many texts an image is closer than of_images [B], and how many images to a text than of_texts
    [N]. Image i's text is row first + i, and does not count, or not among these.
    """
    rows, columns = torch.empty_like(of_images), torch.empty_like(of_texts)
    _C.exceeding_count(x.image, x.text, x.normalize, x.operand_dtype, first, of_images, of_texts, rows, columns)
    return rows, columns
