"""Compiles what the launchers would launch for chips that are not there, and reads what came out.

As a script, with the triton of its environment: looks for faults in every kernel, for the chips that are named or for
all. `tests/triton_kernels/<op>.py` says what an op can launch on a chip.
"""

import contextlib
import hashlib
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from sslops.kernels.triton import launch

from .resources import Row, counts, tile

HERE = Path(__file__).parent
TUNED = sorted(file.stem for file in (HERE.parents[1] / "kernels/triton").glob("*.json"))  # those with launch configs
OPS = [*TUNED, "prototypes", "sigreg"]


class Chip(NamedTuple):
    target: GPUTarget
    shared: int  # bytes that a block may have
    instruction: str  # that multiplies matrices


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024, "mma.sync"),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, "wgmma"),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, "tcgen05.mma"),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, "v_mfma"),
}
# Chips that no config is filed under take the default: older or smaller than those above, they are like these.
CHIPS |= {f"default on {name}": CHIPS[name]._replace(shared=64 * 1024) for name in ("sm_80", "gfx942")}
INSTRUCTIONS = ("tcgen05.mma", "wgmma", "mma.sync", "v_mfma")
TYPES = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}


class Launch(NamedTuple):
    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    divisible: list[str]  # arguments that are multiples of 16
    options: dict[str, object]
    compile: Callable[[], object]  # as the JIT would, under its own key

    def __str__(self) -> str:
        blocks = "x".join(str(self.constants[name]) for name in self.constants if name.startswith("BLOCK"))
        return f"{blocks} w{self.options.get('num_warps', 4)} s{self.options.get('num_stages', 3)}"

    @property
    def multiplies(self) -> bool:
        """Whether it must use the matrix instruction: not for exact float32 where NVIDIA's have it not"""
        operand = self.constants.get("DTYPE", self.signature[self.kernel.arg_names[0]])
        return "PRECISION" in self.constants and (
            self.constants["PRECISION"] in ("tf32", "tf32x3") or str(operand) not in ("fp32", "*fp32")
        )


@contextlib.contextmanager
def record(chip: str) -> Iterator[list[Launch]]:
    """Collects the launches that would happen on `chip`, specialised as triton does it, instead of launching."""
    launches: list[Launch] = []
    original = JITFunction.run

    def run(kernel: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        work = Launch(kernel, {}, {}, [], options, partial(original, kernel, *args, grid=grid, warmup=True, **kwargs))
        for parameter in kernel.params:
            name, value = parameter.name, given[parameter.name]
            special = isinstance(value, torch.Tensor) or (type(value) is int and not parameter.do_not_specialize)
            if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
                work.signature[name], work.constants[name] = "constexpr", value
                continue
            if isinstance(value, torch.Tensor):
                work.signature[name] = TYPES[value.dtype]
            else:
                work.signature[name] = "fp32" if isinstance(value, float) else "i32"
            if special and (isinstance(value, torch.Tensor) or value % 16 == 0):
                work.divisible.append(name)
        launches.append(work)

    with mock.patch.object(JITFunction, "run", run), mock.patch.object(launch, "chip", return_value=chip.split()[0]):
        yield launches


def source(work: Launch) -> ASTSource:
    names = work.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in work.divisible}
    return ASTSource(work.kernel, work.signature, work.constants, attributes)


def build(work: Launch, chip: Chip) -> CompiledKernel:
    return triton.compile(source(work), target=chip.target, options=work.options)


def hashed(work: Launch) -> str:
    """All that is compiled, the kernel's line and the functions that it calls included"""
    return hashlib.sha256(f"{source(work).hash()} {sorted(work.options.items())}".encode()).hexdigest()[:12]


def dump(cubin: str | Path) -> str:
    """Its resources and its code"""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, "-res-usage", "-sass", cubin], check=True, capture_output=True, text=True).stdout


def measured(binary: CompiledKernel, steps: int) -> tuple[int | str, ...]:
    """registers, stack, shared memory, instruction, the counts, and a tile's, which multiplies in so many steps"""
    assembly = binary.asm.get("amdgcn") or binary.asm["ptx"]
    instruction = next((name for name in INSTRUCTIONS if name in assembly), "-")
    if "amdgcn" in binary.asm:
        usage = {name: int(value) for name, value in re.findall(r"\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
        registers, stack = usage["vgpr_count"], usage["private_segment_fixed_size"]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(binary.asm["cubin"])
            cubin.flush()
            assembly = dump(cubin.name)
        registers, stack = (int(re.search(rf"{name}:(\d+)", assembly)[1]) for name in ("REG", "STACK"))
    of_tile = tile(assembly, steps) if "cubin" in binary.asm else [0] * 6
    return registers, stack, binary.metadata.shared, instruction, *counts(assembly), *of_tile


def fault(row: Row, work: Launch) -> str | None:
    """What is wrong with a compiled kernel"""
    chip = CHIPS[row.chip]
    if row.stack:
        return f"spills {row.stack} bytes: {row}"
    if row.shared > chip.shared:
        return f"over {chip.shared} bytes of shared memory: {row}"
    if work.multiplies and row.instruction != chip.instruction:
        return f"not with {chip.instruction}: {row}"
    return None


def works(chips: Iterable[str] = CHIPS) -> list[tuple[str, str, str, Launch]]:
    """(op, chip, call, launch) of each launch of each op on each chip, once, under the first call that makes it"""
    found: dict[tuple[str, ...], tuple[str, str, str, Launch]] = {}
    for op in OPS:
        for chip in chips:
            for name, call in importlib.import_module(f"tests.triton_kernels.{op}").launches(chip):
                with record(chip) as launches:
                    call()
                for work in launches:
                    if "default" in chip and "PRECISION" not in work.constants:
                        continue  # it has no config, and is the same as on the chip itself
                    found.setdefault((op, chip, work.kernel.__name__, str(work[1:5])), (op, chip, name, work))
    return list(found.values())


def steps(call: str, work: Launch) -> int:
    """How many steps of BLOCK_K columns a product of rows has: of the call's D, or of 4096 columns"""
    width = re.search(r"\bD=(\d+)", call)
    return max(1, int(width[1] if width else 4096) // int(work.constants.get("BLOCK_K", 4096)))


def compiled(op: str, chip: str, call: str, work: Launch) -> tuple[Row, str | None]:
    """What it came to, and what is wrong with it"""
    head = (op, chip, call, work.kernel.__name__, str(work))
    try:
        row = Row(*head, *measured(build(work, CHIPS[chip]), steps(call, work)), hashed(work))
    except Exception as error:  # ptxas gives up on some
        return Row(*head, 0, 0, 0, "-", *[0] * 10, ""), f"does not compile: {head}: {error}"
    return row, fault(row, work)


def compile_all(chips: Iterable[str] = CHIPS, known: Iterable[Row] = (), every: int = 1) -> tuple[list[Row], list[str]]:
    """One in `every` launch of every op on these chips, and the faults. What is known is not compiled again."""
    global _works, _known
    # inherited by the forked workers: a Launch cannot be pickled
    _works, _known = works(chips)[::every], {(row.op, row.chip, row.source): row for row in known}
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as pool:
        results = list(pool.map(_compile, range(len(_works)), chunksize=4))
    return [row for row, _ in results], [found for _, found in results if found]


def _compile(index: int) -> tuple[Row, str | None]:
    op, chip, call, work = _works[index]
    row = _known.get((op, chip, hashed(work)))
    return (row, fault(row, work)) if row else compiled(op, chip, call, work)


def main() -> None:
    """Chips, and a number for one launch in so many"""
    every = [int(word) for word in sys.argv[1:] if word.isdigit()] or [1]
    rows, faults = compile_all([word for word in sys.argv[1:] if not word.isdigit()] or CHIPS, every=every[0])
    print(f"triton {triton.__version__}: {len(rows)} kernels, {len(faults)} faults", *faults, sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
