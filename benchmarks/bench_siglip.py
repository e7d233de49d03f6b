"""SigLIP's loss, forward and backward of both towers' embeddings, beside eager PyTorch, torch.compile and the
unavoidable matmuls.

Shapes: N x D.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import cases, eager_and_compiled, matmul, record
from ._views import memory_row, variant, views

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


def losses(d: int, device: str) -> dict[str, Callable]:
    return eager_and_compiled(fused, eager, lean_eager)


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (n, d), dtype, part = case
    towers = views(n, d, dtype, device)
    torch._dynamo.reset()
    variants = {name: variant(loss, *towers, part) for name, loss in losses(d, device).items()}
    once = matmul(2 * n * n * d, dtype, device)
    variants["matmuls"] = lambda: [once() for _ in range(3)]
    record(benchmark, variants, limit="matmuls", n=n, d=d, dtype=dtype, part=part, flop=6 * n * n * d)


def test_memory(benchmark, device, case):
    names = ["sslops"] if case[0][0] > 8192 else ["sslops", "eager", "lean eager", "compile"]
    memory_row(benchmark, case, "bench_siglip", names)
