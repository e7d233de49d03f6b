"""Images are assigned to prototypes, and other crops must find the assignment: DINO, SwAV."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sslops

from .base import LARGE, SMALL, Method, MomentumTarget, conv_encoder, mlp, multicrop


class Prototypes(nn.Module):
    """Cosines of embeddings `[N, D]` with K prototypes."""

    def __init__(self, width: int, prototypes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(prototypes, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x) @ F.normalize(self.weight).T


def fused_dino(large: Tensor, small: Tensor, teacher: Tensor, bias: Tensor) -> Tensor:
    return sslops.dino([large, small], teacher, teacher_temp=TEACHER_TEMP, bias=bias)


def cross_entropy_of_pairs(student: Tensor, q: Tensor) -> Tensor:
    """Of all crops `[V, N, K]` with the assignments of the large ones `[T, N, K]`, but for equal crops."""
    # not "->vt": one sum over n and k, near half a million equal terms of float32, is 5e-4 off
    losses = -torch.einsum("vnk,tnk->vtn", (student / 0.1).log_softmax(2), q).mean(2)
    return (losses.sum() - losses.diagonal().sum()) / (losses.numel() - min(losses.shape))


def eager_dino(large: Tensor, small: Tensor, teacher: Tensor, bias: Tensor) -> Tensor:
    return cross_entropy_of_pairs(torch.cat([large, small]), (teacher / TEACHER_TEMP + bias).softmax(2))


TEACHER_TEMP = 0.04


class DINO(MomentumTarget):
    """The target's large crops are the teacher: its logits, centred, for the other crops of the online network."""

    prototypes = 1024
    steps, batch = 150, 512
    losses: ClassVar = {"sslops": fused_dino, "eager": eager_dino}

    def __init__(self, side: int):
        super().__init__(side)
        for network in (self.online, self.target):
            network.append(Prototypes(self.projection, self.prototypes))
        self.target.load_state_dict(self.online.state_dict())
        self.target.requires_grad_(False)
        self.ema = sslops.EMA(self.target, self.online, self.momentum)
        # 0.9 is for longer runs: with it a few prototypes took all in turns, and little was learned
        self.center = sslops.nn.PrototypeCenter(self.prototypes, momentum=0.5)

    def views(self, images: Tensor) -> tuple[Tensor, ...]:
        return multicrop(images)

    def forward(self, large: Tensor, small: Tensor) -> tuple[Tensor, ...]:
        self.teacher = self.target(large).unflatten(0, (LARGE, -1))
        student = (self.online(x).unflatten(0, (n, -1)) for x, n in ((large, LARGE), (small, SMALL)))
        return *student, self.teacher, self.center.bias(TEACHER_TEMP)[None]

    def update(self) -> None:
        super().update()
        self.center.update(self.teacher)

    def scores(self, images: Tensor) -> Tensor:
        return self.online(images)


# The paper's 0.05 is for longer runs: with it the assignments stayed near uniform, and little was learned
EPSILON = 0.02


def fused_swav(large: Tensor, small: Tensor) -> Tensor:
    return sslops.swav([large, small], epsilon=EPSILON)


def eager_swav(large: Tensor, small: Tensor) -> Tensor:
    """With the assignments as a matrix, as SwAV's own code has it."""
    assignments = []
    for scores in large.detach():
        q = (scores / EPSILON).exp()
        for _ in range(3):
            q = q / q.sum(dim=0)
            q = q / q.sum(dim=1, keepdim=True)
        assignments.append(q)
    return cross_entropy_of_pairs(torch.cat([large, small]), torch.stack(assignments))


class SwAV(Method):
    """One network for all crops; the large ones are assigned to prototypes in balance."""

    hidden, projection, prototypes = 256, 128, 512
    steps, batch = 150, 512
    losses: ClassVar = {"sslops": fused_swav, "eager": eager_swav}

    def __init__(self, side: int):
        super().__init__()
        self.encoder, features = conv_encoder(side)
        self.head = mlp(features, self.hidden, self.projection)
        self.last = Prototypes(self.projection, self.prototypes)

    def views(self, images: Tensor) -> tuple[Tensor, ...]:
        return multicrop(images)

    def forward(self, large: Tensor, small: Tensor) -> tuple[Tensor, ...]:
        crops = ((large, LARGE), (small, SMALL))
        return tuple(self.scores(x).unflatten(0, (n, -1)) for x, n in crops)

    def scores(self, images: Tensor) -> Tensor:
        return self.last(self.head(self.encoder(images)))
