import functools

import pytest
import torch

import sslops

from . import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUTES = ("gram", "panels")
each_target = pytest.mark.parametrize(("device", "backend"), oracle.targets("barlow_twins"))
each_route = pytest.mark.parametrize("route", ROUTES)


def views(n: int, d: int, *, dtype=torch.float32, device="cpu", noise: float = 1.0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(n * 1000 + d)
    z_a = torch.randn(n, d, generator=g)
    z_b = z_a + noise * torch.randn(n, d, generator=g)
    return {"z_a": (z_a * 3 + 1).to(device, dtype), "z_b": z_b.to(device, dtype)}


@each_target
@each_route
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(8, 5), (7, 33), (64, 200), (100, 64), (256, 700), (700, 257), (129, 1100)])
def test_accuracy(device, backend, route, dtype, n, d):
    with oracle.poisoned_memory():
        oracle.check(sslops.barlow_twins, views(n, d, dtype=dtype, device=device), backend, route=route, lambd=0.01)


@each_target
@each_route
@pytest.mark.parametrize("dtype", DTYPES)
def test_trained(device, backend, route, dtype):
    """C near the identity: the loss and its gradient are what is left of terms that cancel."""
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(512, 64, generator=g)).Q  # uncorrelated columns; or, for the other route, rows
    basis = basis.t() if route == "gram" else basis
    inputs = {name: (basis + 1e-3 * torch.randn(basis.shape, generator=g)).to(device, dtype) for name in ("z_a", "z_b")}
    oracle.check(sslops.barlow_twins, inputs, backend, route=route)


@each_target
@each_route
def test_collapsed_columns(device, backend, route):
    """Constant columns have no variance: their gradient is divided by sqrt(eps), and is finite."""
    inputs = views(64, 40, device=device)
    inputs["z_a"][:, 3] = 0.5
    inputs["z_b"][:, 3] = -2.0
    inputs["z_b"][:, 7] = 1.0
    oracle.check(sslops.barlow_twins, inputs, backend, route=route)


@each_target
@each_route
@pytest.mark.parametrize("offset", [1e3, 1e5])
def test_large_means(device, backend, route, offset):
    inputs = {name: x + offset for name, x in views(128, 48, device=device).items()}
    oracle.check(sslops.barlow_twins, inputs, backend, route=route)


@each_target
@each_route
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, backend, route, dtype):
    oracle.check(
        sslops.barlow_twins, views(96, 80, device=device), backend, dtype=dtype, route=route,
        context=lambda: torch.autocast(device, dtype),
    )  # fmt: skip


@each_target
@each_route
def test_scale_and_eps(device, backend, route):
    inputs = {name: x * 1e-2 for name, x in views(50, 40, device=device).items()}
    oracle.check(functools.partial(sslops.barlow_twins, scale=0.025), inputs, backend, route=route, eps=1e-3)


def test_against_the_formula():
    z_a, z_b = (x.double() for x in views(9, 4).values())
    a, b = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (z_a, z_b))
    expected = 0.0
    for i in range(4):
        for j in range(4):
            c = float((a[:, i] * b[:, j]).sum() / 9)
            expected += (1 - c) ** 2 if i == j else 0.3 * c**2
    torch.testing.assert_close(sslops.barlow_twins(z_a, z_b, lambd=0.3).item(), expected)


def test_gradients_of_the_reference():
    inputs = [x.double().requires_grad_() for x in views(6, 3).values()]
    assert torch.autograd.gradcheck(sslops.barlow_twins, inputs)
    assert torch.autograd.gradgradcheck(sslops.barlow_twins, inputs)


@pytest.mark.parametrize(("n", "d", "route"), [(64, 65, "gram"), (64, 64, "panels"), (256, 8192, "gram")])
def test_route_by_cost(n, d, route):
    from sslops.ops import barlow_twins as module

    assert module.cheaper_route(n, d) == route
    assert f"route   {route}" in sslops.explain("barlow_twins", torch.empty(n, d))


def test_bad_input():
    z_a, z_b = views(4, 8).values()

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "barlow_twins", argument, lambda: sslops.barlow_twins(*args, **kwargs))

    refused(ValueError, "z_b", z_a, z_b[:3])
    refused(ValueError, "z_b", z_a, z_b.double())
    refused(ValueError, "z_a", z_a[0], z_b[0])
    refused(ValueError, "z_a", z_a[:1], z_b[:1])
    refused(TypeError, "z_a", z_a.int(), z_b.int())
    for name in ("lambd", "scale", "eps"):
        for value in (-1.0, float("nan"), float("inf"), 10**400):
            refused(ValueError, name, z_a, z_b, **{name: value})
        refused(TypeError, name, z_a, z_b, **{name: "much"})
    refused(ValueError, "eps", z_a, z_b, eps=0)
    refused(ValueError, "route", z_a, z_b, route="scenic")
    refused(ValueError, "backend", z_a, z_b, backend="tpu")
    assert sslops.barlow_twins(z_a, z_b, scale=10**30).isfinite()


@each_target
@each_route
@pytest.mark.parametrize("dtype", DTYPES)
def test_spiky_columns(device, backend, route, dtype):
    """A few rows hold most of a column: its normalised entries are large, and rounding them would show."""
    inputs = views(128, 300, dtype=dtype, device=device)
    for z in inputs.values():
        z[2:] *= 0.01
    oracle.check(sslops.barlow_twins, inputs, backend, route=route)


@each_route
def test_one_row(isa, route):
    """It holds every column: one number of a Gram matrix, a sum of D like squares, has the digits of the loss."""
    inputs = views(64, 300)
    for z in inputs.values():
        z[1:] *= 0.01
        z[0] = z[0].sign()
    oracle.check(sslops.barlow_twins, inputs, "cpu", route=route)


@each_target
@each_route
@pytest.mark.parametrize(("n", "live"), [(64, 10), (64, 32), (256, 64)])
def test_few_live_columns(device, backend, route, n, live):
    """The other columns are constant, and C is the identity on the live ones: nearly nothing off the diagonal."""
    basis = torch.linalg.qr(torch.randn(n, live, generator=torch.Generator().manual_seed(0))).Q
    inputs = {}
    for k, name in enumerate(("z_a", "z_b")):
        z = torch.full((n, 1000), 0.5)
        z[:, :live] = basis + 1e-3 * torch.randn(n, live, generator=torch.Generator().manual_seed(k + 1))
        inputs[name] = z.to(device)
    oracle.check(sslops.barlow_twins, inputs, backend, route=route)
