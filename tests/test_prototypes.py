"""PrototypeCenter and swav."""

import importlib
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

import sslops
from benchmarks import peers

from . import oracle

BACKENDS = ("cpu", "eager")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_center(dtype):
    center = sslops.nn.PrototypeCenter(30, momentum=0.75)
    expected = torch.zeros(30, dtype=torch.float64)
    for rows in (4, 7, 1):  # batches of any size
        teacher = torch.randn(2, rows, 30).to(dtype)
        center.update(teacher)
        expected = 0.75 * expected + 0.25 * teacher.double().mean((0, 1))
    torch.testing.assert_close(center.center, expected.float()[None])
    torch.testing.assert_close(center.bias(0.04), -expected.float() / 0.04)
    torch.testing.assert_close(center.bias(torch.tensor(0.07)), -expected.float() / 0.07)
    assert list(center.state_dict()) == ["center"]
    other = sslops.nn.PrototypeCenter(30)
    other.load_state_dict(center.state_dict())
    assert torch.equal(other.center, center.center)
    assert repr(center) == "PrototypeCenter(30, momentum=0.75)"


def test_center_of_lists_and_of_nothing():
    teacher = torch.randn(2, 5, 30)
    one, other = (sslops.nn.PrototypeCenter(30) for _ in range(2))
    one.update(teacher)
    other.update([teacher[0], teacher[1, :2], teacher[1, 2:]])
    torch.testing.assert_close(one.center, other.center)
    before = one.center.clone()
    one.update(teacher[:, :0])
    assert torch.equal(one.center, before)


@pytest.mark.parametrize("unit", [True, False])
def test_center_from_features_under_autocast(unit):
    features, prototypes = torch.randn(40, 6), torch.randn(30, 6)
    one, other = (sslops.nn.PrototypeCenter(30, momentum=0.5) for _ in range(2))
    one.update(features, prototypes=prototypes, unit_prototypes=unit)
    with torch.autocast("cpu", torch.bfloat16):
        other.update(features, prototypes=prototypes, unit_prototypes=unit)
    assert torch.equal(one.center, other.center)
    layer = F.normalize(prototypes) if unit else prototypes
    torch.testing.assert_close(one.center[0], 0.5 * (features @ layer.t()).mean(0), rtol=1e-5, atol=1e-6)


def test_center_in_bfloat16_sums_in_float32():
    teacher = torch.full((4096, 8), 1.0).bfloat16()
    center = sslops.nn.PrototypeCenter(8, momentum=0.0)
    center.update(teacher)
    assert torch.equal(center.center, torch.ones(1, 8))


def test_a_center_of_bfloat16_counts_rows_in_float32():
    """Its own 257 is 256"""
    teacher, center = torch.ones(257, 8), sslops.nn.PrototypeCenter(8, momentum=0.0).bfloat16()
    teacher[0] = 0
    center.update(teacher)
    assert torch.equal(center.center, torch.full((1, 8), 256 / 257).bfloat16())
    assert center.center[0, 0] < 1


@pytest.mark.parametrize("unit", [True, False])
def test_center_without_logits(unit):
    """W mean(x) is the mean of W x: with features and weights, one product with a vector."""
    features, weight = torch.randn(20, 6), torch.randn(30, 6)
    one, other, third = (sslops.nn.PrototypeCenter(30) for _ in range(3))
    one.update(features @ (F.normalize(weight) if unit else weight).t())
    other.update(features, prototypes=weight, unit_prototypes=unit)
    torch.testing.assert_close(one.center, other.center)
    third.update([features[:7].bfloat16(), features[7:].bfloat16()], prototypes=weight.bfloat16(), unit_prototypes=unit)
    torch.testing.assert_close(one.center, third.center, rtol=0, atol=2e-3)
    before = one.center.clone()
    one.update(features[:0], prototypes=weight)
    assert torch.equal(one.center, before)


def test_center_is_lightlys():
    if peers.lightly() is None:
        pytest.skip("lightly is not installed")
    theirs = importlib.import_module("lightly.models.modules.center").Center((1, 30), momentum=0.8)
    ours = sslops.nn.PrototypeCenter(30, momentum=0.8)
    for _ in range(3):
        teacher = torch.randn(7, 30)
        theirs.update(teacher)
        ours.update(teacher)
    torch.testing.assert_close(ours.center, theirs.value)


def test_center_compiles():
    center = sslops.nn.PrototypeCenter(30)

    def step(student, teacher, tau):
        loss = sslops.dino(student, teacher, teacher_temp=tau, bias=center.bias(tau))
        center.update(teacher)
        return loss

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    student, teacher, tau = torch.randn(4, 5, 30), torch.randn(2, 5, 30), torch.tensor(0.05)
    first = compiled(student, teacher, tau)
    moved = center.center.clone()
    center.center.zero_()
    torch.testing.assert_close(step(student, teacher, tau), first)
    torch.testing.assert_close(center.center, moved)


def test_center_compiles_for_rows_that_a_mask_picks():
    """How many is not known before it runs: iBOT's masked tokens"""
    tokens, mask = torch.randn(20, 5), torch.arange(20) % 3 == 0
    eager, compiled = (sslops.nn.PrototypeCenter(5) for _ in range(2))
    step = torch.compile(lambda x, m: compiled.update(x[m]), fullgraph=True, backend="aot_eager")
    with mock.patch.object(torch._dynamo.config, "capture_dynamic_output_shape_ops", True):
        step(tokens, mask)
    eager.update(tokens[mask])
    torch.testing.assert_close(compiled.center, eager.center)


def test_center_refuses():
    def refused(error, argument, call):
        oracle.assert_refused(error, "PrototypeCenter", argument, call)

    refused(ValueError, "prototypes", lambda: sslops.nn.PrototypeCenter(0))
    refused(TypeError, "prototypes", lambda: sslops.nn.PrototypeCenter(2.5))
    refused(ValueError, "momentum", lambda: sslops.nn.PrototypeCenter(3, momentum=1.5))
    for error, temperature in ((ValueError, 0), (ValueError, -0.04), (TypeError, "warm")):
        oracle.assert_refused(error, "PrototypeCenter.bias", "teacher_temp",
                              lambda t=temperature: sslops.nn.PrototypeCenter(3).bias(t))  # fmt: skip
    center = sslops.nn.PrototypeCenter(3)
    for error, bad in ((ValueError, torch.ones(2, 4)), (ValueError, torch.tensor(1.0)),
                       (TypeError, torch.ones(3).int()), (TypeError, [3]),
                       (ValueError, torch.ones(2, 3, device="meta"))):  # fmt: skip
        oracle.assert_refused(error, "PrototypeCenter.update", "teacher", lambda bad=bad: center.update(bad))
    for bad in (torch.ones(4, 5), torch.ones(3)):
        oracle.assert_refused(ValueError, "PrototypeCenter.update", "prototypes",
                              lambda bad=bad: center.update(torch.ones(2, 5), prototypes=bad))  # fmt: skip
    oracle.assert_refused(ValueError, "PrototypeCenter.update", "teacher",
                          lambda: center.update(torch.ones(2, 4), prototypes=torch.ones(3, 5)))  # fmt: skip


# ---- swav ----


def scores(views: int, b: int, k: int, rows: int = 0):
    prototypes = F.normalize(torch.randn(k, 16))
    image = torch.randn(b, 16)
    crops = F.normalize(image + torch.randn(views, b, 16), dim=-1) @ prototypes.t()
    return crops, F.normalize(torch.randn(2, rows, 16), dim=-1) @ prototypes.t()


def swavs_own(crops, queue, temperature=0.1, epsilon=0.05, iterations=3, assign=2):
    """The main loop of SwAV's code"""
    loss = 0
    for a in range(assign):
        q = torch.exp(torch.cat([crops[a].detach(), queue[a]]) / epsilon).t()
        q /= q.sum()
        for _ in range(iterations):
            q /= q.sum(1, keepdim=True) * q.shape[0]
            q /= q.sum(0, keepdim=True) * q.shape[1]
        q = (q * q.shape[1]).t()[: len(crops[a])]
        others = [v for v in range(len(crops)) if v != a]
        loss = loss - sum((q * F.log_softmax(crops[v] / temperature, dim=1)).sum(1).mean() for v in others) / len(
            others
        )
    return loss / assign


@pytest.mark.parametrize("rows", [0, 40])
@pytest.mark.parametrize("views", [2, 6])
def test_swav_against_its_own_loop(views, rows):
    crops, queue = (x.double() for x in scores(views, 12, 30, rows))
    torch.testing.assert_close(sslops.swav(crops, queue=queue if rows else None), swavs_own(crops, queue))
    torch.testing.assert_close(
        sslops.swav(list(crops), queue=list(queue), assign=2, iterations=5, temperature=0.2, epsilon=0.07),
        swavs_own(crops, queue, 0.2, 0.07, 5),
    )


@each_backend
@pytest.mark.parametrize("rows", [0, 40])
def test_swav_of_lists_is_that_of_the_tensor(backend, rows):
    crops, queue = scores(5, 12, 30, rows)
    for assign in (1, 2, 3):
        options = {"assign": assign, "backend": backend}
        if rows:
            options["queue"] = [queue[0]] * assign
        found = [sslops.swav(x, **options) for x in (crops, list(crops), [crops[:2], crops[2:]], [crops[0], crops[1:]])]
        assert all(torch.equal(each, found[0]) for each in found), assign


@pytest.mark.parametrize("rows", [0, 300])
def test_swav_is_accurate(rows):
    crops, queue = scores(4, 20, 300, rows)

    def op(crops, backend):
        return sslops.swav(crops, queue=queue.to(crops.dtype) if rows else None, backend=backend)

    oracle.check(op, {"scores": crops}, "cpu")


@each_backend
@pytest.mark.parametrize("unit", [True, False])
def test_swav_of_embeddings(backend, unit):
    """and of a queue of them"""
    z, weight = torch.randn(4, 12, 16), torch.randn(30, 16) / 4
    queue, answers = torch.randn(2, 20, 16), []
    for fused in (True, False):
        leaves = [x.clone().requires_grad_() for x in (z, weight)]
        w = F.normalize(leaves[1]) if unit else leaves[1]
        if fused:
            options = {"prototypes": leaves[1], "unit_prototypes": unit}
            loss = sslops.swav(list(leaves[0]), queue=queue, backend=backend, **options)
        else:
            loss = sslops.swav(leaves[0] @ w.t(), queue=queue @ w.t(), backend=backend)
        answers.append([loss, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@each_backend
def test_swav_compiles(backend):
    crops, queue = scores(3, 24, 30, 8)

    def step(crops):
        return sslops.swav(crops.transpose(0, 1), queue=queue, backend=backend)

    oracle.assert_compiles(step, crops.transpose(0, 1))


def test_swav_refuses():
    crops, queue = scores(3, 6, 30, 8)

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "swav", argument, lambda: sslops.swav(*args, **kwargs))

    refused(ValueError, "temperature", crops, temperature=0)
    refused(ValueError, "epsilon", crops, epsilon=-1.0)
    refused(ValueError, "iterations", crops, iterations=0)
    refused(ValueError, "scores", crops[:1], assign=1)
    refused(ValueError, "scores", crops[..., :0])
    refused(ValueError, "assign", crops, assign=4)
    refused(ValueError, "assign", crops, assign=0)
    refused(ValueError, "queue", crops, queue=queue[:1])
    refused(ValueError, "queue[0]", crops, queue=queue[..., :9])
    refused(ValueError, "queue[0]", crops, queue=queue.to("meta"))
    refused(TypeError, "queue[0]", crops, queue=queue.long())
    with pytest.raises(ValueError, match="sinkhorn: prototypes: wanted"):
        sslops.swav(crops, prototypes=torch.ones(5, 4))


# ---- the modules ----


def test_modules_are_their_ops():
    crops, queue = scores(3, 6, 30, 8)
    b, weights = torch.randn(30), torch.rand(6)
    teacher = crops[:2].clone()
    for module, expected, arguments in (
        (sslops.nn.DINOLoss(0.2, same_view=True),
         lambda *x, **y: sslops.dino(*x, student_temp=0.2, same_view=True, **y),
         ((crops, teacher), {"bias": b})),
        (sslops.nn.DINOLoss(), sslops.dino, ((list(crops), list(teacher)), {})),
        (sslops.nn.IBOTLoss(unit_prototypes=True), lambda *x, **y: sslops.ibot(*x, unit_prototypes=True, **y),
         ((crops[0], crops[1]), {"prototypes": crops[2], "teacher_prototypes": crops[2]})),
        (sslops.nn.IBOTLoss(teacher_temp=0.1), lambda *x, **y: sslops.ibot(*x, teacher_temp=0.1, **y),
         ((crops[0], crops[1]), {"bias": b, "weights": weights})),
        (sslops.nn.SwAVLoss(epsilon=0.1), lambda *x, **y: sslops.swav(*x, epsilon=0.1, **y),
         ((crops,), {"queue": queue})),
    ):  # fmt: skip
        tensors, named = arguments
        assert torch.equal(module(*tensors, **named), expected(*tensors, **named))
        assert not module.state_dict()
