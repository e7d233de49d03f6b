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


def test_the_way_by_gram_matrices_is_taken_where_it_keeps_its_digits():
    from sslops.kernels.cpu import vicreg as kernel

    def by_panels(z_a, z_b):
        _, moments, _ = kernel.forward(Arguments(z_a, z_b, 25.0, 25.0, 1.0, 1e-4, "gram", "", needs_grad=[True, True]))
        return (moments[:, 2] < 0).all(1).tolist()

    inputs = views(64, 200)
    assert by_panels(**inputs) == [False, False]
    inputs["z_a"][:, 3:7] *= 1000
    assert by_panels(**inputs) == [True, False]


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
