"""What is hidden of an image is filled in: MAE its pixels, data2vec a teacher's features."""

import copy
import math
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sslops

from .base import Method


def standard(images: Tensor) -> Tensor:
    """To about mean 0 and variance 1."""
    return (images - 0.15) / 0.3


def waves(count: int, width: int) -> Tensor:
    """Sines and cosines of 0, 1, .., `[count, width]`."""
    angles = torch.outer(torch.arange(count), 0.5 ** torch.linspace(0, 4, width // 2))
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def positions(grid: int, width: int) -> Tensor:
    """Sines and cosines of the rows and columns of grid x grid patches, `[grid * grid, width]`."""
    line = waves(grid, width // 2)
    return torch.cat([line.repeat_interleave(grid, 0), line.repeat(grid, 1)], dim=1)


def transformer(width: int, depth: int) -> nn.Module:
    options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    blocks = [nn.TransformerEncoderLayer(width, 4, 4 * width, **options) for _ in range(depth)]
    return nn.Sequential(*blocks, nn.LayerNorm(width))


def patch_of(side: int) -> int:
    return 4 if side > 8 else 2


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
        patch = patch_of(side)
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


def eager_data2vec(predicted: Tensor, features: Tensor, mask: Tensor, beta: float) -> Tensor:
    """As it is usually written: the masked rows are selected."""
    masked = mask.bool()
    target = F.layer_norm(features, features.shape[-1:])
    return F.smooth_l1_loss(predicted[masked], target[masked], beta=beta)


class Data2Vec(Method):
    """The student sees mask tokens; the teacher, its moving average, all of the image.

    What is predicted of a masked patch is the mean of the teacher's last layers there, each of them normalised
    over the image, and then itself.
    """

    steps, batch, learning_rate = 500, 64, 1e-3
    top, momentum = 2, 0.99  # layers that are averaged
    losses: ClassVar = {
        "sslops": partial(sslops.masked_prediction, loss="smooth_l1", beta=0.5, norm="layer", eps=1e-5),
        "eager": partial(eager_data2vec, beta=0.5),
    }

    def __init__(self, side: int, width: int = 64, depth: int = 3):
        super().__init__()
        self.encoder = ViT(side, patch_of(side), width, depth)
        self.mask_token = nn.Parameter(0.02 * torch.randn(width))
        self.head = nn.Linear(width, width)
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.ema = sslops.EMA(self.teacher, self.encoder, self.momentum)

    def views(self, images: Tensor) -> tuple[Tensor, ...]:
        return images, *sslops.random_mask(len(images), self.encoder.embed.num_patches, 0.6)

    def forward(self, images: Tensor, ids: Tensor, mask: Tensor, ids_restore: Tensor) -> tuple[Tensor, ...]:
        images = standard(images)
        visible = self.encoder.embed(images, ids)
        tokens = sslops.restore_tokens(visible, self.mask_token, ids_restore, self.encoder.positions)
        predicted = self.head(self.encoder.blocks(tokens))

        seen, layers = self.teacher.embed(images, None, self.teacher.positions), []
        for block in self.teacher.blocks[:-1]:  # the last is a norm
            seen = block(seen)
            layers.append(F.instance_norm(seen.mT).mT)
        return predicted, torch.stack(layers[-self.top :]).mean(0), mask

    def update(self) -> None:
        self.ema.step()
