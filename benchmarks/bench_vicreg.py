"""VICReg beside eager PyTorch, torch.compile and the matmuls that its route cannot avoid. Shapes: N x D."""

import pytest
import torch
import torch.nn.functional as F

import sslops
from sslops.ops import vicreg

from ._compare import cases, eager_and_compiled
from ._views import Loss, memory_row, products, time_row
from .peers import lightly_loss, solo_loss

CASES = {
    "cpu": [
        *cases("256x8192 4096x2048", "float32", "both"),
        *cases("256x8192", "float32", "memory"),
    ],
    "cuda": cases("256x8192 1024x8192 4096x8192", "bfloat16", "both"),
    "key": cases("256x8192 4096x8192", "bfloat16", "both"),
    "small": cases("66x7 130x300", "float32 bfloat16", "both"),
}
WORK = {  # by panels: of each view S, whose panels are written and read, and a product
    ("both", f"N={n} D=8192"): {"flops": 8 * n * 8192**2, "bytes": 12 * n * 8192 + 8 * 8192**2} for n in (256, 4096)
}


def eager(z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
    """As the authors' code: both covariance matrices, their diagonals, and what is left of their squares."""
    loss = 25 * F.mse_loss(z_a, z_b)
    n, d = z_a.shape
    for z in (z_a, z_b):
        z = z - z.mean(0)
        loss = loss + 12.5 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        cov = z.t() @ z / (n - 1)
        loss = loss + (cov.square().sum() - cov.diagonal().square().sum()) / d
    return loss


def losses(d: int, device: str) -> dict[str, Loss]:
    found = eager_and_compiled(sslops.vicreg, eager)
    if device == "cuda" or d <= 2048:  # beyond, several seconds a step on a CPU, for what eager shows too
        found |= {"lightly": lightly_loss("VICRegLoss"), "solo-learn": solo_loss("vicreg")}
    return {name: loss for name, loss in found.items() if loss}


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    n, d = case.shape
    torch._dynamo.reset()
    gram = vicreg.cheaper_route(n, d) == "gram"
    time_row(benchmark, case, device, losses(d, device), products(n, d, gram, 2, 2), n * d * min(6 * n, 8 * d))


def test_memory(benchmark, device, case):
    memory_row(benchmark, case, "bench_vicreg", ["sslops", "eager", "compile"])
