"""Sinkhorn's potentials beside eager forms, torch.compile and libraries. Shapes: B x K, three iterations."""

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import sslops

from . import peers
from ._compare import cases, eager_and_compiled, peak_memory, record, record_memory, settings

TEMPERATURE, ITERATIONS = 0.05, 3
CASES = {
    "cpu": [
        *cases("128x65536 1024x65536 4096x3000 512x3000", "float32", "forward"),
        *cases("128x65536", "bfloat16", "forward"),
        *cases("128x65536", "float32", "memory"),
    ],
    "cuda": cases("128x65536 1024x65536 4096x3000", "float32", "forward"),
    "small": cases("6x40 70x3000", "float32 bfloat16", "forward"),
}


def matrix(scores: torch.Tensor, temperature: float = TEMPERATURE, iterations: int = ITERATIONS) -> torch.Tensor:
    """As SwAV's and DINOv2's code have it: Q [B, K], in float64 for float64"""
    q = torch.exp(scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature).t()
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(1, keepdim=True) * q.shape[0]
        q /= q.sum(0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).t()


def kept(scores: torch.Tensor) -> torch.Tensor:
    """The strongest eager form that we found: exp once, and then two products with vectors an iteration"""
    e = torch.exp((scores.float() - scores.max()) / TEMPERATURE)
    rows = e.new_ones(len(e))
    for _ in range(ITERATIONS):
        prototypes = 1 / (rows @ e)
        rows = 1 / (e @ prototypes)
    return prototypes.log()


def fused(scores: torch.Tensor) -> torch.Tensor:
    return sslops.sinkhorn(scores, temperature=TEMPERATURE, iterations=ITERATIONS)


def forms() -> dict[str, Callable]:
    found = eager_and_compiled(fused, matrix, kept)
    if peers.lightly():
        theirs = importlib.import_module("lightly.loss.swav_loss").sinkhorn
        found["lightly"] = lambda x: theirs(x, ITERATIONS, TEMPERATURE)
    return found


def scores(b: int, k: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    rows, prototypes = (F.normalize(torch.randn(n, 128, device=device)) for n in (b, k))
    return (rows @ prototypes.t()).to(dtype)


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (b, k), dtype, _ = case
    x = scores(b, k, dtype, device)
    torch._dynamo.reset()
    variants = {name: (lambda run=run: run(x)) for name, run in forms().items()}
    variants["read"] = lambda: [x.sum() for _ in range(ITERATIONS)]
    record(benchmark, variants, limit="read", b=b, k=k, dtype=dtype, bytes=ITERATIONS * x.nbytes)


def test_memory(benchmark, device, case):
    (b, k), dtype, _ = case
    setup = f"""
import torch
from benchmarks.bench_sinkhorn import forms, scores
x = scores({b}, {k}, {dtype}, "cpu")
run = forms()[{{!r}}]
"""
    names = [n for n in ("sslops", "eager", "lean eager", "compile", "lightly") if n in forms()]
    names = names[:1] if settings.only_ours else names
    record_memory(benchmark, {n: peak_memory(setup.format(n), "run(x)") for n in names}, b=b, k=k, dtype=dtype)
