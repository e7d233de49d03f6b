"""The other losses."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._sums import mean
from ...ops.barlow_twins import barlow_twins
from ...ops.nearest import nearest
from ...ops.sigreg import sigreg
from .._ranks import barlow_twins_of_average, register_knots, vicreg_of_own_invariance
from .state import check_gather, group_of


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
        register_knots(self, knots, t_max)

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
        if local_proj.shape[1:] != global_proj.shape[1:]:
            shapes = f"{local_proj.shape} and {global_proj.shape}"
            raise ValueError(f"local_proj and global_proj must have the same N and D, got {shapes}.")
        everyone = torch.cat([global_proj, local_proj])
        wide = everyone.to(torch.promote_types(everyone.dtype, torch.float32))
        apart = mean((wide - wide[: len(global_proj)].mean(0)).square().mean(2))
        loss: Tensor = self.lambda_param * self.sigreg(everyone) + (1 - self.lambda_param) * apart
        return loss


class NegativeCosineSimilarity(nn.Module):
    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        return -F.cosine_similarity(x0, x1, self.dim, self.eps).mean()
