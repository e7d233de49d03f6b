"""resources.tsv: what the compilers make of the GPU kernels, on a machine without a GPU.

The Triton kernels of every config of each chip (offline.py) and the CUDA kernels (benchmarks/kernel_report.py, which
writes the file). Its first line says by which Triton and which nvcc: others come to other numbers.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).with_name("resources.tsv")
COUNTED = (  # in SASS, and in AMD's assembly
    r"\b(?:H|HG|UTCH|UTCQ|UTCO?)MMA|\bv_mfma_",
    r"\bMUFU\.EX2|\bv_exp_f32",
    r"\bLDG?(?:STS)?\.E\S*\.128|\bUTMALDG|\bUBLKCP|\b(?:global|buffer)_load_dwordx4",
    r"\bLDG?(?:STS)?\.E(?!\S*\.128)|\b(?:global|buffer)_load_(?!dwordx4)",
)


class Row(NamedTuple):
    op: str
    chip: str
    call: str  # "CUDA" for a kernel of csrc/cuda
    kernel: str
    config: str  # blocks, warps, stages
    registers: int  # a thread
    stack: int  # bytes a thread: what was spilled
    shared: int  # bytes a block
    instruction: str  # that multiplies matrices
    matrix: int  # how many multiply matrices,
    exp: int  # take exponentials,
    loads16: int  # load 16 bytes or more,
    loads: int  # or less
    source: str  # a hash of all that was compiled

    def __str__(self) -> str:
        return "\t".join(map(str, self))


def counts(assembly: str) -> list[int]:
    """The four columns of instructions"""
    return [len(re.findall(pattern, assembly)) for pattern in COUNTED]


def read() -> tuple[str, list[Row]]:
    """The compilers, and what they made of the kernels"""
    compilers, _, *lines = TABLE.read_text().splitlines()
    kinds = Row.__annotations__.values()
    return compilers, [Row(*(kind(v) for kind, v in zip(kinds, line.split("\t"), strict=True))) for line in lines]


def write(compilers: str, rows: Iterable[Row]) -> None:
    TABLE.write_text("\n".join([compilers, "\t".join(Row._fields), *map(str, rows)]) + "\n")


def changes(rows: Iterable[Row], listed: Iterable[Row]) -> list[str]:
    """Lines that only one of them has"""
    return sorted({*map(str, rows)} ^ {*map(str, listed)})
