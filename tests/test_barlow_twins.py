import functools

import pytest
import torch

import sslops
from sslops.ops.barlow_twins import Arguments

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


def lowered(z_a, z_b, route: str, backend: str) -> list[object]:
    """As torch.ops.sslops takes them"""
    group, synced = "", True
    return oracle.lowered(Arguments(z_a, z_b, 0.01, 1e-5, route, group, synced, torch.float32, [True, True], backend))


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


@each_target
@each_route
def test_same_bits_every_run(device, backend, route):
    inputs = list(views(200, 700, device=device).values())
    first = oracle.evaluate(sslops.barlow_twins, inputs, backend, route=route)
    for _ in range(3):
        assert all(map(torch.equal, first, oracle.evaluate(sslops.barlow_twins, inputs, backend, route=route)))


@each_target
@each_route
def test_backward_twice_and_without_grad(device, backend, route):
    z_a, z_b = views(40, 60, device=device).values()
    z_a.requires_grad_()
    loss = sslops.barlow_twins(z_a, z_b, route=route, backend=backend)
    once, twice = (torch.autograd.grad(loss, z_a, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)
    with torch.no_grad():
        assert torch.equal(loss, sslops.barlow_twins(z_a, z_b, route=route, backend=backend))


@each_target
@each_route
def test_non_contiguous_and_nan(device, backend, route):
    inputs = views(32, 48, device=device)
    strided = {name: x.repeat(2, 2)[::2, 1:49] for name, x in inputs.items()}
    oracle.check(sslops.barlow_twins, strided, backend, route=route)
    inputs["z_a"][2, 2] = float("nan")
    assert sslops.barlow_twins(**inputs, route=route, backend=backend).isnan()


@each_target
@each_route
def test_opcheck(device, backend, route):
    z_a, z_b = (x.requires_grad_() for x in views(6, 8, device=device).values())
    arguments = lowered(z_a, z_b, route, backend)
    torch.library.opcheck(torch.ops.sslops.barlow_twins.default, arguments)
    with torch.no_grad():
        loss, *saved = torch.ops.sslops.barlow_twins(*arguments)
        detached = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        torch.library.opcheck(torch.ops.sslops.barlow_twins_backward.default, (loss, *detached, *saved))


@each_target
def test_compile(device, backend):
    oracle.assert_compiles(
        lambda a, b: sslops.barlow_twins(a * 2, b, backend=backend), *views(64, 128, device=device).values()
    )


@each_target
def test_second_derivative(device, backend):
    z_a, z_b = (x.requires_grad_() for x in views(6, 8, device=device).values())
    (gradient,) = torch.autograd.grad(sslops.barlow_twins(z_a, z_b, backend=backend), z_a, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='eager'"):
        gradient.sum().backward()


def test_memory_is_linear():
    """N = 128, D = 16384, where C alone is 1 GB: outputs, Grams and panels take a few N x D (8 MB each)."""
    grown = oracle.grown_memory(
        "z = [torch.randn(128, 16384, requires_grad=True) for _ in range(2)]",
        "sslops.barlow_twins(*z).backward()",
    )
    assert grown < 64, f"{grown:.0f} MB"


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
        for value in (-1.0, float("nan"), float("inf")):
            refused(ValueError, name, z_a, z_b, **{name: value})
        refused(TypeError, name, z_a, z_b, **{name: "much"})
    refused(ValueError, "eps", z_a, z_b, eps=0)
    refused(ValueError, "route", z_a, z_b, route="scenic")
    refused(ValueError, "backend", z_a, z_b, backend="tpu")


def test_bad_input_to_the_registered_op():
    z_a, z_b = views(4, 8).values()
    arguments = lowered(z_a, z_b, "gram", "cpu")
    loss, diagonal, kept, gathered = torch.ops.sslops.barlow_twins(*arguments)
    with pytest.raises(ValueError, match="barlow_twins: z_b"):
        torch.ops.sslops.barlow_twins(z_a, z_b[:3], *arguments[2:])
    for bad in ((loss[None], diagonal, kept), (loss, diagonal[1:], kept), (loss, diagonal, kept[:1])):
        with pytest.raises(ValueError, match=r"barlow_twins: (grad|diagonal|kept)"):
            torch.ops.sslops.barlow_twins_backward(bad[0], *arguments, *bad[1:], gathered)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    for route in ("gram", "panels"):
        oracle.check(sslops.barlow_twins, views(70, 90, dtype=dtype), "cpu", route=route)


@each_target
@each_route
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_under_another_default_dtype(device, backend, route, default):
    inputs = list(views(40, 60, device=device).values())
    expected = oracle.evaluate(sslops.barlow_twins, inputs, backend, route=route)
    torch.set_default_dtype(default)
    try:
        assert all(map(torch.equal, expected, oracle.evaluate(sslops.barlow_twins, inputs, backend, route=route)))
    finally:
        torch.set_default_dtype(torch.float32)


@each_target
@each_route
@pytest.mark.parametrize("dtype", DTYPES)
def test_spiky_columns(device, backend, route, dtype):
    """A few rows hold most of a column: its normalised entries are large, and rounding them would show."""
    inputs = views(128, 300, dtype=dtype, device=device)
    for z in inputs.values():
        z[2:] *= 0.01
    oracle.check(sslops.barlow_twins, inputs, backend, route=route)


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


def test_export_with_a_dynamic_batch():
    module = sslops.nn.BarlowTwinsLoss()
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
        found.append(oracle.evaluate(sslops.barlow_twins, inputs, "cpu", route=route))
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))
