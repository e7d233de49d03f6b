"""lightly 1.6's losses and utilities on our ops: the same names, arguments, defaults, attributes and state_dicts.

What differs: losses are float32 for bf16 and float16 inputs and under autocast, where lightly's may be bf16; types,
shapes and values that no loss is meant for (a negative temperature, a momentum above 1, two views of different dtypes)
raise ValueError or TypeError. NTXentLoss has no attribute cross_entropy. update_momentum takes no DTensors and no two
models that share memory: for fully_shard there is `sslops.EMA`.
gather_distributed=True gives lightly's values and gradients, which DDP's averaging makes right: a rank's loss is of its
own rows (NTXentLoss) or has its own invariance (VICRegLoss), and BarlowTwinsLoss averages [D, D] matrices whose columns
each rank normalised by itself. The ops' `group=` takes one batch that is spread over the ranks.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..backend import resolve
from ..ops import random_mask
from ..ops.barlow_twins import barlow_twins
from ..ops.cross_correlation import cross_correlation
from ..ops.ema_update import ema_update_
from ..ops.gather_tokens import gather_tokens
from ..ops.info_nce import info_nce
from ..ops.nt_xent import nt_xent
from ..ops.vicreg import vicreg


class NTXentLoss(nn.Module):
    def __init__(
        self, temperature: float = 0.5, memory_bank_size: int | Sequence[int] = 0, gather_distributed: bool = False
    ) -> None:
        super().__init__()
        self.memory_bank = MemoryBankModule(size=memory_bank_size, gather_distributed=gather_distributed)
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.eps = 1e-8
        if abs(temperature) < self.eps:
            raise ValueError(f"Illegal temperature: abs({temperature}) < 1e-8")
        _check_gather(gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if self.memory_bank.size[0] == 0:  # of the own rows, with the other ranks' among the negatives
            losses = nt_xent(out0, out1, temperature=self.temperature, reduction="none", group=_group(self))
            return losses.mean()
        query, key = F.normalize(out0), F.normalize(out1)
        negatives = self.memory_bank.bank.to(out0.device)
        if key.requires_grad or resolve("info_nce", query.device, query.dtype, None) == "eager":
            negatives = negatives.clone()  # backward will need them as they are now
        loss = info_nce(query, key, negatives, temperature=self.temperature, normalize=False)
        if out0.requires_grad:
            self.memory_bank._dequeue_and_enqueue(key)
        return loss


class MemoryBankModule(nn.Module):
    """The queue as lightly keeps it: rows of a batch that does not fit behind the pointer are dropped."""

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self, size: int | Sequence[int], gather_distributed: bool = False, feature_dim_first: bool = True
    ) -> None:
        super().__init__()
        self.size = (size,) if isinstance(size, int) else tuple(size)
        if any(x < 0 for x in self.size):
            raise ValueError(f"Illegal memory bank size {size}, all entries must be non-negative.")
        if isinstance(size, int) and size > 0:
            raise ValueError(
                f"Memory bank size 'size={size}' does not specify the feature dimension. Set it with "
                f"'size=({size}, dim)', or pass 'size=0' to disable the memory bank."
            )
        if self.size != (0,) and len(self.size) != 2:
            raise ValueError(
                f"Illegal memory bank size {size}, expected a (num_features, dim) tuple, or 'size=0' to disable the "
                "memory bank."
            )
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        bank = F.normalize(torch.randn(self.size), dim=-1) if len(self.size) == 2 else torch.empty(self.size)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("bank_ptr", torch.zeros(1, dtype=torch.long), persistent=False)

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if self.size[0] == 0:
            return output, None
        bank = self.bank.detach().clone()
        if update:
            self._dequeue_and_enqueue(output)
        return output, bank.t() if self.feature_dim_first else bank

    @torch.no_grad()
    def _dequeue_and_enqueue(self, batch: Tensor) -> None:
        # on the device alone: no synchronisation, no graph break
        if group := distributed.name("MemoryBankModule", _group(self)):
            batch = torch.ops.sslops.all_gather(batch, group, 0, "MemoryBankModule")
        size = self.size[0]
        end = self.bank_ptr + len(batch)
        batch = batch[:size].to(self.bank)
        slots = self.bank_ptr + torch.arange(len(batch), device=batch.device)
        fits, slots = slots < size, slots % size
        self.bank.index_copy_(0, slots, torch.where(fits[:, None], batch, self.bank[slots]))
        self.bank_ptr.copy_(torch.where(end < size, end, 0))


class BarlowTwinsLoss(nn.Module):
    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False) -> None:
        super().__init__()
        self.lambda_param = lambda_param
        self.gather_distributed = gather_distributed
        _check_gather(gather_distributed)

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        if _group(self):
            return barlow_twins_of_average(z_a, z_b, self.lambda_param)
        return barlow_twins(z_a, z_b, lambd=self.lambda_param)


class VICRegLoss(nn.Module):
    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 0.0001,
    ) -> None:
        super().__init__()
        _check_gather(gather_distributed)
        self.lambda_param, self.mu_param, self.nu_param = lambda_param, mu_param, nu_param
        self.gather_distributed = gather_distributed
        self.eps = eps

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        """z_a, z_b: [N, ..., D]; with dimensions between, the mean of the losses at their positions."""
        assert min(z_a.shape[0], z_b.shape[0]) > 1, (
            f"z_a and z_b must have batch size > 1 but found {z_a.shape[0]} and {z_b.shape[0]}"
        )
        assert z_a.shape == z_b.shape, f"z_a and z_b must have same shape but found {z_a.shape} and {z_b.shape}."
        if z_a.dim() > 2:
            positions = zip(z_a.flatten(1, -2).unbind(1), z_b.flatten(1, -2).unbind(1), strict=True)
            return torch.stack([self(a, b) for a, b in positions]).mean()
        weights = self.lambda_param, self.mu_param, self.nu_param
        return vicreg_of_own_invariance(z_a, z_b, *weights, self.eps, _group(self))


class NegativeCosineSimilarity(nn.Module):
    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        return -F.cosine_similarity(x0, x1, self.dim, self.eps).mean()


@torch.no_grad()
def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    ema_update_(model_ema.parameters(), model.parameters(), m if isinstance(m, Tensor) else float(m))


def random_token_mask(
    size: tuple[int, int],
    mask_ratio: float = 0.6,
    mask_class_token: bool = False,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    noise = torch.rand(size, device=device)  # as lightly draws it: the same seed gives the same mask
    return random_mask.random_token_mask(*size, mask_ratio, mask_class_token=mask_class_token, noise=noise)


def get_at_index(tokens: Tensor, index: Tensor) -> Tensor:
    if tokens.is_floating_point():
        return gather_tokens(tokens, index)
    return tokens.gather(1, index.unsqueeze(2).expand(-1, -1, tokens.shape[2]))


def set_at_index(tokens: Tensor, index: Tensor, value: Tensor) -> Tensor:
    return tokens.scatter(1, index.unsqueeze(2).expand(-1, -1, tokens.shape[2]), value)


def repeat_token(token: Tensor, size: tuple[int, int]) -> Tensor:
    return token.repeat(*size, 1)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    assert images.shape[2] == images.shape[3]
    assert images.shape[2] % patch_size == 0
    grid = images.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)  # [B, C, rows, columns, p, p]
    return grid.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


# ---- what differs from our own ops over ranks, and is alike in solo-learn ----


def barlow_twins_of_average(z_a: Tensor, z_b: Tensor, lambd: float) -> Tensor:
    """Of the mean over the ranks of their own [D, D] matrices: each rank normalises by its own batch."""
    from torch.distributed.nn.functional import all_reduce  # knows its gradient

    c = all_reduce(cross_correlation(z_a, z_b) / torch.distributed.get_world_size())
    diagonal = c.diagonal()
    return (1 - diagonal).square().sum() + lambd * (c - diagonal.diag()).square().sum()


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


def _group(module: nn.Module) -> str | None:
    return world() if module.gather_distributed else None


def _check_gather(gather_distributed: bool) -> None:
    if gather_distributed and not torch.distributed.is_available():
        raise ValueError(
            "gather_distributed is True but torch.distributed is not available. Please set gather_distributed=False "
            "or install a torch version with distributed support."
        )


REPLACED = {
    "lightly.loss.ntx_ent_loss": (NTXentLoss,),
    "lightly.loss.barlow_twins_loss": (BarlowTwinsLoss,),
    "lightly.loss.vicreg_loss": (VICRegLoss,),
    "lightly.loss.negative_cosine_similarity": (NegativeCosineSimilarity,),
    "lightly.models.modules.memory_bank": (MemoryBankModule,),
    "lightly.models.utils": (
        update_momentum, random_token_mask, get_at_index, set_at_index, repeat_token, patchify,
    ),
}  # fmt: skip
