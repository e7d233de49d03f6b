"""Statistics of the embeddings, not other images, keep them apart: Barlow Twins, VICReg, LeJEPA."""

from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import sslops

from .base import LARGE, SMALL, Method, TwoViews, conv_encoder, mlp, multicrop


def off_diagonal(c: Tensor) -> Tensor:
    """The sum of the squares of all but the diagonal."""
    return c.square().sum() - c.diagonal().square().sum()


def eager_barlow_twins(z0: Tensor, z1: Tensor, lambd: float) -> Tensor:
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z0, z1))
    c = a.T @ b / len(a)
    return (1 - c.diagonal()).square().sum() + lambd * off_diagonal(c)


class BarlowTwins(TwoViews):
    hidden, projection = 512, 2048
    steps, batch = 200, 256
    losses: ClassVar = {
        "sslops": partial(sslops.barlow_twins, lambd=5e-3),
        "eager": partial(eager_barlow_twins, lambd=5e-3),
    }


def eager_vicreg(z0: Tensor, z1: Tensor) -> Tensor:
    n, d = z0.shape
    loss = 25 * F.mse_loss(z0, z1)
    for z in (z0, z1):
        z = z - z.mean(dim=0)
        deviation = (z.var(dim=0) + 1e-4).sqrt()
        loss = loss + 25 * F.relu(1 - deviation).mean() / 2 + off_diagonal(z.T @ z / (n - 1)) / d
    return loss


class VICReg(TwoViews):
    hidden, projection = 512, 2048
    steps, batch = 200, 256
    losses: ClassVar = {"sslops": sslops.vicreg, "eager": eager_vicreg}


LAMBDA = 0.05


def fused_lejepa(large: Tensor, small: Tensor, directions: Tensor, **options: str) -> Tensor:
    return sslops.lejepa(large, small, lambd=LAMBDA, directions=directions, **options)


def eager_lejepa(large: Tensor, small: Tensor, directions: Tensor) -> Tensor:
    """The integral of SIGReg at 17 knots from 0 to 3, as the authors' code has it."""
    views = torch.cat([large, small])
    t = torch.linspace(0, 3, 17)
    phi = (-t.square() / 2).exp()
    weights = torch.cat([t[1:2], (2 * t[1]).expand(15), t[1:2]]) * phi
    phases = (views @ directions.T)[..., None] * t
    apart = (phases.cos().mean(1) - phi).square() + phases.sin().mean(1).square()
    regularity = views.shape[1] * (apart @ weights).mean()
    return LAMBDA * regularity + (1 - LAMBDA) * (views - large.mean(0)).square().mean()


class LeJEPA(Method):
    """One network for all crops, without a teacher: each is near the mean of its image's large crops."""

    hidden, projection, slices = 256, 64, 256
    steps, batch = 150, 512
    losses: ClassVar = {"sslops": fused_lejepa, "eager": eager_lejepa}

    def __init__(self, side: int):
        super().__init__()
        self.encoder, features = conv_encoder(side)
        self.head = mlp(features, self.hidden, self.projection)
        self.step = 0

    def views(self, images: Tensor) -> tuple[Tensor, ...]:
        return multicrop(images)

    def forward(self, large: Tensor, small: Tensor) -> tuple[Tensor, ...]:
        crops = ((large, LARGE), (small, SMALL))
        generator = torch.Generator().manual_seed(self.step)  # the same for both losses, and on all ranks
        directions = F.normalize(torch.randn(self.slices, self.projection, generator=generator))
        return *(self.head(self.encoder(x)).unflatten(0, (n, -1)) for x, n in crops), directions

    def update(self) -> None:
        self.step += 1
