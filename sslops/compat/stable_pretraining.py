"""stable-pretraining 0.1's NTXEntLoss and VICRegLoss on our ops: the same arguments, defaults, values, over ranks too.

What differs: losses are float32 for bf16 and float16 inputs and under autocast. What is not here: its BarlowTwinsLoss
divides sums over N by deviations over N - 1, and each rank's rows by its own, so that its diagonal never reaches 1; its
BYOLLoss is a few row operations, of which a kernel would save nothing.
"""

from torch import Tensor, nn

from ..ops.nt_xent import nt_xent
from ._ranks import vicreg_of_own_invariance, world


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
