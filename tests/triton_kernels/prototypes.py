"""Sinkhorn's, DINO's and iBOT's kernels: launches for offline.py, small calls for sanitize.py, tests for
test_interpreter.py.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

import sslops
from sslops.kernels.triton import dino, ibot, prototypes, sinkhorn
from sslops.ops.dino import Arguments as DINO
from sslops.ops.ibot import Arguments as IBOT
from sslops.ops.sinkhorn import Arguments as Sinkhorn
from sslops.ops.sinkhorn import potentials

from .. import oracle
from .. import test_dino as of_dino
from .. import test_ibot as of_ibot
from .. import test_sinkhorn as of_sinkhorn
from .common import OPERANDS, TARGET, case, launched, take_triton

on_cpu = contextlib.nullcontext
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def temperatures(on_device: bool, device: str) -> tuple[float | Tensor, float | Tensor]:
    return (torch.ones((), device=device),) * 2 if on_device else (0.1, 0.04)


def call_dino(
    views: int, teachers: int, b: int, k: int, operands: str, device: str, *, bias: bool = True, same: bool = False,
    on_device: bool = False, reduction: str = "mean",
) -> None:  # fmt: skip
    """Forward with its gradient where it has one, and backward"""
    new = partial(torch.ones, dtype=OPERANDS[operands], device=device)
    biases = torch.ones(teachers, k, device=device) if bias else None
    weights = torch.ones(b, device=device) if bias else None
    x = DINO([new(views, b, k)], [new(teachers, b, k)], None, None, False, *temperatures(on_device, device), biases,
             weights, same, reduction, True, backend="triton", needs_grad=[True, False])  # fmt: skip
    result, entropy, stats, *_ = dino.forward(x)
    dino.backward(result, x, entropy, stats)


def call_ibot(rows: int, k: int, operands: str, device: str, *, index: bool = True, bias: bool = True) -> None:
    new = partial(torch.ones, dtype=OPERANDS[operands], device=device)
    options = torch.ones(k, device=device) if bias else None, torch.ones(rows, device=device) if index else None
    at = torch.zeros(rows, dtype=torch.int64, device=device) if index else None
    x = IBOT(new(rows, k), new(1 if index else rows, k), None, None, False, *temperatures(index, device), *options, at,
             "mean", True, backend="triton", needs_grad=[True, False])  # fmt: skip
    result, entropy, stats, *_ = ibot.forward(x)
    ibot.backward(result, x, entropy, stats)


def call_sinkhorn(views: int, rows: int, k: int, operands: str, device: str, *, on_device: bool = False) -> None:
    scores = torch.ones(views, rows, k, dtype=OPERANDS[operands], device=device)
    x = Sinkhorn(scores, None, False, temperatures(on_device, device)[0], 3, True, "", backend="triton")
    sinkhorn.forward(x, potentials)


def launches(chip: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """All that changes the code much: dtype, how many teachers, whether wide loads fit"""
    if chip == "default":
        return
    yield "bf16 dino", partial(call_dino, 10, 2, 64, 65536, "bf16", "meta")
    yield "bf16 ibot", partial(call_ibot, 2458, 131072, "bf16", "meta", index=False)
    yield "ieee ibot", partial(call_ibot, 2458, 8192, "ieee", "meta", bias=False)
    yield "bf16 dino K=3000", partial(call_dino, 10, 2, 64, 3000, "bf16", "meta", bias=False, on_device=True)
    yield "ieee dino 8 teachers", partial(call_dino, 8, 8, 64, 65536, "ieee", "meta", same=True, reduction="none")
    yield "bf16 sinkhorn", partial(call_sinkhorn, 1, 128, 65536, "bf16", "meta")
    yield "ieee sinkhorn K=3000", partial(call_sinkhorn, 2, 512, 3000, "ieee", "meta", on_device=True)


def small() -> Iterator[Callable[[], None]]:
    """Ragged shapes down every path"""
    for views, teachers, b, k, options in (
        (1, 2, 1, 1, {}),
        (5, 2, 3, 300, {"on_device": True, "bias": False}),
        (4, 3, 2, 5000, {"same": True, "reduction": "none"}),
    ):
        for operands in ("f16", "ieee"):
            yield partial(call_dino, views, teachers, b, k, operands, "cpu", **options)
    for index in (True, False):
        yield partial(call_ibot, 7, 5000, "f16", "cpu", index=index, bias=not index)
    yield partial(call_sinkhorn, 2, 37, 300, "f16", "cpu", on_device=True)
    yield partial(call_sinkhorn, 1, 5, 1, "ieee", "cpu")


# ---- by the interpreter: test_interpreter.py starts these in a process of their own ----


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The triton backend on CPU tensors; what is read before it was written shows. Rows have several chunks"""
    take_triton(monkeypatch)
    monkeypatch.setattr(prototypes, "CHUNK", 256)
    with oracle.poisoned_memory():
        yield


CASES = [
    *(
        case(of_dino.test_accuracy, *TARGET, dtype, *arguments)
        for dtype, *arguments in (
            # reduction, views, teachers, images, prototypes
            (F32, "mean", 2, 2, 1, 1),  # of one prototype
            (F32, "none", 3, 3, 5, 130),
            (BF16, "mean", 5, 2, 3, 300),
            (BF16, "sum", 4, 6, 2, 33),
            (F16, "mean", 1, 2, 2, 257),
        )
    ),
    case(of_dino.test_pairs_and_temperatures, *TARGET, True, (0.01, 0.07)),
    case(of_dino.test_wide_logits, *TARGET, 1e3),
    case(of_dino.test_collapsed, *TARGET, 130),
    case(of_dino.test_a_crop_without_a_partner_is_not_looked_at, *TARGET),
    case(of_dino.test_same_gradient_in_forward_and_in_backward, *TARGET, F32),
    case(of_dino.test_no_gradient_to_the_teacher, *TARGET),
    case(of_dino.test_empty_and_not_finite, "triton"),
    *(
        case(of_ibot.test_accuracy, *TARGET, dtype, *arguments)
        for dtype, *arguments in (
            # reduction, weighted, shape
            (F32, "mean", True, (9, 600)),
            (F32, "sum", False, (1, 1)),
            (BF16, "none", True, (5, 33)),
            (F16, "mean", False, (2, 300)),
        )
    ),
    case(of_ibot.test_empty_and_not_finite, "triton"),
    *(
        case(of_sinkhorn.test_accuracy, *TARGET, dtype, start, shape)
        for dtype, start, shape in (
            (F32, "scores", (1, 5)),
            (F32, "probabilities", (2, 18, 260)),
            (BF16, "scores", (17, 33)),
            (F16, "probabilities", (3, 130)),
        )
    ),
]


@pytest.mark.parametrize("test", CASES)
def test_as_on_the_cpu(test: Callable[[], None]) -> None:
    test()


def test_lists_are_the_tensor() -> None:
    """Crops of one tensor, or in memory of their own"""
    student, teacher = of_dino.logits(5, 3, 2, 20)
    found = []
    for teachers in (teacher, [x.clone() for x in teacher]):  # three of which no launch can reach all
        for crops in ([student], list(student), [x.clone() for x in student.split([1, 3, 1])]):
            leaves = [x.clone().requires_grad_() if len(crops) == 3 else x.detach().requires_grad_() for x in crops]
            loss = sslops.dino(leaves, teachers, backend="triton")
            grads = torch.autograd.grad(loss * 0.7, leaves)  # by backward's kernel
            found.append((loss, torch.cat([g if g.dim() == 3 else g[None] for g in grads])))
    assert all(all(map(torch.equal, found[0], other)) for other in found)


def test_metrics() -> None:
    student, teacher = of_dino.logits(3, 2, 2, 300)
    ours, eager = (sslops.dino(student, teacher, return_metrics=True, backend=each) for each in ("triton", "eager"))
    torch.testing.assert_close(ours, eager)


def test_wide_scores() -> None:
    """Several blocks of rows; exp(scores / temperature) overflows. And the same bits again"""
    x = of_sinkhorn.scores(20, 40, scale=20.0)
    of_sinkhorn.accurate(x, "triton")
    once, again = (sslops.sinkhorn(x, backend="triton") for _ in range(2))
    assert once.isfinite().all()
    assert torch.equal(once, again)


def test_sinkhorn_without_rows_and_without_a_temperature() -> None:
    assert torch.equal(sslops.sinkhorn(torch.zeros(0, 4), backend="triton"), torch.zeros(4))
    assert sslops.sinkhorn(torch.zeros(0, 3, 4), backend="triton").shape == (0, 4)
    x = of_sinkhorn.scores(5, 9)
    for temperature in (0.07, 0.0, -1.0, float("nan")):
        b = sslops.sinkhorn(x, temperature=torch.tensor(temperature), backend="triton")
        if temperature > 0:
            torch.testing.assert_close(b, sslops.sinkhorn(x, temperature=temperature, backend="triton"))
        else:
            assert b.isnan().all()
    x[3, 2] = float("nan")
    assert sslops.sinkhorn(x, backend="triton").isnan().all()


def test_no_row_is_read_that_there_is_not() -> None:
    """On a GPU no index is checked: NaN, and of the others what is right."""
    student, teacher = of_ibot.logits(6, 40)
    student.requires_grad_()
    with mock.patch("sslops._check.indices"):
        index = torch.tensor([0, 6, 2, -1, 2**40, 5])
        losses = sslops.ibot(student, teacher, index=index, reduction="none", backend="triton")
    wrong = torch.tensor([False, True, False, True, True, False])
    assert torch.equal(losses.isnan(), wrong)
    (grad,) = torch.autograd.grad(losses.sum(), student)
    assert torch.equal(grad.isnan().all(1), wrong)
    right = sslops.ibot(student[~wrong], teacher, index=index[~wrong], reduction="none", backend="triton")
    assert torch.equal(losses[~wrong], right)


@pytest.mark.parametrize("apart", [False, True])
def test_launches(apart: bool) -> None:
    """One a sweep for the crops of one tensor, however they are listed; one for two crops that lie anywhere"""
    student, teacher = torch.randn(8, 2, 20), torch.randn(2, 2, 20)
    crops = [x.clone() for x in student[:2]] if apart else [student[:2], *student[2:].unbind()]
    found = launched(lambda: sslops.dino(crops, teacher, backend="triton"))
    assert found == ["_read", "_join", "_total"]


def test_only_from_logits() -> None:
    x, layer = torch.randn(2, 3, 4), torch.randn(5, 4)
    with pytest.raises(RuntimeError, match="dino's triton kernel has no last layer of its own"):
        sslops.dino(x, x, prototypes=layer, teacher_prototypes=layer, backend="triton")
    with pytest.raises(RuntimeError, match="sinkhorn's triton kernel has no last layer of its own"):
        sslops.sinkhorn(x, prototypes=layer, backend="triton")
