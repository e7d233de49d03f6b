"""iBOT's cross entropy from logits beside eager PyTorch and torch.compile. Shapes: R x K, tokens by prototypes."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import sslops

from ._compare import Variant, cases, peak_memory, record, record_memory, settings

STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.07
CASES = {
    "cpu": [
        *cases("1024x8192 256x65536", "float32", "both"),
        *cases("256x65536", "bfloat16", "both"),
        *cases("256x65536", "float32", "memory"),
    ],
    "cuda": cases("2048x8192 2048x65536", "bfloat16", "both"),
    "small": cases("3x40 70x3000", "float32 bfloat16", "both"),
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


def losses() -> dict[str, Callable]:
    return {
        "sslops": fused,
        "eager": usual_eager,
        "lean eager": lean_eager,
        "compile": torch.compile(usual_eager, dynamic=False),
        "lean compile": torch.compile(lean_eager, dynamic=False),
    }


def rows(r: int, k: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    student, teacher = (0.2 * torch.randn(r, k, device=device).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher, torch.rand(r, device=device) / r


def variant(loss: Callable, student: torch.Tensor, *rest: torch.Tensor) -> Variant:
    def step() -> None:
        student.grad = None
        loss(student, *rest).backward()

    return step


@pytest.mark.usefixtures("threads")
def test_time(benchmark, device, case):
    (r, k), dtype, _ = case
    student, *rest = rows(r, k, dtype, device)
    torch._dynamo.reset()
    variants = {name: variant(loss, student, *rest) for name, loss in losses().items()}
    variants["copy"] = lambda: student.detach().clone()
    record(benchmark, variants, limit="copy", r=r, k=k, dtype=dtype, bytes=3 * student.nbytes)


def test_memory(benchmark, device, case):
    (r, k), dtype, _ = case
    setup = f"""
import torch
from benchmarks.bench_ibot import losses, rows, variant
step = variant(losses()[{{!r}}], *rows({r}, {k}, {dtype}, "cpu"))
"""
    names = list(losses())[: 1 if settings.only_ours else None]
    peak_mb = {name: peak_memory(setup.format(name), "step()") for name in names}
    record_memory(benchmark, peak_mb, r=r, k=k, dtype=dtype)
