"""The other losses."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.barlow_twins import barlow_twins
from ...ops.dino import dino
from ...ops.ibot import ibot
from ...ops.nearest import nearest
from ...ops.sigreg import sigreg
from ...ops.sinkhorn import sinkhorn
from .._ranks import barlow_twins_of_average, moved, vicreg_of_own_invariance, world
from .state import Center, check_center_mode, check_gather, group_of


class BarlowTwinsLoss(nn.Module):
    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False) -> None:
        super().__init__()
        self.lambda_param = lambda_param
        self.gather_distributed = gather_distributed
        check_gather(gather_distributed)

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        if group_of(self):
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
        check_gather(gather_distributed)
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
        return vicreg_of_own_invariance(z_a, z_b, *weights, self.eps, group_of(self))


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
        mean = torch.stack([x.flatten(0, -2).mean(0, dtype=torch.float32) for x in teacher_out]).mean(0)
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
        temperature = self.teacher_temp if teacher_temp is None else teacher_temp
        count = mask.sum((1, 2), keepdim=True).clamp(min=1)
        weights = (1 / (count * len(mask))).expand_as(mask)[mask]
        loss: Tensor = ibot(
            student_out, teacher_out, weights=weights, student_temp=self.student_temp, teacher_temp=temperature,
            bias=(-self.center.value / temperature)[0], reduction="sum",
        )  # fmt: skip
        self.center.update(teacher_out)
        return loss


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


class KoLeoLoss(nn.Module):
    def __init__(self, p: float = 2, eps: float = 1e-8) -> None:
        super().__init__()
        self.p, self.eps = p, eps
        self.pairwise_distance = nn.PairwiseDistance(p=p, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), eps=self.eps)
        other = F.embedding(nearest(x.detach(), x.detach(), exclude_self=True).ids, x)  # sums its gradient in one order
        distance: Tensor = self.pairwise_distance(x, other)
        return -(distance + self.eps).log().mean()


class SIGReg(nn.Module):
    t: Tensor

    def __init__(
        self, *, knots: int = 17, t_max: float = 3.0, num_vectors: int = 1024, gather_distributed: bool = False
    ) -> None:
        super().__init__()
        if knots <= 1:
            raise ValueError("knots must be an integer greater than one.")
        if t_max <= 0:
            raise ValueError("t_max must be greater than zero.")
        if num_vectors <= 0:
            raise ValueError("num_vectors must be a positive integer.")
        check_gather(gather_distributed)
        self.num_vectors = num_vectors
        self.gather_distributed = gather_distributed
        self._t_max = t_max
        t = torch.linspace(0, t_max, knots)
        weights = torch.full((knots,), 2 * t_max / (knots - 1))
        weights[[0, -1]] /= 2
        phi = (-t.square() / 2).exp()
        for name, values in (("t", t), ("phi", phi), ("weights", weights * phi)):
            self.register_buffer(name, values)  # not read

    def forward(self, proj: Tensor) -> Tensor:
        """proj: [.., N, D]. Along lightly's own directions, from torch's generator."""
        directions = torch.randn(proj.shape[-1], self.num_vectors, device=proj.device, dtype=proj.dtype)
        group = group_of(self)
        if group:
            torch.distributed.broadcast(directions, src=0)
        directions = (directions / directions.norm(dim=0)).t()
        views = proj.reshape(-1, *proj.shape[-2:])
        return sigreg(views, knots=len(self.t), t_max=self._t_max, directions=directions, group=group)


class LeJEPALoss(nn.Module):
    def __init__(
        self,
        lambda_param: float = 0.05,
        gather_distributed: bool = False,
        sigreg_knots: int = 17,
        sigreg_t_max: float = 3.0,
        sigreg_num_vectors: int = 1024,
    ) -> None:
        super().__init__()
        if not 0.0 <= lambda_param <= 1.0:
            raise ValueError("lambda_param must be in the unit interval [0, 1].")
        self.lambda_param = lambda_param
        self.sigreg = SIGReg(
            knots=sigreg_knots, t_max=sigreg_t_max, num_vectors=sigreg_num_vectors,
            gather_distributed=gather_distributed,
        )  # fmt: skip

    def forward(self, *, local_proj: Tensor, global_proj: Tensor) -> Tensor:
        """local_proj: [L, N, D]; global_proj: [G, N, D]. Over ranks the invariance is the rank's own."""
        for name, views in (("local", local_proj), ("global", global_proj)):
            if views.dim() != 3:
                raise ValueError(f"{name}_proj must have shape (V_{name}, N, D), got {views.shape}.")
            if not len(views):
                raise ValueError(f"{name}_proj must have at least one {name} view, got {views.shape}.")
        everyone = torch.cat([global_proj, local_proj])
        wide = everyone.to(torch.promote_types(everyone.dtype, torch.float32))
        apart = (wide - wide[: len(global_proj)].mean(0)).square().mean()
        loss: Tensor = self.lambda_param * self.sigreg(everyone) + (1 - self.lambda_param) * apart
        return loss


class NegativeCosineSimilarity(nn.Module):
    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        return -F.cosine_similarity(x0, x1, self.dim, self.eps).mean()
