"""What the losses on columns have alike, on batches that cross tiles (test_promises.py has smaller ones)."""

import pytest
import torch

import sslops

from . import oracle, test_barlow_twins, test_vicreg

VIEWS = {"barlow_twins": test_barlow_twins.views, "vicreg": test_vicreg.views}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_target = pytest.mark.parametrize(
    ("op", "device", "backend"), [(op, *target) for op in VIEWS for target in oracle.targets(op)]
)
each_op = pytest.mark.parametrize("op", VIEWS)
each_route = pytest.mark.parametrize("route", ["gram", "panels"])


def evaluate(op, backend, route, *shape, **options):
    return oracle.evaluate(getattr(sslops, op), list(VIEWS[op](*shape, **options).values()), backend, route=route)


@each_target
@each_route
def test_same_bits_every_run(device, backend, op, route):
    first = evaluate(op, backend, route, 200, 700, device=device)
    for _ in range(3):
        assert all(map(torch.equal, first, evaluate(op, backend, route, 200, 700, device=device)))


@each_op
@pytest.mark.parametrize("dtype", DTYPES)
@each_route
def test_same_bits_for_any_number_of_threads(op, isa, route, dtype):
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(evaluate(op, "cpu", route, 150, 300, dtype=dtype))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@each_target
@each_route
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_under_another_default_dtype(device, backend, op, route, default):
    expected = evaluate(op, backend, route, 40, 60, device=device)
    inputs = list(VIEWS[op](40, 60, device=device).values())
    torch.set_default_dtype(default)
    try:
        assert all(map(torch.equal, expected, oracle.evaluate(getattr(sslops, op), inputs, backend, route=route)))
    finally:
        torch.set_default_dtype(torch.float32)


@each_op
@pytest.mark.parametrize("dtype", DTYPES)
@each_route
def test_every_instruction_set(op, isa, dtype, route):
    oracle.check(getattr(sslops, op), VIEWS[op](70, 90, dtype=dtype), "cpu", route=route)


@each_target
@each_route
@pytest.mark.parametrize("learns", [0, 1])
def test_backward_twice_and_without_grad(device, backend, op, route, learns):
    z = list(VIEWS[op](40, 60, device=device).values())
    z[learns].requires_grad_()
    loss = getattr(sslops, op)(*z, route=route, backend=backend)
    once, twice = (torch.autograd.grad(loss, z[learns], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)
    with torch.no_grad():
        assert torch.equal(loss, getattr(sslops, op)(*z, route=route, backend=backend))


@each_target
@each_route
def test_non_contiguous_and_nan(device, backend, op, route):
    inputs, run = VIEWS[op](32, 48, device=device), getattr(sslops, op)
    strided = {name: x.repeat(2, 2)[::2, 1:49] for name, x in inputs.items()}
    oracle.check(run, strided, backend, route=route)
    inputs["z_a"][2, 2] = float("nan")
    assert run(**inputs, route=route, backend=backend).isnan()


@each_op
def test_memory_is_linear(op):
    """N = 128, D = 16384, where one [D, D] matrix is 1 GB: all there is takes a few N x D (8 MB each)."""
    grown = oracle.grown_memory(
        "z = [torch.randn(128, 16384, requires_grad=True) for _ in range(2)]", f"sslops.{op}(*z).backward()"
    )
    assert grown < 64, f"{grown:.0f} MB"


@each_op
def test_export_with_a_dynamic_batch(op):
    module = {"barlow_twins": sslops.nn.BarlowTwinsLoss, "vicreg": sslops.nn.VICRegLoss}[op]()
    rows = torch.export.Dim("rows", min=2, max=4096)
    exported = torch.export.export(
        module, tuple(VIEWS[op](8, 12).values()), dynamic_shapes=(({0: rows}, {0: rows}),)
    ).module()
    for n in (5, 40):  # one route and the other
        inputs = tuple(VIEWS[op](n, 12).values())
        assert torch.equal(exported(*inputs), module(*inputs))
