"""InfoNCE, beside eager PyTorch, torch.compile, libraries and the unavoidable matmuls.

Shapes: B x K x D. The queue holds unit rows, so eager need not normalise it; ours does. Only the query has a gradient.
K = 0 stands for in-batch negatives, as MoCo v3 has them: the keys learn too. "mask": one pair in a hundred is left out.
B x K x D x M: M negatives of each query's own, not normalised, which learn too, but in "frozen"; K = 0: no others.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import Variant, cases, eager_and_compiled, matmul, peak_memory, record, record_memory, settings
from .peers import inf_cl_info_nce, liger_info_nce, lightly_loss, memeff_info_nce, solo_loss

TEMPERATURE = 0.1
CASES = {
    "cpu": [
        *cases("256x4096x128 256x16384x128 256x65536x128 256x262144x128 1024x65536x256", "float32", "both"),
        *cases("256x65536x128", "bfloat16", "both"),
        *cases("256x65536x128", "float32", "forward backward enqueue"),
        *cases("4096x0x256", "float32", "both"),
        *cases("256x65536x128", "float32 bfloat16", "memory"),
        *cases("4096x0x256", "float32", "memory"),
        *cases("256x16384x256", "float32", "mask"),
        *cases("256x0x256x64 256x16384x256x64", "float32", "both frozen memory"),
    ],
    "cuda": [
        *cases("256x65536x128 4096x65536x256 4096x0x256 16384x0x256", "bfloat16", "both"),
        *cases("256x65536x128", "float32", "both"),
        *cases("256x65536x128", "bfloat16", "enqueue"),
    ],
    "key": cases("256x65536x128 4096x0x256", "bfloat16", "both"),
    "small": [
        *cases("66x70x7 130x700x300 66x0x7", "float32 bfloat16", "both"),
        *cases("66x70x7", "float32", "mask"),
        *cases("13x0x7x19", "float32", "both frozen"),
    ],
}
# Of the Triton kernels in bf16: two products; the queue once in, the sums of 132 spans out and in again.
WORK = {
    ("both", "B=256 K=65536 D=128"): {
        "flops": 4 * 256 * 65536 * 128,
        "exps": 256 * 65536,
        "bytes": 2 * 65536 * 128 + 2 * 4 * 132 * 256 * 128,
    }
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


def usual_in_batch(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    logits = F.normalize(query) @ F.normalize(key).t() / TEMPERATURE
    return F.cross_entropy(logits.float(), torch.arange(len(query), device=query.device))


def lean_in_batch(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    q, k = F.normalize(query) / TEMPERATURE, F.normalize(key)
    return ((q @ k.t()).float().logsumexp(1) - (q * k).sum(1).float()).mean()


def usual_paired(query: torch.Tensor, key: torch.Tensor, own: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
    """As info-nce-pytorch has them, beside the queue"""
    q, k, n = F.normalize(query), F.normalize(key), F.normalize(own, dim=2)
    positive = (q * k).sum(1, keepdim=True)
    logits = torch.cat([positive, (q[:, None] @ n.transpose(1, 2))[:, 0], q @ queue.t()], 1) / TEMPERATURE
    return F.cross_entropy(logits.float(), torch.zeros(len(q), dtype=torch.long, device=q.device))


def lean_paired(query: torch.Tensor, key: torch.Tensor, own: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
    """Without the normalised copy: products with the rows as they are, over their norms"""
    q = F.normalize(query) / TEMPERATURE
    positive = (q * F.normalize(key)).sum(1).float()
    products = torch.bmm(own, q[:, :, None])[..., 0] / torch.linalg.vector_norm(own, dim=2).clamp_min(1e-12)
    total = torch.logaddexp(products.float().logsumexp(1), positive)
    if len(queue):
        total = torch.logaddexp(total, (q @ queue.t()).float().logsumexp(1))
    return (total - positive).mean()


def fused_paired(query: torch.Tensor, key: torch.Tensor, own: torch.Tensor, queue: torch.Tensor) -> torch.Tensor:
    return sslops.info_nce(query, key, queue, paired_negatives=own, temperature=TEMPERATURE)


def usual_masked(query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q, k = F.normalize(query), F.normalize(key)
    negative = (q @ queue.t()).masked_fill(~mask, -torch.inf)
    logits = torch.cat([(q * k).sum(1, keepdim=True), negative], dim=1) / TEMPERATURE
    return F.cross_entropy(logits.float(), torch.zeros(len(q), dtype=torch.long, device=q.device))


def lean_masked(query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    q = F.normalize(query) / TEMPERATURE
    positive = (q * F.normalize(key)).sum(1).float()
    negative = (q @ queue.t()).float().masked_fill(~mask, -torch.inf)
    return (torch.logaddexp(negative.logsumexp(1), positive) - positive).mean()


def fused_masked(query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return sslops.info_nce(query, key, queue, negative_mask=mask, temperature=TEMPERATURE)


def fused(query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor | None = None) -> torch.Tensor:
    return sslops.info_nce(query, key, queue, temperature=TEMPERATURE)


def queue_libraries(k: int, d: int, dtype: torch.dtype, device: str) -> dict[str, Callable | None]:
    """lightly has the queue in the loss, in float32, and enqueues; solo-learn's is [D, K]."""
    bank = lightly_loss("NTXentLoss", temperature=TEMPERATURE, memory_bank_size=(k, d))
    bank = bank.to(device) if bank and dtype == torch.float32 else None
    moco = solo_loss("moco", temperature=TEMPERATURE)
    return {
        "lightly": bank and (lambda query, key, _: bank(query, key)),
        "solo-learn": moco and (lambda query, key, queue: moco(F.normalize(query), F.normalize(key), queue.t())),
    }


def in_batch_libraries() -> dict[str, Callable | None]:
    if not torch.cuda.is_available():
        return {}
    makers = {"memeff": memeff_info_nce, "inf-cl": inf_cl_info_nce, "liger": liger_info_nce}
    return {name: make(TEMPERATURE) for name, make in makers.items()}


def losses(k: int, d: int, dtype: torch.dtype, device: str, beside: str = "") -> dict[str, Callable]:
    """beside: "paired" or "masked" for negatives of that kind"""
    written = {
        "": (fused, usual_eager, lean_eager) if k else (fused, usual_in_batch, lean_in_batch),
        "paired": (fused_paired, usual_paired, lean_paired),
        "masked": (fused_masked, usual_masked, lean_masked),
    }[beside]
    found: dict[str, Callable | None] = {**eager_and_compiled(*written)}
    if not beside:
        found |= queue_libraries(k, d, dtype, device) if k else in_batch_libraries()
    return {name: loss for name, loss in found.items() if loss}


def tensors(b: int, k: int, d: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    query, key = (torch.randn(b, d, device=device).to(dtype) for _ in range(2))
    if k == 0:
        return [query.requires_grad_(), key.requires_grad_()]
    return [query.requires_grad_(), key, F.normalize(torch.randn(k, d, device=device)).to(dtype)]


def of_paired(
    b: int, k: int, d: int, m: int, dtype: torch.dtype, device: str, learn: bool = True
) -> list[torch.Tensor]:
    query, key = (torch.randn(b, d, device=device).to(dtype) for _ in range(2))
    own = torch.randn(b, m, d, device=device).to(dtype).requires_grad_(learn)
    return [query.requires_grad_(), key, own, F.normalize(torch.randn(k, d, device=device)).to(dtype)]


def variant(loss: Callable, inputs: list[torch.Tensor], part: str) -> Variant:
    def forward() -> torch.Tensor:
        for x in inputs:
            x.grad = None
        return loss(*inputs)

    both = {"forward": forward, "backward": (forward, torch.Tensor.backward), "both": lambda: forward().backward()}
    return both[part]


def enqueues(query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor) -> dict[str, Variant]:
    """Beside MoCo's way, keys in the columns of [D, K], and a step of our loss."""
    ours = sslops.NegativeQueue(*queue.shape, dtype=queue.dtype).to(queue.device)
    columns, pointer = queue.t().contiguous(), torch.zeros(1, dtype=torch.long, device=queue.device)

    def moco() -> None:
        at = int(pointer)
        columns[:, at : at + len(key)] = F.normalize(key).t()
        pointer[0] = (at + len(key)) % len(queue)

    return {
        "sslops": lambda: ours.enqueue(key),
        "eager": moco,
        "the loss": variant(fused, [query, key, queue], "both"),
    }


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (b, k, d, *m), dtype, part = case
    if m or part == "mask":
        return time_beside(benchmark, device, case)
    inputs = tensors(b, k, d, dtype, device)
    if part == "enqueue":
        if k == 0:
            pytest.skip("in-batch there is no queue")
        record(benchmark, enqueues(*inputs), b=b, k=k, d=d, dtype=dtype, part=part)
        return
    passes = 1 if k else 2
    flop = passes * 4 * b * (k or b) * d  # against a queue all of it in forward
    torch._dynamo.reset()
    variants = {name: variant(loss, inputs, part) for name, loss in losses(k, d, dtype, device).items()}
    if dtype == torch.bfloat16 and k:
        wide = [x.detach().float() for x in inputs]
        variants["float32 eager"] = variant(usual_eager, [wide[0].requires_grad_(), *wide[1:]], part)
    limit = "matmuls" if part != "backward" else None
    if limit:
        with torch.no_grad():
            once = matmul(flop / passes, dtype, device)
            variants[limit] = lambda: [once() for _ in range(passes)]
    record(benchmark, variants, limit=limit, b=b, k=k, d=d, dtype=dtype, part=part, flop=flop)


def time_beside(benchmark, device, case):
    """The limit of paired negatives alone: to read them twice, and to write as many if they learn."""
    (b, k, d, *m), dtype, part = case
    torch._dynamo.reset()
    facts = {"b": b, "k": k, "d": d, "dtype": dtype, "part": part} | ({"m": m[0]} if m else {})
    if m:
        inputs = of_paired(b, k, d, m[0], dtype, device, learn=part == "both")
    else:
        inputs = [*tensors(b, k, d, dtype, device), torch.rand(b, k, device=device) > 0.01]
    kind = "paired" if m else "masked"
    variants = {name: variant(loss, inputs, "both") for name, loss in losses(k, d, dtype, device, kind).items()}
    if k:
        limit, once = "matmuls", matmul(4 * b * k * d, dtype, device)
        facts["flop"] = 4 * b * k * d
    else:
        own = inputs[2].detach()
        limit, facts["bytes"] = "passes", own.nbytes * (3 if part == "both" else 1)

        def once() -> None:
            own.sum()
            if part == "both":
                own.clone()

    variants[limit] = once
    record(benchmark, variants, limit=limit, **facts)


def test_memory(benchmark, device, case):
    """Of a step on the CPU; on a GPU test_time reads the allocator."""
    (b, k, d, *m), dtype, _ = case
    make, kind = (f"of_paired({b}, {k}, {d}, {m[0]}", "paired") if m else (f"tensors({b}, {k}, {d}", "")
    setup = f"""
import torch
from benchmarks.bench_info_nce import losses, of_paired, tensors, variant
inputs = {make}, {dtype}, "cpu")
step = variant(losses({k}, {d}, {dtype}, "cpu", {kind!r})[{{!r}}], inputs, "both")
"""
    names = ["sslops"] if settings.only_ours else ["sslops", "eager", "compile"]
    peak_mb = {name: peak_memory(setup.format(name), "step()") for name in names}
    record_memory(benchmark, peak_mb, b=b, k=k, d=d, dtype=dtype, **({"m": m[0]} if m else {}))
