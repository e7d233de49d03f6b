"""iBOT's cross entropy beside eager PyTorch and torch.compile. Shapes: R x K, tokens by prototypes, from logits;
R x K x D from features, with a last layer of unit prototypes on either side.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import Variant, cases, eager_and_compiled, matmul, peak_memory, record, record_memory, settings

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.07
CASES = {
    "cpu": [
        *cases("1024x8192 256x65536 1024x65536x256 1024x8192x256", "float32", "both"),
        *cases("256x65536 1024x8192x256", "bfloat16", "both"),
        *cases("256x65536 1024x65536x256", "float32", "memory"),
    ],
    "cuda": cases("2048x8192 2048x65536 3763x65536x256", "bfloat16", "both"),
    "small": cases("3x40 70x3000 70x300x16", "float32 bfloat16", "both"),
}


def usual_eager(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As DINOv2's and lightly's code have it"""
    q = F.softmax(teacher.float() / TEACHER_TEMP, dim=-1)
    losses = -(q * F.log_softmax(student.float() / STUDENT_TEMP, dim=-1)).sum(-1)
    return (losses * weights).sum()


def lean_eager(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    y, q = student.float() / STUDENT_TEMP, F.softmax(teacher.float() / TEACHER_TEMP, dim=-1)
    return ((y.logsumexp(-1) - (q * y).sum(-1)) * weights).sum()


def fused(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return sslops.ibot(
        student, teacher, weights=weights, student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP, reduction="sum"
    )


def from_features(loss: Callable) -> Callable:
    """With the last layers, as F.linear has them"""

    def run(student: torch.Tensor, prototypes: torch.Tensor, teacher: torch.Tensor, of_teacher: torch.Tensor,
            weights: torch.Tensor) -> torch.Tensor:  # fmt: skip
        with torch.no_grad():
            targets = F.linear(teacher, F.normalize(of_teacher))
        return loss(F.linear(student, F.normalize(prototypes)), targets, weights)

    return run


def fused_features(student: torch.Tensor, prototypes: torch.Tensor, teacher: torch.Tensor, of_teacher: torch.Tensor,
                   weights: torch.Tensor) -> torch.Tensor:  # fmt: skip
    return sslops.ibot(
        student, teacher, prototypes=prototypes, teacher_prototypes=of_teacher, unit_prototypes=True, weights=weights,
        student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP, reduction="sum",
    )  # fmt: skip


def losses(layer: bool) -> dict[str, Callable]:
    usual, lean = (from_features(loss) if layer else loss for loss in (usual_eager, lean_eager))
    return eager_and_compiled(fused_features if layer else fused, usual, lean)


def rows(r: int, k: int, *d: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    """logits and the weights; or, of d columns, features and prototypes of each side"""
    weights = torch.rand(r, device=device) / r
    if not d:
        student, teacher = (0.2 * torch.randn(r, k, device=device).to(dtype) for _ in range(2))
        return student.requires_grad_(), teacher, weights
    student, teacher = (F.normalize(torch.randn(r, *d, device=device)).to(dtype) for _ in range(2))
    prototypes, of_teacher = (torch.randn(k, *d, device=device).to(dtype) for _ in range(2))
    return student.requires_grad_(), prototypes.requires_grad_(), teacher, of_teacher, weights


def variant(loss: Callable, *tensors: torch.Tensor) -> Variant:
    def step() -> None:
        for x in tensors:
            x.grad = None
        loss(*tensors).backward()

    return step


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (r, k, *d), dtype, _ = case
    tensors = rows(r, k, *d, dtype=dtype, device=device)
    torch._dynamo.reset()
    variants = {name: variant(loss, *tensors) for name, loss in losses(bool(d)).items()}
    if d:  # one product of the teacher's, three of the student's
        flop = 8 * r * k * d[0]
        variants["matmuls"] = matmul(flop, dtype, device)
        record(benchmark, variants, limit="matmuls", r=r, k=k, d=d[0], dtype=dtype, flop=flop)
    else:
        variants["copy"] = lambda: tensors[0].detach().clone()
        record(benchmark, variants, limit="copy", r=r, k=k, dtype=dtype, bytes=3 * tensors[0].nbytes)


def test_memory(benchmark, device, case):
    shape, dtype, _ = case
    setup = f"""
import torch
from benchmarks.bench_ibot import losses, rows, variant
step = variant(losses({len(shape) > 2})[{{!r}}], *rows(*{shape}, dtype={dtype}, device="cpu"))
"""
    names = list(losses(len(shape) > 2))[: 1 if settings.only_ours else None]
    peak_mb = {name: peak_memory(setup.format(name), "step()") for name in names}
    record_memory(benchmark, peak_mb, **dict(zip("rkd", shape, strict=False)), dtype=dtype)
