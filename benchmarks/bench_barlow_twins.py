"""Barlow Twins beside eager PyTorch, torch.compile and the matmuls that its route cannot avoid. Shapes: N x D."""

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import cases, eager_and_compiled
from ._views import Loss, memory_row, products, time_row
from .peers import lightly_loss, solo_loss

CASES = {
    "cpu": [
        *cases("256x2048 256x8192 1024x8192 4096x2048", "float32", "both"),
        *cases("256x8192 4096x2048 256x32768", "float32", "memory"),
    ],
    "cuda": cases("256x8192 1024x8192 4096x8192", "bfloat16", "both"),
    "key": cases("256x8192 4096x8192", "bfloat16", "both"),
    "small": cases("66x7 130x300", "float32 bfloat16", "both"),
}
WORK = {
    # half of each Gram matrix and two products; C and two products, its panels written once and read twice
    ("both", "N=256 D=8192"): {"flops": 6 * 256**2 * 8192, "bytes": 12 * 256 * 8192 + 16 * 256**2},
    ("both", "N=4096 D=8192"): {"flops": 6 * 4096 * 8192**2, "bytes": 12 * 4096 * 8192 + 6 * 8192**2},
}


def eager(z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
    """As the authors' code: the matrix, its diagonal, and what is left of its squares."""
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    c = (a.t() @ b).float() / len(z_a)
    diagonal = c.diagonal()
    return (diagonal - 1).square().sum() + 5e-3 * (c.square().sum() - diagonal.square().sum())


def losses(d: int, device: str) -> dict[str, Loss]:
    found = eager_and_compiled(sslops.barlow_twins, eager)
    if device == "cuda" or d <= 2048:  # beyond, several seconds a step on a CPU, for what eager shows too
        found |= {"lightly": lightly_loss("BarlowTwinsLoss"), "solo-learn": solo_loss("barlow", scale_loss=1.0)}
    return {name: loss for name, loss in found.items() if loss}


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    n, d = case.shape
    gram = n < d
    limit = products(n, d, gram, 2, 2) if gram else products(n, d, gram, 1, 2)
    torch._dynamo.reset()
    time_row(benchmark, case, device, losses(d, device), limit, 6 * n * d * min(n, d))


def test_memory(benchmark, device, case):
    memory_row(benchmark, case, "bench_barlow_twins", ["sslops", "eager", "compile"])
