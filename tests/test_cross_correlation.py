import pytest
import torch

import sslops
from sslops.ops.cross_correlation import Arguments

from . import oracle

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_target = pytest.mark.parametrize(("device", "backend"), oracle.targets("cross_correlation"))


def views(n: int, d: int, *, dtype=torch.float32, device="cpu") -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(n * 1000 + d)
    z_a = torch.randn(n, d, generator=g)
    z_b = z_a + torch.randn(n, d, generator=g)
    return {"z_a": (z_a * 3 + 1).to(device, dtype), "z_b": z_b.to(device, dtype)}


@each_target
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(7, 33), (64, 200), (300, 64), (100, 1100)])
def test_accuracy(device, backend, dtype, n, d):
    with oracle.poisoned_memory():
        oracle.check(sslops.cross_correlation, views(n, d, dtype=dtype, device=device), backend)


@each_target
def test_collapsed_columns(device, backend):
    inputs = views(64, 40, device=device)
    inputs["z_a"][:, 3] = 0.5
    oracle.check(sslops.cross_correlation, inputs, backend)


@each_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, backend, dtype):
    def autocast():
        return torch.autocast(device, dtype)

    oracle.check(sslops.cross_correlation, views(96, 80, device=device), backend, dtype=dtype, context=autocast)


def test_against_correlation_coefficients():
    z_a, z_b = (z.double() for z in views(20, 3).values())
    expected = torch.corrcoef(torch.cat([z_a, z_b], dim=1).t())[:3, 3:]
    torch.testing.assert_close(sslops.cross_correlation(z_a, z_b, eps=1e-14), expected)


@each_target
def test_is_the_matrix_of_barlow_twins(device, backend):
    inputs = views(50, 30, device=device)
    c = sslops.cross_correlation(**inputs, backend=backend)
    loss = (1 - c.diagonal()).square().sum() + 0.01 * (c - torch.diag(c.diagonal())).square().sum()
    torch.testing.assert_close(loss, sslops.barlow_twins(**inputs, lambd=0.01, backend=backend))


@each_target
def test_non_contiguous_and_same_bits(device, backend):
    strided = {name: x.repeat(2, 2)[::2, 1:49] for name, x in views(32, 48, device=device).items()}
    oracle.check(sslops.cross_correlation, strided, backend)
    first = oracle.evaluate(sslops.cross_correlation, list(strided.values()), backend)
    assert all(map(torch.equal, first, oracle.evaluate(sslops.cross_correlation, list(strided.values()), backend)))


@each_target
def test_opcheck(device, backend):
    z_a, z_b = (z.requires_grad_() for z in views(6, 8, device=device).values())
    arguments = oracle.lowered(Arguments(z_a, z_b, 1e-5, "", True, torch.float32, [True, True], backend))
    torch.library.opcheck(torch.ops.sslops.cross_correlation.default, arguments)
    detached = (z_a.detach(), z_b.detach(), *arguments[2:])
    torch.library.opcheck(
        torch.ops.sslops.cross_correlation_backward.default, (torch.ones(8, 8, device=device), *detached)
    )


@each_target
def test_compile_and_second_derivative(device, backend):
    inputs = list(views(16, 8, device=device).values())
    oracle.assert_compiles(lambda a, b: sslops.cross_correlation(a * 2, b, backend=backend), *inputs)
    z_a, z_b = (z.requires_grad_() for z in inputs)
    (gradient,) = torch.autograd.grad(sslops.cross_correlation(z_a, z_b, backend=backend).sum(), z_a, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='eager'"):
        gradient.sum().backward()


def test_bad_input():
    z_a, z_b = views(4, 8).values()

    def refused(error, argument, *args, **kwargs):
        oracle.assert_refused(error, "cross_correlation", argument, lambda: sslops.cross_correlation(*args, **kwargs))

    refused(ValueError, "z_b", z_a, z_b[:3])
    refused(ValueError, "z_a", z_a[0], z_b[0])
    refused(ValueError, "z_a", z_a[:1], z_b[:1])
    refused(TypeError, "z_a", z_a.int(), z_b.int())
    refused(ValueError, "eps", z_a, z_b, eps=0.0)
    refused(ValueError, "backend", z_a, z_b, backend="tpu")
    arguments = oracle.lowered(Arguments(z_a, z_b, 1e-5, "", True, torch.float32, [True, True], "cpu"))
    with pytest.raises(ValueError, match="cross_correlation: grad"):
        torch.ops.sslops.cross_correlation_backward(torch.ones(7, 8), *arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa, dtype):
    oracle.check(sslops.cross_correlation, views(70, 150, dtype=dtype), "cpu")


def test_same_bits_for_any_number_of_threads():
    inputs, threads, found = list(views(150, 300).values()), torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(oracle.evaluate(sslops.cross_correlation, inputs, "cpu"))
    torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_a_view_with_itself():
    z = views(20, 30)["z_a"].requires_grad_()
    (once,) = torch.autograd.grad(sslops.cross_correlation(z, z).square().sum(), z)
    parts = [z.detach().clone().requires_grad_() for _ in range(2)]
    torch.testing.assert_close(once, sum(torch.autograd.grad(sslops.cross_correlation(*parts).square().sum(), parts)))
