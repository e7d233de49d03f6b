"""Each view predicts what a slow average of the network makes of the other: BYOL."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import MomentumTarget, augment, mlp


def cosine_loss(p0: Tensor, p1: Tensor, t0: Tensor, t1: Tensor) -> Tensor:
    return 2 - F.cosine_similarity(p0, t1).mean() - F.cosine_similarity(p1, t0).mean()


class BYOL(MomentumTarget):
    """Its loss reads four [N, D] once: there is nothing to fuse, and both networks take the same. What is ours is the
    target, `sslops.EMA`. C-BYOL and SimSiam (no average) differ in what stands around it.
    """

    batch = 512
    losses: ClassVar = {"sslops": cosine_loss, "eager": cosine_loss}

    def __init__(self, side: int):
        super().__init__(side)
        self.predictor = mlp(self.projection, self.hidden, self.projection)

    def views(self, images: Tensor) -> tuple[Tensor, ...]:
        return (augment(torch.cat([images, images])),)

    def forward(self, views: Tensor) -> tuple[Tensor, ...]:
        return *self.predictor(self.online(views)).chunk(2), *self.target(views).chunk(2)
