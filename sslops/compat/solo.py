"""solo-learn 1.0.6's loss functions, momentum updater and nearest neighbours on our ops: the same names, arguments and
defaults.

What differs: losses are float32 for bf16 and float16 inputs and under autocast; arguments that no loss is meant for
raise ValueError or TypeError; simclr_loss_func has no overflow at low temperatures; mae_loss_func is 0, not NaN, where
nothing is masked; MomentumUpdater writes the parameters in place, where solo-learn gives them new memory. Over several
ranks the values are solo-learn's; gradients are what DDP's averaging makes right, where solo-learn's own lack what
other ranks' losses contribute.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check, distributed
from ..ops.barlow_twins import barlow_twins
from ..ops.dino import dino
from ..ops.ema_update import ema_update_
from ..ops.ibot import ibot
from ..ops.info_nce import info_nce
from ..ops.masked_prediction import masked_patch_mse
from ..ops.nearest import nearest
from ..ops.nt_xent import nt_xent
from ..ops.sinkhorn import sinkhorn
from ._ranks import barlow_twins_of_average, moved, vicreg_of_own_invariance, world


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    """-log of the positives' share of the sum of exp(<z_i, z_j> / temperature), j != i: the mean over the rows.

    Rows of z [M, D] with equal indexes [M] are each other's positives, at least two of each. Two views, one after the
    other with the same distinct indexes, take nt_xent; anything else takes info_nce, at about twice its work. Which of
    them it is, is read on the host. torch.compile takes two views for granted and asserts them on the device.
    """
    _check.tensors("simclr_loss_func", {"z": z}, {"z": _check.Of("N D")})
    if indexes.shape != z.shape[:1]:
        _check.bad_value("simclr_loss_func", "indexes", f"shape {[len(z)]}", list(indexes.shape))
    group = world()
    name = distributed.name("simclr_loss_func", group)
    if name:
        indexes = torch.ops.sslops.all_gather(indexes, name, 0, "simclr_loss_func")
    if z.shape[0] % 2 == 0:
        first, second = indexes.view(distributed.size(name), 2, -1).unbind(1)
        ordered = first.flatten().sort().values
        two_views = (first == second).all() & (ordered[1:] != ordered[:-1]).all()
        if torch.compiler.is_compiling():
            torch._assert_async(two_views, "simclr_loss_func: indexes: wanted two views in torch.compile")
        if torch.compiler.is_compiling() or two_views:
            return nt_xent(*z.chunk(2), temperature=temperature, reduction="none", group=group).mean()
    (z,) = distributed.gathered("simclr_loss_func", name, z)
    wide = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)))
    with torch.autocast(z.device.type, enabled=False):  # the positives' terms are found by cancellation
        losses = _by_index(wide, indexes, temperature)
    return distributed.own_rows(losses, name, 1).mean()


def _by_index(z: Tensor, indexes: Tensor, temperature: float) -> Tensor:
    """losses [M]; z: [M, D] unit rows"""
    _, group, counts = torch.unique(indexes, return_inverse=True, return_counts=True)
    if (counts < 2).any():
        _check.bad_value("simclr_loss_func", "indexes", "at least two of each", "one alone")
    order = group.argsort(stable=True)
    place = torch.empty_like(order)  # of each row in its group
    place[order] = torch.arange(len(z), device=z.device) - (counts.cumsum(0) - counts)[group[order]]
    rows = order.new_full((len(counts), int(counts.max())), -1)
    rows[group, place] = torch.arange(len(z), device=z.device)
    members = z[rows.clamp(min=0)]  # [groups, V, D]
    similarity = members @ members.mT / temperature
    itself = torch.eye(rows.shape[1], dtype=torch.bool, device=z.device)
    positives = similarity.masked_fill(itself | (rows < 0)[:, None], -math.inf).logsumexp(2)[group, place]
    partner = rows[group, 1 - place.clamp(max=1)]  # one of the positives, for negatives on its scale
    losses = info_nce(
        z, z[partner], z, query_ids=group, negative_ids=group,
        temperature=temperature, normalize=False, reduction="none",
    ).clamp(min=torch.finfo(torch.float32).tiny)  # fmt: skip
    negatives = (z * z[partner]).sum(1) / temperature + losses + (-torch.expm1(-losses)).log()
    return F.softplus(negatives - positives)


def mocov2plus_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """query, key: [N, D], of unit length as they should be; queue: [D, K]."""
    return info_nce(query, key, queue.t(), temperature=temperature, normalize=False)


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    """query, key: [N, D]; over ranks the keys of all, without a gradient, and the mean of the rank's own losses."""
    group = world()
    key = key.detach() if group else key
    losses = info_nce(query, key, temperature=temperature, reduction="none", group=group)
    return 2 * temperature * losses.mean()


def nnclr_loss_func(nn: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor:
    """nn, p: [N, D]; over several ranks the candidates are all ranks' p, and the mean is of the own rows."""
    losses: Tensor = info_nce(nn, p, temperature=temperature, reduction="none", group=world())
    return losses.mean()


def _find_nn() -> Callable[..., tuple[Tensor, Tensor]]:
    """One for each class that has it"""

    @torch.no_grad()
    def find_nn(self: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
        ids = nearest(z, self.queue).ids  # type: ignore[arg-type]
        return ids, self.queue[ids]  # type: ignore[index]

    return find_nn


@torch.no_grad()
def find_nn(self: nn.Module, z: Tensor) -> tuple[Tensor, ...]:
    """All4One's: the nearest one's index, and of five neighbours the rows, the images' indexes and the labels"""
    ids = nearest(z, self.queue, k=5).ids  # type: ignore[arg-type]
    return ids[:, 0], *(x[ids] for x in (self.queue, self.queue_index, self.queue_y))  # type: ignore[index]


def barlow_loss_func(z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025) -> Tensor:
    if world():
        return scale_loss * barlow_twins_of_average(z1, z2, lamb)
    return barlow_twins(z1, z2, lambd=lamb, scale=scale_loss)


def vicreg_loss_func(
    z1: Tensor, z2: Tensor, sim_loss_weight: float = 25.0, var_loss_weight: float = 25.0, cov_loss_weight: float = 1.0
) -> Tensor:
    """The variance terms of the two views are added, not averaged: twice the paper's weight."""
    weights = sim_loss_weight, 2 * var_loss_weight, cov_loss_weight
    return vicreg_of_own_invariance(z1, z2, *weights, 1e-4, world())


def byol_loss_func(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor:
    z = z.detach()
    cosine = (
        F.cosine_similarity(p, z, dim=-1) if simplified else (F.normalize(p, dim=-1) * F.normalize(z, dim=-1)).sum(1)
    )
    return 2 - 2 * cosine.mean()


def mae_loss_func(imgs: Tensor, pred: Tensor, mask: Tensor, patch_size: int, norm_pix_loss: bool = True) -> Tensor:
    return masked_patch_mse(pred, imgs, mask, patch_size, norm_pix=norm_pix_loss)


class DINOLoss(nn.Module):
    center: Tensor

    def __init__(
        self,
        num_prototypes: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: float,
        num_epochs: int,
        student_temp: float = 0.1,
        num_large_crops: int = 2,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.epoch = 0
        self.student_temp, self.center_momentum = student_temp, center_momentum
        self.num_large_crops = num_large_crops
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        warmup = int(warmup_teacher_temp_epochs)
        rise = torch.linspace(warmup_teacher_temp, teacher_temp, warmup, dtype=torch.float64)
        self.teacher_temp_schedule = [*rise.tolist(), *[float(teacher_temp)] * (num_epochs - warmup)]

    def forward(self, student_output: Tensor, teacher_output: Tensor) -> Tensor:
        """student_output: [num_large_crops * N, K], crop after crop; teacher_output: [2 * N, K]."""
        temperature = self.teacher_temp_schedule[self.epoch]
        student, teacher = student_output.unflatten(0, (self.num_large_crops, -1)), teacher_output.unflatten(0, (2, -1))
        loss: Tensor = dino(
            student, teacher, student_temp=self.student_temp, teacher_temp=temperature,
            bias=(-self.center / temperature)[0],
        )  # fmt: skip
        self.update_center(teacher_output)
        return loss

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        self.center = moved(self.center, teacher_output.mean(0, keepdim=True), self.center_momentum)


class SinkhornKnopp(nn.Module):
    """The assignment itself, for those who want it: `sinkhorn` and `dino` do without."""

    def __init__(self, num_iters: int = 3, epsilon: float = 0.05, world_size: int = 1) -> None:
        super().__init__()
        self.num_iters, self.epsilon, self.world_size = num_iters, epsilon, world_size

    @torch.no_grad()
    def forward(self, Q: Tensor) -> Tensor:
        b = sinkhorn(Q, temperature=self.epsilon, iterations=self.num_iters, group=world())
        return (Q / self.epsilon + b).softmax(1)


def swav_loss_func(preds: list[Tensor], assignments: list[Tensor], temperature: float = 0.1) -> Tensor:
    """preds: a list of [N, K]; assignments: as many [N, K] whose rows' sums are 1."""
    loss: Tensor = dino(preds, [a.log() for a in assignments], student_temp=temperature, teacher_temp=1.0)
    return loss


def ressl_loss_func(
    q: Tensor, k: Tensor, queue: Tensor, temperature_q: float = 0.1, temperature_k: float = 0.04
) -> Tensor:
    """q, k: [N, D], of unit length as they should be; queue: [K, D]. No similarities with it are in memory whole."""
    loss: Tensor = ibot(
        q, k, prototypes=queue, teacher_prototypes=queue, student_temp=temperature_q, teacher_temp=temperature_k
    )
    return loss


class MomentumUpdater:
    def __init__(self, base_tau: float = 0.996, final_tau: float = 1.0) -> None:
        assert 0 <= base_tau <= 1
        assert 0 <= final_tau <= 1
        assert base_tau <= final_tau
        self.base_tau = self.cur_tau = base_tau
        self.final_tau = final_tau

    @torch.no_grad()
    def update(self, online_net: nn.Module, momentum_net: nn.Module) -> None:
        pairs = list(zip(online_net.parameters(), momentum_net.parameters(), strict=False))  # as solo-learn pairs them
        ema_update_([target for _, target in pairs], [source for source, _ in pairs], self.cur_tau)

    def update_tau(self, cur_step: int, max_steps: int) -> None:
        rest = (math.cos(math.pi * cur_step / max_steps) + 1) / 2
        self.cur_tau = self.final_tau - (self.final_tau - self.base_tau) * rest


REPLACED = {
    "solo.losses.simclr": (simclr_loss_func,),
    "solo.losses.mocov2plus": (mocov2plus_loss_func,),
    "solo.losses.mocov3": (mocov3_loss_func,),
    "solo.losses.barlow": (barlow_loss_func,),
    "solo.losses.vicreg": (vicreg_loss_func,),
    "solo.losses.byol": (byol_loss_func,),
    "solo.losses.mae": (mae_loss_func,),
    "solo.losses.dino": (DINOLoss,),
    "solo.losses.swav": (swav_loss_func,),
    "solo.losses.ressl": (ressl_loss_func,),
    "solo.losses.nnclr": (nnclr_loss_func,),
    "solo.methods.nnclr:NNCLR": (_find_nn(),),
    "solo.methods.nnbyol:NNBYOL": (_find_nn(),),
    "solo.methods.nnsiam:NNSiam": (_find_nn(),),
    "solo.methods.all4one:All4One": (find_nn,),
    "solo.utils.sinkhorn_knopp": (SinkhornKnopp,),
    "solo.utils.momentum": (MomentumUpdater,),
}
