import importlib

import pytest
import torch
import torch.nn.functional as F

import sslops
from benchmarks import peers
from sslops import _C, _prototypes
from sslops.kernels.cpu import dino as kernel
from sslops.ops.dino import Arguments

from . import oracle

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
TARGETS = oracle.targets("dino")
each_target = pytest.mark.parametrize(("device", "backend"), TARGETS)


def logits(views: int, teachers: int, b: int, k: int, *, dtype=torch.float32, device="cpu", scale: float = 0.5):
    """The student's crops agree with the teacher's somewhat."""
    g = torch.Generator().manual_seed(views * 1000 + k)
    image = torch.randn(b, k, generator=g)
    student = scale * (image + torch.randn(views, b, k, generator=g))
    teacher = scale * (image + 0.5 * torch.randn(teachers, b, k, generator=g))
    return student.to(device, dtype), teacher.to(device, dtype)


def bias(k: int, device="cpu"):
    return torch.randn(k, generator=torch.Generator().manual_seed(k)).to(device)


def on(teacher, **fixed):
    """dino as a function of the student alone"""

    def op(student, backend, **options):
        return sslops.dino(student, teacher.to(student.dtype), backend=backend, **fixed, **options)

    return op


def check(student, teacher, backend, **options):
    """The targets are those of teacher's own values in every dtype."""
    oracle.check(on(teacher), {"student": student}, backend, **options)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("views", "teachers", "b", "k"),
    [(2, 2, 1, 1), (2, 1, 3, 5), (10, 2, 4, 4100), (3, 3, 5, 130), (4, 6, 2, 33), (2, 2, 33, 2048), (1, 2, 2, 2049)],
)
def test_accuracy(device, backend, dtype, reduction, views, teachers, b, k):
    student, teacher = logits(views, teachers, b, k, dtype=dtype, device=device)
    with oracle.poisoned_memory():
        check(student, teacher, backend, reduction=reduction, bias=bias(k, device))


@each_target
@pytest.mark.parametrize("same_view", [True, False])
@pytest.mark.parametrize("temps", [(0.1, 0.04), (1.0, 1.0), (0.01, 0.07)])
def test_pairs_and_temperatures(device, backend, same_view, temps):
    student, teacher = logits(5, 2, 7, 300, device=device)
    check(student, teacher, backend, same_view=same_view, student_temp=temps[0], teacher_temp=temps[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_instruction_set(isa, dtype, reduction):
    student, teacher = logits(6, 2, 5, 4099, dtype=dtype)
    with oracle.poisoned_memory():
        check(student, teacher, "cpu", reduction=reduction, bias=bias(4099).repeat(2, 1))


def plain(student, teacher, tau_s=0.1, tau_t=0.04, center=0.0):
    """DINO's own loop"""
    total, terms = 0, 0
    for t, q in enumerate(F.softmax((teacher - center) / tau_t, dim=-1)):
        for v, crop in enumerate(student):
            if v != t:
                total = total + torch.sum(-q * F.log_softmax(crop / tau_s, dim=-1), dim=-1).mean()
                terms += 1
    return total / terms


def test_against_dinos_own_loop():
    student, teacher = (x.double() for x in logits(5, 2, 4, 30))
    center = 0.1 * bias(30).double()
    ours = sslops.dino(student, teacher, bias=-center / 0.04)
    torch.testing.assert_close(ours, plain(student, teacher, center=center))
    with_queue = [sslops.dino(student, teacher, bias=b) for b in (center, torch.stack([center, center]))]
    assert torch.equal(*with_queue)


def test_against_dinov3s_einsum():
    student, teacher = (x.double() for x in logits(5, 2, 4, 30))
    b = sslops.sinkhorn(teacher, temperature=0.04)
    q = (teacher / 0.04 + b[:, None]).softmax(2)
    losses = -torch.einsum("vbk,tbk->vt", (student / 0.1).log_softmax(2), q)
    off_diagonal = losses.sum() - losses.diagonal().sum()
    torch.testing.assert_close(sslops.dino(student, teacher, bias=b), off_diagonal / (4 * 8))
    torch.testing.assert_close(sslops.dino(student, teacher, bias=b, same_view=True), losses.sum() / (4 * 10))


@each_target
def test_lists_are_the_tensor(device, backend):
    student, teacher = logits(5, 2, 6, 70, device=device)
    expected = oracle.evaluate(on(teacher), [student], backend)
    for split in (1, 2, [2, 3]):
        crops = [x.squeeze(0).requires_grad_() for x in student.clone().split(split)]
        for teachers in (teacher, list(teacher), [teacher[0], teacher[1:]]):
            loss = sslops.dino(crops, teachers, backend=backend)
            assert torch.equal(loss, expected[0])
            cotangent = torch.rand((), generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(loss)
            grads = torch.autograd.grad(loss, crops, cotangent)
            assert [g.shape for g in grads] == [x.shape for x in crops]
            assert torch.equal(torch.cat([g if g.dim() == 3 else g[None] for g in grads]), expected[1])


@each_target
def test_a_crop_without_a_partner_is_not_looked_at(device, backend):
    student, teacher = logits(3, 1, 4, 20, device=device)
    student[0] = float("nan")
    student.requires_grad_()
    for reduction in ("mean", "none"):
        loss = sslops.dino(student, teacher, reduction=reduction, backend=backend)
        (grad,) = torch.autograd.grad(loss.sum(), student)
        assert loss.isfinite().all()
        assert not grad[0].any()
        assert grad.isfinite().all()


@each_target
def test_some_crops_need_no_gradient(device, backend):
    student, teacher = logits(3, 2, 4, 20, device=device)
    crops = [x.clone().requires_grad_(v != 1) for v, x in enumerate(student)]
    sslops.dino(crops, teacher, backend=backend).backward()
    whole = student.clone().requires_grad_()
    sslops.dino(whole, teacher, backend=backend).backward()
    assert crops[1].grad is None
    assert all(torch.equal(crops[v].grad, whole.grad[v]) for v in (0, 2))


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_gradient_in_forward_and_in_backward(device, backend, dtype):
    """grad 1 takes forward's own, what is retained comes from backward's kernel"""
    student, teacher = logits(4, 2, 5, 300, dtype=dtype, device=device)
    student.requires_grad_()
    loss = sslops.dino(student, teacher, backend=backend)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (scaled,) = torch.autograd.grad(sslops.dino(student, teacher, backend=backend) * 2, student)
    assert torch.equal(scaled, 2 * first) or dtype == torch.float16  # whose smallest numbers are rounded otherwise


@each_target
@pytest.mark.parametrize("k", [4096, 65536, 1000])
def test_collapsed(device, backend, k):
    """A uniform student's loss is log K, whatever the teacher; where the teacher is uniform too the gradient is 0."""
    teacher = torch.full((2, 3, k), 1.5, device=device)
    student = torch.full((4, 3, k), -2.5, device=device, requires_grad=True)
    loss, found = sslops.dino(student, teacher, return_metrics=True, backend=backend)
    torch.testing.assert_close(loss, torch.tensor(float(k), device=device).log(), rtol=2e-7, atol=0)
    torch.testing.assert_close(found.teacher_entropy, loss.detach(), rtol=4e-7, atol=0)
    assert found.divergence.abs() < 1e-5
    loss.backward()
    assert student.grad.abs().max() < 1e-6 / k
    teacher[..., 3] += 100
    _, found = sslops.dino(student, teacher, return_metrics=True, backend=backend)
    assert found.teacher_entropy == 0


@each_target
@pytest.mark.parametrize("scale", [10.0, 1e3])
def test_wide_logits(device, backend, scale):
    """Both softmaxes are one prototype, mostly the same: what is left of the gradient is 0, or 1."""
    student, teacher = logits(4, 2, 8, 300, scale=scale, device=device)
    shift = 100 * torch.arange(8, device=device)[:, None]  # of a sample's logits, which changes nothing
    check(student + shift, teacher - shift, backend)


@each_target
@pytest.mark.parametrize("views", [1, 2, 5])
def test_metrics(device, backend, views):
    """Means over the pairs: of one student's view the teacher's other one is in all"""
    student, teacher = (x.double() for x in logits(views, 2, 6, 70, device=device))
    q = (teacher / 0.04).softmax(2)
    of_each = torch.distributions.Categorical(q).entropy().mean(1)
    entropy = torch.stack([of_each[t] for t in range(2) for v in range(views) if t != v]).mean()
    for reduction in ("mean", "sum", "none"):
        loss, found = sslops.dino(
            student.float(), teacher.float(), reduction=reduction, return_metrics=True, backend=backend
        )
        assert torch.equal(loss, sslops.dino(student.float(), teacher.float(), reduction=reduction, backend=backend))
        torch.testing.assert_close(found.teacher_entropy, entropy.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.divergence, (plain(student, teacher) - entropy).float(), rtol=1e-5, atol=1e-6)
        assert not any(x.requires_grad for x in found)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_on_any_number_of_threads(device, backend, dtype):
    student, teacher = logits(6, 2, 17, 3000, dtype=dtype, device=device)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(oracle.evaluate(on(teacher), [student], backend))
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, found[0], other)) for other in found)


@each_target
@pytest.mark.parametrize("dtype", HALF)
def test_autocast_and_a_scaler(device, backend, dtype):
    student, teacher = logits(4, 2, 5, 60, dtype=dtype, device=device)
    student.requires_grad_()
    with torch.autocast(device, dtype):
        loss = sslops.dino(student, teacher, backend=backend)
    assert loss.dtype == torch.float32
    (grad,) = torch.autograd.grad(loss * 1024, student)
    truth = student.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(sslops.dino(truth, teacher.double()) * 1024, truth)
    assert max(oracle.errors(grad, exact)) < torch.finfo(dtype).eps


@each_target
def test_no_gradient_to_the_teacher(device, backend):
    student, teacher = logits(3, 2, 4, 20, device=device)
    tau, b = torch.tensor(0.1, device=device, requires_grad=True), bias(20, device).requires_grad_()
    loss = sslops.dino(student.requires_grad_(), teacher.requires_grad_(), student_temp=tau, teacher_temp=tau, bias=b,
                       backend=backend)  # fmt: skip
    loss.backward()
    assert teacher.grad is tau.grad is b.grad is None
    other = sslops.dino(student, teacher, student_temp=0.1, teacher_temp=0.1, bias=b, backend=backend)
    torch.testing.assert_close(loss, other)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_empty_and_not_finite(backend):
    student, teacher = (x[:, :0] for x in logits(3, 2, 4, 20))
    student.requires_grad_()
    assert sslops.dino(student, teacher, backend=backend).isnan()
    assert sslops.dino(student, teacher, reduction="none", backend=backend).shape == (0,)
    loss = sslops.dino(student, teacher, reduction="sum", backend=backend)
    loss.backward()
    assert loss == 0
    assert student.grad.shape == student.shape
    for of_student in (True, False):
        student, teacher = logits(3, 2, 4, 20)
        (student if of_student else teacher)[1, 2, 5] = float("nan")
        student.requires_grad_()
        losses = sslops.dino(student, teacher, reduction="none", backend=backend)
        losses.sum().backward()
        assert losses.isnan().tolist() == [False, False, True, False]
        assert student.grad.isnan().any(2).any(0).tolist() == [False, False, True, False]
    fused = "cpu" if backend == "eager" else backend
    for bad in (0.0, -1.0, float("nan")):
        student, teacher = logits(3, 2, 4, 20)
        for name in ("student_temp", "teacher_temp"):
            assert sslops.dino(student, teacher, **{name: torch.tensor(bad)}, backend=fused).isnan()


@each_target
def test_non_contiguous(device, backend):
    student, teacher = logits(4, 2, 5, 60, device=device)
    strided = student.transpose(0, 1).contiguous().transpose(0, 1)
    assert all(map(torch.equal, *(oracle.evaluate(on(teacher), [x], backend) for x in (student, strided))))


@each_target
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(device, backend, reduction):
    student, teacher = logits(3, 2, 4, 9, device=device)
    crops = [student[:1].clone().requires_grad_(), student[1:].clone().requires_grad_()]
    for ready in (True, False):
        x = Arguments(crops, [teacher], None, None, False, 0.1, torch.tensor(0.04, device=device),
                      bias(9, device)[None], None, False, reduction, ready, backend=backend,
                      needs_grad=[True, False])  # fmt: skip
        arguments = oracle.lowered(x)
        torch.library.opcheck(torch.ops.sslops.dino.default, arguments)
        with torch.no_grad():
            result, entropy, stats, *_ = torch.ops.sslops.dino(*arguments)
            bare = oracle.lowered(x._replace(student=[crop.detach() for crop in crops]))
            torch.library.opcheck(torch.ops.sslops.dino_backward.default, (result, *bare, entropy, stats))


@each_target
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_gradients_tensor_by_tensor(device, backend, factor, monkeypatch):
    """As where one piece would be large: the bits of one piece, compiled too"""
    crops, teacher = logits(3, 2, 4, 9, device=device)

    def gradients(run):
        students = [crops[:2].clone().requires_grad_(), crops[2].clone().requires_grad_()]
        run(lambda: factor * sslops.dino(students, teacher, backend=backend))().backward()
        return [each.grad for each in students]

    for run in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)):
        with monkeypatch.context() as changed:
            wanted = gradients(run)
            changed.setattr(_prototypes, "KEPT", 0)
            torch._dynamo.reset()
            assert all(map(torch.equal, gradients(run), wanted))


@each_target
def test_compile(device, backend):
    student, teacher = logits(3, 2, 24, 30, device=device)

    def step(student, teacher):  # [B, V, K]: assert_compiles shortens the batch
        crops = student.transpose(0, 1)
        loss = sslops.dino([crops[:1] * 2, crops[1] * 2, crops[2] * 2], teacher.transpose(0, 1), backend=backend)
        return loss + teacher.sum() * 0

    oracle.assert_compiles(step, student.transpose(0, 1), teacher.transpose(0, 1))


def test_memory():
    """The gradient, and less than a tenth of it beside."""
    grown = oracle.grown_memory(
        "s = torch.randn(10, 16, 65536).requires_grad_(); t = torch.randn(2, 16, 65536); "
        "sslops.dino(s[:, :2, :3000], t[:, :2, :3000]).backward(); s.grad = None",
        "sslops.dino(s, t).backward()",
    )
    assert grown < 1.1 * 40 + 4, f"{grown:.0f} MB"


def test_memory_where_the_gradient_is_made_again():
    """Of bf16 times 3: forward's is gone before."""
    grown = oracle.grown_memory(
        "make = lambda v, k: torch.empty(v, 16, k, dtype=torch.bfloat16).fill_(1); "
        "step = lambda s, t: (3 * sslops.dino(s.requires_grad_(), t)).backward(); "
        "step(make(10, 3000), make(2, 3000)); s, t = make(10, 65536), make(2, 65536)",
        "step(s, t)",
    )
    assert grown < 1.1 * 20 + 4, f"{grown:.0f} MB"


def test_lightly_is_the_same():
    if peers.lightly() is None:
        pytest.skip("lightly is not installed")
    student, teacher = logits(5, 2, 4, 30)
    theirs = importlib.import_module("lightly.loss").DINOLoss(30)
    torch.testing.assert_close(sslops.dino(student, teacher), theirs(list(teacher), list(student)))


def test_bad_input():
    student, teacher = logits(3, 2, 4, 8)

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "dino", argument, lambda: sslops.dino(*args, **kwargs))

    refused(ValueError, "teacher", student, teacher[:, :3])
    refused(ValueError, "teacher", student, teacher[..., :3])
    refused(ValueError, "student[1]", [student[0], student[1, :3]], teacher)
    refused(ValueError, "student[1]", [student[0], student[1].double()], teacher)
    refused(TypeError, "student[1]", [student[0], 3], teacher)
    refused(TypeError, "student", [], teacher)
    refused(TypeError, "teacher", student, 3)
    refused(ValueError, "student", student[..., :0], teacher[..., :0])
    refused(ValueError, "student", student[0, 0], teacher)
    refused(TypeError, "student", student.int(), teacher)
    refused(ValueError, "teacher", student, teacher.to("meta"))
    refused(ValueError, "student", student[:1], teacher[:1])
    assert sslops.dino(student[:1], teacher[:1], same_view=True).isfinite()
    refused(ValueError, "bias", student, teacher, bias=torch.zeros(9))
    refused(ValueError, "bias", student, teacher, bias=torch.zeros(3, 8))
    refused(ValueError, "bias", student, teacher, bias=torch.zeros(2, 2, 8))
    refused(TypeError, "bias", student, teacher, bias=0.5)
    for name in ("student_temp", "teacher_temp"):
        for value in (0, -1.0, float("nan"), float("inf")):
            refused(ValueError, name, student, teacher, **{name: value})
        refused(TypeError, name, student, teacher, **{name: None})
        refused(ValueError, name, student, teacher, **{name: torch.ones(2)})
    refused(TypeError, "same_view", student, teacher, same_view=1)
    refused(ValueError, "reduction", student, teacher, reduction="median")
    refused(TypeError, "return_metrics", student, teacher, return_metrics=1)
    refused(ValueError, "group", student, teacher, group="all")
    refused(ValueError, "backend", student, teacher, backend="tpu")
    assert "dino has no cuda kernel" in sslops.explain("dino", student)


def test_bad_input_to_the_registered_op():
    student, teacher = logits(3, 2, 4, 8)
    x = Arguments([student], [teacher], None, None, False, 0.1, 0.04, None, None, False, "mean", False,
                  backend="cpu", needs_grad=[True, False])  # fmt: skip
    result, entropy, stats, *_ = torch.ops.sslops.dino(*oracle.lowered(x))
    for bad in (x._replace(teacher=[teacher[:, :3]]), x._replace(teacher=[teacher[..., :3]]),
                x._replace(student=[student[:0]]), x._replace(bias=torch.zeros(3, 8))):  # fmt: skip
        with pytest.raises(ValueError, match=r"dino: (teacher|student|bias)"):
            torch.ops.sslops.dino(*oracle.lowered(bad))
    for grad, kept in ((result[None], stats), (result, stats[:1]), (result.double(), stats)):
        with pytest.raises(ValueError, match=r"dino: (grad|stats)"):
            torch.ops.sslops.dino_backward(grad, *oracle.lowered(x), entropy, kept)


# ---- from features: the rest is in tests/test_ibot.py, whose rows go the same way ----


def features(views: int, teachers: int, b: int, k: int, d: int, *, dtype=torch.float32, device="cpu"):
    student, teacher = logits(views, teachers, b, d, dtype=dtype, device=device)
    g = torch.Generator().manual_seed(k)
    prototypes, other = (torch.randn(k, d, generator=g).to(device, dtype) / d**0.5 for _ in range(2))
    return student, teacher, prototypes, other


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("views", "teachers", "b", "k", "d"), [(2, 1, 3, 1, 1), (10, 2, 27, 70, 17), (259, 3, 2, 40, 8)]
)
def test_accuracy_from_features(device, backend, dtype, reduction, views, teachers, b, k, d):
    student, teacher, prototypes, other = features(views, teachers, b, k, d, dtype=dtype, device=device)

    def op(student, prototypes, **options):
        of_teacher = other.to(student.dtype)
        return sslops.dino(student, teacher.to(student.dtype), prototypes=prototypes, teacher_prototypes=of_teacher,
                           bias=bias(k, device), student_temp=0.5, **options)  # fmt: skip

    with oracle.poisoned_memory():
        oracle.check(op, {"student": student, "prototypes": prototypes}, backend, reduction=reduction)


@each_target
@pytest.mark.parametrize("images", [6])
def test_features_of_lists_and_of_some(device, backend, images):
    """A list is the tensor; who needs no gradient has none, and takes none from the others."""
    student, teacher, prototypes, other = features(5, 2, images, 70, 12, device=device)
    whole, weight = student.clone().requires_grad_(), prototypes.clone().requires_grad_()
    options = {"teacher_prototypes": other, "unit_prototypes": True, "backend": backend}
    expected, metrics = sslops.dino(whole, teacher, prototypes=weight, return_metrics=True, **options)
    expected.backward()
    crops = [x.clone().requires_grad_(v != 1) for v, x in enumerate(student)]
    loss, found = sslops.dino(crops, list(teacher), prototypes=prototypes, return_metrics=True, **options)
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(map(torch.equal, found, metrics))
    assert crops[1].grad is None
    assert all(torch.equal(crops[v].grad, whole.grad[v]) for v in (0, 2, 3, 4))
    frozen = [x.clone() for x in student]
    alone = prototypes.clone().requires_grad_()
    sslops.dino(frozen, teacher, prototypes=alone, **options).backward()
    assert torch.equal(alone.grad, weight.grad)
    of_rows = sslops.dino(frozen, teacher, prototypes=alone, reduction="none", **options)
    (grad,) = torch.autograd.grad(of_rows.mean(), alone)
    torch.testing.assert_close(grad, weight.grad)


@each_target
def test_second_derivative_and_forward_mode(device, backend):
    student, teacher = logits(3, 2, 4, 8, device=device)
    student.requires_grad_()
    (gradient,) = torch.autograd.grad(sslops.dino(student, teacher, backend=backend), student, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='eager'"):
        gradient.sum().backward()


class TestBrokenKernelsAreFound:
    def refuse(self, *args, **options):
        with pytest.raises(AssertionError, match="above"):
            check(*args, "cpu", **options)

    def plant(self, monkeypatch, **change):
        run = kernel._problem
        monkeypatch.setattr(
            kernel, "_problem", lambda x: run(x)._replace(**{n: f(getattr(run(x), n)) for n, f in change.items()})
        )

    def test_an_equal_view(self, monkeypatch):
        self.plant(monkeypatch, same_view=lambda _: True)
        self.refuse(*logits(10, 2, 4, 300))

    def test_a_sloppy_temperature(self, monkeypatch):
        self.plant(monkeypatch, teacher_temp=lambda tau: tau * (1 + 1e-5))
        self.refuse(*logits(4, 2, 4, 300))

    def test_a_lost_bias(self, monkeypatch):
        self.plant(monkeypatch, bias=lambda b: b.roll(1, 0))
        self.refuse(*logits(4, 2, 4, 300), bias=torch.stack([bias(300), bias(300) * 1.001]))

    def test_unwritten_memory(self, monkeypatch):
        monkeypatch.setattr(_C, "prototypes_backward", lambda *arguments: None)
        with oracle.poisoned_memory():
            self.refuse(*logits(4, 2, 4, 300), reduction="none")
