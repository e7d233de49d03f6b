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
    issued: int  # by a warp for a tile (`tile`): instructions,
    apart: int  # those of them that no product goes on beside in its block,
    macs: int  # multiply-adds of matrix instructions,
    operands: int  # bytes that wgmma reads of shared memory,
    exps: int  # lanes' exponentials, divisions, conversions to float64: 16 a cycle,
    moved: int  # bytes to and from device memory
    source: str  # a hash of all that was compiled

    def __str__(self) -> str:
        return "\t".join(map(str, self))


def counts(assembly: str) -> list[int]:
    """The four columns of instructions"""
    return [len(re.findall(pattern, assembly)) for pattern in COUNTED]


_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"(@!?U?P\w+ )?BRA\S*(?: !?U?P\w+,)? 0x([0-9a-f]+)")
_MATRIX = re.compile(r"\bHGMMA\.(\d+)x(\d+)x(\d+)\S* R\w+, (gdesc)?|\bHMMA\.16(8)(\d+)")
_MOVES = re.compile(r"\b(?:LDG|STG|LDGSTS)(\.E\S*)")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "64": 8, "128": 16}


def _work(instruction: str) -> tuple[int, int, int, int]:
    """macs, operands, exps and moved of one"""
    if found := _MATRIX.search(instruction):
        if found[5]:
            return 16 * 8 * int(found[6]), 0, 0, 0
        m, n, k = map(int, found.groups()[:3])
        item = 4 if "TF32" in instruction else 2
        return m * n * k // 4, item * k * (n + (m if found[4] else 0)) // 4, 0, 0
    if "MUFU" in instruction or "F2F" in instruction:
        return 0, 0, 32, 0
    if found := _MOVES.search(instruction):
        return 0, 0, 0, 32 * next((_BYTES[each] for each in found[1].split(".") if each in _BYTES), 4)
    return 0, 0, 0, 0


def tile(sass: str, steps: int) -> list[int]:
    """The last six numbers of a Row, of NVIDIA's code: of a turn of the loop that does the work, in which an inner one
    that multiplies takes `steps` turns. What a branch can skip is skipped: tiles with a mask are few. 0 for AMD's.
    """
    code = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(sass)]
    jumps = [(at, int(found[2], 16)) for at, text in code if (found := _BRANCH.search(text))]
    loops = sorted(((to, at) for at, to in jumps if to < at), key=lambda loop: loop[1] - loop[0])
    work = {at: _work(text) for at, text in code}

    def inside(loop: tuple[int, int], column: int) -> int:
        return sum(each[column] for at, each in work.items() if loop[0] <= at <= loop[1])

    whole = (code[0][0], code[-1][0]) if code else (0, 0)
    column = 0 if inside(whole, 0) else 3
    main = inner = next((loop for loop in loops if inside(loop, column)), whole)
    if column == 0 and steps > 1:
        main = next((loop for loop in loops if loop[0] <= inner[0] and inner[1] < loop[1]), whole)
    skipped = [
        (at, to)
        for at, to in jumps
        if main[0] <= at < to <= main[1]
        and not inside((at, to), 0)
        and not any(at < loop[0] and loop[1] < to for loop in loops)
    ]
    totals = [0] * 6
    for at, _ in code:
        if main[0] <= at <= main[1] and not any(begin < at < end for begin, end in skipped):
            within = main != inner and inner[0] <= at <= inner[1]
            each = (1, int(not within), *work[at])
            totals = [total + (steps if within else 1) * count for total, count in zip(totals, each, strict=True)]
    return totals


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
