"""SupCon beside eager PyTorch, torch.compile and the unavoidable matmuls. Shapes: M x D, two views, 10 classes; or
M x D x K, against K keys of a queue, unit rows with labels, without a gradient.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import cases, eager_and_compiled, matmul, peak_memory, record, record_memory, settings

TEMPERATURE = 0.1
CASES = {
    "cpu": [
        *cases("512x128 4096x128 8192x128", "float32", "both"),
        *cases("4096x128", "bfloat16", "both"),
        *cases("256x128x65536", "float32", "both memory"),
        *cases("4096x128 65536x128", "float32", "memory"),
    ],
    "cuda": cases("4096x128", "bfloat16", "both"),
    "small": cases("66x7 202x100 66x7x130", "float32 bfloat16", "both"),
}


def eager(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As the papers' code has it, with masks of floats"""
    z, labels = F.normalize(z, dim=2).flatten(0, 1), labels.repeat(2)
    logits = (z @ z.t() / TEMPERATURE).float()
    logits = logits - logits.detach().max(1, keepdim=True).values
    others = torch.ones_like(logits).fill_diagonal_(0)
    mask = (labels[:, None] == labels).float() * others
    log_p = logits - (logits.exp() * others).sum(1, keepdim=True).log()
    return -((mask * log_p).sum(1) / mask.sum(1)).mean()


def lean_eager(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The fewest passes over the matrix that we found: the sum over the positives by the sums of the classes."""
    z, labels = F.normalize(z, dim=2).flatten(0, 1) * TEMPERATURE**-0.5, labels.repeat(2)
    logits = (z @ z.t()).float()
    logits.fill_diagonal_(-torch.inf)
    wide = z.float()
    sums = wide.new_zeros(10, z.shape[1]).index_add(0, labels, wide)
    count = torch.bincount(labels, minlength=10)[labels] - 1
    positives = (wide * (sums[labels] - wide)).sum(1) / count
    return (logits.logsumexp(1) - positives).mean()


def eager_keys(z: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor, key_labels: torch.Tensor) -> torch.Tensor:
    logits = (F.normalize(z) @ keys.t() / TEMPERATURE).float()
    mask = (labels[:, None] == key_labels).float()
    log_p = F.log_softmax(logits, 1)
    return -((mask * log_p).sum(1) / mask.sum(1)).mean()


def lean_eager_keys(
    z: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor, key_labels: torch.Tensor
) -> torch.Tensor:
    """The sum over the positives by the sums of the classes, as above"""
    z = F.normalize(z) / TEMPERATURE
    sums = keys.new_zeros(10, keys.shape[1], dtype=torch.float32).index_add(0, key_labels, keys.float())
    means = sums / torch.bincount(key_labels, minlength=10)[:, None]
    return ((z @ keys.t()).float().logsumexp(1) - (z.float() * means[labels]).sum(1)).mean()


def fused_keys(z: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor, key_labels: torch.Tensor) -> torch.Tensor:
    return sslops.supcon(z, labels, keys=keys, key_labels=key_labels, temperature=TEMPERATURE)


def info_nce(z: torch.Tensor, labels: torch.Tensor, keys: torch.Tensor, key_labels: torch.Tensor) -> torch.Tensor:
    """Not the same either, with the query as its positive"""
    return sslops.info_nce(z, z.detach(), keys, temperature=TEMPERATURE)


def fused(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return sslops.supcon(z, labels, temperature=TEMPERATURE)


def nt_xent(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Not the same: what the labels cost"""
    return sslops.nt_xent(z, temperature=TEMPERATURE)


def losses(keys: bool = False) -> dict[str, Callable]:
    if keys:
        return eager_and_compiled(fused_keys, eager_keys, lean_eager_keys) | {"sslops info_nce": info_nce}
    return eager_and_compiled(fused, eager, lean_eager) | {"sslops nt_xent": nt_xent}


def inputs(m: int, d: int, *k: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    if not k:
        z = torch.randn(2, m // 2, d, device=device).to(dtype).requires_grad_()
        return z, torch.randint(10, (m // 2,), device=device)
    z, keys = torch.randn(m, d, device=device).to(dtype), F.normalize(torch.randn(*k, d, device=device)).to(dtype)
    labels, key_labels = (torch.randint(10, (n,), device=device) for n in (m, *k))
    return z.requires_grad_(), labels, keys, key_labels


def step(loss: Callable, z: torch.Tensor, *rest: torch.Tensor) -> None:
    z.grad = None
    loss(z, *rest).backward()


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (m, d, *k), dtype, part = case
    # Half the tiles of S, them again (unless a CPU holds them, up to M = 2560), and W z. Of keys all tiles, and W z.
    flop = 6 * m * k[0] * d if k else 4 * m * m * d
    tensors = inputs(m, d, *k, dtype=dtype, device=device)
    torch._dynamo.reset()
    variants = {name: lambda loss=loss: step(loss, *tensors) for name, loss in losses(bool(k)).items()}
    variants["matmuls"] = matmul(flop, dtype, device)
    facts = {"k": k[0]} if k else {}
    record(benchmark, variants, limit="matmuls", m=m, d=d, **facts, dtype=dtype, part=part, flop=flop)


def test_memory(benchmark, device, case):
    shape, dtype, _ = case
    setup = f"""
import torch
from benchmarks.bench_supcon import inputs, losses, step
tensors = inputs(*{shape}, dtype={dtype}, device="cpu")
loss = losses({len(shape) > 2})[{{!r}}]
"""
    ours_only = settings.only_ours or shape[0] > 8192
    names = ("sslops",) if ours_only else ("sslops", "eager", "lean eager", "compile")
    peak_mb = {name: peak_memory(setup.format(name), "step(loss, *tensors)") for name in names}
    record_memory(benchmark, peak_mb, **dict(zip("mdk", shape, strict=False)), dtype=dtype)
