"""The dimensions of the embeddings, not other images, keep them apart: Barlow Twins, VICReg."""

from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

import sslops

from .base import TwoViews


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
