"""SIGReg's kernels: launches for offline.py, small calls for sanitize.py, tests for test_interpreter.py."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

import sslops
from sslops.kernels.triton import sigreg
from sslops.ops import sigreg as of_op
from sslops.ops.sigreg import Arguments

from .. import oracle
from .. import test_sigreg as of_sigreg
from .common import OPERANDS, TARGET, case, take_triton

on_cpu = contextlib.nullcontext


def call(views: int, n: int, d: int, m: int, operands: str, device: str, knots: int = 17, drawn: bool = True) -> None:
    """Forward and backward"""
    z = torch.ones(views, n, d, dtype=OPERANDS[operands], device=device)
    key, directions = torch.ones((), dtype=torch.int64, device=device), torch.ones(m, d, device=device)
    x = Arguments(z, *((None, key) if drawn else (directions, None)), m, knots, 3.0, "", "triton")
    loss, *saved = sigreg.forward(x, 0.5)
    sigreg.backward(loss, x, 0.5, *saved)


def launches(chip: str) -> Iterator[tuple[str, Callable[[], None]]]:
    if chip.startswith("default"):
        return
    yield "bf16 D=64", partial(call, 8, 512, 64, 1024, "bf16", "meta")
    yield "ieee D=512", partial(call, 8, 512, 512, 1024, "ieee", "meta")


def small() -> Iterator[Callable[[], None]]:
    """Ragged shapes; directions are given, as triton-viz cannot follow the product in Philox"""
    for shape in ((1, 1, 1, 1), (2, 130, 70, 40), (1, 600, 5, 3)):
        for operands in ("f16", "ieee"):
            yield partial(call, *shape, operands, "cpu", knots=4, drawn=False)


# ---- by the interpreter: test_interpreter.py starts these in a process of their own ----


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The triton backend on CPU tensors; what is read before it was written shows"""
    take_triton(monkeypatch)
    with oracle.poisoned_memory():
        yield


CASES = [
    *(
        case(of_sigreg.test_accuracy, *TARGET, dtype, shape, m)
        for dtype, shape, m in (
            (torch.float32, (1, 1), 1),
            (torch.float32, (2, 67, 33), 70),
            (torch.bfloat16, (67, 20), 40),
            (torch.float16, (3, 5), 70),
        )
    ),
    case(of_sigreg.test_knots, *TARGET, 2, 3.0),
    case(of_sigreg.test_knots, *TARGET, 33, 5.0),
]


@pytest.mark.parametrize(("scale", "shift"), [(0.0, 0.0), (0.1, 1.0), (300.0, 0.0)])
def test_collapsed_and_far(scale: float, shift: float) -> None:
    of_sigreg.check(of_sigreg.embeddings(2, 67, 20, scale=scale) + shift, "triton", 20)


@pytest.mark.parametrize("test", CASES)
def test_as_on_the_cpu(test: Callable[[], None]) -> None:
    test()


def test_several_tiles_and_parts() -> None:
    """Of rows, of directions and of columns; and the same bits again"""
    z = of_sigreg.embeddings(2, 40, 70)
    with mock.patch.multiple(sigreg, PARTS=2, ROWS=33, PANEL=1, TILE=sigreg.TILE | {"BLOCK_N": 32}):
        of_sigreg.check(z, "triton", 40, knots=4)
        options = {"directions": of_sigreg.units(33, 70), "knots": 3}
        once, again = (oracle.evaluate(sslops.sigreg, [z], "triton", **options) for _ in range(2))
    assert all(map(torch.equal, once, again))


def test_empty_and_not_finite() -> None:
    few = {"slices": 3, "knots": 3, "backend": "triton"}
    assert sslops.sigreg(torch.zeros(0, 4), **few).isnan()
    assert sslops.sigreg(torch.zeros(0, 3, 4), **few).isnan()
    assert sslops.sigreg(torch.zeros(3, 0), **few) == sslops.sigreg(torch.zeros(3, 2), **few)
    for bad in (float("nan"), float("inf")):
        z = of_sigreg.embeddings(2, 70, 9)
        z[0, 3, 2] = bad
        loss = sslops.sigreg(z.requires_grad_(), **few)
        (gradient,) = torch.autograd.grad(loss, z)
        assert loss.isnan()
        assert gradient[0].isnan().all()
        assert gradient[1].isfinite().all()
    huge = of_sigreg.embeddings(40, 9, scale=1e20).requires_grad_()  # of phases at random
    loss = sslops.sigreg(huge, slices=40, knots=5, backend="triton")
    loss.backward()
    assert 15 < loss < 60  # 30: the sum of w (1 + 40 phi^2)
    assert huge.grad.isfinite().all()


@triton.jit
def _turns(x, sines, versines, N: tl.constexpr):
    at = tl.arange(0, N)[None, :]
    sine, versine = sigreg._turn(tl.load(x + at))
    tl.store(sines + at, sine)
    tl.store(versines + at, versine)


@pytest.mark.parametrize(
    ("reach", "absolute"), [(1e-3, 0.0), (0.78, 0.0), (3.0, 1.2e-7), (12000.0, 2.6e-7), (1e9, 2.6e-7)]
)
def test_turns(reach: float, absolute: float) -> None:
    """To two units in the last place, small versines too; where quarter turns were taken off, to two units of 1"""
    x = reach * (2 * torch.rand(4096, generator=torch.Generator().manual_seed(1)) - 1)
    sines, versines = torch.empty_like(x), torch.empty_like(x)
    _turns[1,](x, sines, versines, len(x))
    for found, exact in ((sines, x.double().sin()), (versines, 2 * (x.double() / 2).sin().square())):
        assert ((found - exact).abs() <= 2.4e-7 * exact.abs() + absolute).all()


@pytest.mark.parametrize(("m", "d"), [(1, 1), (5, 3), (20, 257)])
def test_directions(m: int, d: int) -> None:
    """The reference's, rounded"""
    for seed in (0, 2**63 - 1):
        key = torch.tensor(seed)
        found, exact = sigreg.draw(key, m, d), of_op.draw(key, m, d)
        torch.testing.assert_close(found.double(), exact, rtol=2.0**-24, atol=1e-10)
        assert (found == exact.float()).double().mean() > 0.99
    z = of_sigreg.embeddings(6, d)
    torch.testing.assert_close(*(of_sigreg.seeded(z, slices=m, backend=each) for each in ("triton", "eager")))
