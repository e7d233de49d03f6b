"""The cross-correlation matrix beside eager PyTorch, torch.compile and its three matmuls. Shapes: N x D."""

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import cases, eager_and_compiled
from ._views import Loss, products, time_row

CASES = {
    "cpu": cases("1024x2048", "float32", "both"),
    "cuda": cases("1024x8192", "bfloat16", "both"),
    "small": cases("66x7 130x300", "float32 bfloat16", "both"),
}
WORK = {("both", "N=1024 D=8192"): {"flops": 6 * 1024 * 8192**2, "bytes": 12 * 1024 * 8192 + 12 * 8192**2}}


def eager(z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
    a, b = (F.batch_norm(z, None, None, training=True) for z in (z_a, z_b))
    return a.t() @ b / len(z_a)


def losses() -> dict[str, Loss]:
    return eager_and_compiled(sslops.cross_correlation, eager)


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    n, d = case.shape
    torch._dynamo.reset()
    time_row(benchmark, case, device, losses(), products(n, d, False, 1, 2), 6 * n * d * d)
