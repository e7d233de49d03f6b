"""dino, ibot, sinkhorn, PrototypeCenter and koleo beside DINOv2's own code, where it is installed."""

import pytest
import torch

import sslops

from . import oracle
from .test_dino import logits

theirs = pytest.importorskip("dinov2.loss", reason="dinov2 is not installed: see benchmarks/requirements-peers.txt")

K, STUDENT_TEMP, TEACHER_TEMP, MOMENTUM = 30, 0.2, 0.07, 0.8
WANTED = {"student_temp": STUDENT_TEMP, "center_momentum": MOMENTUM}


def each_target(op):
    return pytest.mark.parametrize(("device", "backend"), oracle.targets(op))


def close(found, expected):
    """ours in float32, and theirs in float64 as far as it keeps to that"""
    for ours, true in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, true.to(ours), rtol=1e-5, atol=1e-6)


def close_with_gradients(found, student, expected, exact):
    close([found, *torch.autograd.grad(found, student)], [expected, *torch.autograd.grad(expected, exact)])


@each_target("dino")
@pytest.mark.parametrize("balanced", [False, True])
def test_dino(device, backend, balanced):
    """Two large crops and three small ones, whose parts its training adds up so; three steps, for the centre"""
    loss_of = theirs.DINOLoss(K, **WANTED).to(device).double()
    center = sslops.nn.PrototypeCenter(K, momentum=MOMENTUM).to(device)
    for step in range(3):
        student, teacher = (x + 0.1 * step for x in logits(5, 2, 6, K, device=device))
        student, exact, rows = student.requires_grad_(), student.double().requires_grad_(), teacher.flatten(0, 1)
        if balanced:
            q = loss_of.sinkhorn_knopp_teacher(rows, TEACHER_TEMP)
            bias = sslops.sinkhorn(rows, temperature=TEACHER_TEMP, backend=backend)
        else:
            q, bias = loss_of.softmax_center_teacher(rows.double(), TEACHER_TEMP), center.bias(TEACHER_TEMP)
        close([(rows / TEACHER_TEMP + bias).softmax(1)], [q])
        q = q.double().unflatten(0, (2, -1))
        of_large = loss_of([exact[:2].flatten(0, 1)], [q.flip(0).flatten(0, 1)])  # the mean of two pairs
        expected = (loss_of(exact[2:].unbind(), q.unbind()) + 2 * of_large) / (3 * 2 + 2)
        found = sslops.dino(
            student, teacher, student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP, bias=bias, backend=backend
        )
        close_with_gradients(found, student, expected, exact)
        loss_of.update_center(rows.double())
        loss_of.apply_center_update()
        center.update(teacher)
        close([center.center], [loss_of.center])


@each_target("ibot")
@pytest.mark.parametrize("balanced", [False, True])
def test_ibot(device, backend, balanced, monkeypatch):
    """The masked tokens of four images, one of which has none"""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: None)  # theirs asks for a process group
    loss_of = theirs.iBOTPatchLoss(K, **WANTED).to(device).double()
    center = sslops.nn.PrototypeCenter(K, momentum=MOMENTUM).to(device)
    mask = torch.zeros(4, 9, dtype=torch.bool, device=device)
    mask[0, :5], mask[1, 2:4], mask[3] = True, True, True
    weights = (1 / mask.sum(1).clamp(min=1)).repeat_interleave(mask.sum(1)) / len(mask)
    for step in range(3):
        student, teacher = (x[0] + 0.1 * step for x in logits(1, 1, int(mask.sum()), K, device=device))
        student, exact = student.requires_grad_(), student.double().requires_grad_()
        if balanced:
            q = loss_of.sinkhorn_knopp_teacher(teacher, TEACHER_TEMP, mask.sum().double())
            bias = sslops.sinkhorn(teacher, temperature=TEACHER_TEMP, backend=backend)
        else:
            (q,), bias = loss_of.softmax_center_teacher(teacher.double()[None], TEACHER_TEMP), center.bias(TEACHER_TEMP)
        expected = loss_of.forward_masked(exact, q.double(), mask)
        found = sslops.ibot(
            student, teacher, student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP, bias=bias, weights=weights,
            reduction="sum", backend=backend,
        )  # fmt: skip
        close_with_gradients(found, student, expected, exact)
        loss_of.update_center(teacher.double()[None])
        loss_of.apply_center_update()
        center.update(teacher)
        close([center.center], [loss_of.center[0]])


@each_target("sinkhorn")
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn(device, backend, iterations):
    _, (scores,) = logits(1, 1, 50, K, device=device)
    q = theirs.DINOLoss(K).sinkhorn_knopp_teacher(scores, TEACHER_TEMP, n_iterations=iterations)
    b = sslops.sinkhorn(scores, temperature=TEACHER_TEMP, iterations=iterations, backend=backend)
    close([(scores / TEACHER_TEMP + b).softmax(1)], [q])


@each_target("nearest")
@pytest.mark.filterwarnings("ignore:.*torch.cuda.amp:FutureWarning")
def test_koleo(device, backend):
    x = torch.randn(60, 8, device=device, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    close_with_gradients(sslops.koleo(x, backend=backend), x, theirs.KoLeoLoss()(exact), exact)
