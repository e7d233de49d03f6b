"""What the machine gives: a large matrix product, a copy. Percentages of these are what kernels are judged by."""

import pytest
import torch

from ._compare import cases, products_are_slow, record

CASES = {
    "cpu": cases("2048", "float32 bfloat16", "product"),
    "cuda": cases("8192", "float32 bfloat16", "product"),
    "small": cases("33", "float32 bfloat16", "product"),
}


@pytest.mark.usefixtures("threads")
def test_matmul(benchmark, device, case):
    (n,), dtype, _ = case
    if device == "cpu" and products_are_slow(dtype):
        n = min(n, 512)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))  # zeros would be faster than data
    out = torch.empty_like(a)
    record(benchmark, {"torch": lambda: torch.mm(a, b, out=out)}, "torch", n=n, dtype=dtype, flop=2 * n**3)


@pytest.mark.usefixtures("threads")
def test_copy(benchmark, device):
    n = 2**30 if device == "cuda" else 2**26
    a, b = torch.randn(2, n, device=device)
    record(benchmark, {"torch": lambda: a.copy_(b)}, "torch", n=n, bytes=8 * n)
