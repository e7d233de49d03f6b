"""What the machine gives: a large matrix product, a copy. Percentages of these are what kernels are judged by."""

import time

import pytest
import torch

from ._compare import cases, record

CASES = {
    "cpu": cases("2048", "float32 bfloat16", "product"),
    "cuda": cases("8192", "float32 bfloat16", "product"),
    "small": cases("33", "float32 bfloat16", "product"),
}


def square(n: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.randn(n, n, device=device).to(dtype)  # zeros would be faster than data


def is_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for such a product: in bfloat16 one of 2048 then takes 13 seconds"""
    a = square(256, dtype, "cpu")
    start = time.perf_counter()
    torch.mm(a, a)
    return 2 * 256**3 / (time.perf_counter() - start) < 5e9


@pytest.mark.usefixtures("threads")
def test_matmul(benchmark, device, case):
    (n,), dtype, _ = case
    if device == "cpu" and is_slow(dtype):
        n = min(n, 512)
    a, b = (square(n, dtype, device) for _ in range(2))
    out = torch.empty_like(a)
    record(benchmark, {"torch": lambda: torch.mm(a, b, out=out)}, "torch", n=n, dtype=dtype, flop=2 * n**3)


@pytest.mark.usefixtures("threads")
def test_copy(benchmark, device):
    n = 2**30 if device == "cuda" else 2**26
    a, b = torch.randn(2, n, device=device)
    record(benchmark, {"torch": lambda: a.copy_(b)}, "torch", n=n, bytes=8 * n)
