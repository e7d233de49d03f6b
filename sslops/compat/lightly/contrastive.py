"""The losses that compare with negatives."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import _check, distributed
from ...backend import resolve
from ...ops.info_nce import info_nce
from ...ops.nt_xent import nt_xent
from ...ops.supcon import supcon
from .state import MemoryBankModule, check_gather, group_of


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
        check_gather(gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        if self.memory_bank.size[0] == 0:  # of the own rows, with the other ranks' among the negatives
            losses = nt_xent(out0, out1, temperature=self.temperature, reduction="none", group=group_of(self))
            return losses.mean()
        query, key = F.normalize(out0), F.normalize(out1)
        negatives = self.memory_bank.bank.to(out0.device)
        if key.requires_grad or resolve("info_nce", query.device, query.dtype, None) == "eager":
            negatives = negatives.clone()  # backward will need them as they are now
        loss = info_nce(query, key, negatives, temperature=self.temperature, normalize=False)
        if out0.requires_grad:
            self.memory_bank._dequeue_and_enqueue(key)
        return loss


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - len(out0) * similarity.softmax(0)


class DCLLoss(nn.Module):
    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed
        check_gather(gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        weights = None
        if self.weight_fn:
            unit0, unit1 = F.normalize(out0), F.normalize(out1)
            weights = torch.stack([self.weight_fn(unit0, unit1), self.weight_fn(unit1, unit0)])
        losses = nt_xent(
            out0, out1, temperature=self.temperature, reduction="none", decoupled=True,
            positive_weights=None if weights is None else weights.detach(), group=group_of(self),
        )  # fmt: skip
        if weights is None or not weights.requires_grad:
            return losses.mean()
        similarity = (unit0 * unit1).sum(1).detach() / self.temperature
        return losses.mean() - ((weights - weights.detach()) * similarity).mean()  # what reaches the weights


class DCLWLoss(DCLLoss):
    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False) -> None:
        weight_fn = partial(negative_mises_fisher_weights, sigma=sigma)
        super().__init__(temperature, weight_fn, gather_distributed)


class DetConBLoss(nn.Module):
    def __init__(self, temperature: float = 0.1, gather_distributed: bool = True) -> None:
        super().__init__()
        self.eps = 1e-8
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        if abs(self.temperature) < self.eps:
            raise ValueError(f"Illegal temperature: abs({self.temperature}) < 1e-8")
        check_gather(gather_distributed)

    def forward(
        self,
        pred_view0: Tensor,
        pred_view1: Tensor,
        target_view0: Tensor,
        target_view1: Tensor,
        mask_view0: Tensor,
        mask_view1: Tensor,
    ) -> Tensor:
        """pred_view0, .., target_view1: [B, M, D], a row for each region; mask_view0, mask_view1: [B, M], which"""
        for name, target in (("target_view0", target_view0), ("target_view1", target_view1)):
            if target.requires_grad:
                _check.bad_value("DetConBLoss", name, "targets that want no gradient (detach)", "one that does")
        group = distributed.name("DetConBLoss", group_of(self))
        labels, ids, weights = _regions(mask_view0, mask_view1, group)
        rows = torch.cat([target_view0, target_view1]).flatten(0, 1)
        keys, key_labels, key_ids = (
            torch.ops.sslops.all_gather(x, group, 0, "DetConBLoss") if group else x for x in (rows, labels, ids)
        )
        loss: Tensor = supcon(
            torch.cat([pred_view0, pred_view1]).flatten(0, 1), labels, keys=keys, key_labels=key_labels, query_ids=ids,
            key_ids=key_ids, weights=weights, temperature=self.temperature,
        )  # fmt: skip
        return 2 * loss


class DetConSLoss(nn.Module):
    def __init__(self, temperature: float = 0.1, gather_distributed: bool = True) -> None:
        super().__init__()
        self.detconbloss = DetConBLoss(temperature=temperature, gather_distributed=gather_distributed)

    def forward(self, view0: Tensor, view1: Tensor, mask_view0: Tensor, mask_view1: Tensor) -> Tensor:
        """view0, view1: [B, M, D]; mask_view0, mask_view1: [B, M]"""
        of = self.detconbloss
        group = group_of(of)
        labels, ids, weights = _regions(mask_view0, mask_view1, distributed.name("DetConSLoss", group))
        losses = supcon(
            torch.cat([view0, view1]).flatten(0, 1), labels, query_ids=ids, weights=weights,
            temperature=of.temperature, reduction="none", group=group,
        )  # fmt: skip
        return 2 * losses.mean()


def _regions(mask0: Tensor, mask1: Tensor, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """[2 B M] each: equal for one mask of one image; for that of one view too; 1 over how often it is there"""
    masks = torch.stack([mask0, mask1])
    image = distributed.rank(group) * len(mask0) + torch.arange(len(mask0), device=masks.device)
    labels = (image[:, None] << 33) + (masks.long() & 0xFFFFFFFF)
    ids = labels + (torch.arange(2, device=masks.device)[:, None, None] << 32)
    weights = 1 / (masks[..., None] == masks[..., None, :]).sum(-1)
    return labels.flatten(), ids.flatten(), weights.flatten()
