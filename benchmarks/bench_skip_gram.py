"""Word2Vec's step, forward and backward to the gradients of both tables, beside eager PyTorch with sparse gradients and
with dense ones, and torch.compile, which has dense ones only. Words are as frequent as in texts: by Zipf's law.

Shapes: V x D x B x N, N negatives. update: SparseAdam's step too, or Adam's where gradients are dense.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import Variant, cases, peak_memory, record, record_memory, settings

CASES = {
    "cpu": [
        *cases("100000x300x8192x5 30000x128x8192x15", "float32", "both"),
        *cases("100000x300x8192x5", "bfloat16", "both"),
        *cases("100000x300x8192x5", "float32", "update memory"),
    ],
    "cuda": cases("100000x300x8192x5", "float32", "both"),
    "small": [*cases("30x7x20x3", "float32 bfloat16", "both"), *cases("30x7x20x3", "float32", "update")],
}
Tensors = tuple[torch.Tensor, ...]


def fused(sparse: bool, u: torch.Tensor, v: torch.Tensor, *ids: torch.Tensor) -> torch.Tensor:
    return sslops.skip_gram(u, v, *ids, sparse=sparse)


def eager(sparse: bool, u: torch.Tensor, v: torch.Tensor, centers: torch.Tensor, contexts: torch.Tensor,
          negatives: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """As it is usually written, and simpler than the op: a negative that is the context counts too."""
    center = F.embedding(centers, u, sparse=sparse)
    positive = (center * F.embedding(contexts, v, sparse=sparse)).sum(1)
    negative = torch.bmm(F.embedding(negatives, v, sparse=sparse), center[:, :, None])[..., 0]
    return -(F.logsigmoid(positive) + F.logsigmoid(-negative).sum(1)).mean()


def lean_eager(sparse: bool, u: torch.Tensor, v: torch.Tensor, centers: torch.Tensor, contexts: torch.Tensor,
               negatives: torch.Tensor) -> torch.Tensor:  # fmt: skip
    """The strongest form that we found: one look-up in each table, one product"""
    rows = F.embedding(torch.cat([contexts[:, None], negatives], 1), v, sparse=sparse)
    logits = torch.bmm(rows, F.embedding(centers, u, sparse=sparse)[:, :, None])[..., 0].float()
    return (F.softplus(logits).sum() - logits[:, 0].sum()) / len(logits)


def losses() -> dict[str, Callable]:
    return {
        "sslops": partial(fused, True),
        "sslops dense": partial(fused, False),
        "eager": partial(eager, True),
        "lean eager": partial(lean_eager, True),
        "dense eager": partial(eager, False),
        "lean dense eager": partial(lean_eager, False),
        "dense compile": torch.compile(partial(eager, False), dynamic=False),
        "lean dense compile": torch.compile(partial(lean_eager, False), dynamic=False),
    }


def words(v: int, d: int, b: int, n: int, dtype: torch.dtype, device: str) -> Tensors:
    tables = [(torch.randn(v, d, device=device) / d**0.5).to(dtype).requires_grad_() for _ in range(2)]
    counts = 1 / torch.arange(1, v + 1, dtype=torch.float64, device=device)
    pairs = sslops.NegativeSampler(counts, 1.0).draw(b, 2)
    negatives = sslops.NegativeSampler(counts).draw(b, n)
    return *tables, pairs[:, 0].contiguous(), pairs[:, 1].contiguous(), negatives


def variant(loss: Callable, tensors: Tensors, optimizer: torch.optim.Optimizer | None = None) -> Variant:
    def step() -> None:
        for table in tensors[:2]:
            table.grad = None
        loss(*tensors).backward()
        if optimizer:
            optimizer.step()

    return step


def least(tensors: Tensors) -> Variant:
    """Reads each row that is looked at once, and writes as many"""
    u, v, centers, contexts, negatives = tensors
    ids = centers.unique(), torch.cat([contexts, negatives.flatten()]).unique()
    out = [table.detach()[rows] for table, rows in zip((u, v), ids, strict=True)]

    def run() -> None:
        for table, rows, to in zip((u, v), ids, out, strict=True):
            torch.index_select(table.detach(), 0, rows, out=to)

    return run


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (v, d, b, n), dtype, part = case
    tensors = words(v, d, b, n, dtype, device)
    torch._dynamo.reset()
    variants = {}
    for name, loss in losses().items():
        optimizer = None
        if part == "update":
            optimizer = (torch.optim.Adam if "dense" in name else torch.optim.SparseAdam)(tensors[:2], lr=1e-6)
        variants[name] = variant(loss, tensors, optimizer)
    if part == "both":
        variants["memory"] = least(tensors)
    rows = len(tensors[2].unique()) + len(torch.cat([tensors[3], tensors[4].flatten()]).unique())
    record(benchmark, variants, limit="memory" if part == "both" else None, v=v, d=d, b=b, n=n, dtype=dtype, part=part,
           bytes=2 * rows * d * dtype.itemsize)  # fmt: skip


def test_memory(benchmark, device, case):
    (v, d, b, n), dtype, _ = case
    setup = f"""
import torch
from benchmarks.bench_skip_gram import losses, variant, words
step = variant(losses()[{{!r}}], words({v}, {d}, {b}, {n}, {dtype}, "cpu"))
"""
    names = ["sslops", "sslops dense", "eager", "lean eager", "dense eager", "dense compile"]
    names = names[:1] if settings.only_ours else names
    peak_mb = {name: peak_memory(setup.format(name), "step()") for name in names}
    record_memory(benchmark, peak_mb, v=v, d=d, b=b, n=n, dtype=dtype)
