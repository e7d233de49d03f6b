"""stable-pretraining 0.1's NTXEntLoss, VICRegLoss and SlicedEppsPulley on our ops: the same arguments, defaults and
values, over ranks too.

What differs: losses are float32 for bf16 and float16 inputs and under autocast. SlicedEppsPulley over ranks is of all
their rows; theirs drops the means that it has reduced. What is not here: its BarlowTwinsLoss divides sums over N by
deviations over N - 1, and each rank's rows by its own, so that its diagonal never reaches 1; its BYOLLoss is a few row
operations, of which a kernel would save nothing.
"""

import torch
from torch import Tensor, nn

from ..ops.nt_xent import nt_xent
from ..ops.sigreg import sigreg
from ._ranks import register_knots, vicreg_of_own_invariance, world


class NTXEntLoss(nn.Module):
    def __init__(self, temperature: float = 0.5) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        return nt_xent(z_i, z_j, temperature=self.temperature, reduction="none", group=world()).mean()


class VICRegLoss(nn.Module):
    def __init__(
        self, sim_coeff: float = 25, std_coeff: float = 25, cov_coeff: float = 1, epsilon: float = 1e-4
    ) -> None:
        super().__init__()
        self.sim_coeff, self.std_coeff, self.cov_coeff, self.epsilon = sim_coeff, std_coeff, cov_coeff, epsilon

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        weights = self.sim_coeff, self.std_coeff, self.cov_coeff
        return vicreg_of_own_invariance(z_i, z_j, *weights, self.epsilon, world())


class SlicedEppsPulley(nn.Module):
    """Along directions by a counter of its calls, with the buffers that theirs has."""

    global_step: Tensor

    def __init__(self, num_slices: int = 1024, t_max: float = 3.0, n_points: int = 17) -> None:
        super().__init__()
        if n_points % 2 == 0:
            raise ValueError(f"n_points: wanted an odd number, got {n_points}")
        self.num_slices, self._t_max, self._knots = num_slices, t_max, n_points
        self.ep = nn.Module()
        register_knots(self.ep, n_points, t_max)
        self.register_buffer("global_step", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, D]"""
        step, group = self.global_step.clone(), world()
        if group:
            torch.distributed.broadcast(step, src=0)
        generator = torch.Generator(device=x.device).manual_seed(int(step))
        directions = torch.randn(x.shape[-1], self.num_slices, device=x.device, generator=generator)
        self.global_step += 1
        directions = (directions / directions.norm(dim=0)).t()
        return sigreg(x, knots=self._knots, t_max=self._t_max, directions=directions, group=group)
