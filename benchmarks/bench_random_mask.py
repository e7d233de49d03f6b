"""Random masks beside MAE's eager code (rand, two argsorts, gather). Shapes: B x L, at ratio 0.75.

The other masks, of the same length at the same ratio: of padded rows, of ratios for each row, of blocks and of tubes.
"""

import pytest
import torch

import sslops

from ._compare import cases, record

CASES = {
    "cpu": cases("64x196 4096x196 64x1568", "float32", "forward"),
    "cuda": cases("64x196 4096x196 64x1568", "float32", "forward"),
    "small": cases("3x196 2x1568", "float32", "forward"),
}
WORK = {("forward", "B=4096 L=196"): {"bytes": 4096 * (49 * 8 + 196 * 12)}}


def eager(batch: int, length: int, keep: int, device: str) -> tuple[torch.Tensor, ...]:
    shuffle = torch.argsort(torch.rand(batch, length, device=device), dim=1)
    restore = torch.argsort(shuffle, dim=1)
    mask = torch.ones(batch, length, device=device)
    mask[:, :keep] = 0
    return shuffle[:, :keep], torch.gather(mask, 1, restore), restore


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    batch, length = case.shape
    keep = length // 4
    outputs = [torch.empty(batch, length, dtype=d, device=device) for d in (torch.int64, torch.int64, torch.float32)]
    lengths = torch.randint(1, length + 1, (batch,), device=device)
    ratios = torch.rand(batch, device=device)
    variants = {
        "sslops": lambda: sslops.random_mask(batch, length, 0.75, device=device),
        "padded": lambda: sslops.random_mask(batch, length, 0.75, lengths=lengths),
        "ratios": lambda: sslops.random_mask(batch, length, ratios),
        "blocks": lambda: sslops.block_mask(batch, (length // 14, 14), 0.75, device=device),
        "tubes": lambda: sslops.tube_mask(batch, (length // 14 // 2, 2, 14), 0.75, device=device),
        "eager": lambda: eager(batch, length, keep, device),
        "outputs written": lambda: [out.zero_() for out in outputs],
    }
    record(benchmark, variants, limit="outputs written", b=batch, l=length, bytes=20 * batch * length)
