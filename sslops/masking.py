"""Masking as masked autoencoders do it, on top of the ops."""

import torch
from torch import Tensor

from . import _check
from ._check import Of
from .ops.gather_tokens import gather_tokens
from .ops.random_mask import draw


def random_masking(
    tokens: Tensor,
    mask_ratio: float,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """MAE's random_masking: `random_mask` of the tokens' batch and length, and `gather_tokens` of those it keeps.

    Args:
        tokens: [B, L, D] float32, float16, bfloat16 or float64.
        mask_ratio, noise, generator, backend: as for `random_mask`.

    Returns:
        visible [B, K, D] with K = int(L * (1 - mask_ratio)), mask [B, L] (float32, 1 for masked), ids_restore [B, L].

    Raises:
        TypeError, ValueError, RuntimeError: as `random_mask` and `gather_tokens` do.

    Source: He et al., Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377.
    """
    op = "random_masking"
    wanted = {"tokens": Of("B L D"), "noise": Of("B L", optional=True)}
    _check.tensors(op, {"tokens": tokens, "noise": noise}, wanted)
    _check.fraction(op, mask_ratio=mask_ratio)
    batch, length, _ = tokens.shape
    ids_keep, _, mask, ids_restore = draw(op, batch, length, mask_ratio, 0, noise, generator, tokens.device, backend)
    return gather_tokens(tokens, ids_keep, unique=True, backend=backend), mask, ids_restore
