"""Linear layer and cross entropy of the masked tokens, 16% of them, beside eager PyTorch over all positions, as Hugging
Face has it, over the gathered ones, torch.compile, and torch's chunked op. Shapes: N x V x D.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import Variant, cases, matmul, peak_memory, record, record_memory, settings

CASES = {
    "cpu": [
        *cases("2048x30522x768 8192x30522x256", "float32", "both"),
        *cases("2048x30522x768", "bfloat16", "both"),
        *cases("2048x30522x768 8192x30522x256", "float32", "memory"),
    ],
    "cuda": cases("16384x30522x768", "bfloat16", "both"),
    "small": cases("40x70x16", "float32 bfloat16", "both"),
}
SHARE = 0.16


Tensors = tuple[torch.Tensor, ...]


def fused(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return sslops.masked_token_cross_entropy(hidden, weight, labels, bias=bias)


def all_positions(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels)


def of_gathered(loss: Callable, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
                labels: torch.Tensor) -> torch.Tensor:  # fmt: skip
    masked = labels != -100
    return loss(hidden[masked], weight, bias, labels[masked])


def chunked(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, labels: torch.Tensor,
            **options: object) -> torch.Tensor:  # fmt: skip
    """torch's own, there from 2.13 on"""
    options = torch.nn.LinearCrossEntropyOptions(**options)
    return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, options=options)


def losses() -> dict[str, Callable]:
    rows = partial(chunked, batch_chunk_size=256, chunking_method=None)
    return {
        "sslops": fused,
        "all positions": all_positions,
        "gathered": partial(of_gathered, all_positions),
        "gathered compile": partial(of_gathered, torch.compile(all_positions, dynamic=True)),
        "gathered chunked": partial(of_gathered, chunked),
        "gathered chunked 256": partial(of_gathered, rows),
    }


def tokens(n: int, v: int, d: int, dtype: torch.dtype, device: str) -> Tensors:
    hidden, weight, bias = (torch.randn(shape, device=device).to(dtype) for shape in ((n, d), (v, d), (v,)))
    labels = torch.full((n,), -100, device=device)
    masked = torch.randperm(n, device=device)[: max(1, round(SHARE * n))]
    labels[masked] = torch.randint(v, masked.shape, device=device)
    return hidden.requires_grad_(), weight.div_(d**0.5).requires_grad_(), bias.requires_grad_(), labels


def variant(loss: Callable, *tensors: torch.Tensor) -> Variant:
    def step() -> None:
        for x in tensors[:3]:
            x.grad = None
        loss(*tensors).backward()

    return step


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (n, v, d), dtype, _ = case
    tensors = tokens(n, v, d, dtype, device)
    torch._dynamo.reset()
    variants = {name: variant(loss, *tensors) for name, loss in losses().items()}
    flop = 6 * v * d * max(1, round(SHARE * n))  # one product forward, two backward
    variants["matmuls"] = matmul(flop, dtype, device)
    record(benchmark, variants, limit="matmuls", n=n, v=v, d=d, dtype=dtype, flop=flop)


def test_memory(benchmark, device, case):
    (n, v, d), dtype, _ = case
    setup = f"""
import torch
from benchmarks.bench_masked_token_cross_entropy import losses, tokens, variant
step = variant(losses()[{{!r}}], *tokens({n}, {v}, {d}, {dtype}, "cpu"))
"""
    names = list(losses())[: 1 if settings.only_ours else None]
    peak_mb = {name: peak_memory(setup.format(name), "step()") for name in names}
    record_memory(benchmark, peak_mb, n=n, v=v, d=d, dtype=dtype)
