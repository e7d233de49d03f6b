"""DINO's cross entropy beside eager forms, torch.compile and lightly. Shapes: V x B x K, two teachers, from logits;
V x B x K x D from features, with a last layer of unit prototypes on either side. Part swav: SwAV's loss of V crops.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import Variant, cases, eager_and_compiled, matmul, peak_memory, record, record_memory, settings
from .bench_sinkhorn import ITERATIONS, TEMPERATURE, kept, matrix
from .peers import lightly_loss

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04
CASES = {
    "cpu": [
        *cases("10x32x65536 10x128x4096 2x128x4096 10x4x262144 10x32x65536x256", "float32", "both"),
        *cases("10x32x65536", "bfloat16", "both"),
        *cases("10x32x65536 10x32x65536x256", "float32", "memory"),
        *cases("8x64x3000", "float32", "swav"),
    ],
    "cuda": [
        *cases("10x64x65536 10x128x4096 10x64x65536x256", "bfloat16", "both"),
        *cases("8x64x3000", "bfloat16", "swav"),
    ],
    "small": [
        *cases("3x2x40 10x5x3000 10x5x300x16", "float32 bfloat16", "both"),
        *cases("3x9x40", "float32 bfloat16", "swav"),
    ],
}
Crops = list[torch.Tensor]


def targets(teacher: Crops, center: torch.Tensor) -> torch.Tensor:
    return F.softmax((torch.stack(teacher).float() - center) / TEACHER_TEMP, dim=-1)


def pair_by_pair(student: Crops, teacher: Crops, center: torch.Tensor) -> torch.Tensor:
    """As DINO's and DINOv2's code have it, with each crop's log_softmax taken once"""
    logs = [F.log_softmax(s.float() / STUDENT_TEMP, dim=-1) for s in student]
    losses = [
        -(q * log).sum(-1).mean()
        for t, q in enumerate(targets(teacher, center))
        for v, log in enumerate(logs)
        if v != t
    ]
    return torch.stack(losses).mean()


def einsum(student: Crops, teacher: Crops, center: torch.Tensor) -> torch.Tensor:
    """As DINOv3's has it, but the diagonal left out by a product: Inductor cannot differentiate its diagonal_scatter"""
    logs = F.log_softmax(torch.stack(student).float() / STUDENT_TEMP, dim=-1)
    losses = -torch.einsum("vbk,tbk->vt", logs, targets(teacher, center))
    others = 1 - torch.eye(*losses.shape, device=losses.device)
    return (losses * others).sum() / (others.sum() * logs.shape[1])


def by_linearity(student: Crops, teacher: Crops, center: torch.Tensor) -> torch.Tensor:
    return with_targets(student, targets(teacher, center))


def with_targets(student: Crops, q: torch.Tensor) -> torch.Tensor:
    """The fewest passes over the logits that we found: the teachers summed first, logsumexp and one product a crop"""
    everyone, total = q.sum(0), 0
    for v, s in enumerate(student):
        y, of = s.float() / STUDENT_TEMP, everyone - q[v] if v < len(q) else everyone
        total = total + (y.logsumexp(-1) * (len(q) - (v < len(q)))).sum() - (of * y).sum()
    return total / (len(q) * (len(student) - 1) * len(student[0]))


def fused(student: Crops, teacher: Crops, center: torch.Tensor) -> torch.Tensor:
    bias = (-center / TEACHER_TEMP).flatten()
    return sslops.dino(student, teacher, student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP, bias=bias)


def swavs_own(scores: Crops) -> torch.Tensor:
    """As SwAV's code has it: each assigned crop's Q, and the others' cross entropy with it"""
    total = 0
    for t, assigned in enumerate(scores[:2]):
        with torch.no_grad():
            q = matrix(assigned)
        for v, crop in enumerate(scores):
            if v != t:
                total = total - (q * F.log_softmax(crop.float() / STUDENT_TEMP, dim=1)).sum(1).mean()
    return total / (2 * (len(scores) - 1))


def lean_swav(scores: Crops) -> torch.Tensor:
    with torch.no_grad():
        q = torch.stack([(x.float() / TEMPERATURE + kept(x)).softmax(1) for x in scores[:2]])
    return with_targets(scores, q)


def swav_losses() -> dict[str, Callable]:
    ours = partial(sslops.swav, temperature=STUDENT_TEMP, epsilon=TEMPERATURE)
    found = eager_and_compiled(ours, swavs_own, lean_swav)
    options = {"temperature": STUDENT_TEMP, "sinkhorn_iterations": ITERATIONS, "sinkhorn_epsilon": TEMPERATURE}
    if theirs := lightly_loss("SwaVLoss", **options):
        found["lightly"] = lambda scores: theirs(scores[:2], scores[2:])
    return found


Layers = tuple[torch.Tensor, torch.Tensor]  # the student's and the teacher's prototypes


def from_features(loss: Callable) -> Callable:
    """With the last layers, as F.linear has them"""

    def run(student: Crops, teacher: Crops, center: torch.Tensor, layers: Layers) -> torch.Tensor:
        weight = F.normalize(layers[0])
        with torch.no_grad():
            targets = F.linear(torch.stack(teacher), F.normalize(layers[1])).unbind()
        return loss([F.linear(s, weight) for s in student], targets, center)

    return run


def fused_features(student: Crops, teacher: Crops, center: torch.Tensor, layers: Layers) -> torch.Tensor:
    return sslops.dino(
        student, teacher, prototypes=layers[0], teacher_prototypes=layers[1], unit_prototypes=True,
        student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP, bias=(-center / TEACHER_TEMP).flatten(),
    )  # fmt: skip


def losses_from_features() -> dict[str, Callable]:
    forms = {name: from_features(loss) for name, loss in (("dinov2", pair_by_pair), ("linearity", by_linearity))}
    compiled = {
        "compile": torch.compile(forms["dinov2"], dynamic=False),
        "linearity compile": torch.compile(forms["linearity"], dynamic=False),
    }
    return {"sslops": fused_features} | forms | compiled


def losses(k: int) -> dict[str, Callable]:
    found = {
        "sslops": fused,
        "dinov2": pair_by_pair,
        "dinov3": einsum,
        "linearity": by_linearity,
        "compile": torch.compile(pair_by_pair, dynamic=False),
        "dinov3 compile": torch.compile(einsum, dynamic=False),
        "linearity compile": torch.compile(by_linearity, dynamic=False),
    }
    if theirs := lightly_loss("DINOLoss", output_dim=k):
        found["lightly"] = lambda student, teacher, center: theirs(teacher, student)
    return found


def crops(v: int, b: int, k: int, dtype: torch.dtype, device: str) -> tuple[Crops, Crops, torch.Tensor]:
    """Logits as a head of unit rows and prototypes gives them; leaves"""
    student, teacher = (
        [F.normalize(torch.randn(b, 64, device=device)) @ prototypes for _ in range(n)]
        for prototypes in [F.normalize(torch.randn(64, k, device=device), dim=0)]
        for n in (v, 2)
    )
    return (
        [s.to(dtype).requires_grad_() for s in student],
        [t.to(dtype) for t in teacher],
        0.01 * torch.randn(1, 1, k, device=device),
    )


def features(v: int, b: int, k: int, d: int, dtype: torch.dtype, device: str) -> tuple[Any, ...]:
    """Unit features, the centre, and the layers"""
    student, teacher, _ = crops(v, b, d, dtype, device)
    student, teacher = ([F.normalize(x.detach()) for x in each] for each in (student, teacher))
    layers = tuple(torch.randn(k, d, device=device).to(dtype) for _ in range(2))
    for x in (*student, layers[0]):
        x.requires_grad_()
    return student, teacher, 0.01 * torch.randn(1, 1, k, device=device), layers


def variant(loss: Callable, student: Crops, *rest: Any) -> Variant:
    def step() -> None:
        for x in [*student, *(x for layers in rest[2:] for x in layers)]:
            x.grad = None
        loss(student, *rest).backward()

    return step


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (v, b, k, *d), dtype, part = case
    torch._dynamo.reset()
    if d:  # one product of each teacher's crop, three of each student's
        tensors, flop = features(v, b, k, *d, dtype, device), (6 * v + 2 * 2) * b * k * d[0]
        variants = {name: variant(loss, *tensors) for name, loss in losses_from_features().items()}
        variants["matmuls"] = matmul(flop, dtype, device)
        record(benchmark, variants, limit="matmuls", v=v, b=b, k=k, d=d[0], dtype=dtype, flop=flop)
        return
    student, *rest = crops(v, b, k, dtype, device)
    facts: dict[str, object] = {"bytes": 3 * v * b * k * student[0].element_size()}
    if part == "swav":
        found, rest, facts = swav_losses(), [], {"part": part}
    else:
        found = losses(k)
    variants = {name: variant(loss, student, *rest) for name, loss in found.items()}
    variants["copy"] = lambda: [s.detach().clone() for s in student]
    record(benchmark, variants, limit="copy", v=v, b=b, k=k, dtype=dtype, **facts)


def test_memory(benchmark, device, case):
    shape, dtype, _ = case
    layer = len(shape) > 3
    made = ("losses_from_features()", "features") if layer else (f"losses({shape[2]})", "crops")
    setup = f"""
import torch
from benchmarks.bench_dino import crops, features, losses, losses_from_features, variant
step = variant({made[0]}[{{!r}}], *{made[1]}(*{shape}, {dtype}, "cpu"))
"""
    found = losses_from_features() if layer else losses(shape[2])
    names = [n for n in ("sslops", "dinov2", "dinov3", "linearity compile", "lightly") if n in found]
    names = names[:1] if settings.only_ours else names
    peak_mb = {name: peak_memory(setup.format(name), "step()") for name in names}
    record_memory(benchmark, peak_mb, **dict(zip("vbkd", shape, strict=False)), dtype=dtype)
