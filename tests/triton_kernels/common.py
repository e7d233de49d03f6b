"""What the modules of several ops share."""

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from sslops import backend

TARGET = "cpu", "triton"
FLOAT32 = ("tf32", "tf32x3", "ieee")  # by what launch.precision says of it
OPERANDS = {"bf16": torch.bfloat16, "f16": torch.float16} | dict.fromkeys(FLOAT32, torch.float32)


def precision(operands: str) -> str:
    """launch.precision's answer"""
    return operands if operands in FLOAT32 else "ieee"


def float32_on(chip: str) -> tuple[str, str]:
    """On one of offline.py's chips, of an op that has tf32x3: with TF32 allowed, and without"""
    return "tf32", "ieee" if chip.endswith("gfx942") else "tf32x3"


def multiply(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> None:
    """launch.multiply on a CPU, whose addmm has no out_dtype"""
    torch.addmm(out, a.float(), b.float(), alpha=alpha, beta=beta, out=out)


def launched(call: Callable[[], object]) -> list[str]:
    """The kernels that a call would launch, by the interpreter's names; none runs"""
    found: list[str] = []

    def run(kernel: InterpretedFunction, *args: object, **kwargs: object) -> None:
        found.append(kernel.fn.__name__)

    with mock.patch.object(InterpretedFunction, "run", run):
        call()
    return found


def take_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The triton backend on CPU tensors"""
    monkeypatch.setitem(backend._ORDER, "cpu", TARGET)
    backend.refusal.cache_clear()
    backend._choose.cache_clear()


def case(test: Callable, *arguments: object) -> object:
    return pytest.param(partial(test, *arguments), id=" ".join(map(str, [test.__name__, *arguments])))
