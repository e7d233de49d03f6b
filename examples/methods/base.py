"""What methods are made of: the views of an image, networks, and the two kinds that most methods are of."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sslops


def augment(images: Tensor, side: int | None = None, shown: tuple[float, float] = (0.8, 1.25)) -> Tensor:
    """A random affine map and a smooth random warp of each image, the whole batch at once: `[N, 1, side, side]`.

    `shown`: the least and the most of the image's width and height that a view shows.
    """
    batch = len(images)
    side = side or images.shape[-1]

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(batch).uniform_(low, high)

    angle, scale, stretch, shear = uniform(-0.35, 0.35), uniform(*shown), uniform(0.85, 1.18), uniform(-0.3, 0.3)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [cos * stretch, shear - sin, uniform(-0.15, 0.15), sin, cos / stretch, uniform(-0.15, 0.15)]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(batch, 2, 3), [batch, 1, side, side], align_corners=False)
    warp = F.interpolate(0.08 * torch.randn(batch, 2, 4, 4), size=(side, side), mode="bilinear")
    views = F.grid_sample(images, grid + warp.permute(0, 2, 3, 1), align_corners=False)
    return views.contiguous(memory_format=torch.channels_last)


def conv_encoder(side: int) -> tuple[nn.Module, int]:
    """A network from `[N, 1, side, side]` to features `[N, F]`, and F."""
    channels = [1, 16, 32, 64, 128]
    blocks = []
    for wide_in, wide_out in pairwise(channels):
        conv = nn.Conv2d(wide_in, wide_out, 3, stride=2, padding=1, bias=False)
        blocks += [conv, nn.BatchNorm2d(wide_out), nn.ReLU()]
    return nn.Sequential(*blocks, nn.Flatten()), channels[-1] * (-(-side // 16)) ** 2


def mlp(wide_in: int, hidden: int, wide_out: int) -> nn.Module:
    return nn.Sequential(nn.Linear(wide_in, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, wide_out))


class Method(nn.Module):
    """What pretrain.py asks of a method; `encoder` is what pretraining is for, and what the probe looks at."""

    encoder: nn.Module
    # "sslops" and "eager": the same value from the same arguments, the tensors that forward gives.
    losses: ClassVar[dict[str, Callable[..., Tensor]]]
    data: tuple[str, ...] = ("mnist", "digits")  # what it can be trained on; the first if nothing is said
    steps, batch, learning_rate = 150, 2048, 5e-3

    chosen: Tensor  # of what it has seen, the places that this step takes

    def see(self, images: Tensor, known: Any) -> None:
        """All that it will be pretrained on, once before: images and their labels, or passages and the words."""

    def optimizer(self, trained: list[Tensor]) -> torch.optim.Optimizer:
        """The learning rate is set by a schedule."""
        return torch.optim.AdamW(trained, weight_decay=1e-4)

    def views(self, images: Tensor) -> tuple[Tensor, ...]:
        """All that is random in a step, from images `[N, 1, S, S]`, or passages `[N, L]`: what forward takes."""
        raise NotImplementedError

    def update(self) -> None:
        """What follows the optimizer's step."""


class TwoViews(Method):
    """One network for both views of an image; the loss takes their projections, `[N, D]` each."""

    hidden, projection = 256, 128

    def __init__(self, side: int):
        super().__init__()
        self.encoder, features = conv_encoder(side)
        self.head = mlp(features, self.hidden, self.projection)

    def views(self, images: Tensor) -> tuple[Tensor, ...]:
        return (augment(torch.cat([images, images])),)

    def forward(self, views: Tensor) -> tuple[Tensor, ...]:
        return self.head(self.encoder(views)).chunk(2)


class MomentumTarget(Method):
    """An online network that is trained, and its moving average, the target, that is not."""

    hidden, projection, momentum = 256, 128, 0.99

    def __init__(self, side: int):
        super().__init__()
        self.encoder, features = conv_encoder(side)
        self.online = nn.Sequential(self.encoder, mlp(features, self.hidden, self.projection))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.ema = sslops.EMA(self.target, self.online, self.momentum)

    def update(self) -> None:
        self.ema.step()


LARGE, SMALL = 2, 3  # crops of each image


def multicrop(images: Tensor) -> tuple[Tensor, Tensor]:
    """The large crops of all images, crop after crop, and the small ones."""
    small = round(0.65 * images.shape[-1])  # enough for the encoder to give as many features as of a large crop
    large_crops = augment(images.repeat(LARGE, 1, 1, 1))
    return large_crops, augment(images.repeat(SMALL, 1, 1, 1), small, shown=(0.5, 0.85))
