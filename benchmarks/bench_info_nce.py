"""InfoNCE against a queue, beside eager PyTorch, torch.compile, libraries and the unavoidable matmuls.

Shapes: B x K x D. The queue holds unit rows, so eager need not normalise it; ours does. Only the query has a gradient.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from _compare import Variant, cases, matmul, peak_memory, record, record_memory, settings

import sslops

TEMPERATURE = 0.1
CASES = {
    "cpu": [
        *cases("256x65536x128 256x4096x128 1024x65536x256", "float32", "both"),
        *cases("256x65536x128", "bfloat16", "both"),
        *cases("256x65536x128", "float32", "forward backward"),
        *cases("256x65536x128", "float32 bfloat16", "memory"),
    ],
    "cuda": [
        *cases("256x65536x128 4096x65536x256", "bfloat16", "both"),
        *cases("256x65536x128", "float32", "both"),
    ],
}


def usual_eager(query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
    """As training scripts have it: the positive's logit and the negatives' concatenated, and a cross entropy."""
    q, k = F.normalize(query), F.normalize(key)
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
    negative = torch.einsum("nc,kc->nk", q, queue)
    logits = torch.cat([positive, negative], dim=1) / TEMPERATURE
    return F.cross_entropy(logits.float(), torch.zeros(len(q), dtype=torch.long, device=q.device))


def lean_eager(query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
    """The fewest passes over the matrix that we found: the temperature in the query, logsumexp, the positive apart."""
    q = F.normalize(query) / TEMPERATURE
    positive = (q * F.normalize(key)).sum(1).float()
    return (torch.logaddexp((q @ queue.t()).float().logsumexp(1), positive) - positive).mean()


def fused(query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
    return sslops.info_nce(query, key, queue, temperature=TEMPERATURE)


def losses() -> dict[str, Callable]:
    return {
        "sslops": fused,
        "eager": usual_eager,
        "lean eager": lean_eager,
        "compile": torch.compile(usual_eager, dynamic=False),
        "lean compile": torch.compile(lean_eager, dynamic=False),
    }


def tensors(b: int, k: int, d: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    query, key = (torch.randn(b, d, device=device).to(dtype) for _ in range(2))
    return [query.requires_grad_(), key, F.normalize(torch.randn(k, d, device=device)).to(dtype)]


def variant(loss: Callable, inputs: list[torch.Tensor], part: str) -> Variant:
    def forward() -> torch.Tensor:
        inputs[0].grad = None
        return loss(*inputs)

    both = {"forward": forward, "backward": (forward, torch.Tensor.backward), "both": lambda: forward().backward()}
    return both[part]


def tile_matmuls(query: torch.Tensor, queue: torch.Tensor) -> Variant:
    """The CPU kernel's tiles without anything between the matmuls: the limit of its algorithm on this machine."""
    from sslops.kernels.cpu.tiles import ranges, stream_for

    with torch.no_grad():
        stream = stream_for(F.normalize(query.float()), query.dtype)
    stream.weights().zero_()

    def run() -> None:
        o = stream.zeros(len(query))
        for j in ranges(len(queue), stream.COLUMNS):
            stream.load(queue[j])
            for i in ranges(len(query), stream.ROWS):
                stream.logits(i)
                stream.add(o, i)

    return run


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (b, k, d), dtype, part = case
    flop = 4 * b * k * d  # all of it in forward
    inputs = tensors(b, k, d, dtype, device)
    torch._dynamo.reset()
    variants = {name: variant(loss, inputs, part) for name, loss in losses().items()}
    if dtype == torch.bfloat16:
        wide = [x.detach().float() for x in inputs]
        variants["float32 eager"] = variant(usual_eager, [wide[0].requires_grad_(), *wide[1:]], part)
    limit = "matmuls" if part != "backward" else None
    if limit:
        with torch.no_grad():
            variants[limit] = tile_matmuls(inputs[0], inputs[2]) if device == "cpu" else matmul(flop, dtype)
    record(benchmark, variants, limit=limit, b=b, k=k, d=d, dtype=dtype, part=part, flop=flop)


def test_memory(benchmark, device, case):
    """Of a step on the CPU; on a GPU test_time reads the allocator."""
    (b, k, d), dtype, _ = case
    setup = f"""
import torch
from bench_info_nce import losses, tensors, variant
inputs = tensors({b}, {k}, {d}, {dtype}, "cpu")
step = variant(losses()[{{!r}}], inputs, "both")
"""
    names = ["sslops"] if settings.only_ours else ["sslops", "eager", "compile"]
    peak_mb = {name: peak_memory(setup.format(name), "step()") for name in names}
    record_memory(benchmark, peak_mb, b=b, k=k, d=d, dtype=dtype)
