"""SupCon's Triton kernels: launches for offline.py, small calls for sanitize.py, tests for test_interpreter.py."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

import sslops
from sslops.distributed import Part
from sslops.kernels.triton import launch, pairs, rows, supcon
from sslops.ops.supcon import Arguments

from .. import oracle
from .. import test_supcon as of_supcon
from .common import OPERANDS, TARGET, case, launched, take_triton


def on_cpu() -> contextlib.AbstractContextManager[object]:
    """In spans of several tiles even of small inputs"""
    return mock.patch.object(supcon, "PROGRAMS", 6)


def call(
    shape: tuple[int, ...], operands: str, temperature: float | None, device: str, *, where: str = "out",
    normalize: bool = True, part: Part | None = None, keys: int | None = None, ids: bool = False,
) -> None:  # fmt: skip
    """Forward and backward; without a temperature it is a tensor: the tops are searched for"""
    compute = OPERANDS[operands]
    z = torch.ones(shape, dtype=compute, device=device)
    labels = torch.ones(shape[-2], dtype=torch.int32, device=device)
    tau = torch.ones((), device=device) if temperature is None else temperature
    x = arguments(z, labels, tau, normalize, where)._replace(needs_grad=[True, temperature is None])
    if ids:
        x = x._replace(query_ids=labels, weights=torch.ones(shape[-2], device=device))
    if keys is not None:
        of_keys = torch.ones(keys, dtype=torch.int32, device=device)
        x = x._replace(keys=z.new_ones(keys, shape[-1]), key_labels=of_keys, key_ids=of_keys if ids else None)
    with mock.patch.object(launch, "precision", return_value="tf32" if operands == "tf32" else "ieee"):
        if keys is not None:
            supcon.among_keys(x)
            return
        _, _, inv_norm, _ = supcon.forward(x, part)
        stats = inv_norm.new_zeros(4, len(inv_norm))
        supcon.backward(inv_norm, x, inv_norm, stats, part)


def arguments(
    z: Tensor, labels: Tensor, temperature: float | Tensor, normalize: bool = True, where: str = "out"
) -> Arguments:
    options = temperature, normalize, where, -1, "", "mean", z.dtype, "triton", [True, True]
    return Arguments(z, labels, None, None, None, None, None, *options)


def launches(chip: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every listed config; of the launches without one, which other ops' are like, none but on one chip"""

    def matmuls(*arguments: object, **options: object) -> None:
        with contextlib.ExitStack() as stack:
            listed = ((pairs, "_unit"), (supcon, "_losses")) if chip != "sm_90" else ()
            for module, name in ((rows, "_gradient"), *listed):
                stack.enter_context(mock.patch.object(module, name, mock.MagicMock()))
            call(*arguments, **options)

    half = "f16" if chip.startswith("default") else "bf16"
    for operands, d in ((half, 128), (half, 512), ("tf32", 128), ("ieee", 128)):
        if not chip.startswith("default") or d == 128:
            yield f"{operands} D={d} search", partial(matmuls, (4096, d), operands, None, "meta")
    if chip == "sm_90":
        yield "bf16 D=128 in search", partial(matmuls, (4096, 128), "bf16", None, "meta", where="in")
    if not chip.startswith("default"):
        search = partial(matmuls, (4096, 128), "bf16", None, "meta")
        yield "bf16 D=128 keys search", partial(search, where="in", keys=65536, ids=True)
        yield "bf16 D=128 ids search", partial(search, ids=True)


def small() -> Iterator[Callable[[], None]]:
    """Ragged shapes down every path"""
    for shape, operands, temperature, options in (
        ((1, 1), "f16", 0.1, {}),
        ((70, 100), "f16", None, {}),
        ((2, 40, 70), "tf32", None, {"where": "in", "part": Part(10, 30, None)}),
        ((30, 20), "ieee", 0.1, {"normalize": False, "ids": True}),
        ((2, 40, 70), "f16", None, {"keys": 50, "ids": True}),
        ((5, 20), "tf32", 0.1, {"keys": 0}),
    ):
        yield partial(call, shape, operands, temperature, "cpu", **options)


def tuning(operands: str, width: int, kernel: str, device: str) -> Callable[[], tuple[Tensor, ...]]:
    """The call that tune.py times for `kernel`: a temperature that learns"""
    compute = torch.bfloat16 if operands == "half" else torch.float32
    z = torch.randn(2048 if operands == "ieee" else 8192, width, dtype=compute, device=device)
    labels, tau = torch.arange(len(z), dtype=torch.int32, device=device) % 1000, torch.tensor(0.1, device=device)
    x = arguments(z, labels, tau)
    losses, _, inv_norm, stats = supcon.forward(x)
    if kernel == "forward":
        return lambda: supcon.forward(x)
    return lambda: supcon.backward(torch.full_like(losses, 1 / len(losses)), x, inv_norm, stats)


# ---- by the interpreter: test_interpreter.py starts these in a process of their own ----


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The triton backend on CPU tensors; what is read before it was written shows"""
    take_triton(monkeypatch)
    with oracle.poisoned_memory(), on_cpu():
        yield


HALF = (torch.float16, torch.bfloat16)


def accuracy(where: str, dtype: torch.dtype, shape: tuple[int, ...], temperature: float, noise: float = 1.0) -> None:
    inputs = of_supcon.rows(*shape, dtype=dtype, noise=noise)
    oracle.check(of_supcon.losses, inputs, "triton", where=where, temperature=temperature)


def collapsed(where: str, temperature: float, normalize: bool) -> None:
    """All embeddings equal: terms of size 2 / tau cancel in the gradient"""
    row = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) / 8
    size = 2 / temperature / float(row.norm()) / 64**0.5
    options = {"where": where, "temperature": temperature, "normalize": normalize}
    oracle.check(of_supcon.losses, {"z": row.repeat(90, 1)}, "triton", scale={"z": size}, **options)


def learned(where: str, dtype: torch.dtype, normalize: bool) -> None:
    """The temperature's gradient too"""

    def op(z: Tensor, temperature: Tensor, **kwargs: object) -> Tensor:
        return of_supcon.losses(z, temperature=temperature, **kwargs)

    inputs = {"z": 0.3 * of_supcon.rows(2, 35, 24, dtype=dtype)["z"], "temperature": torch.tensor(0.2)}
    oracle.check(op, inputs, "triton", dtype=dtype, where=where, normalize=normalize)


def options(op: Callable, where: str, dtype: torch.dtype, shape: tuple[int, ...], temperature: float) -> None:
    oracle.check(op, of_supcon.rows(*shape, dtype=dtype), "triton", where=where, temperature=temperature)


def of_keys(z: Tensor, **kwargs: object) -> Tensor:
    return of_supcon.among(z, count=70, ids=True, weights=True, **kwargs)


def weighted(z: Tensor, **kwargs: object) -> Tensor:
    """Weights that float16 has no room for, were they not in the scale"""
    weights = torch.arange(len(z)) % 3 * 1000.0
    return of_supcon.with_ids(z, weights=weights, **kwargs)


CASES = [
    case(options, of_keys, "out", torch.float32, (2, 35, 20), 0.1),
    case(options, of_keys, "in", torch.float32, (70, 70), 0.01),
    case(options, of_keys, "out", torch.bfloat16, (70, 24), 0.02),
    case(options, of_keys, "in", torch.float16, (35, 24), 0.1),
    case(options, weighted, "out", torch.float16, (90, 24), 0.1),
    case(options, weighted, "in", torch.float32, (70, 24), 0.01),
    case(of_supcon.test_a_row_without_weight_counts_nothing, *TARGET),
    case(of_supcon.test_a_row_without_weight_beside_one_with, *TARGET, "in"),
    *(case(of_supcon.test_no_keys_and_none_that_is_a_candidate, *TARGET, where) for where in ("out", "in")),
    case(of_supcon.test_keys_are_rows_where_ids_leave_out_the_own, *TARGET),
    *(
        case(accuracy, where, torch.float32, (2, 35, 20), tau)
        for where, tau in (("out", 0.1), ("in", 0.1), ("in", 0.01))
    ),
    *(case(accuracy, "out", dtype, (70, 70), 0.1) for dtype in (torch.float32, torch.bfloat16)),  # slices of columns
    *(case(accuracy, where, dtype, (2, 35, 20), 0.01) for where, dtype in (("out", HALF[0]), ("in", HALF[1]))),
    *(case(accuracy, where, torch.float32, (2, 35, 24), 0.1, 1e-3) for where in ("out", "in")),  # small differences
    case(accuracy, "out", torch.bfloat16, (2, 35, 24), 0.02, 0.1),
    *(case(learned, where, torch.float32, where == "out") for where in ("out", "in")),
    *(case(collapsed, where, 0.02, False) for where in ("out", "in")),
    case(collapsed, "out", 0.1, True),
    case(of_supcon.test_positives_far_below_the_negatives, *TARGET, "in", 0.005),
    case(of_supcon.test_a_row_far_longer_than_its_positives, *TARGET, "out", 1e20),
    *(case(of_supcon.test_non_finite_rows_as_eager, *TARGET, where, torch.inf, False) for where in ("out", "in")),
    case(of_supcon.test_metrics, *TARGET),
]


@pytest.mark.parametrize("test", CASES)
def test_as_on_the_cpu(test: Callable[[], None]) -> None:
    test()


def test_parts_of_the_batch() -> None:
    """As ranks have them: the slices of the whole, of each view"""
    (z,) = of_supcon.rows(2, 33, 20).values()
    labels = torch.arange(33, dtype=torch.int32) % 13
    x = arguments(z, labels, 0.01, where="in")._replace(weights=torch.arange(33) % 4.0)
    parts = [Part(0, 15, None), Part(15, 18, None)]

    def joined(each: list[Tensor]) -> Tensor:
        return torch.cat([part.unflatten(-1, (2, -1)) for part in each], -1).flatten(-2)

    losses, positives, inv_norm, stats = supcon.forward(x)
    found = [supcon.forward(x, part) for part in parts]
    for k, whole in ((0, losses), (1, positives), (3, stats)):
        torch.testing.assert_close(joined([each[k] for each in found]), whole)
    grad = torch.linspace(0, 2, 66)
    dz, dtemperature = supcon.backward(grad, x, inv_norm, stats)
    shares = [supcon.backward(grad, x, inv_norm, stats, part) for part in parts]
    torch.testing.assert_close(torch.cat([each[0] for each in shares], 1), dz)
    torch.testing.assert_close(sum(each[1] for each in shares), dtemperature)


def test_the_same_bits_no_positives_and_an_empty_batch() -> None:
    (z,) = of_supcon.rows(30, 20).values()
    runs = [oracle.evaluate(of_supcon.losses, [z], "triton") for _ in range(2)]
    assert all(map(torch.equal, *runs))
    alone, none = z.clone().requires_grad_(), torch.zeros(0, 5, requires_grad=True)
    for where in ("out", "in"):
        loss = sslops.supcon(alone, torch.arange(30), where=where, backend="triton")
        assert loss == 0
        assert not torch.autograd.grad(loss, alone)[0].any()
    (gradient,) = torch.autograd.grad(of_supcon.losses(none, backend="triton").sum(), none)
    assert gradient.shape == (0, 5)
    assert of_supcon.losses(z, temperature=torch.tensor(-1.0), backend="triton")[:3].isnan().all()


def test_few_launches() -> None:
    (z,) = of_supcon.rows(30, 20).values()
    found = launched(lambda: sslops.supcon(z.requires_grad_(), torch.arange(30) % 3, backend="triton").backward())
    assert found == ["_unit", "_sums", "_losses", "_unit", "_weigh_back", "_gradient"]
