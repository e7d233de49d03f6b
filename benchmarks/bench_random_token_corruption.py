"""BERT's masking beside eager PyTorch as Hugging Face's collator has it. Shapes: B x L."""

import pytest
import torch

import sslops

from ._compare import cases, record

CASES = {
    "cpu": cases("64x512 1024x512", "int64", "forward"),
    "cuda": cases("64x512 1024x512", "int64", "forward"),
    "small": cases("3x50", "int64", "forward"),
}
WORK = {("forward", "B=1024 L=512"): {"bytes": 24 * 1024 * 512}}
MASK, VOCABULARY = 103, 30522


def eager(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    corrupted, labels = ids.clone(), ids.clone()
    chosen = torch.bernoulli(torch.full(ids.shape, 0.15, device=ids.device)).bool()
    labels[~chosen] = -100
    masked = torch.bernoulli(torch.full(ids.shape, 0.8, device=ids.device)).bool() & chosen
    corrupted[masked] = MASK
    random = torch.bernoulli(torch.full(ids.shape, 0.5, device=ids.device)).bool() & chosen & ~masked
    words = torch.randint(VOCABULARY, ids.shape, device=ids.device)
    corrupted[random] = words[random]
    return corrupted, labels


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    ids = torch.randint(VOCABULARY, case.shape, device=device)
    variants = {
        "sslops": lambda: sslops.random_token_corruption(ids, MASK, VOCABULARY),
        "eager": lambda: eager(ids),
        "memory": lambda: (ids.clone(), ids.clone()),
    }
    b, length = case.shape
    record(benchmark, variants, limit="memory", b=b, l=length, bytes=24 * ids.numel())
