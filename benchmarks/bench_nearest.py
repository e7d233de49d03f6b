"""Nearest neighbours beside eager PyTorch, torch.compile, lightly and the unavoidable matmul. Shapes: B x K x D.

forward: the look-up of B queries. both: NNCLR's step after the network, of two views of B images, forward and backward:
the look-up in a bank of K rows, and NT-Xent of each view's neighbour and the other's prediction, as lightly has it.
"""

import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import sslops

from . import peers
from ._compare import cases, matmul, peak_memory, record, record_memory, settings

TEMPERATURE = 0.1
CASES = {
    "cpu": [
        *cases("256x65536x256 1024x65536x128 256x98304x256", "float32", "forward"),
        *cases("256x65536x256", "float32", "both"),
        *cases("256x65536x256", "bfloat16", "forward"),
        *cases("256x65536x256", "float32", "memory"),
    ],
    "cuda": cases("256x65536x256", "float32 bfloat16", "forward"),
    "small": [*cases("6x40x7 70x1500x33", "float32 bfloat16", "forward"), *cases("6x40x7", "float32", "both")],
}


def eager(query: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """As solo-learn has it"""
    return (query @ support.t()).max(dim=1).indices


def tiled(query: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """The strongest eager form that we found: 2,048 candidates at a time"""
    best = query.new_full((len(query),), -torch.inf)
    ids = torch.zeros_like(best, dtype=torch.int64)
    for first in range(0, len(support), 2048):
        value, where = (query @ support[first : first + 2048].t()).max(dim=1)
        higher = value > best
        best, ids = torch.where(higher, value, best), torch.where(higher, where + first, ids)
    return ids


def fused(query: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    return sslops.nearest(query, support).ids


def searches() -> dict[str, Callable]:
    return {
        "sslops": fused,
        "eager": eager,
        "tiled eager": tiled,
        "compile": torch.compile(eager, dynamic=False),
        "tiled compile": torch.compile(tiled, dynamic=False),
    }


@peers.or_failing
def bank(support: torch.Tensor) -> Callable | None:
    """lightly's, which clones and normalises all of it at every call"""
    if not peers.lightly():
        return None
    made = importlib.import_module("lightly.models.modules.nn_memory_bank").NNMemoryBankModule(tuple(support.shape))
    made.bank = support
    return made


def nt_xent(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    z = F.normalize(torch.cat([a, b]))
    logits = (z @ z.t() / TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(a)))


def fused_nt_xent(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return sslops.nt_xent(a, b, temperature=TEMPERATURE)


def nnclr(search: Callable, loss: Callable) -> Callable:
    def step(z: torch.Tensor, support: torch.Tensor, p0: torch.Tensor, p1: torch.Tensor) -> torch.Tensor:
        near0, near1 = support[search(z, support)].chunk(2)
        return (loss(near0, p1) + loss(near1, p0)) / 2

    return step


def lightly_step(support: torch.Tensor) -> Callable | None:
    replace, loss = bank(support), peers.lightly_loss("NTXentLoss", temperature=TEMPERATURE)
    if replace is None:
        return None

    def step(z: torch.Tensor, _: torch.Tensor, p0: torch.Tensor, p1: torch.Tensor) -> torch.Tensor:
        near0, near1 = (replace(view) for view in z.chunk(2))
        return (loss(near0, p1) + loss(near1, p0)) / 2

    return step


def inputs(b: int, k: int, d: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(F.normalize(torch.randn(n, d, device=device)).to(dtype) for n in (b, k))


def train(step: Callable, z: torch.Tensor, support: torch.Tensor, p: list[torch.Tensor]) -> None:
    for leaf in p:
        leaf.grad = None
    step(z, support, *p).backward()


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (b, k, d), dtype, part = case
    both = part == "both"
    query, support = inputs(2 * b if both else b, k, d, dtype, device)
    torch._dynamo.reset()
    if both:
        steps = {name: nnclr(search, fused_nt_xent if name == "sslops" else nt_xent)
                 for name, search in searches().items() if "compile" not in name}  # fmt: skip
        steps["compile"] = torch.compile(steps["eager"], dynamic=False)
        steps["lightly"] = lightly_step(support)
        p = [torch.randn(b, d, device=device).to(dtype).requires_grad_() for _ in range(2)]
        variants = {name: lambda run=run: train(run, query, support, p) for name, run in steps.items() if run}
    else:
        forms = {**searches(), "lightly": bank(support)}
        variants = {
            name: (lambda run=run: run(query)) if name == "lightly" else lambda run=run: run(query, support)
            for name, run in forms.items()
            if run
        }
    flop = 2 * len(query) * k * d + both * 16 * 2 * b * b * d
    variants["matmuls"] = matmul(flop, dtype, device)
    record(benchmark, variants, limit="matmuls", b=b, k=k, d=d, dtype=dtype, part=part, flop=flop)


def test_memory(benchmark, device, case):
    (b, k, d), dtype, _ = case
    setup = f"""
import torch
from benchmarks.bench_nearest import bank, inputs, searches
query, support = inputs({b}, {k}, {d}, {dtype}, "cpu")
forms = searches() | {{{{"lightly": (lambda module: lambda query, support: module(query))(bank(support))}}}}
run = forms[{{!r}}]
"""
    names = ["sslops", "eager", "tiled eager", "compile", *["lightly"] * bool(peers.lightly())]
    names = names[:1] if settings.only_ours else names
    peak_mb = {name: peak_memory(setup.format(name), "run(query, support)") for name in names}
    record_memory(benchmark, peak_mb, b=b, k=k, d=d, dtype=dtype)
