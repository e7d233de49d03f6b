"""What the machine gives: a large matrix product, a copy. Percentages of these are what kernels are judged by."""

import pytest
import torch

from ._compare import record


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matmul(benchmark, device, dtype):
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))  # zeros would be faster than data
    out = torch.empty_like(a)
    record(benchmark, {"torch": lambda: torch.mm(a, b, out=out)}, "torch", n=n, dtype=dtype, flop=2 * n**3)


@pytest.mark.usefixtures("threads")
def test_copy(benchmark, device):
    n = 2**30 if device == "cuda" else 2**26
    a, b = torch.randn(2, n, device=device)
    record(benchmark, {"torch": lambda: a.copy_(b)}, "torch", n=n, bytes=8 * n)
