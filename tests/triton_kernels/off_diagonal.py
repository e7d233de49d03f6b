"""The losses on columns: launches for offline.py, small calls for sanitize.py, tests for test_interpreter.py."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

import sslops
from sslops.kernels.triton import barlow_twins, cross_correlation, launch, off_diagonal, vicreg
from sslops.ops.barlow_twins import Arguments as BarlowTwins
from sslops.ops.cross_correlation import Arguments as CrossCorrelation
from sslops.ops.vicreg import Arguments as VICReg

from .. import test_barlow_twins as of_barlow_twins
from .. import test_columns as of_columns
from .. import test_cross_correlation as of_cross_correlation
from .. import test_vicreg as of_vicreg
from ..oracle import check, evaluate, poisoned_memory
from .common import OPERANDS, TARGET, float32_on, multiply, precision, take_triton


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """And S in panels that small inputs have more than one of"""
    with mock.patch.object(launch, "multiply", multiply), mock.patch.object(off_diagonal, "PANEL", 128):
        yield


def call(
    op: str, n: int, d: int, operands: str, device: str, *, views: int = 2, needs_grad: bool = True,
    dtype: torch.dtype | None = None, route: str = "",
) -> None:  # fmt: skip
    """Forward and, with needs_grad, backward"""
    compute = OPERANDS[operands]
    z = torch.ones(n, d, dtype=dtype or compute, device=device)
    pair, rest = (z, z if views == 2 else None), (compute, [needs_grad, needs_grad and views == 2], "triton")
    with mock.patch.object(launch, "precision", return_value=precision(operands)):
        if op == "cross_correlation":
            x = CrossCorrelation(z, z, 1e-5, "", True, *rest)
            cross_correlation.backward(cross_correlation.forward(x), x)
            return
        if op == "barlow_twins":
            module, x = barlow_twins, BarlowTwins(*pair, 0.1, 1e-4, route, "", True, *rest)
        else:
            module, x = vicreg, VICReg(*pair, 25.0, 25.0, 1.0, 1e-4, route, "", *rest)
        loss, *kept = module.forward(x)
        if needs_grad:
            module.backward(loss, x, *kept)


def tuning(operands: str, width: int, kernel: str, device: str) -> Callable[[], tuple[Tensor, ...]]:
    """The call that tune.py times: the forward pass of Barlow Twins by the route that `kernel` is on"""
    compute = torch.bfloat16 if operands == "half" else torch.float32
    route, n = ("gram", 1024) if kernel == "gram" else ("panels", 4096)
    z = torch.randn(2, n // 2 if operands == "ieee" else n, width, dtype=compute, device=device)
    x = BarlowTwins(z[0], z[1], 0.005, 1e-5, route, "", True, compute, [True, True], "triton")
    return lambda: barlow_twins.forward(x)


def launches(chip: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """All that a chip can launch"""
    for operands in ("bf16", "f16", *float32_on(chip)):
        for op in ("barlow_twins", "vicreg"):
            for n, route in ((256, "gram"), (4096, "panels")):
                work = partial(call, op, n, 8192, operands, "meta", route=route)
                yield f"{operands} {op} {route}", work
                yield f"{operands} {op} {route} loss only", partial(work, needs_grad=False)
        yield f"{operands} cross_correlation", partial(call, "cross_correlation", 1024, 8192, operands, "meta")
    for n, route in ((256, "gram"), (4096, "panels")):
        for op in ("barlow_twins", "vicreg"):
            autocast = partial(call, op, n, 8192, "bf16", "meta", route=route, dtype=torch.float32)
            yield f"bf16 autocast {op} {route}", autocast
        yield f"bf16 vicreg {route} one view", partial(call, "vicreg", n, 8192, "bf16", "meta", route=route, views=1)


def small() -> Iterator[Callable[[], None]]:
    """Ragged shapes down every path"""
    for route in ("gram", "panels"):
        yield partial(call, "barlow_twins", 2, 1, "f16", "cpu", route=route)
        for operands in ("tf32", "tf32x3"):
            yield partial(call, "barlow_twins", 70, 130, operands, "cpu", route=route, needs_grad=False)
        for op in ("barlow_twins", "vicreg"):
            yield partial(call, op, 70, 130, "f16", "cpu", route=route)
    yield partial(call, "vicreg", 70, 130, "f16", "cpu", route="panels", views=1)
    yield partial(call, "cross_correlation", 70, 130, "f16", "cpu")


# ---- by the interpreter: test_interpreter.py starts these in a process of their own ----

ROUTES = ("gram", "panels")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The triton backend on CPU tensors; what is read before it was written shows"""
    take_triton(monkeypatch)
    with on_cpu(), poisoned_memory():
        yield


def case(test: Callable, *arguments: object) -> object:
    return pytest.param(partial(test, *TARGET, *arguments), id=" ".join(map(str, [test.__name__, *arguments])))


def cases() -> Iterator[object]:
    """Tests of the ops themselves, on small and on ragged tensors"""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield case(of_cross_correlation.test_accuracy, dtype, 70, 33)
        for route in ROUTES:
            for n, d in ((7, 33), (70, 130)):
                yield case(of_barlow_twins.test_accuracy, route, dtype, n, d)
                yield case(of_vicreg.test_accuracy, route, dtype, n, d)
            yield case(of_vicreg.test_one_view, route, dtype)
        yield case(of_barlow_twins.test_trained, "panels", dtype)
    yield case(of_cross_correlation.test_collapsed_columns)
    yield case(of_cross_correlation.test_is_the_matrix_of_barlow_twins)
    for route in ROUTES:
        yield case(of_barlow_twins.test_collapsed_columns, route)
        yield case(of_barlow_twins.test_large_means, route, 1e5)
        for dtype in (torch.float16, torch.bfloat16):
            yield case(of_barlow_twins.test_autocast, route, dtype)
        yield case(of_columns.test_backward_twice_and_without_grad, "barlow_twins", route, 0)
        for op in of_columns.VIEWS:
            yield case(of_columns.test_non_contiguous_and_nan, op, route)
        yield case(of_vicreg.test_collapsed_columns, route)
        yield case(of_vicreg.test_a_tie_at_the_hinge, route)
    yield case(of_barlow_twins.test_few_live_columns, "gram", 64, 32)
    yield case(of_vicreg.test_unequal_variances, "panels", 64)


@pytest.mark.parametrize("test", [*cases()])
def test_like_any_backend(test: Callable[[], None]) -> None:
    test()


@pytest.mark.parametrize(("op", "route"), [(sslops.barlow_twins, "gram"), (sslops.vicreg, "panels")])
def test_as_on_sm_90(op: Callable, route: str) -> None:
    """Its tiles, several splits of the Gram matrix, several parts of the rows; and the same bits again"""
    inputs = of_barlow_twins.views(150, 140)
    with mock.patch.object(launch, "chip", return_value="sm_90"), mock.patch.object(off_diagonal, "SPLIT", 64):
        check(op, inputs, "triton", route=route)
        once, again = (evaluate(op, list(inputs.values()), "triton", route=route) for _ in range(2))
    assert all(map(torch.equal, once, again))


def test_the_route_of_a_gpu() -> None:
    """Nothing is read on the host, so VICReg cannot leave the way by Gram matrices where that loses digits."""
    module = importlib.import_module("sslops.ops.vicreg")
    assert [module.cheaper_route(64, 300, name) for name in ("cpu", "triton")] == ["gram", "panels"]
    inputs = of_vicreg.views(64, 200)
    default, panels = (sslops.vicreg(**inputs, backend="triton", route=route) for route in (None, "panels"))
    assert torch.equal(default, panels)
