"""Proves every load and store of the Triton kernels inside its tensor, by triton-viz's symbolic sanitizer.

A script, for an environment of its own: triton-viz needs an older triton (requirements-sanitize.txt). No value is
computed; a violation is printed, with its line, and ends the script.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import builtins
import contextlib
import importlib
import io
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from unittest import mock

import torch
import triton
import triton.language as tl
import triton_viz
from triton_viz.clients.sanitizer import sanitizer
from triton_viz.core import patch
from triton_viz.frontends.triton import TRITON_NAMESPACES

jit = triton.jit


def transposed(x: tl.tensor) -> tl.tensor:
    """Of a matmul's operand: triton-viz's own tl.trans forgets the shape, and no address depends on the values"""
    return tl.tensor(x.handle, tl.block_type(x.dtype, x.shape[::-1]))


class Sanitizer(sanitizer.SymbolicSanitizer):
    """Its own checks after a loop bound that loop's index only, and not those of the loops around it."""

    def _check_range_satisfiable(self, address: object, constraints: object, *args: object) -> None:
        names = [loop.lineno for loop in self.loop_stack]
        assert len(set(names)) == len(names), f"nested loops in line {names[-1]} of two functions: indices collide"
        around = [
            sanitizer._range_to_iterator_constraint(loop.idx_z3, start=loop.start, stop=loop.stop, step=loop.step)
            for loop in self.loop_stack
        ]
        super()._check_range_satisfiable(address, sanitizer._and_constraints(constraints, around), *args)


def traced(function: Callable | None = None, **options: object) -> Callable:
    """triton.jit whose kernels are checked as they are launched"""
    if function is None:
        return lambda f: traced(f, **options)
    return triton_viz.trace(client=Sanitizer(abort_on_error=True))(jit(**options)(function))


triton.jit = traced
builtins._triton_viz_loop_patcher = patch._loop_patcher  # it is for the kernel's module only, a loop may be another's
tl.trans = transposed
del TRITON_NAMESPACES[tl]["trans"]


@traced
def _unmasked(x, n, BLOCK: tl.constexpr):
    for row in range(0, 2):
        for i in range(0, n, BLOCK):
            tl.store(x + row * n + i + tl.arange(0, BLOCK), 0.0)


def assert_a_planted_bug_is_found() -> None:
    _unmasked[(1,)](torch.zeros(2, 8), 8, 4)  # in bounds: must pass
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _unmasked[(1,)](torch.zeros(2, 7), 7, 4)
    except SystemExit:
        return
    raise AssertionError("a store beyond the end was not found")


def check(name: str, chip: str) -> str:
    from sslops.kernels.triton import launch

    start, op = time.perf_counter(), importlib.import_module(f"tests.triton_kernels.{name}")
    with mock.patch.object(launch, "chip", return_value=chip), op.on_cpu():
        for call in op.small():
            call()
    return f"{name} as on {chip}: in bounds, {time.perf_counter() - start:.0f} s"


def main() -> None:
    assert_a_planted_bug_is_found()
    from sslops.kernels.triton import launch

    from . import offline

    chips = {name: launch.configs(name).keys() & {"sm_90", "default"} for name in offline.TUNED}
    work = [(name, chip) for name in offline.OPS for chip in sorted(chips.get(name, ["any chip"]))]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for line in pool.map(check, *zip(*work, strict=True)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
