"""RELIC's Triton kernels: launches for offline.py, small calls for sanitize.py, tests for test_interpreter.py."""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

from sslops import backend
from sslops.kernels.triton import launch, relic
from sslops.ops.relic import Arguments

from .. import oracle
from .. import test_relic as of_relic
from .common import OPERANDS


def on_cpu() -> contextlib.AbstractContextManager[object]:
    """In spans of several tiles even of small inputs"""
    return mock.patch.object(launch, "processors", return_value=2)


def call(
    b: int, d: int, operands: str, temperature: float | None, device: str, *, negatives: int | None = None,
    normalize: bool = True, count: bool = False, gradients: int = 1, crops: tuple[int, int] | None = None,
) -> None:  # fmt: skip
    """Forward and backward; without a temperature it is a tensor: the maxima are searched for. With crops, fewer
    negatives than all are drawn.
    """
    compute = OPERANDS[operands]
    online, target = (
        torch.ones(*([] if crops is None else [crops[k]]), b, d, dtype=compute, device=device) for k in range(2)
    )
    order = None
    if crops and negatives:
        order = torch.arange(b, device=device).repeat(math.prod(crops), 1)
    tau = torch.ones((), device=device) if temperature is None else temperature
    needs_grad = [True, gradients == 2, temperature is None]
    arguments = Arguments(
        online, target, tau, 1.0, 1.0, negatives, order, normalize, count, "none", compute, needs_grad, "triton"
    )
    with mock.patch.object(launch, "precision", return_value="tf32" if operands == "tf32" else "ieee"):
        losses, *saved = relic.forward(arguments)
        relic.backward(losses, arguments, *saved)


def launches(chip: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """Every listed config, its matrices the least and the most that a launch can have"""
    everything = {"count": True, "gradients": 2}
    yield "f16 D=256 search", partial(call, 4096, 256, "f16", None, "meta", **everything)
    for operands, d in (("bf16", 128), ("bf16", 256), ("bf16", 512), ("tf32", 128), ("ieee", 128)):
        if not chip.startswith("default") or operands != "bf16":
            yield f"{operands} D={d} fixed", partial(call, 4096, d, operands, 0.1, "meta")
    if chip == "sm_90":
        drawn = {"crops": (8, 2), "negatives": 10, "gradients": 2}
        yield "bf16 D=256 drawn", partial(call, 1024, 256, "bf16", 0.1, "meta", **drawn)


def small() -> Iterator[Callable[[], None]]:
    """Ragged shapes down every path"""
    for b, d, operands, temperature, options in (
        (1, 1, "f16", 0.1, {}),
        (33, 7, "f16", None, {"count": True, "gradients": 2}),
        (70, 100, "f16", 0.1, {"negatives": 11}),
        (40, 300, "f16", 0.1, {"negatives": 30, "gradients": 2}),
        (70, 100, "tf32", None, {"negatives": 11}),
        (40, 300, "ieee", 0.1, {"normalize": False}),
        (33, 70, "f16", 0.1, {"crops": (3, 2), "gradients": 2, "count": True}),
        (40, 7, "tf32", None, {"crops": (2, 2), "negatives": 11, "gradients": 2}),
    ):
        yield partial(call, b, d, operands, temperature, "cpu", **options)


def tuning(operands: str, width: int, kernel: str, device: str) -> Callable[[], tuple[Tensor, ...]]:
    """The call that tune.py times for `kernel`, all others as negatives, the gradient of one view"""
    compute = torch.bfloat16 if operands == "half" else torch.float32
    views = torch.randn(2, 1024 if operands == "ieee" else 4096, width, dtype=compute, device=device)
    needs_grad = [True, False, False]
    x = Arguments(*views, 0.1, 1.0, 1.0, None, None, True, False, "none", compute, needs_grad, "triton")
    losses, *saved = relic.forward(x)
    if kernel == "forward":
        return lambda: relic.forward(x)
    return lambda: relic.backward(torch.full_like(losses, 1 / len(losses)), x, *saved)[:1]


# ---- by the interpreter: test_interpreter.py starts these in a process of their own ----


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The triton backend on CPU tensors; what is read before it was written shows. Large batches are cut"""
    views = of_relic.views
    monkeypatch.setattr(of_relic, "views", lambda n, *rest, **kwargs: views(n if n <= 150 else 70, *rest, **kwargs))
    monkeypatch.setitem(backend._ORDER, "cpu", ("cpu", "triton"))
    backend.refusal.cache_clear()
    backend._choose.cache_clear()
    with oracle.poisoned_memory(), mock.patch.object(launch, "chip", return_value="sm_90"):
        yield


def case(test: Callable, *arguments: object) -> object:
    return pytest.param(partial(test, *arguments), id=" ".join(map(str, [test.__name__, *arguments])))


TARGET = "cpu", "triton"
HALF = (torch.float16, torch.bfloat16)
CASES = [
    *(
        case(of_relic.test_accuracy, *TARGET, dtype, *shape)
        for dtype, *shape in (
            # rows, columns, temperature, negatives
            (torch.float32, 2, 3, 0.5, None),
            (torch.float32, 67, 33, 0.1, None),
            (torch.float32, 100, 20, 0.1, 1),
            (torch.float32, 100, 33, 0.02, 60),  # a wide band, the maxima searched
        )
    ),
    *(
        case(test, *TARGET, *before, dtype, *after)
        for dtype in HALF
        for test, before, *after in (
            (of_relic.test_accuracy, (), 5, 33, 0.5, 3),
            (of_relic.test_accuracy, (), 150, 33, 0.05, 11),  # a narrow band
            (of_relic.test_accuracy, (), 40, 300, 0.2, 38),  # slices of columns
            (of_relic.test_temperature_gradient, (), *((0.5, None) if dtype == torch.bfloat16 else (0.03, 20))),
            (of_relic.test_unnormalised, (), 4.0),
            (of_relic.test_aligned_pairs, (of_relic.losses,), 0.05),
            (of_relic.test_collapsed, ()),
        )
    ),
    case(of_relic.test_temperature_gradient, *TARGET, torch.float32, 0.03, 20),
    case(of_relic.test_aligned_pairs, *TARGET, of_relic.mean_loss, torch.float32, 0.05),
    *(case(of_relic.test_no_divergence_where_views_agree, *TARGET, k, 0.1) for k in (None, 40)),
    case(of_relic.test_no_divergence_where_views_agree, *TARGET, None, 0.02),
    case(of_relic.test_small_divergences_keep_their_digits, *TARGET),
    case(of_relic.test_terms, *TARGET, {"alpha": 0.0}),
    case(of_relic.test_no_rows_and_one, *TARGET),
    case(of_relic.test_not_a_number_as_eager, *TARGET),
    case(of_relic.test_gradient_of_one_view, *TARGET, of_relic.losses),
    case(of_relic.test_backward_twice, *TARGET),
    *(case(of_relic.test_metrics, *TARGET, k) for k in (None, 30)),
    *(
        case(of_relic.TestMultiCrop().test_accuracy, *TARGET, dtype, 70, k)
        for dtype in (torch.float32, *HALF)
        for k in (None, 7)
    ),
    *(case(of_relic.TestMultiCrop().test_sum_and_scale, "triton", 3, k) for k in (None, 5)),
]


@pytest.mark.parametrize("test", CASES)
def test_as_on_the_cpu(test: Callable[[], None]) -> None:
    test()


@pytest.mark.parametrize("negatives", [None, 90])
def test_spans_of_several_tiles(negatives: int | None) -> None:
    inputs = of_relic.views(150, 20)
    with on_cpu():
        oracle.check(of_relic.losses, inputs, "triton", num_negatives=negatives)
        runs = [oracle.evaluate(of_relic.losses, list(inputs.values()), "triton") for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_nan_for_what_is_no_temperature(temperature: float) -> None:
    inputs = {name: x.requires_grad_() for name, x in of_relic.views(3, 5).items()}
    losses = of_relic.losses(**inputs, temperature=torch.tensor(temperature), backend="triton")
    assert losses.isnan().all()
    assert all(x.isnan().all() for x in torch.autograd.grad(losses.sum(), list(inputs.values())))
