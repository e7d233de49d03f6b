import math

import pytest
import torch
import torch.nn.functional as F

import sslops
from sslops import _C
from sslops.kernels.cpu import sigreg as kernel
from sslops.ops.sigreg import Arguments, draw

from . import oracle

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
TARGETS = oracle.targets("sigreg")
each_target = pytest.mark.parametrize(("device", "backend"), TARGETS)


def embeddings(*shape, scale: float = 1.0, dtype=torch.float32, device="cpu"):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))).to(device, dtype)


def units(m: int, d: int, device="cpu"):
    return F.normalize(torch.randn(m, d, generator=torch.Generator().manual_seed(m * d)), dim=1).to(device)


def seeded(z, seed: int = 3, **options):
    return sslops.sigreg(z, generator=torch.Generator(z.device).manual_seed(seed), **options)


def check(z, backend, m: int = 70, **options):
    directions = units(m, z.shape[-1], z.device)
    oracle.check(lambda z, **kwargs: sslops.sigreg(z, directions=directions, **kwargs), {"z": z}, backend, **options)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (67, 20), (2, 5, 33), (3, 130, 16), (1, 300, 8)])
@pytest.mark.parametrize("m", [1, 70])
def test_accuracy(device, backend, dtype, shape, m):
    with oracle.poisoned_memory():
        check(embeddings(*shape, dtype=dtype, device=device), backend, m)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(67, 20), (2, 130, 33)])
def test_every_instruction_set(isa, dtype, shape):
    with oracle.poisoned_memory():
        check(embeddings(*shape, dtype=dtype), "cpu", 130)


@each_target
@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.1, 10.0, 300.0])
def test_collapsed_and_far(device, backend, scale):
    """All rows 0, where the gradient is too; phases over many turns"""
    z = embeddings(2, 67, 20, scale=scale, device=device)
    check(z, backend)
    check(z + 1, backend)


@each_target
@pytest.mark.parametrize(("knots", "t_max"), [(2, 3.0), (3, 0.5), (33, 5.0), (129, 3.0)])
def test_knots(device, backend, knots, t_max):
    check(embeddings(67, 20, device=device), backend, knots=knots, t_max=t_max)


def test_many_rows():
    """Sums are of blocks of rows: a column that has collapsed loses no digits"""
    check(embeddings(20000, 2, scale=0.1), "cpu", 3)


def test_is_zero_for_a_normal_distribution():
    """Of its integral over t, with characteristic functions for means; and of many rows, near what N of them have"""
    z = torch.special.ndtri((torch.arange(4001).double() + 0.5) / 4001)[:, None]
    assert sslops.sigreg(z, slices=1) < 1e-3
    integral = sslops.sigreg(torch.zeros(1, 1).double(), slices=1, knots=129, t_max=8.0)
    expected = (2 * math.pi) ** 0.5 * (1 - 2 / 2**0.5 + 1 / 3**0.5)  # of phi (1 - phi)^2
    torch.testing.assert_close(integral.item(), expected, rtol=1e-9, atol=0)


@each_target
def test_views_are_distributions_of_their_own(device, backend):
    z, directions = embeddings(3, 40, 9, device=device), units(70, 9, device)
    each = [sslops.sigreg(view, directions=directions, backend=backend) for view in z]
    whole = sslops.sigreg(z, directions=directions, backend=backend)
    torch.testing.assert_close(whole, torch.stack(each).mean())
    assert abs(sslops.sigreg(z.flatten(0, 1), directions=directions, backend=backend) - whole) > 0.01


class TestDirections:
    @pytest.mark.parametrize(("m", "d"), [(1, 1), (5, 3), (70, 64), (3, 257)])
    def test_every_instruction_set(self, isa, m, d):
        """The reference's, rounded"""
        for seed in (0, 1, 2**63 - 1):
            key, found = torch.tensor(seed), torch.empty(m, d)
            _C.sigreg_draw(key, found)
            exact = draw(key, m, d)
            torch.testing.assert_close(found.double(), exact, rtol=2.0**-24, atol=1e-10)
            assert (found == exact.float()).double().mean() > 0.999

    def test_are_isotropic(self):
        x = draw(torch.tensor(7), 4000, 8)
        torch.testing.assert_close(x.norm(dim=1), torch.ones(4000).double())
        torch.testing.assert_close(x.t() @ x / 4000, torch.eye(8).double() / 8, rtol=0, atol=0.01)
        torch.testing.assert_close(x.mean(0), torch.zeros(8).double(), rtol=0, atol=0.02)
        torch.testing.assert_close(8 * 10 * x.pow(4).mean(0), torch.full((8,), 3.0).double(), rtol=0.1, atol=0)
        assert (x[1:] * x[:-1]).sum(1).abs().mean() < 0.32  # 0.29 for independent ones

    @each_target
    def test_by_key(self, device, backend):
        """One key, one value, on every backend; another key, another; and what the draw was is kept for backward"""
        z = embeddings(30, 12, device=device)
        found = [seeded(z, seed, backend=b) for seed in (3, 4) for b in (backend, backend, "eager")]
        assert found[0] == found[1] != found[3]
        torch.testing.assert_close(found[0], found[2])
        torch.testing.assert_close(found[3], found[5])
        oracle.check(seeded, {"z": z}, backend, slices=70)

    @each_target
    def test_default_generator(self, device, backend):
        z = embeddings(30, 12, device=device)
        torch.manual_seed(5)
        first, second = (sslops.sigreg(z, backend=backend) for _ in range(2))
        torch.manual_seed(5)
        assert sslops.sigreg(z, backend=backend) == first != second


@each_target
@pytest.mark.parametrize("dtype", HALF)
def test_phases_are_float32_under_autocast(device, backend, dtype):
    z, directions = embeddings(40, 30, scale=3.0, device=device), units(70, 30, device)
    for each in (backend, "eager"):
        found = []
        for cast in (False, True):
            leaf = z.clone().requires_grad_()
            with torch.autocast(device, dtype=dtype, enabled=cast):
                loss = sslops.sigreg(leaf, directions=directions, backend=each)
            found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
        assert all(map(torch.equal, *found))


@each_target
def test_compile_draws_as_eager_does(device, backend):
    torch._dynamo.reset()
    z = embeddings(30, 12, device=device)
    compiled = torch.compile(lambda z: sslops.sigreg(2 * z, slices=70), fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, lambda z: sslops.sigreg(2 * z, slices=70)):
        leaf = z.clone().requires_grad_()
        torch.manual_seed(5)
        loss = run(leaf)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_empty_and_not_finite(backend):
    assert sslops.sigreg(torch.zeros(0, 4), backend=backend).isnan()
    assert sslops.sigreg(torch.zeros(0, 3, 4), backend=backend).isnan()
    torch.testing.assert_close(
        sslops.sigreg(torch.zeros(3, 0), backend=backend), sslops.sigreg(torch.zeros(3, 2), backend=backend)
    )
    for bad in (float("nan"), float("inf")):
        z = embeddings(2, 70, 9)
        z[0, 3, 2] = bad
        leaf = z.requires_grad_()
        loss = sslops.sigreg(leaf, backend=backend)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.isnan()
        assert gradient[0].isnan().all()
        assert gradient[1].isfinite().all()
    huge = embeddings(40, 9, scale=1e20).requires_grad_()  # of phases at random
    loss = sslops.sigreg(huge, backend=backend)
    loss.backward()
    assert 40 < loss < 80  # 2.5 + 39 * 1.45
    assert huge.grad.isfinite().all()


def test_memory():
    """Nothing of size [V, N, M], 64 MB here; sums, 2 MB, and the directions"""
    grown = oracle.grown_memory(
        "z = torch.randn(8, 2048, 16, requires_grad=True); sslops.sigreg(z[:, :4]).backward()",
        "sslops.sigreg(z).backward()",
    )
    assert grown < 8, f"{grown:.1f} MB"


@each_target
def test_lejepa(device, backend):
    """As the authors write it; lists, tensors, and no local views"""
    views, directions = embeddings(5, 20, 8, device=device), units(70, 8, device)

    def op(views, backend, lambd=0.05):
        return sslops.lejepa(views[:2], views[2:], lambd=lambd, directions=directions, backend=backend)

    for lambd in (0.0, 0.05, 1.0):
        oracle.check(op, {"views": views}, backend, lambd=lambd)
        expected = lambd * sslops.sigreg(views, directions=directions, backend=backend)
        expected = expected + (1 - lambd) * (views - views[:2].mean(0)).square().mean()
        torch.testing.assert_close(op(views, backend, lambd), expected)
    listed = sslops.lejepa(list(views[:2]), [views[2], views[3:]], directions=directions, backend=backend)
    assert torch.equal(listed, op(views, backend))
    pair = sslops.lejepa(views[:2], directions=directions, lambd=0.0, backend=backend)
    torch.testing.assert_close(pair, (views[0] - views[1]).square().mean() / 4)
    assert sslops.lejepa(views.bfloat16(), backend=backend).dtype == torch.float32
    module = sslops.nn.LeJEPALoss(lambd=0.1, slices=70)
    torch.manual_seed(3)
    found = module(views[:2], views[2:], directions=directions)
    torch.testing.assert_close(found, op(views, None, 0.1))
    assert torch.equal(sslops.nn.SIGReg(knots=5)(views, directions=directions),
                       sslops.sigreg(views, directions=directions, knots=5))  # fmt: skip


def test_bad_input():
    z, directions = embeddings(6, 8), units(5, 8)

    def refused(error, argument, *args, op="sigreg", **kwargs):
        oracle.assert_refused(error, op, argument, lambda: getattr(sslops, op)(*args, **kwargs))

    refused(TypeError, "z", z.tolist())
    refused(TypeError, "z", z.long())
    refused(TypeError, "z", z.to_sparse())
    refused(ValueError, "z", z[0])
    for name, least in (("slices", 0), ("knots", 1)):
        refused(ValueError, name, z, **{name: least})
        refused(TypeError, name, z, **{name: 2.5})
    refused(ValueError, "knots", z, knots=130)
    for t_max in (0.0, -1.0, float("nan"), float("inf")):
        refused(ValueError, "t_max", z, t_max=t_max)
    refused(TypeError, "t_max", z, t_max="far")
    refused(TypeError, "directions", z, directions=directions.tolist())
    refused(TypeError, "directions", z, directions=directions.long())
    refused(ValueError, "directions", z, directions=directions[0])
    refused(ValueError, "directions", z, directions=directions[:, :7])
    refused(ValueError, "directions", z, directions=directions.to("meta"))
    refused(ValueError, "slices", z, directions=directions[:0])
    refused(TypeError, "generator", z, generator=3)
    refused(ValueError, "generator", z, directions=directions, generator=torch.Generator())
    refused(ValueError, "group", z, group="all")
    refused(ValueError, "backend", z, backend="tpu")
    with pytest.raises(RuntimeError, match=r"no torch\.float64 kernel"):
        sslops.sigreg(z.double(), backend="cpu")
    with pytest.raises(RuntimeError, match="sigreg has no cuda kernel"):
        sslops.sigreg(z, backend="cuda")
    for error, name, views in (
        (TypeError, "global_views", ([],)), (TypeError, "global_views", (z[0],)),
        (TypeError, "global_views", (z.long(),)), (ValueError, "global_views", ([z, z[1:]],)),
        (ValueError, "local_views", (z, z[:, 1:])), (ValueError, "local_views", (z, z.half())),
        (TypeError, "local_views", (z, 3)),
    ):  # fmt: skip
        refused(error, name, *views, op="lejepa")
    refused(ValueError, "global_views", z[None][:0], z, op="lejepa")
    refused(ValueError, "lambd", z, op="lejepa", lambd=1.5)


def test_lies_about_the_directions():
    """In direct calls: a key beside directions, or neither; directions that are not as many"""
    z, directions, key = embeddings(1, 6, 8), units(5, 8), torch.tensor(3)
    for given in ((directions, key, 5), (None, None, 5), (directions, None, 6), (None, key, 0)):
        x = Arguments(z, *given, 17, 3.0, "", backend="cpu")
        with pytest.raises(ValueError, match="sigreg: "):
            torch.ops.sslops.sigreg(*oracle.lowered(x))


class TestBrokenKernelsAreFound:
    def refuse(self, z=None):
        with pytest.raises(AssertionError, match=r"above|NaN|nan"):
            check(embeddings(2, 67, 20) if z is None else z, "cpu")

    def test_a_lost_row(self, monkeypatch):
        run = kernel.forward
        monkeypatch.setattr(kernel, "forward", lambda x, *rest: run(x._replace(z=x.z[:, 1:].contiguous()), *rest))
        self.refuse()

    def test_rounded_phases(self, monkeypatch):
        def rounded(x):
            return x._replace(directions=x.directions.bfloat16().float())

        run = kernel.forward
        monkeypatch.setattr(kernel, "forward", lambda x, *rest: run(rounded(x), *rest))
        self.refuse()

    def test_knots_a_little_apart(self, monkeypatch):
        run = kernel._step
        monkeypatch.setattr(kernel, "_step", lambda x: run(x) * (1 + 1e-5))
        self.refuse()

    def test_a_sloppy_gradient(self, monkeypatch):
        run = kernel.backward
        monkeypatch.setattr(kernel, "backward", lambda grad, x, *saved: run(grad * (1 + 1e-5), x, *saved))
        self.refuse()

    def test_unwritten_sums(self, monkeypatch):
        monkeypatch.setattr(_C, "sigreg_forward", lambda *arguments: None)
        with oracle.poisoned_memory():
            self.refuse()
