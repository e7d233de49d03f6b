import functools

import pytest
import torch
import torch.nn.functional as F

import sslops
from sslops.ops.vicreg import Arguments

from . import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_target = pytest.mark.parametrize(("device", "backend"), oracle.targets("vicreg"))
each_route = pytest.mark.parametrize("route", ["gram", "panels"])


def views(n: int, d: int, *, dtype=torch.float32, device="cpu", size: float = 0.7) -> dict[str, torch.Tensor]:
    """Columns with standard deviations on both sides of the hinge."""
    g = torch.Generator().manual_seed(n * 1000 + d)
    z_a = torch.randn(n, d, generator=g) * torch.linspace(0.3, 2, d)
    z_b = z_a + 0.3 * torch.randn(n, d, generator=g)
    return {"z_a": (size * z_a + 1).to(device, dtype), "z_b": (size * z_b).to(device, dtype)}


def lowered(z_a, z_b, route: str, backend: str) -> list[object]:
    """As torch.ops.sslops takes them"""
    rest = (route, "", torch.float32, [True, z_b is not None], backend)
    return oracle.lowered(Arguments(z_a, z_b, 25.0, 25.0, 1.0, 1e-4, *rest))


@each_target
@each_route
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(8, 5), (7, 33), (64, 200), (100, 64), (256, 700), (700, 257), (129, 1100)])
def test_accuracy(device, backend, route, dtype, n, d):
    with oracle.poisoned_memory():
        oracle.check(sslops.vicreg, views(n, d, dtype=dtype, device=device), backend, route=route)


@each_target
@each_route
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_view(device, backend, route, dtype):
    z = {"z_a": views(64, 100, dtype=dtype, device=device)["z_a"]}
    oracle.check(sslops.vicreg, z, backend, route=route)


@each_target
@each_route
@pytest.mark.parametrize("only", ["invariance", "variance", "covariance"])
def test_each_term(device, backend, route, only):
    weights = {name: float(name == only) for name in ("invariance", "variance", "covariance")}
    oracle.check(functools.partial(sslops.vicreg, **weights), views(64, 100, device=device), backend, route=route)


@each_target
@each_route
@pytest.mark.parametrize("n", [64, 300])
def test_unequal_variances(device, backend, route, n):
    """Four columns of standard deviation 100: the off-diagonal part is a small share of what a Gram matrix knows."""
    if (route, backend) == ("gram", "triton"):
        pytest.skip("a GPU is not waited for to find out; its default is panels")
    inputs = views(n, 200, device=device, size=0.1)
    for z in inputs.values():
        z[:, 3:7] *= 1000
    oracle.check(functools.partial(sslops.vicreg, invariance=0.0), inputs, backend, route=route)


@each_target
@each_route
def test_trained(device, backend, route):
    """Uncorrelated columns of standard deviation 1, as far as the rank lets them be."""
    shape = (64, 80) if route == "gram" else (512, 64)
    basis = torch.linalg.qr(torch.randn(512, 512, generator=torch.Generator().manual_seed(0))).Q
    inputs = {name: (basis[: shape[0], : shape[1]] * 22 + 0.01 * k).to(device) for k, name in enumerate(("z_a", "z_b"))}
    oracle.check(sslops.vicreg, inputs, backend, route=route)


@each_target
@each_route
def test_collapsed_columns(device, backend, route):
    inputs = views(64, 40, device=device)
    for z in inputs.values():
        z[:, 3] = 0.5
    oracle.check(sslops.vicreg, inputs, backend, route=route)


@each_target
@each_route
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, backend, route, dtype):
    oracle.check(
        sslops.vicreg, views(96, 80, device=device), backend, dtype=dtype, route=route,
        context=lambda: torch.autocast(device, dtype),
    )  # fmt: skip


def test_against_the_formula():
    z_a, z_b = (z.double() for z in views(9, 4).values())
    expected = 25 * F.mse_loss(z_a, z_b).item()
    for z in (z_a, z_b):
        for i in range(4):
            expected += 12.5 / 4 * max(0.0, 1 - float((z[:, i].var() + 1e-4).sqrt()))
            for j in range(4):
                cov = float(((z[:, i] - z[:, i].mean()) * (z[:, j] - z[:, j].mean())).sum() / 8)
                expected += (i != j) * cov**2 / 4
    torch.testing.assert_close(sslops.vicreg(z_a, z_b).item(), expected)
    alone = sslops.vicreg(z_a) + sslops.vicreg(z_b) + 25 * F.mse_loss(z_a, z_b)
    torch.testing.assert_close(alone.item(), expected)


def test_gradients_of_the_reference():
    inputs = [z.double().requires_grad_() for z in views(6, 3).values()]
    assert torch.autograd.gradcheck(sslops.vicreg, inputs)
    assert torch.autograd.gradgradcheck(sslops.vicreg, inputs)


@each_target
@each_route
def test_same_bits_every_run(device, backend, route):
    inputs = list(views(200, 700, device=device).values())
    first = oracle.evaluate(sslops.vicreg, inputs, backend, route=route)
    for _ in range(3):
        assert all(map(torch.equal, first, oracle.evaluate(sslops.vicreg, inputs, backend, route=route)))


@each_target
@each_route
def test_backward_twice_and_without_grad(device, backend, route):
    z_a, z_b = views(40, 60, device=device).values()
    z_b.requires_grad_()
    loss = sslops.vicreg(z_a, z_b, route=route, backend=backend)
    once, twice = (torch.autograd.grad(loss, z_b, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)
    with torch.no_grad():
        assert torch.equal(loss, sslops.vicreg(z_a, z_b, route=route, backend=backend))


@each_target
@each_route
def test_non_contiguous_and_nan(device, backend, route):
    inputs = views(32, 48, device=device)
    strided = {name: x.repeat(2, 2)[::2, 1:49] for name, x in inputs.items()}
    oracle.check(sslops.vicreg, strided, backend, route=route)
    inputs["z_a"][2, 2] = float("nan")
    assert sslops.vicreg(**inputs, route=route, backend=backend).isnan()


@each_target
@each_route
@pytest.mark.parametrize("both", [True, False])
def test_opcheck(device, backend, route, both):
    z_a, z_b = (z.requires_grad_() for z in views(6, 8, device=device).values())
    arguments = lowered(z_a, z_b if both else None, route, backend)
    torch.library.opcheck(torch.ops.sslops.vicreg.default, arguments)
    with torch.no_grad():
        loss, *saved = torch.ops.sslops.vicreg(*arguments)
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        torch.library.opcheck(torch.ops.sslops.vicreg_backward.default, (loss, *detached, *saved))


@each_target
def test_compile(device, backend):
    oracle.assert_compiles(
        lambda a, b: sslops.vicreg(a * 2, b, backend=backend), *views(64, 128, device=device).values()
    )


@each_target
def test_second_derivative(device, backend):
    z_a, z_b = (z.requires_grad_() for z in views(6, 8, device=device).values())
    (gradient,) = torch.autograd.grad(sslops.vicreg(z_a, z_b, backend=backend), z_a, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='eager'"):
        gradient.sum().backward()


def test_memory_is_linear():
    """N = 128, D = 16384, where one covariance matrix is 1 GB: all there is takes a few N x D (8 MB each)."""
    grown = oracle.grown_memory(
        "z = [torch.randn(128, 16384, requires_grad=True) for _ in range(2)]",
        "sslops.vicreg(*z).backward()",
    )
    assert grown < 64, f"{grown:.0f} MB"


def test_bad_input():
    z_a, z_b = views(4, 8).values()

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "vicreg", argument, lambda: sslops.vicreg(*args, **kwargs))

    refused(ValueError, "z_b", z_a, z_b[:3])
    refused(ValueError, "z_b", z_a, z_b.double())
    refused(ValueError, "z_a", z_a[0])
    refused(ValueError, "z_a", z_a[:1], z_b[:1])
    refused(TypeError, "z_a", z_a.int())
    for name in ("invariance", "variance", "covariance", "eps"):
        for value in (-1.0, float("nan"), float("inf")):
            refused(ValueError, name, z_a, z_b, **{name: value})
        refused(TypeError, name, z_a, z_b, **{name: "much"})
    refused(ValueError, "route", z_a, z_b, route="scenic")
    refused(ValueError, "backend", z_a, z_b, backend="tpu")


def test_bad_input_to_the_registered_op():
    z_a, z_b = views(4, 8).values()
    arguments = lowered(z_a, z_b, "gram", "cpu")
    loss, moments, kept, gathered = torch.ops.sslops.vicreg(*arguments)
    with pytest.raises(ValueError, match="vicreg: z_b"):
        torch.ops.sslops.vicreg(z_a, z_b[:3], *arguments[2:])
    for bad in ((loss[None], moments, kept), (loss, moments[1:], kept), (loss, moments, kept[:1])):
        with pytest.raises(ValueError, match=r"vicreg: (grad|moments|kept)"):
            torch.ops.sslops.vicreg_backward(bad[0], *arguments, *bad[1:], gathered)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for route in ("gram", "panels"):
        oracle.check(sslops.vicreg, views(70, 90, dtype=dtype), "cpu", route=route)


@each_target
@each_route
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_under_another_default_dtype(device, backend, route, default):
    inputs = list(views(40, 60, device=device).values())
    expected = oracle.evaluate(sslops.vicreg, inputs, backend, route=route)
    torch.set_default_dtype(default)
    try:
        assert all(map(torch.equal, expected, oracle.evaluate(sslops.vicreg, inputs, backend, route=route)))
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_way_by_gram_matrices_is_taken_where_it_keeps_its_digits(monkeypatch):
    from sslops.kernels.cpu import vicreg as kernel

    by_panels, calls = kernel._panels, []
    monkeypatch.setattr(kernel, "_panels", lambda *args: calls.append(args) or by_panels(*args))
    inputs = views(64, 200)
    oracle.evaluate(sslops.vicreg, list(inputs.values()), "cpu", route="gram")
    assert not calls
    inputs["z_a"][:, 3:7] *= 1000
    oracle.evaluate(sslops.vicreg, list(inputs.values()), "cpu", route="gram")
    assert len(calls) == 2  # forward and backward of the one view


@each_target
@each_route
def test_a_tie_at_the_hinge(device, backend, route):
    z = {"z_a": torch.tensor([[-1.0, 2.0], [0.0, 0.5], [1.0, 1.0]], device=device)}
    oracle.check(functools.partial(sslops.vicreg, eps=0.0), z, backend, route=route)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("route", ["gram", "panels"])
@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_constant_column_without_eps(backend, route, value):
    """Its standard deviation is 0, where the root has no slope: the hinge pushes it nowhere."""
    inputs = views(40, 12)
    for z in inputs.values():
        z[:, 5] = value
    options = {"eps": 0.0, "route": route, "invariance": 0.0}
    loss, *gradients = oracle.evaluate(sslops.vicreg, list(inputs.values()), backend, **options)
    truth, *_ = oracle.evaluate(sslops.vicreg, list(inputs.values()), "eager", torch.float64, **options)
    assert max(oracle.errors(loss, truth)) < oracle.FLOORS[torch.float32]
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert not gradient[:, 5].any()
        assert gradient.any(0).sum() == 11


@each_target
@each_route
@pytest.mark.parametrize("which", ["fused", "eager"])
def test_collapsed_views(device, backend, route, which):
    """A row and 1e-4 of noise, where the hinge is at work: to the digits that the rounded inputs leave."""
    g = torch.Generator().manual_seed(3)
    row = torch.randn(60, generator=g)
    z = [(row + 1e-4 * torch.randn(100, 60, generator=g)).to(device) for _ in range(2)]
    backend = backend if which == "fused" else "eager"
    truth = oracle.evaluate(sslops.vicreg, z, "eager", torch.float64, route=route)
    for got, exact in zip(oracle.evaluate(sslops.vicreg, z, backend, route=route), truth, strict=True):
        assert max(oracle.errors(got, exact)) < 1e-6


@pytest.mark.parametrize("n", [2, 257])
def test_the_distance_of_views(n):
    """Its squares are summed in double: the loss has no error but that of its rounding."""
    inputs = [x * 100 for x in views(n, 513).values()]
    weights = {"variance": 0.0, "covariance": 0.0}
    got, truth = (sslops.vicreg(*(x.to(t) for x in inputs), **weights) for t in (torch.float32, torch.float64))
    assert float((got.double() - truth) / truth) == pytest.approx(0, abs=6e-8)


def test_export_with_a_dynamic_batch():
    module = sslops.nn.VICRegLoss()
    rows = torch.export.Dim("rows", min=2, max=4096)
    exported = torch.export.export(
        module, tuple(views(8, 12).values()), dynamic_shapes=(({0: rows}, {0: rows}),)
    ).module()
    for n in (5, 40):  # one route and the other
        inputs = tuple(views(n, 12).values())
        assert torch.equal(exported(*inputs), module(*inputs))


@pytest.mark.parametrize("dtype", DTYPES)
@each_route
def test_same_bits_for_any_number_of_threads(isa, route, dtype):
    inputs, threads, found = list(views(150, 300, dtype=dtype).values()), torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(oracle.evaluate(sslops.vicreg, inputs, "cpu", route=route))
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))
