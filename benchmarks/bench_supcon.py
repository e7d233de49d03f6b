"""SupCon beside eager PyTorch, torch.compile and the unavoidable matmuls. Shapes: M x D, two views, 10 classes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import cases, matmul, peak_memory, record, record_memory, settings

TEMPERATURE = 0.1
CASES = {
    "cpu": [
        *cases("512x128 4096x128 8192x128", "float32", "both"),
        *cases("4096x128", "bfloat16", "both"),
        *cases("4096x128 65536x128", "float32", "memory"),
    ],
    "cuda": cases("4096x128", "bfloat16", "both"),
    "small": cases("66x7 202x100", "float32 bfloat16", "both"),
}


def eager(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As the papers' code has it, with masks of floats"""
    z, labels = F.normalize(z, dim=2).flatten(0, 1), labels.repeat(2)
    logits = (z @ z.t() / TEMPERATURE).float()
    logits = logits - logits.detach().max(1, keepdim=True).values
    others = torch.ones_like(logits).fill_diagonal_(0)
    mask = (labels[:, None] == labels).float() * others
    log_p = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -((mask * log_p).sum(1) / mask.sum(1)).mean()


def lean_eager(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The fewest passes over the matrix that we found: the sum over the positives by the sums of the classes."""
    z, labels = F.normalize(z, dim=2).flatten(0, 1) * TEMPERATURE**-0.5, labels.repeat(2)
    logits = (z @ z.t()).float()
    logits.fill_diagonal_(-torch.inf)
    wide = z.float()
    sums = wide.new_zeros(10, z.shape[1]).index_add(0, labels, wide)
    count = torch.bincount(labels, minlength=10)[labels] - 1
    positives = (wide * (sums[labels] - wide)).sum(1) / count
    return (logits.logsumexp(1) - positives).mean()


def fused(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return sslops.supcon(z, labels, temperature=TEMPERATURE)


def nt_xent(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Not the same: what the labels cost"""
    return sslops.nt_xent(z, temperature=TEMPERATURE)


def losses() -> dict[str, Callable]:
    return {
        "sslops": fused,
        "eager": eager,
        "lean eager": lean_eager,
        "compile": torch.compile(eager, dynamic=False),
        "lean compile": torch.compile(lean_eager, dynamic=False),
        "sslops nt_xent": nt_xent,
    }


def inputs(m: int, d: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    z = torch.randn(2, m // 2, d, device=device).to(dtype).requires_grad_()
    return z, torch.randint(10, (m // 2,), device=device)


def step(loss: Callable, z: torch.Tensor, labels: torch.Tensor) -> None:
    z.grad = None
    loss(z, labels).backward()


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (m, d), dtype, part = case
    flop = 4 * m * m * d  # half the tiles of S; in backward them again, and W z
    z, labels = inputs(m, d, dtype, device)
    torch._dynamo.reset()
    variants = {name: lambda loss=loss: step(loss, z, labels) for name, loss in losses().items()}
    variants["matmuls"] = matmul(flop, dtype, device)
    record(benchmark, variants, limit="matmuls", m=m, d=d, dtype=dtype, part=part, flop=flop)


def test_memory(benchmark, device, case):
    (m, d), dtype, _ = case
    setup = f"""
import torch
from benchmarks.bench_supcon import inputs, losses, step
z, labels = inputs({m}, {d}, {dtype}, "cpu")
loss = losses()[{{!r}}]
"""
    names = ("sslops",) if settings.only_ours or m > 8192 else ("sslops", "eager", "lean eager", "compile")
    peak_mb = {name: peak_memory(setup.format(name), "step(loss, z, labels)") for name in names}
    record_memory(benchmark, peak_mb, m=m, d=d, dtype=dtype)
