"""What the compilers make of the GPU kernels, on a machine without a GPU: kernels.tsv, and a part of RESULTS.md.

Every Triton kernel with every config of its chip (by tests/triton_kernels/offline.py) and every CUDA kernel (by nvcc):
registers, spills, shared memory, occupancy, and how many instructions multiply matrices, take exponentials, load 16
bytes and load less. As a script it prints what differs from kernels.tsv; with --write it writes it.

The times are estimates: the datasheets' rates, all reached at once. An op's bench_<op>.py counts its work in WORK.
"""

import functools
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks/kernels.tsv"


class Chip(NamedTuple):
    name: str
    registers: int  # of a multiprocessor, 32 bits each
    shared: int  # bytes, of a multiprocessor
    warps: int  # resident on a multiprocessor at most
    lanes: int  # of a warp
    flops: float  # of half-precision matrix products, a second
    bytes: float  # of device memory, a second
    exps: float  # a second


# The datasheets' rates (dense, SXM or OAM); exp: 16 a cycle on each multiprocessor, at the highest clock.
CHIPS = {
    "sm_80": Chip("A100", 65536, 164 * 1024, 64, 32, 312e12, 2.04e12, 108 * 16 * 1.41e9),
    "sm_90": Chip("H100", 65536, 228 * 1024, 64, 32, 989e12, 3.35e12, 132 * 16 * 1.98e9),
    "sm_100": Chip("B200", 65536, 228 * 1024, 64, 32, 2250e12, 8.0e12, 148 * 16 * 1.97e9),
    "gfx942": Chip("MI300X", 4 * 512 * 64, 64 * 1024, 32, 64, 1307e12, 5.3e12, 304 * 16 * 2.1e9),
}
COUNTED = {  # in SASS, and in AMD's assembly
    "matrix": r"\b(?:H|HG|UTCH|UTCQ|UTCO?)MMA|\bv_mfma_",
    "exp": r"\bMUFU\.EX2|\bv_exp_f32",
    "loads16": r"\bLDG?(?:STS)?\.E\S*\.128|\bUTMALDG|\bUBLKCP|\b(?:global|buffer)_load_dwordx4",
    "loads": r"\bLDG?(?:STS)?\.E(?!\S*\.128)|\b(?:global|buffer)_load_(?!dwordx4)",
}


class Row(NamedTuple):
    op: str
    chip: str
    call: str
    kernel: str
    config: str
    registers: int
    stack: int  # bytes a thread: what was spilled
    shared: int  # bytes a block
    occupancy: str  # of the warps that a multiprocessor can hold
    matrix: int
    exp: int
    loads16: int
    loads: int


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table that reads as well in a terminal: all to the right"""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    padded = [header, ["-" * (width - 1) + ":" for width in widths], *lines]
    return "\n".join(f"| {' | '.join(map(str.rjust, line, widths))} |" for line in padded)


def occupancy(chip: Chip, registers: int, shared: int, threads: int) -> str:
    warps = threads // chip.lanes
    by_registers = chip.registers // (max(8, -(-registers // 8) * 8) * threads)
    reserved = 1024 if chip.lanes == 32 else 0
    blocks = min(by_registers, chip.shared // (shared + reserved) if shared else 32, chip.warps // warps, 32)
    return f"{100 * blocks * warps // chip.warps}%"


def counts(assembly: str) -> list[int]:
    return [len(re.findall(pattern, assembly)) for pattern in COUNTED.values()]


@functools.cache
def cuobjdump() -> str:
    import triton

    return shutil.which("cuobjdump") or str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def dump(cubin: Path, what: str) -> str:
    return subprocess.run([cuobjdump(), what, cubin], check=True, capture_output=True, text=True).stdout


def cuda_rows() -> Iterator[Row]:
    """Every kernel of csrc/cuda, by nvcc"""
    threads = 256  # of each one's blocks
    for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
        for arch in (name for name in CHIPS if name.startswith("sm_")):
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder, "cubin")
                command = ["nvcc", "-O3", "-DNDEBUG", "-std=c++17", f"-I{ROOT}/csrc", f"-arch={arch}", "-cubin"]
                subprocess.run([*command, "-o", cubin, source], check=True)
                usage, code = dump(cubin, "-res-usage"), dump(cubin, "-sass")
            bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", code, re.DOTALL))
            for symbol, numbers in sorted(re.findall(r"Function (\S+):\n(.*)", usage)):
                name = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout
                kernel = name.split("(anonymous namespace)::")[1].split("(")[0]
                registers, stack, shared = (
                    int(re.search(rf"{n}:(\d+)", numbers)[1]) for n in ("REG", "STACK", "SHARED")
                )
                share = occupancy(CHIPS[arch], registers, shared, threads)
                yield Row(
                    source.stem, arch, "CUDA", kernel, "", registers, stack, shared, share, *counts(bodies[symbol])
                )


def _triton_row(index: int) -> Row:
    import offline

    op, arch, call, work = _works[index]
    binary = offline.build(work, offline.CHIPS[arch])
    registers, stack, shared, _ = offline.resources(binary)
    if arch.startswith("sm_"):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            assembly = dump(Path(file.name), "-sass")
    else:
        assembly = binary.asm["amdgcn"]
    threads = binary.metadata.num_warps * CHIPS[arch].lanes
    share = occupancy(CHIPS[arch], registers, shared, threads)
    return Row(op, arch, call, work.kernel.__name__, str(work), registers, stack, shared, share, *counts(assembly))


def triton_rows() -> list[Row]:
    """Every kernel that a launcher launches on a chip that has configs of its own"""
    global _works
    sys.path[:0] = [str(ROOT / "tests/triton_kernels"), str(ROOT / "tests")]
    import offline

    _works = offline.works(CHIPS)  # inherited by the forked workers: a Launch cannot be pickled
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        return list(pool.map(_triton_row, range(len(_works)), chunksize=4))


def nvcc() -> str | None:
    """Its release, None where it is not"""
    if shutil.which("nvcc") is None:
        return None
    done = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True)
    return re.search(r"release ([\d.]+)", done.stdout)[1]


def text(rows: Iterable[Row]) -> str:
    return "\n".join("\t".join(map(str, row)) for row in (Row._fields, *rows)) + "\n"


def read() -> tuple[str, list[Row]]:
    """The compilers, and what they made of the kernels"""
    compilers, _, *lines = TABLE.read_text().splitlines()
    return compilers, [Row(*(int(v) if v.isdigit() else v for v in line.split("\t"))) for line in lines]


def faults(rows: Iterable[Row]) -> list[str]:
    """What is wrong with CUDA kernels whatever the table says; offline.fault is for Triton's"""
    return [f"spills {row.stack} bytes: {row}" for row in rows if row.stack]


def estimates() -> list[list[str]]:
    """[op, part, shape, and a time for each chip]: the slowest of its matrix FLOP, exponentials and bytes"""
    lines = []
    for file in sorted((ROOT / "benchmarks").glob("bench_*.py")):
        work = getattr(importlib.import_module(file.stem), "WORK", {})
        for (part, shape), counted in work.items():
            cells = []
            for chip in CHIPS.values():
                needs = {name: counted.get(name, 0) / getattr(chip, name) * 1e3 for name in ("flops", "exps", "bytes")}
                slowest = max(needs, key=needs.get)
                cells.append(f"{needs[slowest]:.3g} ms ({slowest})")
            lines.append([file.stem.removeprefix("bench_"), part, shape, *cells])
    return lines


def section() -> str:
    """For RESULTS.md: estimated times, and a part of the table"""
    compilers, rows = read()
    shown = [row for row in rows if row.call in ("CUDA", "bf16 D=128 fixed", "bf16 D=512 fixed") and row.op != "probe"]
    lines = [[*map(str, row)] for row in shown]
    chips = [chip.name for chip in CHIPS.values()]
    return f"""## The GPU kernels, compiled

No time here is measured. An **estimate** is the longest of what the matrix FLOP, the exponentials and the bytes of
device memory take at the datasheet's rates: a bound that a kernel comes near to at best.

{markdown(["op", "part", "estimate for", *chips], estimates())}

What {compilers} made of some; [kernels.tsv](benchmarks/kernels.tsv) has all. `stack` is bytes spilled a
thread, `shared` bytes a block, `occupancy` the share of a multiprocessor's warps; then instructions in the code: matrix
products, exponentials, loads of 16 bytes, other loads.

{markdown(list(Row._fields), lines)}"""


def main() -> None:
    rows = [*cuda_rows(), *triton_rows()]
    if "--write" in sys.argv:
        import triton

        TABLE.write_text(f"triton {triton.__version__} and nvcc {nvcc()}\n{text(rows)}")
    changed = set(text(rows).splitlines()) ^ set(TABLE.read_text().splitlines()[1:])
    found = faults(rows)
    print(f"{len(rows)} kernels", *found, *sorted(changed), sep="\n")
    sys.exit(bool(found or changed))


if __name__ == "__main__":
    main()
