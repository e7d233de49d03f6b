"""NT-Xent's Triton kernels: launches for offline.py, small calls for sanitize.py, tests for test_interpreter.py."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

from sslops.distributed import Part
from sslops.kernels.triton import launch, nt_xent, w_z
from sslops.ops.nt_xent import Arguments, reference

from .. import oracle
from .. import test_nt_xent as of_nt_xent
from ..oracle import assert_promise, poisoned_memory
from .common import FLOAT32, OPERANDS, TARGET, case, float32_on, multiply, precision, take_triton


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """And W in blocks that small inputs have more than one of"""
    with mock.patch.object(launch, "multiply", multiply), mock.patch.object(w_z, "W_BLOCK", 128):
        yield


def call(
    n: int,
    d: int,
    operands: str,
    temperature: float | None,
    device: str,
    dtype: torch.dtype | None = None,
    count: bool = False,
    own: slice | None = None,
    views: int = 0,
    decoupled: bool = False,
) -> None:
    """Forward and backward; without a temperature it is a tensor, and the kernels search for the maximum"""
    compute = OPERANDS[operands]
    z = torch.ones(*([views] if views else []), n, d, dtype=dtype or compute, device=device)
    tau = torch.ones((), device=device) if temperature is None else temperature
    with mock.patch.object(launch, "precision", return_value=precision(operands)):
        x = arguments(z, None if views else z, tau, True, compute, count)
        x = x._replace(needs_grad=[True, not views, temperature is None])
        if decoupled:
            x = x._replace(decoupled=True, positive_weights=torch.ones(views or 2, n, device=device))
        losses, _, *saved = nt_xent.forward(x)
        nt_xent.backward(losses, x, *saved)
        if own is not None:
            part = Part(own.start, own.stop - own.start, None)
            nt_xent.forward(x, part)
            nt_xent.backward(losses, x, *saved, part)


def arguments(
    z0: Tensor,
    z1: Tensor | None,
    temperature: float | Tensor,
    normalize: bool,
    operand: torch.dtype,
    count: bool = False,
) -> Arguments:
    needs_grad = [True, z1 is not None, True]
    return Arguments(
        z0, z1, None, None, temperature, normalize, False, count, "", "none", operand, "triton", needs_grad
    )


def tuning(operands: str, width: int, kernel: str, device: str) -> Callable[[], tuple[Tensor, ...]]:
    """The call that tune.py times for `kernel`: the forward pass, or else the backward"""
    compute = torch.bfloat16 if operands == "half" else torch.float32
    z = torch.randn(2, 2048 if operands == "ieee" else 8192, width, dtype=compute, device=device)
    x = arguments(z[0], z[1], 0.1, True, compute)
    losses, _, *saved = nt_xent.forward(x)
    if kernel == "forward":
        return lambda: nt_xent.forward(x)
    return lambda: nt_xent.backward(torch.full_like(losses, 1 / len(losses)), x, *saved)


def launches(chip: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """All that a chip can launch: every listed width, and one beyond the widest"""
    table = launch.configs("nt_xent")
    for operands in ("bf16", "f16", *float32_on(chip)):
        widths = table.get(chip, table["default"])[operands if operands in FLOAT32 else "half"]
        for d in (*map(int, widths), 1000):
            for how, temperature in (("fixed", 0.1), ("search", None)):
                yield f"{operands} D={d} {how}", partial(call, 65536, d, operands, temperature, "meta", count=True)
                if operands != "f16":  # of half as many rows a block
                    yield (
                        f"{operands} D={d} few {how}",
                        partial(call, 512, d, operands, temperature, "meta"),
                    )
    for how, temperature in (("fixed", 0.1), ("search", None)):
        yield f"bf16 D=128 views {how}", partial(call, 65536, 128, "bf16", temperature, "meta", count=True, views=4)
    yield "bf16 D=1000 views", partial(call, 65536, 1000, "bf16", 0.1, "meta", views=4)
    yield "bf16 D=128 decoupled", partial(call, 65536, 128, "bf16", 0.1, "meta", decoupled=True)
    yield "bf16 autocast D=128", partial(call, 65536, 128, "bf16", 0.1, "meta", torch.float32)


def small() -> Iterator[Callable[[], None]]:
    """Ragged shapes down every path"""
    for n, d in ((1, 1), (33, 7), (70, 100), (35, 300)):
        for operands in ("f16", "tf32", "tf32x3"):
            for temperature in (0.1, None):
                yield partial(call, n, d, operands, temperature, "cpu", count=operands == "tf32", own=slice(n // 3, n))
    for n, d, operands, temperature in ((33, 7, "f16", 0.1), (35, 300, "tf32", None)):
        options = {"count": True, "own": slice(n // 3, n), "views": 3, "decoupled": d == 7}
        yield partial(call, n, d, operands, temperature, "cpu", **options)


# ---- by the interpreter: test_interpreter.py starts these in a process of their own ----


def pairs(kind: str, n: int, d: int) -> tuple[Tensor, Tensor]:
    z = torch.randn(2, n, d, dtype=torch.float64)
    if kind == "aligned":
        z[1] = z[0] + 0.01 * z[1]
    elif kind == "collapsed":
        z = z[0, 0] + 0.01 * z
    elif kind == "short rows":  # shorter than the 1e-12 of F.normalize
        z[:, ::3] *= 1e-14
        z[:, ::5] = 0
    return z[0], z[1]


def evaluate(f: Callable, z: Sequence[Tensor], temperature: float, dtype: torch.dtype) -> list[Tensor]:
    """Losses [2N] and the gradients of the views and the temperature under uneven weights"""
    z0, z1 = (x.detach().to(dtype).requires_grad_() for x in z)
    tau = torch.tensor(temperature, dtype=torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    losses = f(z0, z1, tau)
    weights = torch.linspace(0, 2, len(losses), dtype=losses.dtype) / len(losses)
    return [losses.detach(), *torch.autograd.grad(losses, (z0, z1, tau), weights)]


class Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z0, z1, tau, options):
        ctx.inputs = arguments(z0, z1, *options)
        losses, _, *ctx.saved = nt_xent.forward(ctx.inputs)
        return losses

    @staticmethod
    def backward(ctx, grad):
        return *nt_xent.backward(grad.contiguous(), ctx.inputs, *ctx.saved), None


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    take_triton(monkeypatch)
    with poisoned_memory(), on_cpu():
        yield


CASES = [
    # pairs, N, D, temperature
    ("random", 1, 3, 0.5),
    ("random", 2, 1, 0.5),
    ("random", 33, 40, 0.1),
    ("random", 90, 100, 0.5),
    ("random", 70, 200, 0.07),
    ("random", 70, 300, 0.2),
    ("random", 33, 40, 0.02),  # the fixed maximum with its bias
    ("random", 33, 40, 0.005),  # the maximum searched
    ("aligned", 40, 64, 0.05),
    ("aligned", 40, 64, 0.03),  # losses of 1e-9; below 1e-12 the float64 reference is not the truth
    ("collapsed", 40, 33, 0.1),
    ("short rows", 33, 40, 0.1),
]


@pytest.mark.parametrize(
    ("chip", "search", "dtype"),
    [("default", True, torch.float32), ("sm_90", True, torch.float16), ("sm_90", False, torch.bfloat16)],
)
@pytest.mark.parametrize(("kind", "n", "d", "temperature"), CASES)
def test_accuracy(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, chip: str, search: bool, dtype: torch.dtype,
    kind: str, n: int, d: int, temperature: float,
) -> None:  # fmt: skip
    if kind == "collapsed" and dtype == torch.bfloat16:
        why = "rounding moves all logits alike but the positive's, which is float32: the CPU kernel's losses do so too"
        request.applymarker(pytest.mark.xfail(strict=True, raises=AssertionError, reason=why))
        monkeypatch.setattr("tests.oracle.DRAWS", 1)  # it is off in each
    if kind == "short rows" and dtype == torch.float16:
        pytest.skip("their gradient is beyond float16's range")
    if d >= 200 and dtype == torch.float16:
        pytest.skip("of the same tiles as bfloat16's")
    compare(pairs(kind, n, d), temperature, True, dtype, chip, search, cancels=kind == "collapsed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "d"), [(20, 17), (70, 300)])
def test_unnormalized(dtype: torch.dtype, n: int, d: int) -> None:
    compare(pairs("random", n, d), 2.0, False, dtype, "sm_90", False)


@pytest.mark.parametrize(("blocks", "search"), [(1, False), (2, False), (2, True)])
def test_panels_of_several_blocks_of_rows(monkeypatch: pytest.MonkeyPatch, search: bool, blocks: int) -> None:
    monkeypatch.setattr(nt_xent, "_panels", lambda m, rows, search, block, processors: (blocks * block, 1.0))
    compare(pairs("random", 170, 20), 0.1, True, torch.bfloat16, "default", search)


def options(op: Callable, v: int, n: int, d: int, dtype: torch.dtype, temperature: float) -> None:
    """Of v views, or of two tensors for v = 0"""
    make = of_nt_xent.crops if v else of_nt_xent.views
    inputs = make(*([v] if v else []), n, d, dtype=dtype, noise=4.0)
    oracle.check(op, inputs, "triton", temperature=temperature)


@pytest.mark.parametrize(
    "test",
    [
        case(options, of_nt_xent.losses, 3, 40, 33, torch.float32, 0.1),
        case(options, of_nt_xent.losses, 5, 27, 100, torch.bfloat16, 0.005),
        case(options, of_nt_xent.losses_of_ids, 3, 40, 33, torch.float16, 0.02),
        case(options, of_nt_xent.losses_of_ids, 3, 50, 300, torch.bfloat16, 0.1),
        case(options, of_nt_xent.losses_of_ids, 0, 60, 24, torch.float32, 0.1),
        case(options, of_nt_xent.decoupled, 3, 40, 24, torch.float16, 0.1),
        case(options, of_nt_xent.decoupled, 3, 40, 300, torch.float32, 0.005),
        case(options, of_nt_xent.decoupled, 0, 70, 33, torch.bfloat16, 0.01),
        case(options, of_nt_xent.decoupled, 0, 70, 33, torch.float16, 1.0),
        case(of_nt_xent.test_two_views_in_one_tensor, *TARGET),
        *(case(of_nt_xent.test_an_easy_and_a_hard_positive, *TARGET, temperature) for temperature in (0.05, 0.005)),
        case(of_nt_xent.test_temperature_gradient_of_many_views, *TARGET),
        case(of_nt_xent.test_temperature_gradient_when_decoupled, *TARGET, False),
        case(of_nt_xent.test_ids_leave_out_what_they_name, *TARGET),
        case(of_nt_xent.test_metrics_of_many_views, *TARGET, of_nt_xent.losses_of_ids),
        case(of_nt_xent.test_decoupled_without_negatives, *TARGET),
    ],
)
def test_as_on_the_cpu(test: Callable[[], None]) -> None:
    test()


def test_parts_of_several_views() -> None:
    (z,) = of_nt_xent.crops(3, 33, 20).values()
    ids, weights = torch.arange(33, dtype=torch.int32) % 20, torch.rand(3, 33)
    for search in (True, False):
        x = arguments(z, None, 0.1 if search else torch.tensor(0.1), True, z.dtype, True)
        x = x._replace(query_ids=ids, decoupled=search, positive_weights=weights if search else None)
        assert_parts(x, 3, 33, [(0, 10), (10, 33)])


@pytest.mark.parametrize(("n", "d"), [(170, 20), (40, 300)])
def test_metrics(n: int, d: int) -> None:
    z0, z1 = (x.float() for x in pairs("random", n, d))
    z1 += 2 / d**0.5 * z0
    x = arguments(z0, z1, 0.1, True, z0.dtype, True)
    _, (similarity, counted), _, _ = nt_xent.forward(x)
    positive, exceeding = reference(x)[1]
    torch.testing.assert_close(similarity, positive)
    assert torch.equal(counted, exceeding)
    assert exceeding.unique().numel() > 10


@pytest.mark.parametrize(
    ("chip", "n", "d", "first", "last"),
    [("default", 170, 20, 37, 150), ("sm_90", 40, 300, 0, 33), ("default", 3, 4, 1, 2)],
)
def test_parts_of_the_batch(chip: str, n: int, d: int, first: int, last: int) -> None:
    """As ranks have them: the slices of the whole"""
    z0, z1 = (x.float() for x in pairs("random", n, d))
    x = arguments(z0, z1, 0.1, True, z0.dtype, True)
    with mock.patch.object(launch, "chip", return_value=chip):
        assert_parts(x, 2, n, [(0, first), (first, last), (last, n)])


def assert_parts(x: Arguments, v: int, n: int, bounds: list[tuple[int, int]]) -> None:
    grad = torch.linspace(0, 2, v * n)
    parts = [Part(start, stop - start, None) for start, stop in bounds if start < stop]

    def joined(each: list[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(-1, (v, -1)) for part in each], -1).flatten(-2)

    losses, logged, inv_norm, stats = nt_xent.forward(x)
    found = [nt_xent.forward(x, part) for part in parts]
    gathered = joined([each[3] for each in found])
    gradients = nt_xent.backward(grad, x, inv_norm, stats)
    shares = [nt_xent.backward(grad, x, inv_norm, gathered, part) for part in parts]
    torch.testing.assert_close(joined([each[0] for each in found]), losses)
    torch.testing.assert_close(joined([each[1] for each in found]), logged)
    torch.testing.assert_close(gathered[2:], stats[2:])  # m and 1 / r go by another maximum
    for expected, *each in zip(gradients, *shares, strict=True):
        torch.testing.assert_close(torch.cat(each, -2) if expected.dim() > 1 else sum(each), expected)


def test_magnitude_does_not_matter() -> None:
    """A power of two cancels to the last bit, squares that overflow or not"""
    z = torch.randn(2, 33, 40)

    def kernel(z0: Tensor, z1: Tensor, tau: Tensor) -> Tensor:
        return Kernel.apply(z0, z1, tau, (0.1, True, torch.float32))

    losses, dz0, dz1, _ = evaluate(kernel, (z[0], z[1]), 0.1, torch.float32)
    huge = evaluate(kernel, (z[0] * 2.0**100, z[1] * 2.0**100), 0.1, torch.float32)
    for x, y in zip((losses, dz0 * 2.0**-100, dz1 * 2.0**-100), huge, strict=False):
        assert torch.equal(x, y)


def compare(
    z: tuple[Tensor, Tensor], temperature: float, normalize: bool, dtype: torch.dtype, chip: str, search: bool,
    cancels: bool = False,
) -> None:  # fmt: skip
    def kernel(z0: Tensor, z1: Tensor, tau: Tensor) -> Tensor:
        options = (tau.detach() if search else temperature, normalize, dtype)
        return Kernel.apply(z0, z1, tau, options)

    def of_reference(z: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        return evaluate(lambda *x: reference(arguments(*x, normalize, dtype))[0], z, temperature, dtype)

    def answers(z: Sequence[Tensor]) -> list[list[Tensor]]:
        with mock.patch.object(launch, "chip", return_value=chip):
            got, again = (evaluate(kernel, z, temperature, dtype) for _ in range(2))
        assert all(map(torch.equal, got, again))
        return [got, of_reference(z, dtype), of_reference([x.double() for x in z], torch.float64)]

    z = [x.to(dtype) for x in z]
    # The temperature's gradient is a sum of terms that may cancel: its floor is of their size.
    losses = of_reference([x.double() for x in z], torch.float64)[0]
    scale = {"dtemperature": float(losses.abs().mean()) / temperature}
    if cancels:  # each row's terms, of both directions: its gradient is what little they leave
        length = float(z[0].float().norm(dim=1).mean())
        scale |= dict.fromkeys(("dz0", "dz1"), 2 / temperature / len(losses) / length / z[0].shape[1] ** 0.5)
    assert_promise(("losses", "dz0", "dz1", "dtemperature"), answers, z, dtype, scale)


def test_empty() -> None:
    z = torch.empty(0, 5)
    x = arguments(z, z, 0.5, True, z.dtype)
    losses, _, inv_norm, stats = nt_xent.forward(x)
    dz0, dz1, dtemperature = nt_xent.backward(losses, x, inv_norm, stats)
    assert (losses.shape, inv_norm.shape, stats.shape) == ((0,), (0,), (3, 0))
    assert (dz0.shape, dz1.shape, dtemperature.item()) == ((0, 5), (0, 5), 0)


def test_nan_spreads() -> None:
    z = torch.randn(9, 5)
    z[4, 2] = torch.nan
    losses, *_ = nt_xent.forward(arguments(z, z, 0.5, True, z.dtype))
    assert losses.isnan().all()


@pytest.mark.parametrize("temperature", [0.0, -0.5])
def test_nan_for_what_is_no_temperature(temperature: float) -> None:
    z0, z1 = torch.randn(2, 9, 5)
    x = arguments(z0, z1, torch.tensor(temperature), True, torch.float32)
    losses, _, *saved = nt_xent.forward(x)
    assert losses.isnan().all()
    assert all(gradient.isnan().all() for gradient in nt_xent.backward(torch.ones_like(losses), x, *saved))
