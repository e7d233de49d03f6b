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
from sslops.kernels.triton import dino, ibot, last_layer, launch, prototypes, sinkhorn
from sslops.ops.dino import Arguments as DINO
from sslops.ops.ibot import Arguments as IBOT
from sslops.ops.sinkhorn import Arguments as Sinkhorn
from sslops.ops.sinkhorn import potentials

from .. import oracle
from .. import test_dino as of_dino
from .. import test_ibot as of_ibot
from .. import test_sinkhorn as of_sinkhorn
from .common import OPERANDS, TARGET, case, launched, multiply, take_triton

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """In chunks of rows that small inputs have more than one of"""
    with mock.patch.object(launch, "multiply", multiply), mock.patch.multiple(last_layer, ROWS=4, LOGITS=1):
        yield


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


def call_features(rows: int, k: int, d: int, operands: str, device: str, *, unit: bool = True) -> None:
    """ibot with a last layer, with an index where it is of unit rows"""
    dtype = OPERANDS[operands]
    new = partial(torch.ones, dtype=dtype, device=device)
    at = torch.zeros(rows, dtype=torch.int64, device=device) if unit else None
    x = IBOT(new(rows, d), new(rows, d), new(k, d), new(k, d), unit, 0.1, 0.04, None, None, at, "mean", True, dtype,
             "triton", [True, True])  # fmt: skip
    ibot.forward(x)


def call_sinkhorn(
    views: int, rows: int, k: int, operands: str, device: str, *, on_device: bool = False, d: int | None = None
) -> None:
    """of scores, or of features [V, B, d]"""
    new = partial(torch.ones, dtype=OPERANDS[operands], device=device)
    layer = None if d is None else new(k, d)
    x = Sinkhorn(new(views, rows, d or k), layer, False, temperatures(on_device, device)[0], 3, True, "",
                 OPERANDS[operands], "triton")  # fmt: skip
    sinkhorn.forward(x, potentials)


def launches(chip: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """All that changes the code much: dtype, how many teachers, whether wide loads fit"""
    if chip.startswith("default"):
        return
    yield "bf16 dino", partial(call_dino, 10, 2, 64, 65536, "bf16", "meta")
    yield "bf16 ibot", partial(call_ibot, 2458, 131072, "bf16", "meta", index=False)
    yield "ieee ibot", partial(call_ibot, 2458, 8192, "ieee", "meta", bias=False)
    yield "bf16 dino K=3000", partial(call_dino, 10, 2, 64, 3000, "bf16", "meta", bias=False, on_device=True)
    yield "ieee dino 8 teachers", partial(call_dino, 8, 8, 64, 65536, "ieee", "meta", same=True, reduction="none")
    yield "bf16 features", partial(call_features, 2458, 65536, 256, "bf16", "meta")
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
    yield partial(call_sinkhorn, 2, 20, 70, "f16", "cpu", d=9)
    for unit in (True, False):
        yield partial(call_features, 20, 300, 21, "f16", "cpu", unit=unit)


# ---- by the interpreter: test_interpreter.py starts these in a process of their own ----


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The triton backend on CPU tensors; what is read before it was written shows. Rows have several chunks"""
    take_triton(monkeypatch)
    monkeypatch.setattr(prototypes, "CHUNK", 256)
    with on_cpu(), oracle.poisoned_memory():
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
            (BF16, "scores", (9, 6, 33)),  # more views than a chunk has
            (F16, "probabilities", (3, 130)),
        )
    ),
    *(
        case(of_ibot.test_accuracy_from_features, *TARGET, dtype, *arguments)
        for dtype, *arguments in (
            # unit, shape: rows, in chunks of 4, prototypes and columns
            (F32, True, (1, 1, 1)),
            (F32, False, (5, 300, 24)),
            (BF16, True, (9, 130, 21)),
            (F16, True, (6, 33, 300)),
        )
    ),
    *(
        case(of_dino.test_accuracy_from_features, *TARGET, dtype, *arguments)
        for dtype, *arguments in (
            # reduction, views, teachers, images, prototypes, columns
            (F32, "none", 3, 2, 3, 70, 17),
            (F16, "mean", 3, 3, 2, 40, 8),
        )
    ),
    case(of_dino.test_features_of_lists_and_of_some, *TARGET, 2),
    case(of_ibot.test_a_teacher_without_width, *TARGET),
    case(of_ibot.test_features_are_a_linear_layer, *TARGET, 6),
    case(of_ibot.test_a_frozen_last_layer_changes_no_bit, *TARGET, True, 5),
    case(of_ibot.test_features_of_no_rows, "triton"),
    *(
        case(of_sinkhorn.test_of_features, *TARGET, dtype, unit, *shapes)
        for dtype, unit, *shapes in (
            # rows, in chunks of 4, and columns; prototypes
            (F32, True, (9, 12), 300),
            (BF16, False, (5, 2, 9), 50),
            (F16, True, (2, 5, 5), 20),
            (F32, False, (0, 3), 5),
            (F32, True, (4, 0), 5),
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


@pytest.mark.parametrize("layer", [False, True])
def test_no_row_is_read_that_there_is_not(layer: bool) -> None:
    """On a GPU no index is checked: NaN, and of the others what is right."""
    student, teacher = of_ibot.logits(6, 40)
    student.requires_grad_()
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)) if layer else None
    options = {"reduction": "none", "backend": "triton", "prototypes": weight, "teacher_prototypes": weight}
    with mock.patch("sslops._check.indices"):
        index = torch.tensor([0, 6, 2, -1, 2**40, 5])
        losses = sslops.ibot(student, teacher, index=index, **options)
    wrong = torch.tensor([False, True, False, True, True, False])
    assert torch.equal(losses.isnan(), wrong)
    (grad,) = torch.autograd.grad(losses.sum(), student)
    assert torch.equal(grad.isnan().all(1), wrong)
    right = sslops.ibot(student[~wrong], teacher, index=index[~wrong], **options)
    assert torch.equal(losses[~wrong], right)


@pytest.mark.parametrize("apart", [False, True])
def test_launches(apart: bool) -> None:
    """One a sweep for the crops of one tensor, however they are listed; one for two crops that lie anywhere"""
    student, teacher = torch.randn(8, 2, 20), torch.randn(2, 2, 20)
    crops = [x.clone() for x in student[:2]] if apart else [student[:2], *student[2:].unbind()]
    found = launched(lambda: sslops.dino(crops, teacher, backend="triton"))
    assert found == ["_read", "_join", "_total"]


@pytest.mark.parametrize("tau", [0.3, torch.tensor(0.3)])
def test_float16s_range(tau: float | Tensor) -> None:
    """Rows of which a loss over a million is the mean: float16 has nothing of them, if they are not scaled"""
    student, prototypes, *rest = (x.half().float() for x in of_ibot.features(6, 70, 12))
    options = {"weights": torch.logspace(-9, -6, 6), "reduction": "sum", "student_temp": tau}
    op = partial(of_ibot.from_features, teacher=rest[0], teacher_prototypes=rest[1], **options)
    _, *exact = oracle.evaluate(op, [student, prototypes], "eager", torch.float64)
    with torch.autocast("cpu", F16):
        _, *found = oracle.evaluate(op, [student, prototypes], "triton")
    for x, y in zip(found, exact, strict=True):
        scale = options["weights"][:, None] if len(x) == 6 else 1.0
        assert max(oracle.errors(x / scale, y / scale)) < torch.finfo(F16).eps


def test_swav_of_embeddings() -> None:
    """Sinkhorn's logits made in every pass, with a queue, or once: all is as from scores"""
    x, queue, prototypes, _ = of_dino.features(3, 2, 5, 30, 12)
    leaves = [x.requires_grad_(), prototypes.requires_grad_()]
    options = {"epsilon": 0.5, "assign": 2}
    found = [
        sslops.swav(x, queue=queue, prototypes=prototypes, backend="triton", **options),
        sslops.swav(x @ prototypes.t(), queue=queue @ prototypes.t(), backend="eager", **options),
    ]
    torch.testing.assert_close(*found)
    for ours, theirs in zip(*(torch.autograd.grad(loss, leaves) for loss in found), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_what_is_not_wanted_is_not_made() -> None:
    """No gradient of a frozen layer, nor any without gradients; Sinkhorn's logits once, if a chunk is all"""
    student, prototypes, teacher, of_teacher = of_ibot.features(6, 70, 16)
    made: list[tuple[int, ...]] = []
    first, second = [(4, 70)] * 2, [(2, 70)] * 2  # the student's and the teacher's logits of either chunk
    with mock.patch.object(launch, "multiply", lambda out, *_, **__: made.append(tuple(out.shape))):
        for grads, expected in (
            ((False, False), [*first, *second]),
            ((True, False), [*first, (4, 16), *second, (2, 16)]),
            ((False, True), [*first, (70, 16), *second, (70, 16)]),
        ):
            made.clear()
            leaves = [x.detach().requires_grad_(each) for x, each in zip((student, prototypes), grads, strict=True)]
            launched(partial(of_ibot.from_features, *leaves, teacher, of_teacher, "triton"))
            assert made == expected
        for rows, expected in ((4, [(4, 70)]), (6, [(4, 70), (2, 70)] * 3)):
            made.clear()
            launched(partial(sslops.sinkhorn, student[:rows], prototypes=prototypes, backend="triton"))
            assert made == expected
