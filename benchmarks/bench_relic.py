"""RELIC and RELICv2 beside eager PyTorch, torch.compile and the unavoidable matmuls.

Shapes: B x D x large crops x small crops x negatives; 1 x 0 crops are one pair. The targets need no gradient, as in
training.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import Variant, cases, eager_and_compiled, matmul, peak_memory, record, record_memory, settings

TEMPERATURE, ALPHA, BETA = 0.1, 1.0, 1.0
MULTICROP = "1024x256x2x6x1023"
CASES = {
    "cpu": [
        *cases(f"{MULTICROP} 1024x256x2x6x10 1024x256x1x0x1023 4096x128x1x0x4095", "float32", "both"),
        *cases(f"{MULTICROP} 4096x128x1x0x4095", "bfloat16", "both"),
        *cases(f"{MULTICROP} 4096x128x1x0x4095 16384x128x1x0x16383", "float32", "memory"),
    ],
    "cuda": cases(f"{MULTICROP} 1024x256x2x6x10 4096x256x1x0x4095 16384x256x1x0x16383", "bfloat16", "both"),
    "key": cases("4096x256x1x0x4095", "bfloat16", "both"),
    "small": cases("66x7x2x1x65 66x7x1x0x10 130x300x1x0x129", "float32 bfloat16", "both"),
}


def work(part: str, b: int, d: int) -> dict[str, int]:
    """Of the Triton kernels for one pair in bf16, all others as negatives, and a target that learns nothing"""
    if part == "forward":
        return {"flops": 4 * b * b * d, "exps": 2 * b * b, "bytes": 12 * b * d}
    return {"flops": 6 * b * b * d, "exps": 2 * b * b, "bytes": 2 * 12 * b * d}


WORK = {(p, f"B={b} D=256"): work(p, b, 256) for b in (1024, 4096, 16384) for p in ("forward", "backward")}

Crops = tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]
Loss = Callable[[Crops, int], torch.Tensor]


def fused(crops: Crops, negatives: int) -> torch.Tensor:
    return sslops.relic_multicrop(*crops, temperature=TEMPERATURE, alpha=ALPHA, beta=BETA, num_negatives=negatives)


def from_logits(p: torch.Tensor, q: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """The mean loss of rows of log p and log q."""
    shares = p.exp()
    divergence = (shares * p).sum(1).detach() - (shares * q).sum(1)
    return BETA * divergence.mean() - ALPHA * positives.mean()


def all_pairs(online: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """All others as negatives: the fewest passes over the matrix that we found."""
    s = (online @ target.t()).float() / TEMPERATURE
    p, q = s.log_softmax(1), s.t().log_softmax(1)
    return from_logits(p, q, p.diagonal())


def drawn(online: torch.Tensor, target: torch.Tensor, negatives: int) -> torch.Tensor:
    """Drawn negatives, gathered: their logits alone are computed."""
    n = len(online)
    chosen = torch.rand(n, n - 1, device=online.device).topk(negatives, 1).indices
    own = torch.arange(n, device=online.device)[:, None]
    chosen = torch.cat([own, chosen + (chosen >= own)], 1)
    p, q = (
        (torch.einsum("nd,nkd->nk", x, y[chosen]).float() / TEMPERATURE).log_softmax(1)
        for x, y in ((online, target), (target, online))
    )
    return from_logits(p, q, p[:, 0])


def eager(crops: Crops, negatives: int) -> torch.Tensor:
    """Each crop is normalised once."""
    large, small, targets = ([F.normalize(x) for x in each] for each in crops)
    terms = [
        all_pairs(o, t) if negatives == len(o) - 1 else drawn(o, t, negatives) for o in large + small for t in targets
    ]
    return torch.stack(terms).mean()


def losses() -> dict[str, Loss]:
    return eager_and_compiled(fused, eager)


def crops(shape: Sequence[int], dtype: torch.dtype, device: str) -> Crops:
    b, d, large, small, _ = shape

    def views(count: int, grad: bool) -> list[torch.Tensor]:
        return [torch.randn(b, d, device=device).to(dtype).requires_grad_(grad) for _ in range(count)]

    return views(large, True), views(small, True), views(large, False)


def variant(loss: Loss, inputs: Crops, negatives: int) -> Variant:
    def step() -> None:
        for x in inputs[0] + inputs[1]:
            x.grad = None
        loss(inputs, negatives).backward()

    return step


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (b, d, large, small, negatives), dtype, part = case
    # On a GPU 4 forward and 6 backward, with both matrices of a pair; on the CPU one of each, and its product
    flop = (10 if device == "cuda" else 4) * b * (negatives + 1) * d * (large + small) * large
    assert part == "both", "the backends share the work between the passes in their own ways"
    inputs = crops(case.shape, dtype, device)
    torch._dynamo.reset()
    variants = {name: variant(loss, inputs, negatives) for name, loss in losses().items()}
    variants["matmuls"] = matmul(flop, dtype, device)
    record(
        benchmark, variants, limit="matmuls",
        b=b, d=d, crops=f"{large}+{small}", k=negatives, dtype=dtype, part=part, flop=flop,
    )  # fmt: skip


def test_memory(benchmark, device, case):
    """Of a step on the CPU; on a GPU test_time reads the allocator."""
    (b, d, large, small, negatives), dtype, _ = case
    setup = f"""
import torch
from benchmarks.bench_relic import crops, losses, variant
step = variant(losses()[{{!r}}], crops({case.shape}, {dtype}, "cpu"), {negatives})
"""
    names = ["sslops"] if settings.only_ours else ["sslops", "eager", "compile"]
    peak_mb = {name: peak_memory(setup.format(name), "step()") for name in names}
    record_memory(benchmark, peak_mb, b=b, d=d, crops=f"{large}+{small}", k=negatives, dtype=dtype)
