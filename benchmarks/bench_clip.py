"""CLIP's loss, forward and backward of both towers' embeddings, beside eager PyTorch, torch.compile and the unavoidable
matmuls.

Shapes: N x D. Eager holds the logits and recomputes nothing: 6 N^2 D FLOP, where ours are 8 N^2 D.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import cases, eager_and_compiled, matmul, record
from ._views import memory_row, variant, views

SCALE = 1 / 0.07
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
    """As open_clip has it, on one device: a product for each direction"""
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    own = torch.arange(len(image), device=image.device)
    per_image, per_text = SCALE * image @ text.t(), SCALE * text @ image.t()
    return (F.cross_entropy(per_image.float(), own) + F.cross_entropy(per_text.float(), own)) / 2


def lean_eager(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The fewest passes over the matrix that we found: one product, the scale in a tower, the pairs apart."""
    image, text = F.normalize(image, dim=1) * SCALE, F.normalize(text, dim=1)
    logits = (image @ text.t()).float()
    return ((logits.logsumexp(1) + logits.logsumexp(0)) / 2 - (image * text).sum(1).float()).mean()


def fused(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    return sslops.clip(image, text, logit_scale=SCALE)


def losses(d: int, device: str) -> dict[str, Callable]:
    return eager_and_compiled(fused, eager, lean_eager)


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (n, d), dtype, part = case
    towers = views(n, d, dtype, device)
    torch._dynamo.reset()
    variants = {name: variant(loss, *towers, part) for name, loss in losses(d, device).items()}
    once = matmul(2 * n * n * d, dtype, device)
    variants["matmuls"] = lambda: [once() for _ in range(3)]  # eager's; ours are one more where S is not held
    record(benchmark, variants, limit="matmuls", n=n, d=d, dtype=dtype, part=part, flop=8 * n * n * d)


def test_memory(benchmark, device, case):
    names = ["sslops"] if case[0][0] > 8192 else ["sslops", "eager", "lean eager", "compile"]
    memory_row(benchmark, case, "bench_clip", names)
