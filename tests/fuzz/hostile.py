"""Wrong calls of all public functions and modules, and lies to torch.ops.sslops: each must be refused by name, within a
second and with nothing written, or be a call that makes sense. Prints counts; a crash shows as this process's end.

python -m tests.fuzz.hostile [--every K] [--seconds S]: every K-th call only
"""

import argparse
import faulthandler
import inspect
import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import sslops

from .. import oracle
from ..cases import CASES
from ..test_promises import calls

REFUSALS = (TypeError, ValueError, RuntimeError)
MADE_OF = {"swav": ("dino: ", "sinkhorn: "), "NegativeQueue.from_moco": ("NegativeQueue: ",)}  # messages may name these
FUNCTIONS = {"include", "exclude", "copied"}  # may be, and what a function raises is its own
# of work or memory: a million is a call that makes sense
AMOUNTS = {"iterations", "batch", "length", "size", "dim", "rows", "count"}


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        found += _tensors(value) if isinstance(value, (list, tuple)) else [value] * isinstance(value, Tensor)
    return found


def _readable(x: Tensor) -> bool:
    return x.layout == torch.strided and x.device.type == "cpu"


def of_tensor(x: Tensor) -> list[Any]:
    """What may stand where a tensor should"""
    found: list[Any] = [
        None, 3, "z", [1.0], x[None], x.sum(), x.to("meta"), x.to_sparse(), x.to(torch.complex64), x.bool(), x.int(),
        x.to(torch.uint8), x.double(), x.half(), x.bfloat16(), x.new_empty(0), x.new_empty(0, 0), x.flatten(),
        x.unsqueeze(-1), x.expand(2, *x.shape), torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    ]  # fmt: skip
    if x.dim():
        found += [
            x[:0],
            x[:1],
            x[..., :0],
            x[..., :-1],
            torch.cat([x, x]),
            torch.cat([x, x], -1),
            x.mT if x.dim() > 1 else x,
        ]
    if x.dtype in (torch.int32, torch.int64):
        found += [x - 10**6, x + 10**6, x * 0 - 1, x * 2**61, x * 0 - 2**63]
    elif x.is_floating_point():
        found += [x * float("nan"), x * 1e38]
    return found


def of_value(name: str, value: Any) -> list[Any]:
    """What may stand where anything else should"""
    numbers = [-1, 0, 1, 2, -(2**63), 10**30, -1.0, 0.0, 0.5, 1e-300, 1e300]
    numbers += [] if name in AMOUNTS else [10**6, 2**31, 2**63 - 1]
    numbers += [float("nan"), float("inf"), -float("inf"), 1j, True, False]
    others = [
        None,
        "",
        "nonsense",
        b"cpu",
        [],
        [1],
        [-1.0, "a"],
        (1, 2, 3),
        {},
        object(),
        int,
        torch.int32,
        torch.qint8,
    ]
    others += [
        oracle.Array(),
        10**400,
        torch.tensor(0.5),
        torch.tensor([0.5, 0.5]),
        torch.tensor(3),
        torch.tensor(0.5, device="meta"),
    ]
    if isinstance(value, list) and value:
        others += [value[:-1], value * 2, [*value[:-1], float("nan")], [*value[:-1], -value[-1]], value[0]]
    return [each for each in numbers + others if not (callable(each) and name in FUNCTIONS)]


def wrong_calls() -> Iterator[tuple[str, str, Callable[[], Any], list[Tensor]]]:
    """(op, which argument, the call, tensors that it must leave alone)"""
    for case in CASES:
        if case.call.__name__ == "drawn":
            continue
        given = case.inputs | case.options
        for name, parameter in inspect.signature(case.call).parameters.items():
            value = given.get(name, parameter.default)
            others = of_tensor(value) if isinstance(value, Tensor) else of_value(name, value)
            if value is None and case.inputs:
                others = others + of_tensor(next(iter(case.inputs.values())))
            for other in others:
                arguments = given | {name: other}
                yield case.op, name, lambda call=case.call, a=arguments: call(**a), _tensors(arguments.values())
    x = torch.randn(4, 6)
    modules: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
        ("EMA", sslops.EMA, {"target": torch.nn.Linear(3, 3), "online": torch.nn.Linear(3, 3), "momentum": 0.9,
                             "buffers": "copy", "include": None, "exclude": None, "copied": None, "half": "master",
                             "seed": 0, "backend": None}),
        ("ema_update_", sslops.ema_update_, {"targets": [x.clone()], "sources": [x.clone()], "momentum": 0.5,
                                             "shadows": None, "seed": None, "backend": None}),
        ("cosine_momentum", sslops.cosine_momentum, {"steps": 10, "start": 0.9, "end": 1.0}),
        ("ema_avg_fn", sslops.ema_avg_fn, {"decay": 0.9}),
        ("NegativeQueue", sslops.NegativeQueue, {"size": 8, "dim": 6, "dtype": None}),
        ("NegativeQueue.enqueue", sslops.NegativeQueue(8, 6).enqueue, {"keys": x, "ids": torch.arange(4),
                                                                       "labels": None, "group": None}),
        ("NegativeQueue.from_moco", sslops.NegativeQueue.from_moco, {"queue": x, "queue_ptr": torch.zeros(1).long()}),
        ("NegativeSampler", sslops.NegativeSampler, {"counts": torch.arange(5), "power": 0.75}),
        ("NegativeSampler.draw", sslops.NegativeSampler(torch.arange(5)).draw, {"rows": 3, "count": 2,
                                                                                "generator": None}),
        ("random_masking", sslops.random_masking, {"tokens": torch.randn(2, 4, 3), "mask_ratio": 0.5, "noise": None,
                                                   "generator": None, "backend": None}),
        ("swav", sslops.swav, {"scores": torch.randn(3, 4, 5), "prototypes": torch.randn(6, 5),
                               "unit_prototypes": False, "temperature": 0.1, "epsilon": 0.05, "iterations": 3,
                               "assign": 2, "queue": None, "reduction": "mean", "return_metrics": False,
                               "group": None, "backend": None}),
        ("explain", sslops.explain, {"op": "nt_xent"}),
    ]  # fmt: skip
    for op, call, given in modules:
        for name, value in given.items():
            others = of_tensor(value) if isinstance(value, Tensor) else of_value(name, value)
            for other in others:
                yield op, name, lambda call=call, a=given | {name: other}: call(**a), []


def lies() -> Iterator[tuple[str, str, Callable[[], Any], list[Tensor]]]:
    """Direct calls with one argument that is not what the others say"""
    for case in CASES:
        for op, arguments in calls(case, "cpu"):
            for k, (argument, value) in enumerate(zip(op._schema.arguments, arguments, strict=True)):
                if isinstance(value, Tensor):
                    others = of_tensor(value)
                elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                    others = [[], *([other] for other in of_tensor(value[0])), [*value, value[0][:-1]]]
                elif isinstance(value, torch.dtype):  # of a number that is none torch itself makes a crash
                    others = [
                        torch.int32,
                        torch.uint8,
                        torch.bool,
                        torch.qint8,
                        torch.complex64,
                        torch.float64,
                        "x",
                        None,
                    ]
                else:
                    others = of_value(argument.name, value)
                for other in others:
                    lie = (*arguments[:k], other, *arguments[k + 1 :])
                    yield case.op, f"{op} {argument.name}", lambda op=op, lie=lie: op(*lie), _tensors(lie)


def tried(op: str, which: str, call: Callable[[], Any], given: list[Tensor], seconds: float) -> tuple[str, str]:
    """What came of it, and what is wrong with that"""
    before = [(x, x.clone()) for x in given if _readable(x)]
    begin, message, error = time.perf_counter(), "", ""
    try:
        with torch.no_grad():
            call()
    except REFUSALS as refusal:
        message, error = str(refusal), type(refusal).__name__
    except Exception as other:
        return "refused", f"{type(other).__name__}: {other}"
    trouble = ""
    if time.perf_counter() - begin > seconds:
        trouble = f"{time.perf_counter() - begin:.1f} s"
    if error and not (
        message.startswith((op, *MADE_OF.get(op, ()))) or f"sslops::{op}" in message or f"{op}()" in message
    ):
        trouble = f"not by name: {error}: {message}"
    for x, kept in before:
        same = torch.equal(x, kept) if x.is_quantized or not x.is_floating_point() else torch.equal(
            x.double().nan_to_num(), kept.double().nan_to_num())  # fmt: skip
        if not same:
            trouble = "an argument was changed"
    return "refused" if error else "taken", trouble


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="that a call may take at most")
    asked = parser.parse_args()
    faulthandler.enable()
    counts: Counter[str] = Counter()
    failures = []
    for what, stream in (("wrong calls", wrong_calls()), ("lying direct calls", lies())):
        for op, which, call, given in itertools.islice(stream, 0, None, asked.every):
            print(f"\r{op} {which}", end="", file=sys.stderr)
            result, trouble = tried(op, which, call, given, asked.seconds)
            counts[f"{what} {result}"] += 1
            if trouble:
                failures.append(f"{op} {which}: {trouble[:300]}")
    for text in dict.fromkeys(failures):
        print(text)
    for what, number in counts.items():
        print(number, what)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
