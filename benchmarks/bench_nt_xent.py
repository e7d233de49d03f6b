"""NT-Xent beside eager PyTorch, torch.compile, libraries and the unavoidable matmuls. Shapes: M x D, M = 2N. Part
decoupled: DCL, forward and backward, beside nt_xent itself too.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import Variant, cases, eager_and_compiled, matmul, peak_memory, record, record_memory, settings
from .peers import lightly_loss, solo_loss

TEMPERATURE = 0.1
CASES = {
    "cpu": [
        *cases("512x128 4096x128 8192x128 16384x128", "float32", "both"),
        *cases("4096x128 8192x128", "bfloat16", "both"),
        *cases("4096x128", "float32", "decoupled"),
        *cases("4096x128 16384x128 65536x128", "float32", "memory"),
        *cases("65536x128", "bfloat16", "memory"),
    ],
    "cuda": [
        *cases("512x128 4096x128 8192x128 16384x128 32768x128 65536x128 131072x128", "bfloat16", "both"),
        *cases("16384x128", "bfloat16", "forward backward decoupled"),
        *cases("16384x512", "bfloat16", "both"),
        *cases("4096x128 16384x128", "float32", "both"),
    ],
    "key": cases("16384x128 4096x128", "bfloat16", "both"),
    "small": [
        *cases("66x7 202x100 130x300", "float32 bfloat16", "both"),
        *cases("66x7", "float32 bfloat16", "decoupled"),
    ],
}


def work(part: str, m: int, d: int) -> dict[str, int]:
    """Of the Triton kernels for bf16 and a known maximum, up to D = 256"""
    if part == "forward":  # half the tiles
        return {"flops": m * m * d, "exps": m * m // 2, "bytes": 6 * m * d}
    return {"flops": 4 * m * m * d, "exps": m * m, "bytes": 16 * m * d}


WORK = {(p, f"M={m} D=128"): work(p, m, 128) for m in (4096, 16384, 65536) for p in ("forward", "backward")}


def usual_eager(z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
    """As training scripts have it: one [2N, 2N] matrix and a cross entropy."""
    z = F.normalize(torch.cat([z0, z1]))
    n = len(z0)
    logits = (z @ z.t() / TEMPERATURE).float()
    logits.fill_diagonal_(float("-inf"))
    return F.cross_entropy(logits, torch.arange(2 * n, device=z.device).roll(n))


def lean_eager(z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
    """The fewest passes over the matrix that we found: the temperature in the operands, logsumexp, positives apart."""
    z = F.normalize(torch.cat([z0, z1])) * TEMPERATURE**-0.5
    positives = (z[: len(z0)].float() * z[len(z0) :].float()).sum(1)
    logits = (z @ z.t()).float()
    logits.fill_diagonal_(float("-inf"))
    return logits.logsumexp(1).mean() - positives.mean()


def fused(z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
    return sslops.nt_xent(z0, z1, temperature=TEMPERATURE)


def losses(m: int, device: str) -> dict[str, Callable]:
    found = {
        **eager_and_compiled(fused, usual_eager, lean_eager),
        "lightly": lightly_loss("NTXentLoss", temperature=TEMPERATURE),
        "solo-learn": solo_loss("simclr", temperature=TEMPERATURE),
    }
    if device == "cpu" and m > 8192:  # half a minute a step, for what eager shows too
        del found["lightly"], found["solo-learn"]
    return {name: loss for name, loss in found.items() if loss}


def eager_decoupled(z0: torch.Tensor, z1: torch.Tensor) -> torch.Tensor:
    """lean_eager without the positive in the sum"""
    n, z = len(z0), F.normalize(torch.cat([z0, z1])) * TEMPERATURE**-0.5
    positives = (z[:n].float() * z[n:].float()).sum(1)
    logits = (z @ z.t()).float()
    for offset in (-n, 0, n):
        logits.diagonal(offset).fill_(float("-inf"))
    return logits.logsumexp(1).mean() - positives.mean()


def decoupled_losses() -> dict[str, Callable]:
    found = {
        **eager_and_compiled(partial(sslops.nt_xent, temperature=TEMPERATURE, decoupled=True), eager_decoupled),
        "sslops nt_xent": fused,
        "lightly": lightly_loss("DCLLoss", temperature=TEMPERATURE),
    }
    return {name: loss for name, loss in found.items() if loss}


def views(m: int, d: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    return [torch.randn(m // 2, d, device=device).to(dtype).requires_grad_() for _ in range(2)]


def variant(loss: Callable, z0: torch.Tensor, z1: torch.Tensor, part: str) -> Variant:
    def forward() -> torch.Tensor:
        z0.grad = z1.grad = None
        return loss(z0, z1)

    directions: dict[str, Variant] = {"forward": forward, "backward": (forward, torch.Tensor.backward)}
    return directions.get(part, lambda: forward().backward())


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (m, d), dtype, part = case
    # Half the tiles of S, them again (unless a CPU holds them, up to M = 2560), and W z. A CPU's forward does all.
    flop = {"forward": 1, "backward": 3}.get(part, 4) * m * m * d
    z0, z1 = views(m, d, dtype, device)
    torch._dynamo.reset()
    found = decoupled_losses() if part == "decoupled" else losses(m, device)
    variants = {name: variant(loss, z0, z1, part) for name, loss in found.items()}
    variants["matmuls"] = matmul(flop, dtype, device)
    record(benchmark, variants, limit="matmuls", m=m, d=d, dtype=dtype, part=part, flop=flop)


def test_memory(benchmark, device, case):
    """Of a step on the CPU; on a GPU test_time reads the allocator."""
    (m, d), dtype, _ = case
    setup = f"""
import torch
from benchmarks.bench_nt_xent import losses, variant, views
z0, z1 = views({m}, {d}, {dtype}, "cpu")
step = variant(losses({m}, "cpu")[{{!r}}], z0, z1, "both")
"""
    names = [n for n in ("sslops", "eager", "compile", "lightly") if n in losses(m, device)]
    names = names[:1] if settings.only_ours else names
    peak_mb = {name: peak_memory(setup.format(name), "step()") for name in names}
    record_memory(benchmark, peak_mb, m=m, d=d, dtype=dtype)
