"""The methods that pretrain.py trains: what each makes of an image, its networks, and its loss fused and eager."""

import copy
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import ClassVar

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
    steps, batch, learning_rate = 150, 2048, 5e-3

    def views(self, images: Tensor) -> tuple[Tensor, ...]:
        """All that is random in a step, from images `[N, 1, S, S]`: what forward takes."""
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


LARGE, SMALL = 2, 3  # crops of each image


def multicrop(images: Tensor) -> tuple[Tensor, Tensor]:
    """The large crops of all images, crop after crop, and the small ones."""
    small = round(0.65 * images.shape[-1])  # enough for the encoder to give as many features as of a large crop
    large_crops = augment(images.repeat(LARGE, 1, 1, 1))
    return large_crops, augment(images.repeat(SMALL, 1, 1, 1), small, shown=(0.5, 0.85))


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
    losses = -torch.einsum("vnk,tnk->vt", (student / 0.1).log_softmax(2), q) / student.shape[1]
    return (losses.sum() - losses.diagonal().sum()) / (losses.numel() - min(losses.shape))


def eager_dino(large: Tensor, small: Tensor, teacher: Tensor, bias: Tensor) -> Tensor:
    return cross_entropy_of_pairs(torch.cat([large, small]), (teacher / TEACHER_TEMP + bias).softmax(2))


TEACHER_TEMP = 0.04


class DINO(MomentumTarget):
    """The target's large crops are the teacher: its logits, centred, for the other crops of the online network."""

    prototypes = 1024
    steps, batch, momentum = 150, 512, 0.9
    losses: ClassVar = {"sslops": fused_dino, "eager": eager_dino}

    def __init__(self, side: int):
        super().__init__(side)
        for network in (self.online, self.target):
            network.append(Prototypes(self.projection, self.prototypes))
        self.target.load_state_dict(self.online.state_dict())
        self.target.requires_grad_(False)
        self.ema = sslops.EMA(self.target, self.online, self.momentum)
        self.center = sslops.nn.PrototypeCenter(self.prototypes)

    def views(self, images: Tensor) -> tuple[Tensor, ...]:
        return multicrop(images)

    def forward(self, large: Tensor, small: Tensor) -> tuple[Tensor, ...]:
        self.teacher = self.target(large).unflatten(0, (LARGE, -1))
        student = (self.online(x).unflatten(0, (n, -1)) for x, n in ((large, LARGE), (small, SMALL)))
        return *student, self.teacher, self.center.bias(TEACHER_TEMP)[None]

    def update(self) -> None:
        super().update()
        self.center.update(self.teacher)


def fused_swav(large: Tensor, small: Tensor) -> Tensor:
    return sslops.swav([large, small])


def eager_swav(large: Tensor, small: Tensor) -> Tensor:
    """With the assignments as a matrix, as SwAV's own code has it."""
    assignments = []
    for scores in large.detach():
        q = (scores / 0.05).exp()
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
        return tuple(self.last(self.head(self.encoder(x))).unflatten(0, (n, -1)) for x, n in crops)


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


METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "barlow": BarlowTwins,
    "vicreg": VICReg,
    "moco": MoCo,
    "relicv2": RELICv2,
    "dino": DINO,
    "swav": SwAV,
    "mae": MAE,
}
