"""What lightly, solo-learn and stable-pretraining do or keep alike, most of it over ranks, where our own ops differ."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from .._columns import off_identity
from ..ops.cross_correlation import cross_correlation
from ..ops.vicreg import vicreg


def barlow_twins_of_average(z_a: Tensor, z_b: Tensor, lambd: float) -> Tensor:
    """Of the mean over the ranks of their own [D, D] matrices: each rank normalises by its own batch."""
    from torch.distributed.nn.functional import all_reduce  # knows its gradient

    c = all_reduce(cross_correlation(z_a, z_b) / torch.distributed.get_world_size())
    return off_identity(c, lambd)


def vicreg_of_own_invariance(
    z_a: Tensor, z_b: Tensor, invariance: float, variance: float, covariance: float, eps: float, group: str | None
) -> Tensor:
    """Variance and covariance of all ranks' rows, but the invariance of this rank's: the gradient is vicreg's."""
    loss = vicreg(
        z_a, z_b, invariance=0.0 if group else invariance, variance=variance, covariance=covariance, eps=eps,
        group=group,
    )  # fmt: skip
    wide = torch.promote_types(z_a.dtype, torch.float32)
    return loss + invariance * F.mse_loss(z_a.to(wide), z_b.to(wide)) if group else loss


def world() -> str | None:
    """The group of all ranks, where there is one."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return "world" if ready and torch.distributed.get_world_size() > 1 else None


def moved(center: Tensor, mean: Tensor, momentum: float) -> Tensor:
    """By the mean of the ranks' means, wherever there are ranks"""
    mean = distributed.mean(mean, distributed.name("Center", world()))
    return center * momentum + mean * (1 - momentum)


def register_knots(module: nn.Module, knots: int, t_max: float) -> None:
    """The buffers of SIGReg's integral that are in their state_dicts; `sigreg` does not read them"""
    t = torch.linspace(0, t_max, knots)
    weights = torch.full((knots,), 2 * t_max / (knots - 1))
    weights[[0, -1]] /= 2
    phi = (-t.square() / 2).exp()
    for name, values in (("t", t), ("phi", phi), ("weights", weights * phi)):
        module.register_buffer(name, values)
