"""What MAE is made of."""

import torch
from torch import Tensor

from ... import _patches
from ...ops import random_mask
from ...ops.gather_tokens import gather_tokens


def random_token_mask(
    size: tuple[int, int],
    mask_ratio: float = 0.6,
    mask_class_token: bool = False,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    noise = torch.rand(size, device=device)  # as lightly draws it: the same seed gives the same mask
    return random_mask.random_token_mask(*size, mask_ratio, mask_class_token=mask_class_token, noise=noise)


def get_at_index(tokens: Tensor, index: Tensor) -> Tensor:
    if tokens.is_floating_point():
        return gather_tokens(tokens, index)
    return tokens.gather(1, index.unsqueeze(2).expand(-1, -1, tokens.shape[2]))


def set_at_index(tokens: Tensor, index: Tensor, value: Tensor) -> Tensor:
    return tokens.scatter(1, index.unsqueeze(2).expand(-1, -1, tokens.shape[2]), value)


def repeat_token(token: Tensor, size: tuple[int, int]) -> Tensor:
    return token.repeat(*size, 1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    assert images.shape[2] == images.shape[3]
    assert images.shape[2] % patch_size == 0
    return _patches.patchify(images, (patch_size, patch_size), "hwc")
