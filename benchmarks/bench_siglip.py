"""SigLIP's loss, forward and backward of both towers' embeddings, beside eager PyTorch, torch.compile and the
unavoidable matmuls.

Shapes: N x D.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import cases, matmul, peak_memory, record, record_memory, settings

SCALE, BIAS = 10.0, -10.0
CASES = {
    "cpu": [
        *cases("1024x512 4096x512", "float32", "both"),
        *cases("4096x512", "bfloat16", "both"),
        *cases("4096x512 32768x512", "float32", "memory"),
    ],
    "cuda": cases("4096x512", "bfloat16", "both"),
    "small": cases("66x7 202x100", "float32 bfloat16", "both"),
}


def eager(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """As open_clip has it, on one device: with a matrix of signs"""
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    logits = SCALE * image @ text.t() + BIAS
    signs = 2 * torch.eye(len(image), device=image.device, dtype=image.dtype) - 1
    return -F.logsigmoid((signs * logits).float()).sum() / len(image)


def lean_eager(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The fewest passes over the matrix that we found: no signs, and a pair's softplus(-x) is softplus(x) - x."""
    image, text = F.normalize(image, dim=1) * SCALE, F.normalize(text, dim=1)
    logits = torch.addmm(image.new_full((), BIAS), image, text.t()).float()
    pairs = (image * text).sum(1).float() + BIAS
    return (F.softplus(logits).sum() - pairs.sum()) / len(image)


def fused(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return sslops.siglip(image, text, logit_scale=SCALE, bias=BIAS)


def losses() -> dict[str, Callable]:
    return {
        "sslops": fused,
        "eager": eager,
        "lean eager": lean_eager,
        "compile": torch.compile(eager, dynamic=False),
        "lean compile": torch.compile(lean_eager, dynamic=False),
    }


def inputs(n: int, d: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    return [torch.randn(n, d, device=device).to(dtype).requires_grad_() for _ in range(2)]


def step(loss: Callable, towers: list[torch.Tensor]) -> None:
    for x in towers:
        x.grad = None
    loss(*towers).backward()


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (n, d), dtype, part = case
    towers = inputs(n, d, dtype, device)
    torch._dynamo.reset()
    variants = {name: lambda loss=loss: step(loss, towers) for name, loss in losses().items()}
    once = matmul(2 * n * n * d, dtype, device)
    variants["matmuls"] = lambda: [once() for _ in range(3)]
    record(benchmark, variants, limit="matmuls", n=n, d=d, dtype=dtype, part=part, flop=6 * n * n * d)


def test_memory(benchmark, device, case):
    (n, d), dtype, _ = case
    setup = f"""
import torch
from benchmarks.bench_siglip import inputs, losses, step
towers = inputs({n}, {d}, {dtype}, "cpu")
loss = losses()[{{!r}}]
"""
    names = ("sslops",) if settings.only_ours or n > 8192 else ("sslops", "eager", "lean eager", "compile")
    peak_mb = {name: peak_memory(setup.format(name), "step(loss, towers)") for name in names}
    record_memory(benchmark, peak_mb, n=n, d=d, dtype=dtype)
