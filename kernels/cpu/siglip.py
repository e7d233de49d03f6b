"""SigLIP on the CPU: loss and gradients from one pass over tiles, nothing of size N x N (csrc/cpu/siglip.h)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sslops import _C

from .memory import FLOAT32, empty, refuses  # noqa: F401

if TYPE_CHECKING:
    from sslops.ops.siglip import Arguments

DISTRIBUTED = True


def forward(x: Arguments, first: int = 0) -> tuple[Tensor, ...]:
    """loss and the gradients of image, text, logit_scale and bias, in float32: what these images and texts add to them.

    Image i's text is row first + i, or not among these.
    """
    image, text, *_ = x.needs_grad
    none = torch.empty(0, **FLOAT32)
    dimage = empty(*x.image.shape) if image else none
    dtext = empty(*x.text.shape) if text else none
    loss, dlogit_scale, dbias = (torch.empty((), **FLOAT32) for _ in range(3))
    _C.siglip_forward(
        x.image, x.text, float(x.logit_scale), float(x.bias), x.normalize, x.operand_dtype, first,
        loss, dimage, dtext, dlogit_scale, dbias,
    )  # fmt: skip
    found = (dimage, dtext, dlogit_scale, dbias)
    return loss, *(each if wanted else none.clone() for each, wanted in zip(found, x.needs_grad, strict=True))
