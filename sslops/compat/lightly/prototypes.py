"""The losses over prototypes."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.dino import dino
from ...ops.ibot import ibot
from ...ops.sinkhorn import sinkhorn
from .._ranks import moved, world
from .state import Center, check_center_mode, check_gather, group_of
from .tokens import get_at_index


class DINOLoss(nn.Module):
    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
    ) -> None:
        super().__init__()
        check_center_mode(center_mode)
        self.teacher_temp, self.student_temp = teacher_temp, student_temp
        self.register_buffer("center", torch.zeros(1, 1, output_dim))
        self.center_momentum = center_momentum
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.teacher_temp_schedule = torch.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)

    def forward(
        self,
        teacher_out: list[Tensor],
        student_out: list[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        """teacher_out, student_out: lists of [B, K], equal views first in both."""
        temperature = self.teacher_temp if teacher_temp is None else teacher_temp
        if teacher_temp is None and epoch is not None and epoch < self.warmup_teacher_temp_epochs:
            temperature = float(self.teacher_temp_schedule[epoch])
        bias = (-self.center / temperature).flatten()
        loss: Tensor = dino(
            student_out, teacher_out, student_temp=self.student_temp, teacher_temp=temperature, bias=bias
        )
        self.update_center(teacher_out)
        return loss

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor | Sequence[Tensor]) -> None:
        """teacher_out: [T, B, K] or a list, as forward has it"""
        mean = torch.stack([x.mean(0, dtype=torch.float32) for x in teacher_out]).mean(0)
        self.center.data = moved(self.center, mean.to(self.center).expand_as(self.center), self.center_momentum)


class IBOTPatchLoss(nn.Module):
    def __init__(
        self,
        output_dim: int = 65536,
        teacher_temp: float = 0.04,
        student_temp: float = 0.1,
        center_mode: str = "mean",
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.teacher_temp, self.student_temp = teacher_temp, student_temp
        self.center = Center(size=(1, output_dim), mode=center_mode, momentum=center_momentum)

    def forward(
        self, teacher_out: Tensor, student_out: Tensor, mask: Tensor, teacher_temp: float | None = None
    ) -> Tensor:
        """teacher_out, student_out: [masked tokens, K]; mask: [B, H, W], True for these."""
        counts = mask.sum((1, 2))
        weights = (1 / (counts.clamp(min=1) * len(mask))).repeat_interleave(counts, output_size=len(student_out))
        return self._loss(teacher_out, student_out, weights, teacher_temp)

    def _loss(
        self, teacher_out: Tensor, student_out: Tensor, weights: Tensor | None, teacher_temp: float | None
    ) -> Tensor:
        temperature = self.teacher_temp if teacher_temp is None else teacher_temp
        loss: Tensor = ibot(
            student_out, teacher_out, weights=weights, student_temp=self.student_temp, teacher_temp=temperature,
            bias=(-self.center.value / temperature)[0], reduction="mean" if weights is None else "sum",
        )  # fmt: skip
        self.center.update(teacher_out)
        return loss


class IBOTPlusPlusPatchLoss(IBOTPatchLoss):
    def forward(
        self,
        teacher_out: Tensor,
        student_out: Tensor,
        mask: Tensor | None = None,
        teacher_temp: float | None = None,
        visible_loss_weight: float = 1.0,
    ) -> Tensor:
        """teacher_out, student_out: [B, N, K], or [B * N, K] beside a mask; mask: [B, H, W] or [B, N]"""
        if teacher_out.shape != student_out.shape:
            shapes = f"{tuple(teacher_out.shape)} and {tuple(student_out.shape)}"
            raise ValueError(f"teacher_out and student_out must have the same shape but got {shapes}.")
        if teacher_out.dim() not in (2, 3):
            raise ValueError(f"teacher_out must be rank 2 or 3 but got rank {teacher_out.dim()}.")
        if teacher_out.dim() == 2 and mask is None:
            raise ValueError("mask is required when teacher_out has rank 2: it has the batch size.")
        batch = len(teacher_out if mask is None or teacher_out.dim() == 3 else mask)
        rows = teacher_out.shape[:-1].numel()
        if rows % max(batch, 1):
            raise ValueError(f"teacher_out length {rows} is not divisible by batch size {batch} of the mask.")
        weights = None
        if mask is not None:
            masked = mask.reshape(batch, -1).to(torch.promote_types(student_out.dtype, torch.float32))
            visible = 1 - masked
            counts = [(x.sum(1, keepdim=True).clamp(min=1) * batch) for x in (masked, visible)]
            weights = (masked / counts[0] + visible_loss_weight * visible / counts[1]).flatten()
        k = teacher_out.shape[-1]
        return self._loss(teacher_out.reshape(-1, k), student_out.reshape(-1, k), weights, teacher_temp)


class SwaVLoss(nn.Module):
    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_gather(sinkhorn_gather_distributed, "sinkhorn_gather_distributed")
        self.temperature = temperature
        self.sinkhorn_iterations, self.sinkhorn_epsilon = sinkhorn_iterations, sinkhorn_epsilon
        self.sinkhorn_gather_distributed = sinkhorn_gather_distributed

    def forward(
        self,
        high_resolution_outputs: list[Tensor],
        low_resolution_outputs: list[Tensor],
        queue_outputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Lists of scores [B, K], the queue's [Q, K]; a loss of shape [1]."""
        views = []
        for k, view in enumerate(high_resolution_outputs):
            rows = view if queue_outputs is None else torch.cat([view, queue_outputs[k]])
            views.append(
                sinkhorn(
                    rows.detach(), temperature=self.sinkhorn_epsilon, iterations=self.sinkhorn_iterations,
                    group=world() if self.sinkhorn_gather_distributed else None,
                )
            )  # fmt: skip
        loss: Tensor = dino(
            [*high_resolution_outputs, *low_resolution_outputs], high_resolution_outputs,
            student_temp=self.temperature, teacher_temp=self.sinkhorn_epsilon, bias=torch.stack(views),
        )  # fmt: skip
        return loss.reshape(1)


class MSNLoss(nn.Module):
    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        regularization_weight: float = 1.0,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be in (0, inf) but is {temperature}.")
        if sinkhorn_iterations < 0:
            raise ValueError(f"sinkhorn_iterations must be >= 0 but is {sinkhorn_iterations}.")
        check_gather(gather_distributed)
        self.temperature, self.sinkhorn_iterations = temperature, sinkhorn_iterations
        self.regularization_weight = regularization_weight
        self.gather_distributed = gather_distributed

    def forward(
        self, anchors: Tensor, targets: Tensor, prototypes: Tensor, target_sharpen_temperature: float = 0.25
    ) -> Tensor:
        """anchors: [V * N, D], view after view; targets: [N, D]; prototypes: [K, D]."""
        anchors, targets, prototypes = (F.normalize(x, dim=1) for x in (anchors, targets, prototypes))
        scores, temperature = anchors @ prototypes.t(), self.temperature * target_sharpen_temperature
        bias = None
        with torch.no_grad():
            target_scores = targets @ prototypes.t()
            if self.sinkhorn_iterations > 0:
                bias = sinkhorn(
                    target_scores, temperature=temperature, iterations=self.sinkhorn_iterations, start="probabilities",
                    group=group_of(self),
                )  # fmt: skip
        views = scores.view(-1, *target_scores.shape)
        loss: Tensor = dino(
            views, target_scores[None], student_temp=self.temperature, teacher_temp=temperature, bias=bias,
            same_view=True,
        )  # fmt: skip
        if self.regularization_weight > 0:
            loss = loss + self.regularization_weight * self.regularization_loss(
                (scores.to(loss.dtype) / self.temperature).softmax(1).mean(0)
            )
        return loss

    def regularization_loss(self, mean_anchor_probs: Tensor) -> Tensor:
        return -torch.special.entr(mean_anchor_probs).sum() + math.log(len(mean_anchor_probs))


class PMSNLoss(MSNLoss):
    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        regularization_weight: float = 1,
        power_law_exponent: float = 0.25,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, sinkhorn_iterations, regularization_weight, gather_distributed)
        self.power_law_exponent = power_law_exponent

    def regularization_loss(self, mean_anchor_probs: Tensor) -> Tensor:
        k = torch.arange(1, len(mean_anchor_probs) + 1, device=mean_anchor_probs.device)
        target = k**-self.power_law_exponent
        return F.kl_div(mean_anchor_probs.log(), target / target.sum(), reduction="sum")


class PMSNCustomLoss(MSNLoss):
    def __init__(
        self,
        target_distribution: Callable[[Tensor], Tensor],
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        regularization_weight: float = 1,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__(temperature, sinkhorn_iterations, regularization_weight, gather_distributed)
        self.target_distribution = target_distribution

    def regularization_loss(self, mean_anchor_probs: Tensor) -> Tensor:
        target = self.target_distribution(mean_anchor_probs).to(mean_anchor_probs.device)
        return F.kl_div(mean_anchor_probs.log(), target, reduction="sum")


class CAPILoss(nn.Module):
    def __init__(
        self,
        teacher_temperature: float = 0.06,
        student_temperature: float = 0.12,
        sinkhorn_iterations: int = 3,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_gather(gather_distributed)
        self.teacher_temperature, self.student_temperature = teacher_temperature, student_temperature
        self.sinkhorn_iterations = sinkhorn_iterations
        self.gather_distributed = gather_distributed

    def forward(self, teacher_logits: Tensor, student_logits: Tensor, teacher_index: Tensor | None = None) -> Tensor:
        """teacher_logits: [B, N, K]; student_logits: [B, M, K]; teacher_index: [B, M], which of the N; None: all"""
        teacher = teacher_logits.detach()
        bias = sinkhorn(
            teacher.transpose(0, 1), temperature=self.teacher_temperature, iterations=self.sinkhorn_iterations,
            group=group_of(self),
        )  # fmt: skip  # [N, K]: each position is balanced by itself
        if teacher_index is not None:
            teacher, bias = get_at_index(teacher, teacher_index), bias[teacher_index]
        loss: Tensor = ibot(
            student_logits.flatten(0, 1), (teacher / self.teacher_temperature + bias).flatten(0, 1),
            student_temp=self.student_temperature, teacher_temp=1.0,
        )  # fmt: skip
        return loss
