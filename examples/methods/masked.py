"""What is hidden of an image is filled in: MAE."""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sslops

from .base import Method


def standard(images: Tensor) -> Tensor:
    """To about mean 0 and variance 1."""
    return (images - 0.15) / 0.3


def positions(grid: int, width: int) -> Tensor:
    """Sines and cosines of the rows and columns of grid x grid patches, `[grid * grid, width]`."""
    waves = torch.outer(torch.arange(grid), 0.5 ** torch.linspace(0, 4, width // 4))
    waves = torch.cat([waves.sin(), waves.cos()], dim=1)
    return torch.cat([waves.repeat_interleave(grid, 0), waves.repeat(grid, 1)], dim=1)


def transformer(width: int, depth: int) -> nn.Module:
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    blocks = [nn.TransformerEncoderLayer(width, 4, 4 * width, **options) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.LayerNorm(width))


class ViT(nn.Module):
    """Images `[N, 1, S, S]` to the tokens of the patches `ids`; without ids to the mean over all, `[N, D]`."""

    def __init__(self, side: int, patch: int, width: int, depth: int):
        super().__init__()
        self.embed = sslops.nn.MaskedPatchEmbed(side, patch, 1, width)
        self.blocks = transformer(width, depth)
        self.register_buffer("positions", positions(side // patch, width))

    def forward(self, images: Tensor, ids: Tensor | None = None) -> Tensor:
        tokens = self.blocks(self.embed(standard(images), ids, self.positions))
        return tokens.mean(dim=1) if ids is None else tokens


def fused_mae(predicted: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    return sslops.masked_patch_mse(predicted, images, mask, math.isqrt(predicted.shape[2]), norm_pix=False)


def eager_mae(predicted: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """As it is usually written: the error of every patch, then of the masked ones."""
    p = math.isqrt(predicted.shape[2])
    errors = (predicted - F.unfold(images, kernel_size=p, stride=p).transpose(1, 2)).square().mean(dim=-1)
    return (errors * mask).sum() / mask.sum()


class MAE(Method):
    """The encoder sees a quarter of the patches, the decoder fills in the others: their pixels as they are.

    (Normalised, a patch of background would be a target of noise, and most of these images is background.)
    """

    steps, batch, learning_rate = 1000, 64, 3e-3
    losses: ClassVar = {"sslops": fused_mae, "eager": eager_mae}

    def __init__(self, side: int, width: int = 64, depth: int = 2, decoder: int = 64):
        super().__init__()
        patch = 4 if side > 8 else 2
        self.encoder = ViT(side, patch, width, depth)
        self.to_decoder = nn.Linear(width, decoder)
        self.mask_token = nn.Parameter(0.02 * torch.randn(decoder))
        self.register_buffer("positions", positions(side // patch, decoder))
        self.decoder = nn.Sequential(transformer(decoder, 1), nn.Linear(decoder, patch * patch))

    def views(self, images: Tensor) -> tuple[Tensor, ...]:
        return images, *sslops.random_mask(len(images), self.encoder.embed.num_patches, 0.75)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor, ids_restore: Tensor) -> tuple[Tensor, ...]:
        tokens = self.to_decoder(self.encoder(images, ids))
        tokens = sslops.restore_tokens(tokens, self.mask_token, ids_restore, self.positions)
        return self.decoder(tokens), standard(images), mask
