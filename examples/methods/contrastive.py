"""Each embedding must find its own among others: SimCLR, SupCon, MoCo, NNCLR, RELICv2."""

from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import sslops

from .base import LARGE, SMALL, Method, MomentumTarget, TwoViews, augment, conv_encoder, mlp, multicrop


def eager_nt_xent(z0: Tensor, z1: Tensor, temperature: float) -> Tensor:
    """NT-Xent as it is usually written: the whole `[2N, 2N]` matrix of logits."""
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    positives = torch.arange(len(z)).roll(len(z0))
    return F.cross_entropy(logits, positives)


class SimCLR(TwoViews):
    # The one-line change: both take the projections [N, D] of the two views and give a scalar.
    losses: ClassVar = {
        "sslops": partial(sslops.nt_xent, temperature=0.2),
        "eager": partial(eager_nt_xent, temperature=0.2),
    }


def fused_supcon(z0: Tensor, z1: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return sslops.supcon(torch.stack([z0, z1]), labels, temperature=temperature)


def eager_supcon(z0: Tensor, z1: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """SupCon's loss as it is usually written, with the `[2N, 2N]` matrix of logits and a mask of as many positives."""
    n = len(labels)
    classes = torch.where(labels < 0, -1 - torch.arange(n), labels).repeat(2)  # of none: a class of its own
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    positives = (classes[:, None] == classes).fill_diagonal_(False)
    log_p = logits.log_softmax(dim=1).masked_fill(~positives, 0)
    return -(log_p.sum(1) / positives.sum(1)).mean()


class SupCon(Method):
    """A tenth of the images have labels: theirs find all of their class, the others their own other view."""

    hidden, projection = 256, 128
    losses: ClassVar = {
        "sslops": partial(fused_supcon, temperature=0.2),
        "eager": partial(eager_supcon, temperature=0.2),
    }

    def __init__(self, side: int):
        super().__init__()
        self.encoder, features = conv_encoder(side)
        self.head = mlp(features, self.hidden, self.projection)

    def see(self, images: Tensor, known: Any) -> None:
        self.labels = torch.as_tensor(known).where(torch.arange(len(images)) % 10 == 0, -1)

    def views(self, images: Tensor) -> tuple[Tensor, ...]:
        return augment(torch.cat([images, images])), self.labels[self.chosen]

    def forward(self, views: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        return *self.head(self.encoder(views)).chunk(2), labels


def eager_info_nce(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """MoCo's loss as it is usually written, the `[N, 1 + K]` logits in one matrix; negatives are unit rows."""
    query, key = F.normalize(query), F.normalize(key)
    positive = (query * key).sum(dim=1, keepdim=True)
    logits = torch.cat([positive, query @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))


class MoCo(MomentumTarget):
    steps, batch = 150, 512
    losses: ClassVar = {
        "sslops": partial(sslops.info_nce, temperature=0.1),
        "eager": partial(eager_info_nce, temperature=0.1),
    }

    def __init__(self, side: int):
        super().__init__(side)
        self.queue = sslops.NegativeQueue(16384, self.projection)

    def views(self, images: Tensor) -> tuple[Tensor, ...]:
        return augment(images), augment(images)

    def forward(self, query_view: Tensor, key_view: Tensor) -> tuple[Tensor, ...]:
        self.keys = self.target(key_view)
        return self.online(query_view), self.keys, self.queue.negatives

    def update(self) -> None:
        super().update()
        self.queue.enqueue(self.keys)  # after the loss: a key is no negative of its own query


def fused_nnclr(z0: Tensor, z1: Tensor, p0: Tensor, p1: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """The nearest row of the bank stands for each view; the other view's prediction must find it."""
    near0, near1 = bank[sslops.nearest(torch.cat([z0, z1]), bank).ids].chunk(2)
    losses = (sslops.info_nce(near, p, temperature=temperature) for near, p in ((near0, p1), (near1, p0)))
    return sum(losses) / 2


def eager_nnclr(z0: Tensor, z1: Tensor, p0: Tensor, p1: Tensor, bank: Tensor, temperature: float) -> Tensor:
    """NNCLR's loss as it is usually written, with the `[2N, K]` matrix of all similarities."""
    near0, near1 = bank[(torch.cat([z0, z1]) @ bank.T).argmax(dim=1)].chunk(2)
    own = torch.arange(len(p0))
    logits = [near @ F.normalize(p).T / temperature for near, p in ((near0, p1), (near1, p0))]
    return sum(F.cross_entropy(each, own) for each in logits) / 2


class NNCLR(Method):
    """One network with a predictor on top; the queue is of its own embeddings."""

    batch = 512
    hidden, projection = 256, 128
    losses: ClassVar = {
        "sslops": partial(fused_nnclr, temperature=0.1),
        "eager": partial(eager_nnclr, temperature=0.1),
    }

    def __init__(self, side: int):
        super().__init__()
        self.encoder, features = conv_encoder(side)
        self.head = mlp(features, self.hidden, self.projection)
        self.predictor = mlp(self.projection, self.hidden, self.projection)
        self.queue = sslops.NegativeQueue(16384, self.projection)

    def views(self, images: Tensor) -> tuple[Tensor, ...]:
        return (augment(torch.cat([images, images])),)

    def forward(self, views: Tensor) -> tuple[Tensor, ...]:
        z = self.head(self.encoder(views))
        self.keys = z.detach()
        return *F.normalize(self.keys).chunk(2), *self.predictor(z).chunk(2), self.queue.negatives

    def update(self) -> None:
        self.queue.enqueue(self.keys.chunk(2)[0])  # of one view


def fused_relic(*crops: Tensor, **constants: float) -> Tensor:
    online, target = crops[:-LARGE], crops[-LARGE:]
    return sslops.relic_multicrop(online[:LARGE], online[LARGE:], target, **constants)


def eager_relic(*crops: Tensor, temperature: float, alpha: float, beta: float) -> Tensor:
    """RELICv2's loss of all pairs, with `[N, N]` logits for each."""
    online, target = ([F.normalize(z) for z in part] for part in (crops[:-LARGE], crops[-LARGE:]))
    total = 0.0
    for z in online:
        for t in target:
            logits = z @ t.T / temperature
            log_p, log_q = logits.log_softmax(dim=1), logits.T.log_softmax(dim=1)
            p = log_p.exp()
            divergence = (p * log_p).sum(dim=1).detach() - (p * log_q).sum(dim=1)
            total = total + (beta * divergence - alpha * log_p.diagonal()).mean()
    return total / (len(online) * len(target))


class RELICv2(MomentumTarget):
    """All crops go through the online network, the large ones through the target too."""

    steps, batch = 100, 512
    momentum = 0.9  # at 0.99 a third of the target would still be its random start after 100 steps
    losses: ClassVar = {
        "sslops": partial(fused_relic, temperature=0.2, alpha=1.0, beta=1.0),
        "eager": partial(eager_relic, temperature=0.2, alpha=1.0, beta=1.0),
    }

    def views(self, images: Tensor) -> tuple[Tensor, ...]:
        return multicrop(images)

    def forward(self, large: Tensor, small: Tensor) -> tuple[Tensor, ...]:
        online = (*self.online(large).chunk(LARGE), *self.online(small).chunk(SMALL))
        return *online, *self.target(large).chunk(LARGE)
