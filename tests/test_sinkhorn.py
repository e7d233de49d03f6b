import pytest
import torch
import torch.nn.functional as F

import sslops
from benchmarks.bench_sinkhorn import matrix
from sslops import _C
from sslops.kernels.cpu import sinkhorn as kernel
from sslops.ops.sinkhorn import Arguments

from . import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = oracle.targets("sinkhorn")
each_target = pytest.mark.parametrize(("device", "backend"), TARGETS)


def scores(*shape, scale: float = 0.0, dtype=torch.float32, device="cpu"):
    """Cosines of unit rows with unit prototypes, or logits of that standard deviation"""
    g = torch.Generator().manual_seed(sum(shape))
    if scale:
        return (scale * torch.randn(*shape, generator=g)).to(device, dtype)
    rows, prototypes = torch.randn(*shape[:-1], 24, generator=g), torch.randn(shape[-1], 24, generator=g)
    return (F.normalize(rows, dim=-1) @ F.normalize(prototypes, dim=-1).t()).to(device, dtype)


def accurate(x, backend, **options):
    def answers(draw):
        values = ((draw[0], backend), (draw[0], "eager"), (draw[0].double(), "eager"))
        return [[sslops.sinkhorn(x, backend=each, **options)] for x, each in values]

    oracle.assert_promise(["b"], answers, [x], torch.float32)


@pytest.mark.parametrize("scale", [0.0, 6.0])
def test_against_the_matrix(scale):
    """Bounded scores, and wide ones, whose exp float64 just holds: b says the same, at every number of iterations."""
    x = scores(70, 33, scale=scale).double()
    assert (x / 0.05).exp().isfinite().all()
    assert (x / 0.05).float().exp().isfinite().all() == (scale == 0)
    for iterations in (1, 2, 3, 10):
        b = sslops.sinkhorn(x, iterations=iterations)
        torch.testing.assert_close((x / 0.05 + b).softmax(1), matrix(x, iterations=iterations), rtol=1e-12, atol=1e-14)


def test_from_probabilities_against_the_matrix():
    p = (scores(70, 33).double() / 0.05).softmax(1)
    b = sslops.sinkhorn(p.log(), temperature=1.0, start="probabilities")
    torch.testing.assert_close((p.log() + b).softmax(1), matrix(p.log(), 1.0), rtol=1e-12, atol=1e-14)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("start", ["scores", "probabilities"])
@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (7, 130), (64, 3000), (67, 2049), (530, 257), (2, 33, 4100)])
def test_accuracy(device, backend, dtype, start, shape):
    with oracle.poisoned_memory():
        accurate(scores(*shape, dtype=dtype, device=device), backend, start=start)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(130, 3001), (33, 40000)])
def test_every_instruction_set(isa, dtype, shape):
    with oracle.poisoned_memory():
        accurate(scores(*shape, dtype=dtype), "cpu", temperature=0.07)


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize(("shape", "k"), [((1, 3), 1), ((600, 12), 1100), ((2, 300, 7), 50), ((0, 3), 5), ((4, 0), 5)])
def test_of_features(device, backend, dtype, unit, shape, k):
    """In chunks of rows, which may be more than one"""
    g = torch.Generator().manual_seed(k)
    x = F.normalize(torch.randn(shape, generator=g), dim=-1).to(device, dtype)
    prototypes = torch.randn(k, shape[-1], generator=g).to(device, dtype)

    def answers(draw):
        values = ((draw, backend), (draw, "eager"), ([x.double() for x in draw], "eager"))
        options = {"unit_prototypes": unit, "temperature": 0.5}
        return [[sslops.sinkhorn(x, prototypes=w, backend=each, **options)] for (x, w), each in values]

    with oracle.poisoned_memory():
        oracle.assert_promise(["b"], answers, [x, prototypes], dtype)


@each_target
@pytest.mark.parametrize("scale", [1.0, 20.0, 1e4])
def test_wide_scores(device, backend, scale):
    """Where exp(scores / temperature) overflows, and the samples' best scores are far apart"""
    x = scores(130, 3000, scale=scale, device=device)
    assert not matrix(x.cpu().double()).isfinite().all() or scale == 1
    accurate(x, backend)
    b = sslops.sinkhorn(x, backend=backend)
    assert b.isfinite().all()


@each_target
def test_a_shift_of_each_sample_would_be_another_assignment(device, backend):
    """It cancels only after infinitely many iterations."""
    x = scores(40, 60, scale=2.0, device=device)
    exact = (x.double() / 0.05 + sslops.sinkhorn(x.double())).softmax(1)
    shifted = x - x.amax(1, keepdim=True)
    for values, close in ((x, True), (shifted, False)):
        q = (x / 0.05 + sslops.sinkhorn(values, backend=backend)).softmax(1)
        variation = (q - exact).abs().sum(1).max() / 2
        assert (variation < 1e-4) == close
        assert close or variation > 0.1


@each_target
def test_a_tensor_of_one_view_or_more(device, backend):
    x = scores(3, 40, 70, device=device)
    b = sslops.sinkhorn(x, backend=backend)
    assert b.shape == (3, 70)
    assert all(torch.equal(b[v], sslops.sinkhorn(x[v], backend=backend)) for v in range(3))
    strided = x.repeat_interleave(2, 2)[..., ::2]
    assert torch.equal(sslops.sinkhorn(strided, backend=backend), b)


@each_target
@pytest.mark.parametrize("shape", [(300, 3000), (40, 40000)])
def test_same_bits_on_any_number_of_threads(device, backend, shape):
    x, before = scores(*shape, device=device), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            found.append(sslops.sinkhorn(x, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], b) for b in found)


@each_target
def test_temperature_as_a_tensor(device, backend):
    x = scores(40, 70, device=device)
    tau = torch.tensor(0.07, device=device)
    torch.testing.assert_close(
        sslops.sinkhorn(x, temperature=tau, backend=backend), sslops.sinkhorn(x, temperature=0.07, backend=backend)
    )
    for bad in (0.0, -1.0, float("nan")):
        assert sslops.sinkhorn(x, temperature=torch.tensor(bad, device=device), backend=backend).isnan().all()


@each_target
def test_no_gradient(device, backend):
    x = scores(6, 9, device=device).requires_grad_()
    assert not sslops.sinkhorn(x, backend=backend).requires_grad


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_empty_and_not_finite(backend):
    assert torch.equal(sslops.sinkhorn(torch.zeros(0, 4), backend=backend), torch.zeros(4))
    assert sslops.sinkhorn(torch.zeros(0, 3, 4), backend=backend).shape == (0, 4)
    x = scores(40, 70)
    x[3, 2] = float("nan")
    assert sslops.sinkhorn(x, backend=backend).isnan().all()
    for k in (1, 5, 16):  # a row that is wholly at -inf has no softmax
        x = torch.full((1, k), -torch.inf)
        assert sslops.sinkhorn(x, start="probabilities", backend=backend).isnan().all()


def test_mass_below_the_range_leaves_b():
    """From probabilities, a prototype that no row gives any"""
    x = torch.tensor([[0.0, -1000.0], [0.0, -1000.0]])
    for backend in ("cpu", "eager"):
        b = sslops.sinkhorn(x, temperature=1.0, start="probabilities", backend=backend)
        torch.testing.assert_close(b[1] - b[0], 3 * torch.tensor(2.0).log())


@each_target
def test_opcheck(device, backend):
    for temperature in (0.05, torch.tensor(0.05, device=device)):
        x = Arguments(scores(2, 6, 9, device=device), None, False, temperature, 3, True, "", backend=backend)
        torch.library.opcheck(torch.ops.sslops.sinkhorn.default, oracle.lowered(x))


@each_target
def test_compile(device, backend):
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: sslops.sinkhorn(x * 2, backend=backend), fullgraph=True, backend=graphs)
    for rows in (20, 31, 7):
        x = scores(rows, 9, device=device)
        assert torch.equal(compiled(x), sslops.sinkhorn(x * 2, backend=backend))
    assert graphs.frame_count <= 2


def test_memory():
    """A sixteenth of the scores and a few rows"""
    grown = oracle.grown_memory(
        "x = torch.randn(512, 65536) * 0.1; sslops.sinkhorn(x[:40, :3000].contiguous())", "sslops.sinkhorn(x)"
    )
    assert grown < 128 / 16 + 4, f"{grown:.0f} MB of 128"


def test_bad_input():
    x = scores(4, 8)

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "sinkhorn", argument, lambda: sslops.sinkhorn(*args, **kwargs))

    refused(ValueError, "scores", x[0])
    refused(ValueError, "scores", x[None, None])
    refused(ValueError, "scores", x[:, :0])
    refused(TypeError, "scores", x.int())
    refused(TypeError, "scores", x.tolist())
    refused(TypeError, "scores", x.to_sparse())
    for temperature in (0, -1.0, float("nan"), float("inf")):
        refused(ValueError, "temperature", x, temperature=temperature)
    refused(ValueError, "temperature", x, temperature=torch.ones(2))
    refused(TypeError, "temperature", x, temperature="warm")
    refused(ValueError, "iterations", x, iterations=0)
    refused(TypeError, "iterations", x, iterations=1.5)
    refused(ValueError, "start", x, start="rows")
    refused(ValueError, "prototypes", x, prototypes=torch.ones(5, x.shape[1] + 1))
    refused(ValueError, "prototypes", x, prototypes=x[:0])
    refused(TypeError, "unit_prototypes", x, prototypes=x, unit_prototypes=1)
    refused(ValueError, "group", x, group="all")
    refused(ValueError, "backend", x, backend="tpu")
    with pytest.raises(ValueError, match="sinkhorn: ranks: wanted the name of a process group, got 'nonsense'"):
        torch.ops.sslops.sinkhorn(x[None], None, False, None, 0.1, 3, True, "nonsense", torch.float32, "cpu")
    with pytest.raises(RuntimeError, match=r"no torch\.float64 kernel"):
        sslops.sinkhorn(x.double(), backend="cpu")
    with pytest.raises(RuntimeError, match="sinkhorn has no cuda kernel"):
        sslops.sinkhorn(x, backend="cuda")
    assert "sinkhorn has no cuda kernel" in sslops.explain("sinkhorn", x)


class TestBrokenKernelsAreFound:
    def refuse(self, x, **options):
        with pytest.raises(AssertionError, match=r"above|NaN|nan"):
            accurate(x, "cpu", **options)

    def plant(self, monkeypatch, fault):
        run = kernel.forward
        monkeypatch.setattr(kernel, "forward", lambda x, potentials: run(fault(x), potentials))

    def test_a_lost_row(self, monkeypatch):
        self.plant(monkeypatch, lambda x: x._replace(scores=x.scores[:, 1:].contiguous()))
        self.refuse(scores(300, 40))

    def test_a_sloppy_temperature(self, monkeypatch):
        self.plant(monkeypatch, lambda x: x._replace(temperature=x.temperature * (1 + 1e-4)))
        self.refuse(scores(300, 40))

    def test_a_lost_pass(self, monkeypatch):
        self.plant(monkeypatch, lambda x: x._replace(iterations=x.iterations - 1))
        self.refuse(scores(300, 40))

    def test_unwritten_memory(self, monkeypatch):
        monkeypatch.setattr(_C, "sinkhorn_potentials", lambda *arguments: None)
        with oracle.poisoned_memory():
            self.refuse(scores(300, 40))
