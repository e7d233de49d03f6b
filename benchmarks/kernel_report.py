"""The GPU kernels as compilers see them: the part of RESULTS.md that needs no GPU.

The numbers are tests/triton_kernels/resources.tsv; `python -m benchmarks.kernel_report` prints what
differs from it, and --write writes it. How many blocks a multiprocessor holds, and its occupancy, follow from them.

The times are estimates: the datasheets' rates, all reached at once. An op's bench_<op>.py counts its work in WORK.
"""

import hashlib
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.triton_kernels import resources
from tests.triton_kernels.resources import Row

ROOT = Path(__file__).parents[1]


class Chip(NamedTuple):
    name: str
    registers: int  # of a multiprocessor, 32 bits each
    shared: int  # bytes, of a multiprocessor
    warps: int  # resident on a multiprocessor at most
    lanes: int  # of a warp
    flops: float  # of half-precision matrix products, a second
    bytes: float  # of device memory, a second
    processors: int
    clock: float  # the highest, a second

    @property
    def exps(self) -> float:
        """A second: 16 a cycle on each multiprocessor"""
        return 16 * self.processors * self.clock

    def a_cycle(self, rate: float) -> float:
        """What a multiprocessor does in a cycle of what the chip does in a second"""
        return rate / self.processors / self.clock


# The datasheets' rates (dense, SXM or OAM).
CHIPS = {
    "sm_80": Chip("A100", 65536, 164 * 1024, 64, 32, 312e12, 2.04e12, 108, 1.41e9),
    "sm_90": Chip("H100", 65536, 228 * 1024, 64, 32, 989e12, 3.35e12, 132, 1.98e9),
    "sm_100": Chip("B200", 65536, 228 * 1024, 64, 32, 2250e12, 8.0e12, 148, 1.97e9),
    "gfx942": Chip("MI300X", 4 * 512 * 64, 64 * 1024, 32, 64, 1307e12, 5.3e12, 304, 2.1e9),
}
CUDA_BLOCK = "w8"  # of csrc/cuda's kernels: 256 threads


def markdown(header: list[str], lines: list[list[str]]) -> str:
    """A table that reads as well in a terminal: all to the right"""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    padded = [header, ["-" * (width - 1) + ":" for width in widths], *lines]
    return "\n".join(f"| {' | '.join(map(str.rjust, line, widths))} |" for line in padded)


def blocks(row: Row) -> int:
    """How many of them a multiprocessor holds"""
    chip = CHIPS[row.chip]
    by_registers = chip.registers // (max(8, -(-row.registers // 8) * 8) * warps(row) * chip.lanes)
    reserved = 1024 if chip.lanes == 32 else 0
    by_shared = chip.shared // (row.shared + reserved) if row.shared else 32
    return min(by_registers, by_shared, chip.warps // warps(row), 32)


def share(row: Row) -> str:
    """Of its limit, what a model gives a kernel that is nothing but its tiles, and what they wait for

    A cycle of a multiprocessor issues 4 instructions, reads 128 bytes of shared memory for wgmma, and does its part of
    what the chip does in a second. The limit: matrix products (in tf32x3 three of TF32) or exponentials, whatever takes
    longer, or where nothing is multiplied the bytes. All go on together, but for a block that is alone on its
    multiprocessor: there a tile's products take turns with what is done to them.
    """
    chip = CHIPS[row.chip]
    if not row.issued or row.call.startswith("ieee") or (row.instruction != "-" and not row.macs):
        return "-"  # not NVIDIA's code, no matrix instructions for it, or their size is not in them
    rate = chip.a_cycle(chip.flops) / 2 / (2 if row.call.startswith("tf32") else 1)
    each = {
        "matrix": row.macs / rate,
        "operands": row.operands / 128,
        "exps": row.exps / 16,
        "instructions": row.issued / 4,
        "bytes": 0 if row.macs else row.moved / chip.a_cycle(chip.bytes),
    }
    longest = max(each, key=each.__getitem__)
    limit, time = max(each["bytes"], each["matrix"], each["exps"] if row.macs else 0), each[longest]
    if row.macs and blocks(row) == 1:
        multiplying = max(each["matrix"], each["operands"], (row.issued - row.apart) / 4)
        longest, time = "turns", multiplying + max(each["exps"], row.apart / 4)
    return f"{100 * limit / time:.0f}% ({longest})"


def warps(row: Row) -> int:
    """Of a block"""
    return int(re.search(r"\bw(\d+)", row.config)[1])


def hashed(source: Path) -> str:
    """Of a source and all of ours that it includes"""
    found, new = set(), {source}
    while new:
        found |= new
        names = {
            (file.parent, name) for file in new for name in re.findall(r'^#include "(.+)"', file.read_text(), re.M)
        }
        new = {
            folder / name for at, name in names for folder in (at, ROOT / "csrc") if (folder / name).exists()
        } - found
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(found))).hexdigest()[:12]


def cuda_rows(known: Iterable[Row] = ()) -> Iterator[Row]:
    """Every kernel of csrc/cuda, by nvcc. What is known is not compiled again."""
    from tests.triton_kernels import offline  # with triton, which is not needed to read the table

    for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
        text = hashed(source)
        for arch in (name for name in CHIPS if name.startswith("sm_")):
            if held := [row for row in known if (row.op, row.chip, row.source) == (source.stem, arch, text)]:
                yield from held
                continue
            with tempfile.TemporaryDirectory() as folder:
                cubin = Path(folder, "cubin")
                command = ["nvcc", "-O3", "-DNDEBUG", "-std=c++17", f"-I{ROOT}/csrc", f"-arch={arch}", "-cubin"]
                subprocess.run([*command, "-o", cubin, source], check=True)
                listing = offline.dump(cubin)
            bodies = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", listing, re.DOTALL))
            for symbol, usage in sorted(re.findall(r"Function (\S+):\n(.*)", listing)):
                name = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout
                kernel = name.split("(anonymous namespace)::")[1].split("(")[0]
                numbers = (int(re.search(rf"{n}:(\d+)", usage)[1]) for n in ("REG", "STACK", "SHARED"))
                yield Row(
                    source.stem,
                    arch,
                    "CUDA",
                    kernel,
                    CUDA_BLOCK,
                    *numbers,
                    "-",
                    *resources.counts(bodies[symbol]),
                    *resources.tile(bodies[symbol], 1),
                    text,
                )


def nvcc() -> str | None:
    """Its release, None where it is not"""
    if shutil.which("nvcc") is None:
        return None
    done = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True)
    return re.search(r"release ([\d.]+)", done.stdout)[1]


def estimates() -> list[list[str]]:
    """[op, part, shape, and a time for each chip]: the slowest of its matrix FLOP, exponentials and bytes"""
    lines = []
    for file in sorted((ROOT / "benchmarks").glob("bench_*.py")):
        work = getattr(importlib.import_module(f"benchmarks.{file.stem}"), "WORK", {})
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
    compilers, rows = resources.read()
    lines = []
    for row in rows:
        if row.call in ("CUDA", "bf16 D=128 fixed", "bf16 D=512 fixed") and row.chip in CHIPS and row.op != "probe":
            held = blocks(row)
            filled = f"{100 * held * warps(row) // CHIPS[row.chip].warps}%"
            lines.append([*map(str, row[:-1]), str(held), filled, share(row)])
    chips = [chip.name for chip in CHIPS.values()]
    return f"""## The GPU kernels, compiled

No time here is measured. An **estimate** is the longest of what the matrix FLOP, the exponentials and the bytes of
device memory take at the datasheet's rates: a bound that a kernel comes near to at best.

{markdown(["op", "part", "estimate for", *chips], estimates())}

What {compilers} made of some; [resources.tsv](tests/triton_kernels/resources.tsv) has all. `stack` is bytes spilled a
thread, `shared` bytes a block, `instruction` what multiplies matrices; then how many instructions do so, take
exponentials, load 16 bytes, load less. For a tile a warp issues so many instructions (`issued`; so many `apart` from
its products), multiplies and adds `macs` numbers, of which wgmma reads `operands` bytes of shared memory, takes `exps`,
and moves so many bytes. A multiprocessor holds so many `blocks`, with so much of its warps' room filled; `share` is
what a model makes of these numbers: of the limit, were the kernel nothing but its tiles, and what they wait for
([how](benchmarks/kernel_report.py)). No GPU has confirmed it.

{markdown([*Row._fields[:-1], "blocks", "occupancy", "share"], lines)}"""


def main() -> None:
    import triton

    from tests.triton_kernels import offline

    rows = list(cuda_rows())
    faults = [f"spills {row.stack} bytes: {row}" for row in rows if row.stack]
    for found, into in zip(offline.compile_all(), (rows, faults), strict=True):
        into += found
    changed = resources.changes(rows, resources.read()[1])
    print(f"{len(rows)} kernels", *faults, *changed, sep="\n")
    if "--write" in sys.argv:
        resources.write(f"triton {triton.__version__} and nvcc {nvcc()}", rows)
    sys.exit(bool(faults or changed))


if __name__ == "__main__":
    main()
