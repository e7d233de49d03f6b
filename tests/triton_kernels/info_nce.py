"""InfoNCE's Triton kernels: launches for offline.py, small calls for sanitize.py, tests for test_interpreter.py."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

import sslops
from sslops.distributed import Part
from sslops.kernels.triton import info_nce, launch, rows
from sslops.ops.info_nce import Arguments

from .. import oracle
from .. import test_info_nce as of_info_nce
from .common import OPERANDS, TARGET, case, take_triton

on_cpu = contextlib.nullcontext
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def call(
    b: int, k: int, d: int, operands: str, temperature: float | None, device: str, *, ids: bool = False,
    normalize: bool = True, queue: torch.dtype | None = None, needs_grad: bool = True, key_grad: bool = False,
    mask: bool = False, own: int = 0, decoupled: bool = False,
) -> None:  # fmt: skip
    """Forward and backward, in-batch for k = 0; without a temperature it is a tensor: the maximum is searched for"""
    compute = OPERANDS[operands]
    keys = torch.ones(b + 2, d, dtype=compute, device=device)
    negatives = None if k == 0 else torch.ones(k, d, dtype=queue or compute, device=device)
    names = [torch.arange(n, device=device) if ids else None for n in (b, k or b + 2)]
    tau = torch.ones((), device=device) if temperature is None else temperature
    learn = [needs_grad, k == 0 or key_grad, k > 0, False]
    x = arguments(keys[:b], keys if k == 0 else keys[:b], negatives, tau, compute, learn, normalize, names)
    if mask:
        x = x._replace(negative_mask=torch.ones(b, k or b + 2, dtype=torch.bool, device=device))
    if own:
        paired = torch.ones(b, own, d, dtype=compute, device=device)
        x = x._replace(paired_negatives=paired, needs_grad=[*learn, True])
        x = x._replace(paired_mask=torch.ones(b, own, dtype=torch.bool, device=device) if mask else None)
    if decoupled:
        x = x._replace(decoupled=True, positive_weights=torch.ones(b, device=device))
    part = (Part(1, b, None),) if k == 0 else ()
    with mock.patch.object(launch, "precision", return_value="tf32" if operands == "tf32" else "ieee"):
        losses, *_, stats = info_nce.forward(x, *part)
        if needs_grad and queue is None:
            info_nce.backward(losses, x, stats, *part)


def arguments(
    query: Tensor, key: Tensor, negatives: Tensor | None, temperature: float | Tensor, operand: torch.dtype,
    needs_grad: list[bool], normalize: bool = True, ids: Sequence[Tensor | None] = (None, None),
) -> Arguments:  # fmt: skip
    options = temperature, normalize, False, 0, "", False, operand, "triton"
    return Arguments(query, key, negatives, *ids, None, None, None, None, *options, [*needs_grad, False])


def matmuls(call: Callable[[], None]) -> None:
    """Of the launches those that have configs; the others differ by dtype and by whether wide loads fit, and little"""
    kernels = ((rows, "_inv_norms"), (rows, "_prepare"), (info_nce, "_join"), (info_nce, "_join_back"))
    with contextlib.ExitStack() as stack:
        for module, name in kernels:
            stack.enter_context(mock.patch.object(module, name, mock.MagicMock()))
        call()


def launches(chip: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every listed width; what else changes the code, on chips of their own"""
    table = launch.configs("info_nce")
    default = chip not in table
    for operands in ("f16" if default else "bf16", "tf32", "ieee"):
        widths = table.get(chip, table["default"])[operands if operands in ("tf32", "ieee") else "half"]
        for d in map(int, widths):
            fixed = partial(call, 256, 65536, d, operands, 0.1, "meta")
            yield f"{operands} D={d} fixed", partial(matmuls, fixed)
    if default:
        return
    yield "f16 D=128 search", partial(matmuls, partial(call, 256, 65536, 128, "f16", None, "meta"))
    yield "bf16 D=100 search", partial(call, 256, 65536, 100, "bf16", None, "meta")  # wide loads do not fit
    yield "bf16 D=128 in-batch", partial(call, 4096, 0, 128, "bf16", 0.1, "meta", ids=True)
    yield "bf16 D=128 masked", partial(call, 256, 65536, 128, "bf16", 0.1, "meta", mask=True, own=32, key_grad=True)
    yield "bf16 D=128 decoupled", partial(call, 256, 65536, 128, "bf16", None, "meta", own=32, decoupled=True)
    yield "bf16 D=128 float32 queue", partial(call, 256, 65536, 128, "bf16", 0.1, "meta", queue=torch.float32)


def small() -> Iterator[Callable[[], None]]:
    """Ragged shapes down every path"""
    for b, k, d, options in (
        (1, 1, 1, {}),
        (33, 0, 7, {"ids": True}),
        (70, 133, 100, {"key_grad": True}),
        (70, 40, 32, {}),
        (5, 0, 16, {"ids": True, "normalize": False}),
        (5, 40, 300, {"ids": True}),
        (5, 40, 20, {"normalize": False, "needs_grad": False}),
        (33, 70, 40, {"mask": True, "own": 3, "key_grad": True}),
        (5, 0, 16, {"mask": True, "own": 70, "decoupled": True}),
    ):
        for operands, temperature in (("f16", None), ("tf32", 0.1), ("ieee", None)):
            yield partial(call, b, k, d, operands, temperature, "cpu", **options)


def tuning(operands: str, width: int, kernel: str, device: str) -> Callable[[], tuple[Tensor, ...]]:
    """The call that tune.py times for `kernel`: the forward pass against a queue, or the in-batch backward"""
    compute = torch.bfloat16 if operands == "half" else torch.float32
    query, key = torch.randn(2, 256 if kernel == "forward" else 4096, width, dtype=compute, device=device)
    queue = torch.randn(65536, width, dtype=compute, device=device) if kernel == "forward" else None
    x = arguments(query, key, queue, 0.1, compute, [True, True, False, False])
    losses, *_, stats = info_nce.forward(x)
    if kernel == "forward":
        return lambda: info_nce.forward(x)
    return lambda: info_nce.backward(torch.full_like(losses, 1 / len(losses)), x, stats)[:1]


# ---- by the interpreter: test_interpreter.py starts these in a process of their own ----


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The triton backend on CPU tensors; what is read before it was written shows"""
    take_triton(monkeypatch)
    with oracle.poisoned_memory():
        yield


def accuracy(b: int, k: int, d: int, temperature: float, dtype: torch.dtype, kind: str, **options: object) -> None:
    of_info_nce.check(of_info_nce.pairs(b, d, k, dtype=dtype), "triton", kind, temperature=temperature, **options)


def in_many_blocks(*arguments: object) -> None:
    """Norms of the candidates by a launch, as more blocks of whole rows share them"""
    with mock.patch.object(info_nce, "OWN_NORMS", 0):
        accuracy(*arguments)


def magnitudes(magnitude: float, d: int) -> None:
    inputs = {name: x * magnitude for name, x in of_info_nce.pairs(35, d, 70).items()}
    of_info_nce.check(inputs, "triton", "trainable", temperature=0.1)


def all_gradients(dtype: torch.dtype, normalize: bool) -> None:
    """The temperature's too; its maximum is searched for"""

    def losses(query: Tensor, key: Tensor, negatives: Tensor, temperature: Tensor, **kwargs: object) -> Tensor:
        return of_info_nce.losses(query, key, negatives, temperature=temperature, **kwargs)

    inputs = {name: x * 0.3 for name, x in of_info_nce.pairs(33, 40, 90, dtype=dtype).items()}
    oracle.check(losses, inputs | {"temperature": torch.tensor(0.1)}, "triton", dtype=dtype, normalize=normalize)


def metrics_and_ids(kind: str) -> None:
    inputs = of_info_nce.pairs(40, 16, 50, noise=2.0)
    if kind == "in-batch":
        del inputs["negatives"]
    ids = {"query_ids": torch.arange(40) % 30}
    if kind == "queue":
        ids["negative_ids"] = torch.arange(50) % 30
    ours, eager = (sslops.info_nce(**inputs, **ids, return_metrics=True, backend=each) for each in ("triton", "eager"))
    torch.testing.assert_close(ours, eager)


def queue_of_another_dtype(dtype: torch.dtype) -> None:
    inputs = of_info_nce.pairs(20, 16, 50)
    mixed = inputs | {name: inputs[name].to(dtype) for name in ("query", "key")}
    with torch.autocast("cpu", dtype):
        ours, eager = (of_info_nce.losses(**mixed, backend=each) for each in ("triton", "eager"))
    error = torch.finfo(dtype).eps
    torch.testing.assert_close(ours, eager, rtol=error, atol=error)


def accuracy_of(op: Callable, b: int, d: int, kind: str, dtype: torch.dtype, temperature: float) -> None:
    """An option: beside several blocks of candidates two of each query's own"""
    make = partial(of_info_nce.with_paired, m=70) if op is of_info_nce.of_paired else of_info_nce.pairs
    of_info_nce.check(make(b, d, 100, dtype=dtype), "triton", kind, op, temperature=temperature)


KINDS = ("queue", "trainable", "in-batch")
SHAPES = (  # on a chip without configs, whose blocks have 64 or 32 columns
    (67, 100, 33, 0.02),  # several blocks of rows, several spans; the fixed maximum with its bias
    (17, 40, 150, 0.2),  # several slices of columns
    (70, 70, 32, 0.1),  # whole rows in a block
)
CASES = [
    *(
        case(accuracy, *shape, dtype, KINDS[1 + k % 2])
        for k, shape in enumerate(SHAPES)
        for dtype in (DTYPES[0], DTYPES[1 + k % 2])
    ),
    *(case(accuracy, *SHAPES[-1], dtype, "queue") for dtype in DTYPES[1:]),
    case(accuracy, 33, 70, 20, 0.005, torch.float32, "trainable"),  # no fixed maximum
    *(
        case(in_many_blocks, 70, 40, 16, 0.1, dtype, kind)
        for dtype, kind in zip(DTYPES[1:], ("queue", "in-batch"), strict=True)
    ),
    *(case(magnitudes, *each) for each in ((1e-12, 16), (1e25, 16), (1e25, 24))),
    case(all_gradients, torch.float32, True),
    *(case(all_gradients, dtype, normalize) for dtype, normalize in zip(DTYPES[1:], (True, False), strict=True)),
    *(
        case(test, *TARGET, kind, *arguments)
        for kind in KINDS
        for test, *arguments in (
            (of_info_nce.test_one_row_opposite_all_others, 0.02),
            (of_info_nce.test_empty_and_single, 0, 5),
            (of_info_nce.test_empty_and_single, 3, 0),
            (of_info_nce.test_empty_and_single, 1, 1),
            (of_info_nce.test_non_finite_rows_as_eager, float("nan"), "negatives"),
            (of_info_nce.test_zero_rows,),
        )
    ),
    case(of_info_nce.test_non_finite_rows_as_eager, *TARGET, "trainable", float("inf"), "query"),
    case(of_info_nce.test_parts_of_the_batch, *TARGET, True),
    case(of_info_nce.test_ids_leave_out_what_they_name, *TARGET),
    *(case(of_info_nce.test_ids_below_zero_are_equal_to_none, *TARGET, kind) for kind in ("queue", "in-batch")),
    case(of_info_nce.test_high_temperatures, *TARGET, 1e30),
    *(case(metrics_and_ids, kind) for kind in ("queue", "in-batch")),
    case(of_info_nce.test_non_contiguous, *TARGET),
    *(case(queue_of_another_dtype, dtype) for dtype in DTYPES[1:]),
    case(of_info_nce.test_gradients_of_some, *TARGET, "negatives"),
    case(of_info_nce.test_no_paired_negative_is_none, *TARGET),
    case(accuracy_of, of_info_nce.of_mask, 66, 40, "trainable", torch.float32, 0.1),
    case(accuracy_of, of_info_nce.of_mask, 66, 33, "in-batch", torch.bfloat16, 0.1),
    case(accuracy_of, of_info_nce.of_mask, 66, 32, "trainable", torch.float16, 0.02),
    case(accuracy_of, of_info_nce.of_paired, 15, 40, "trainable", torch.float32, 0.005),
    case(accuracy_of, of_info_nce.of_paired, 15, 32, "in-batch", torch.bfloat16, 0.1),
    case(accuracy_of, of_info_nce.of_paired, 15, 33, "queue", torch.float16, 0.02),
    case(accuracy_of, of_info_nce.weighted, 15, 40, "in-batch", torch.float32, 0.1),
    case(accuracy_of, of_info_nce.weighted, 15, 32, "trainable", torch.float16, 0.02),
    case(accuracy_of, of_info_nce.decoupled, 15, 32, "queue", torch.bfloat16, 0.005),
    *(case(of_info_nce.test_magnitudes_of_paired, *TARGET, each) for each in (1e-12, 1e25)),
    case(of_info_nce.test_temperature_gradient_of_paired_alone, *TARGET),
    case(of_info_nce.test_paired_are_shared_ones_that_a_mask_leaves_to_one_query, "triton", False),
    *(
        case(of_info_nce.test_what_a_mask_leaves_out_is_not_looked_at, "triton", *options)
        for options in ((float("nan"), True), (float("inf"), False))
    ),
    case(of_info_nce.test_masks_of_any_strides, "triton"),
    *(case(of_info_nce.test_no_negative_when_decoupled, *TARGET, temperature) for temperature in (0.2, 0.005)),
]


@pytest.mark.parametrize("test", CASES)
def test_as_on_the_cpu(test: Callable[[], None]) -> None:
    test()


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_nan_for_what_is_no_temperature(temperature: float) -> None:
    inputs = of_info_nce.pairs(3, 4, 5)
    assert of_info_nce.losses(**inputs, temperature=torch.tensor(temperature), backend="triton").isnan().all()


@pytest.mark.parametrize("temperature", [0.1, torch.tensor(0.1)])
def test_two_launches_where_only_the_query_learns(temperature: float | Tensor) -> None:
    launched = []

    def run(kernel: InterpretedFunction, *args: object, **kwargs: object) -> None:
        launched.append(kernel.fn.__name__)

    query, key = torch.randn(2, 256, 128, dtype=torch.bfloat16)
    chip = mock.patch.object(launch, "chip", return_value="sm_90")
    with chip, mock.patch.object(InterpretedFunction, "run", run):
        queue = torch.randn(65536, 128, dtype=torch.bfloat16)
        sslops.info_nce(query.requires_grad_(), key, queue, temperature=temperature, backend="triton").backward()
    assert launched == ["_weigh", "_join"]
