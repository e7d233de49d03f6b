"""What is kept from step to step: the memory bank, the center, the momentum model."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import distributed
from ...ops.ema_update import ema_update_
from ...ops.nearest import nearest
from .._ranks import moved, world


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
        if group := distributed.name("MemoryBankModule", group_of(self)):
            batch = torch.ops.sslops.all_gather(batch, group, 0, "MemoryBankModule")
        size = self.size[0]
        end = self.bank_ptr + len(batch)
        batch = batch[:size].to(self.bank)
        slots = self.bank_ptr + torch.arange(len(batch), device=batch.device)
        fits, slots = slots < size, slots % size
        self.bank.index_copy_(0, slots, torch.where(fits[:, None], batch, self.bank[slots]))
        self.bank_ptr.copy_(torch.where(end < size, end, 0))


class NNMemoryBankModule(MemoryBankModule):
    """The bank as it was before the update; it is neither copied nor normalised."""

    def __init__(self, size: int | Sequence[int]) -> None:
        super().__init__(size)

    def forward(self, output: Tensor, update: bool = False) -> Tensor:  # type: ignore[override]
        assert self.size[0] > 0, "NNMemoryBankModule: wanted a bank, got size 0"
        bank = self.bank.detach().to(output.device)
        found = bank[nearest(output.detach(), bank, normalize=True).ids]
        if update:
            self._dequeue_and_enqueue(output)
        return found


class Center(nn.Module):
    center: Tensor

    def __init__(self, size: tuple[int, ...], mode: str = "mean", momentum: float = 0.9) -> None:
        super().__init__()
        check_center_mode(mode)
        self.size = size
        self.dim = tuple(i for i, s in enumerate(size) if s == 1)
        self.register_buffer("center", torch.zeros(self.size))
        self.momentum = momentum

    @property
    def value(self) -> Tensor:
        return self.center

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        self.center = moved(self.center, x.mean(self.dim, keepdim=True), self.momentum)


def check_center_mode(mode: str) -> None:
    if mode != "mean":
        raise ValueError(f"Unknown mode '{mode}'. Valid modes are ['mean'].")


@torch.no_grad()
def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    ema_update_(model_ema.parameters(), model.parameters(), m if isinstance(m, Tensor) else float(m))


def group_of(module: nn.Module) -> str | None:
    return world() if module.gather_distributed else None


def check_gather(gather_distributed: bool, name: str = "gather_distributed") -> None:
    if gather_distributed and not torch.distributed.is_available():
        raise ValueError(
            f"{name} is True but torch.distributed is not available. Please set gather_distributed=False "
            "or install a torch version with distributed support."
        )
