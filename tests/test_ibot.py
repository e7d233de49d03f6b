import pytest
import torch

import sslops
from sslops.kernels.cpu import ibot as kernel
from sslops.ops.ibot import Arguments

from . import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = oracle.targets("ibot")
each_target = pytest.mark.parametrize(("device", "backend"), TARGETS)


def logits(rows: int, k: int, *, dtype=torch.float32, device="cpu", scale: float = 0.5):
    g = torch.Generator().manual_seed(rows * 1000 + k)
    token = torch.randn(rows, k, generator=g)
    student, teacher = (scale * (token + torch.randn(rows, k, generator=g)) for _ in range(2))
    return student.to(device, dtype), teacher.to(device, dtype)


def check(student, teacher, backend, **options):
    def op(student, backend, **options):
        return sslops.ibot(student, teacher.to(student.dtype), backend=backend, **options)

    oracle.check(op, {"student": student}, backend, **options)


def spread(rows: int, size: int, device="cpu"):
    """weights, some 0, and an index into that many rows"""
    g = torch.Generator().manual_seed(rows)
    weights = torch.rand(rows, generator=g) * (torch.rand(rows, generator=g) < 0.7)
    return weights.to(device), torch.randint(size, (rows,), generator=g).to(device)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (67, 2049), (9, 4100)])
def test_accuracy(device, backend, dtype, reduction, weighted, shape):
    student, teacher = logits(*shape, dtype=dtype, device=device)
    weights, index = spread(*shape[:1], shape[0] // 2 + 1, device)
    weights[0] = 0.5
    options = {"weights": weights, "index": index} if weighted else {}
    with oracle.poisoned_memory():
        check(student, teacher[: shape[0] // 2 + 1] if weighted else teacher, backend, reduction=reduction,
              bias=0.3 * teacher[0].float(), **options)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    with oracle.poisoned_memory():
        check(*logits(7, 4099, dtype=dtype), "cpu", student_temp=0.2)


def test_against_dinov2s_formula():
    """Each image's tokens share its loss, and images without any count in the mean."""
    student, teacher = (x.double() for x in logits(10, 20))
    masked = torch.tensor([3, 0, 7])
    share = 1 / masked.clamp(min=1).repeat_interleave(masked).double()
    losses = -((teacher / 0.07).softmax(1) * (student / 0.1).log_softmax(1)).sum(1)
    ours = sslops.ibot(student, teacher, weights=share / 3, reduction="sum")
    torch.testing.assert_close(ours, (losses * share).sum() / 3)
    torch.testing.assert_close(sslops.ibot(student, teacher, weights=share), (losses * share).sum() / share.sum())
    torch.testing.assert_close(sslops.ibot(student, teacher), losses.mean())


@each_target
def test_index_is_a_gather(device, backend):
    student, teacher = logits(40, 70, device=device)
    _, index = spread(40, 40, device)
    found = [
        sslops.ibot(student, rows, index=i, reduction="none", backend=backend)
        for rows, i in ((teacher, index), (teacher[index], None))
    ]
    assert torch.equal(*found)


@each_target
def test_ressl_is_this_with_a_queue(device, backend):
    """and distillation: prototypes are the queue's rows"""
    z, k, queue = (torch.nn.functional.normalize(torch.randn(n, 16, device=device)) for n in (12, 12, 50))
    expected = -((k @ queue.t() / 0.04).softmax(1) * (z @ queue.t() / 0.1).log_softmax(1)).sum(1).mean()
    ours = sslops.ibot(z @ queue.t(), k @ queue.t(), teacher_temp=0.04, backend=backend)
    torch.testing.assert_close(ours, expected)


@each_target
def test_metrics(device, backend):
    student, teacher = logits(30, 50, device=device)
    weights, _ = spread(30, 30, device)
    q, p = (teacher.double() / 0.07).softmax(1), (student.double() / 0.1).softmax(1)
    share = weights.double() / weights.double().sum()
    for reduction in ("mean", "sum", "none"):
        _, found = sslops.ibot(
            student, teacher, weights=weights, reduction=reduction, return_metrics=True, backend=backend
        )
        entropy = -(q * q.log()).sum(1) @ share
        torch.testing.assert_close(found.teacher_entropy, entropy.float(), rtol=1e-5, atol=1e-6)
        divergence = (q * (q / p).log()).sum(1) @ share
        torch.testing.assert_close(found.divergence, divergence.float(), rtol=1e-5, atol=1e-5)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_any_number_of_threads(device, backend, dtype):
    student, teacher = logits(50, 3000, dtype=dtype, device=device)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            leaf = student.clone().requires_grad_()
            loss = sslops.ibot(leaf, teacher, backend=backend)
            loss.backward()
            found.append((loss, leaf.grad))
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, found[0], other)) for other in found)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_empty_and_not_finite(backend):
    student, teacher = (x.requires_grad_() for x in logits(0, 20))
    assert sslops.ibot(student, teacher, backend=backend).isnan()
    assert sslops.ibot(student, teacher, weights=torch.ones(0), backend=backend) == 0
    loss = sslops.ibot(student, teacher, reduction="sum", backend=backend)
    loss.backward()
    assert loss == 0
    assert student.grad.shape == (0, 20)
    student, teacher = logits(6, 20)
    student.requires_grad_()
    loss = sslops.ibot(student, teacher, weights=torch.zeros(6), backend=backend)
    loss.backward()
    assert loss == 0
    assert not student.grad.any()
    student, teacher = logits(6, 20)
    teacher[2, 3] = float("nan")
    student.requires_grad_()
    losses = sslops.ibot(student, teacher, reduction="none", backend=backend)
    losses.sum().backward()
    assert losses.isnan().nonzero().tolist() == [[2]]
    assert student.grad.isnan().all(1).nonzero().tolist() == [[2]]


@each_target
def test_opcheck(device, backend):
    student, teacher = logits(5, 9, device=device)
    weights, index = spread(5, 5, device)
    for ready in (True, False):
        x = Arguments(student.requires_grad_(), teacher, None, None, False, 0.1, torch.tensor(0.04, device=device),
                      teacher[0], weights, index, "mean", ready, backend=backend, needs_grad=[True, False])  # fmt: skip
        torch.library.opcheck(torch.ops.sslops.ibot.default, oracle.lowered(x))
        with torch.no_grad():
            result, entropy, stats, *_ = torch.ops.sslops.ibot(*oracle.lowered(x))
            bare = oracle.lowered(x._replace(student=student.detach()))
            torch.library.opcheck(torch.ops.sslops.ibot_backward.default, (result, *bare, entropy, stats))


@each_target
def test_compile(device, backend):
    def step(student, teacher):
        return sslops.ibot(student * 2, teacher, weights=teacher[:, 0].abs(), backend=backend) + teacher.sum() * 0

    oracle.assert_compiles(step, *logits(24, 30, device=device))


def test_bad_input():
    student, teacher = logits(4, 8)

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "ibot", argument, lambda: sslops.ibot(*args, **kwargs))

    refused(ValueError, "teacher", student, teacher[:3])
    refused(ValueError, "teacher", student, teacher[:, :3])
    refused(ValueError, "teacher", student, teacher.to("meta"))
    refused(TypeError, "student", student.int(), teacher)
    refused(TypeError, "student", student.tolist(), teacher)
    refused(ValueError, "student", student[None], teacher)
    refused(ValueError, "student", student[:, :0], teacher[:, :0])
    refused(ValueError, "bias", student, teacher, bias=torch.zeros(9))
    refused(ValueError, "weights", student, teacher, weights=torch.zeros(5))
    refused(TypeError, "weights", student, teacher, weights=0.5)
    refused(TypeError, "index", student, teacher, index=torch.zeros(4))
    refused(ValueError, "index", student, teacher, index=torch.zeros(5, dtype=torch.int64))
    for bad in (-1, 4):
        refused(ValueError, "index[2]", student, teacher, index=torch.tensor([0, 1, bad, 2]))
    for name in ("student_temp", "teacher_temp"):
        refused(ValueError, name, student, teacher, **{name: 0.0})
    refused(ValueError, "reduction", student, teacher, reduction="median")
    refused(ValueError, "backend", student, teacher, backend="tpu")
    x = Arguments(student, teacher, None, None, False, 0.1, 0.07, None, None, torch.tensor([0, 1, 9, 2]), "mean", False,
                  backend="cpu", needs_grad=[True, False])  # fmt: skip
    with pytest.raises(ValueError, match=r"ibot: index\[2\]"):
        torch.ops.sslops.ibot(*oracle.lowered(x))


def test_a_lost_weight_is_found(monkeypatch):
    run = kernel._problem
    monkeypatch.setattr(kernel, "_problem", lambda x: run(x)._replace(weights=x.weights.bfloat16().float()))
    weights, _ = spread(30, 30)
    with pytest.raises(AssertionError, match="above"):
        check(*logits(30, 40), "cpu", weights=weights, reduction="sum")


# ---- from features ----


def features(rows: int, k: int, d: int, *, dtype=torch.float32, device="cpu"):
    """The student's, its prototypes, the teacher's and its own, which are of another width"""
    g = torch.Generator().manual_seed(rows * 1000 + k)
    shapes = (rows, d), (k, d), (rows, d + 2), (k, d + 2)
    return [torch.randn(shape, generator=g).to(device, dtype) / shape[1] ** 0.25 for shape in shapes]


def from_features(student, prototypes, teacher, teacher_prototypes, backend, **options):
    of_teacher = None if teacher_prototypes is None else teacher_prototypes.to(student.dtype)
    return sslops.ibot(student, teacher.to(student.dtype), prototypes=prototypes, teacher_prototypes=of_teacher,
                       backend=backend, **options)  # fmt: skip


def check_features(student, prototypes, teacher, of_teacher, backend, **options):
    def op(student, prototypes, backend, **options):
        return from_features(student, prototypes, teacher, of_teacher, backend, **options)

    oracle.check(op, {"student": student, "prototypes": prototypes}, backend, **options)


# chunks of rows, ragged widths, tiles of each size, and more of them than there are parts
SHAPES = [(1, 1, 1), (300, 70, 24), (20, 1100, 17), (5, 9000, 9)]


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy_from_features(device, backend, dtype, unit, shape):
    student, prototypes, teacher, of_teacher = features(*shape, dtype=dtype, device=device)
    weights, _ = spread(*shape[:1], 1, device)
    weights[0] = 0.5
    options = {"unit_prototypes": unit, "weights": weights, "student_temp": 0.3}
    with oracle.poisoned_memory():
        check_features(student, prototypes, teacher, of_teacher, backend, **options)
        logits = teacher @ of_teacher.t()
        check_features(student, prototypes, logits, None, backend, reduction="none", bias=logits[0].float(), **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_on_every_instruction_set(isa, dtype):
    with oracle.poisoned_memory():
        check_features(*features(37, 1030, 21, dtype=dtype), "cpu", unit_prototypes=True, reduction="sum")


@each_target
def test_a_teacher_without_width(device, backend):
    """Nothing of [K, 0] is in memory: it is a last layer all the same, and its logits are 0."""
    student, prototypes, *_ = features(9, 30, 6, device=device)
    check_features(student, prototypes, student[:, :0], prototypes[:, :0], backend)


@each_target
def test_features_under_autocast(device, backend):
    """The operands are rounded, the logits are not."""
    tensors = [x.to(torch.bfloat16).float() for x in features(40, 70, 24, device=device)]
    expected = oracle.evaluate(lambda *x, **y: from_features(*x, *tensors[2:], **y), tensors[:2], backend)
    with torch.autocast(device, torch.bfloat16):
        found = oracle.evaluate(lambda *x, **y: from_features(*x, *tensors[2:], **y), tensors[:2], backend)
    assert [x.dtype for x in found] == [torch.float32] * 3
    if backend == "cpu" and sslops._C.isa() != "amx":  # others round what they multiply on the way back
        assert all(map(torch.equal, found, expected))
    else:
        off = [max(oracle.errors(x, y.double())) for x, y in zip(found, expected, strict=True)]
        assert max(off) < torch.finfo(torch.bfloat16).eps


@each_target
@pytest.mark.parametrize("rows", [300])
def test_features_are_a_linear_layer(device, backend, rows):
    """with an index of the teacher's rows, and the metrics of the logits"""
    student, prototypes, teacher, of_teacher = features(rows, 70, 24, device=device)
    size = min(rows, 40)
    weights, index = spread(rows, size, device)
    options = {"index": index, "weights": weights, "return_metrics": True, "backend": backend}
    answers = []
    for fused in (True, False):
        leaves = [x.clone().requires_grad_() for x in (student, prototypes)]
        if fused:
            layers = {"prototypes": leaves[1], "teacher_prototypes": of_teacher}
            loss, metrics = sslops.ibot(leaves[0], teacher[:size], **layers, **options)
        else:
            loss, metrics = sslops.ibot(leaves[0] @ leaves[1].t(), teacher[:size] @ of_teacher.t(), **options)
        answers.append([loss.detach(), *metrics, *torch.autograd.grad(loss, leaves)])
    for ours, theirs in zip(*answers, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@each_target
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("rows", [300])
def test_a_frozen_last_layer_changes_no_bit(device, backend, unit, rows):
    """of the student's gradient, nor does frozen features those of the prototypes; forward's are backward's"""
    student, prototypes, *rest = features(rows, 70, 24, device=device)
    found = []
    for wanted in ((True, True), (True, False), (False, True)):
        leaves = [x.clone().requires_grad_(each) for x, each in zip((student, prototypes), wanted, strict=True)]
        loss = from_features(*leaves, *rest, backend, unit_prototypes=unit)
        graded = [x for x in leaves if x.requires_grad]
        first, second = (torch.autograd.grad(loss, graded, retain_graph=True) for _ in range(2))
        assert all(map(torch.equal, first, second))
        (whole,) = (torch.autograd.grad(loss * 4, graded),)
        assert all(torch.equal(x, 4 * y) for x, y in zip(whole, first, strict=True))
        found.append(first)
    both, (of_student,), (of_prototypes,) = found
    assert torch.equal(both[0], of_student)
    assert torch.equal(both[1], of_prototypes)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_features_of_no_rows(backend):
    student, prototypes, *rest = (x.requires_grad_() for x in features(0, 20, 6))
    loss = from_features(student, prototypes, *rest, backend, reduction="sum")
    loss.backward()
    assert loss == 0
    assert student.grad.shape == (0, 6)
    assert not prototypes.grad.any()
    assert from_features(student, prototypes, *rest, backend).isnan()


def test_memory_from_features():
    """Two chunks' logits, and no [R, K]: 67 MB each here"""
    grown = oracle.grown_memory(
        "x, y = torch.randn(2, 2048, 64); w, v = torch.randn(2, 8192, 64); x.requires_grad_(), w.requires_grad_()\n"
        "def step(n): sslops.ibot(x[:n], y[:n], prototypes=w, teacher_prototypes=v).backward()\n"
        "step(1); x.grad = w.grad = None",
        "step(2048)",
    )
    assert grown < 30, f"{grown:.0f} MB"


def test_bad_layers():
    student, prototypes, teacher, of_teacher = features(4, 9, 6)

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "ibot", argument, lambda: sslops.ibot(*args, **kwargs))

    both = {"prototypes": prototypes, "teacher_prototypes": of_teacher}
    refused(ValueError, "prototypes", student, teacher, **both | {"prototypes": prototypes[:, :5]})
    refused(ValueError, "prototypes", student, teacher, **{name: x[:0] for name, x in both.items()})
    refused(ValueError, "prototypes", student, teacher, **both | {"prototypes": prototypes[0]})
    refused(TypeError, "prototypes", student, teacher, **both | {"prototypes": 3})
    refused(TypeError, "prototypes", student, teacher, **both | {"prototypes": prototypes.int()})
    refused(ValueError, "teacher_prototypes", student, teacher, **both | {"teacher_prototypes": of_teacher[:, :5]})
    refused(ValueError, "teacher_prototypes", student, teacher, **both | {"teacher_prototypes": of_teacher[:5]})
    refused(ValueError, "teacher_prototypes", student, teacher, teacher_prototypes=of_teacher)
    refused(ValueError, "teacher", student, teacher, prototypes=prototypes)
    refused(ValueError, "bias", student, teacher, **both, bias=torch.zeros(6))
    refused(TypeError, "unit_prototypes", student, teacher, **both, unit_prototypes=1)


def test_a_rounded_gradient_is_found(monkeypatch):
    run = kernel.prototypes._features
    monkeypatch.setattr(
        kernel.prototypes, "_features", lambda *args: [d.to(torch.bfloat16).float() for d in run(*args)]
    )
    with pytest.raises(AssertionError, match="above"):
        check_features(*features(300, 40, 8), "cpu")
