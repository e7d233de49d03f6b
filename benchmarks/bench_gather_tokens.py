"""Rows picked by unique ids beside eager PyTorch. Shapes: B x L x K x D."""

import pytest
import torch

import sslops

from ._compare import cases, record

CASES = {
    "cpu": cases("64x196x49x768", "float32", "forward both"),
    "cuda": cases("64x196x49x768 1024x196x49x768", "float32 bfloat16", "forward both"),
    "small": cases("3x50x12x20", "float32 bfloat16", "forward both"),
}
WORK = {("both", "B=1024 L=196 K=49 D=768"): {"bytes": 2 * 1024 * 768 * (4 * 49 + 196)}}


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (b, length, k, d), dtype, part = case
    tokens = torch.randn(b, length, d, device=device).to(dtype).requires_grad_(part == "both")
    ids = torch.rand(b, length, device=device).argsort(dim=1)[:, :k].contiguous()
    counts = torch.full((b,), k, device=device)
    rows = torch.arange(b, device=device)[:, None]
    grad = torch.randn(b, k, d, device=device).to(dtype)
    picked, whole = torch.empty_like(grad), torch.empty_like(tokens.detach())

    def least() -> None:
        picked.copy_(grad)
        if part == "both":
            whole.zero_()
            picked.copy_(grad)

    def step(pick):
        def run():
            tokens.grad = None
            out = pick()
            if part == "both":
                out.backward(grad)

        return run

    variants = {
        "sslops": step(lambda: sslops.gather_tokens(tokens, ids, unique=True)),
        "repeated": step(lambda: sslops.gather_tokens(tokens, ids)),
        "counts": step(lambda: sslops.gather_tokens(tokens, ids, counts=counts, unique=True)),
        "eager": step(lambda: tokens.gather(1, ids[:, :, None].expand(-1, -1, d))),
        "indexing": step(lambda: tokens[rows, ids]),
        "memory": least,
    }
    size = b * d * dtype.itemsize
    written = 2 * k if part == "forward" else 4 * k + length
    record(benchmark, variants, limit="memory", b=b, l=length, k=k, d=d, dtype=dtype, part=part, bytes=size * written)
