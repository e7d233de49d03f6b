"""Masking as masked autoencoders do it, on top of the ops."""

import torch
from torch import Tensor

from . import _check
from .ops.gather_tokens import gather_tokens
from .ops.random_mask import random_mask


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
    _check.floats("random_masking", "[B, L, D]", tokens=tokens)
    if noise is not None:
        _check.floats("random_masking", "[B, L]", noise=noise)
        _check.same_device("random_masking", "tokens", tokens, noise=noise)
    ids_keep, mask, ids_restore = random_mask(
        tokens.shape[0], tokens.shape[1], mask_ratio,
        noise=noise, generator=generator, device=tokens.device, backend=backend,
    )  # fmt: skip
    return gather_tokens(tokens, ids_keep, unique=True, backend=backend), mask, ids_restore
