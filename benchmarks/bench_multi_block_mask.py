"""I-JEPA's masks beside the way they are usually drawn: image by image in Python, as its data loader does.

Shapes: B x H x W.
"""

import math
import random

import pytest
import torch

import sslops

from ._compare import cases, record

CASES = {
    "cpu": cases("64x14x14 1024x14x14", "float32", "forward"),
    "cuda": cases("64x14x14 1024x14x14", "float32", "forward"),
    "small": cases("3x14x14 2x6x8", "float32", "forward"),
}


def block(height: int, width: int, area: float, aspect: float) -> torch.Tensor:
    """[H, W] bool: one block of that area and aspect, anywhere"""
    h = max(1, min(height, round(math.sqrt(area * aspect))))
    w = max(1, min(width, round(math.sqrt(area / aspect))))
    top, left = random.randint(0, height - h), random.randint(0, width - w)
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top : top + h, left : left + w] = True
    return mask


def eager(batch: int, height: int, width: int, device: str) -> list[list[torch.Tensor]]:
    size, drawn = height * width, []
    for _ in range(batch):
        targets = [block(height, width, size * random.uniform(0.15, 0.2), random.uniform(0.75, 1.5)) for _ in range(4)]
        free = ~torch.stack(targets).any(0)
        context = free & block(height, width, size * random.uniform(0.85, 1.0), 1.0)
        while context.sum() < min(10, size // 2):
            context = free & block(height, width, size * random.uniform(0.85, 1.0), 1.0)
        drawn.append([mask.flatten().nonzero().squeeze(1).to(device) for mask in (context, *targets)])
    return drawn


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    batch, height, width = case.shape

    def draw():
        return sslops.multi_block_mask(batch, (height, width), min_keep=min(10, height * width // 2), device=device)

    outputs = [torch.empty_like(out) for out in draw()]
    variants = {
        "sslops": draw,
        "eager": lambda: eager(batch, height, width, device),
        "random_mask": lambda: sslops.random_mask(batch, height * width, 0.75, device=device),
        "outputs written": lambda: [out.zero_() for out in outputs],
    }
    record(
        benchmark, variants, limit="outputs written", b=batch, h=height, w=width,
        bytes=8 * sum(out.numel() for out in outputs),
    )  # fmt: skip
