"""Loops over elements run on vectors: where one is wider than the registers, or the compiler has no instruction for it,
comparisons, selections and conversions silently become scalar code, a lane after the other."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

from sslops import _C

ROOT = Path(__file__).parents[1]
# All innermost loops of an object together. Not 0: some are for the last few elements.
BOUND = 15
MORE_ON_AARCH64 = {"prototypes": 40, "supcon": 20}  # the latter compares rows' maxima, in code for each kind of tile
MORE = {"prototypes": 30}  # joins tiles of 256 logits in double: once a tile, once a pair of crops
INSTRUCTION = re.compile(r"^ *([0-9a-f]+):\t(\S+)[ \t]*([^\n]*)", re.MULTILINE)


class Assembly(NamedTuple):
    objdump: str
    scalar: re.Pattern[str]  # what such an instruction begins with, its operands behind a space
    jump: re.Pattern[str]
    calls: tuple[str, ...]


X86 = Assembly(
    "objdump",
    re.compile(r"v?(u?comis[sd]|cmp\w*s[sd]|cvt\w*2s[sd]|cvtt?s[sd]2\w+|(min|max)s[sd]) "),
    re.compile("j"),
    ("call",),
)
AARCH64 = Assembly(
    "aarch64-linux-gnu-objdump",
    re.compile(r"(fc?cmpe?|fcsel|fcvt\w*|[su]cvtf|f(max|min)(nm)?|fcm(eq|gt|ge|lt|le)) [swxdh]\d"),
    re.compile(r"(b|b\..*|cbn?z|tbn?z)$"),
    ("bl", "blr"),
)

here = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("objdump") is None, reason="needs x86-64, and objdump of binutils"
)


def scalar_in_loops(file: Path, of: Assembly = X86) -> list[str]:
    """The scalar comparisons, selections and conversions of floating-point numbers in its innermost loops, but those
    beside the call of a function: loops over rows close a row, and call logf, once for all its elements."""
    disassemble = [of.objdump, "-d", "--no-show-raw-insn", str(file)]
    text = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    found = []
    for section in text.split("\nDisassembly of section ")[1:]:
        code = [(int(at, 16), name, operands) for at, name, operands in INSTRUCTION.findall(section)]
        calls = [at for at, name, _ in code if name in of.calls]
        targets = [
            (int(to[1], 16), at)
            for at, name, operands in code
            if of.jump.match(name) and (to := re.search(r"\b([0-9a-f]+) <", operands))
        ]
        loops = sorted(((to, at) for to, at in targets if 0 < to < at), key=lambda x: x[1] - x[0])
        for at, name, operands in code:
            if of.scalar.match(f"{name} {operands}"):
                begin, end = next(((begin, end) for begin, end in loops if begin <= at < end), (0, 0))
                outer = any(begin <= b < e <= end and (b, e) != (begin, end) for b, e in loops)
                if begin and not outer and not any(begin <= call < end for call in calls):
                    found.append(f"{name} at {at:x}")
    return found


def objects() -> list[Path]:
    built = ROOT / "build" / sysconfig.get_platform() / "csrc" / "cpu"
    return [file for source in sorted(ROOT.glob("csrc/cpu/*.cpp")) for file in sorted(built.glob(f"{source.stem}.*.o"))]


@here
@pytest.mark.parametrize("file", objects(), ids=lambda file: file.stem)
def test_no_scalar_code_in_loops(file: Path) -> None:
    assert len(scalar := scalar_in_loops(file)) <= MORE.get(file.name.split(".")[0], BOUND), scalar


@here
@pytest.mark.skipif(not objects(), reason="nothing was built here")
def test_every_isa_is_seen() -> None:
    assert {file.suffixes[0][1:] for file in objects()} == set(str(_C.build_info()["isas"]).split(","))


@here
@pytest.mark.parametrize("lanes", [4, 16])
def test_the_check_itself(lanes: int, tmp_path: Path) -> None:
    """vec.h for SSE2, as it is, and with vectors four times as wide as the registers."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs {compiler[0]}")
    header = (ROOT / "csrc" / "cpu" / "vec.h").read_text()
    planted = header.replace("kLanes = 4;", f"kLanes = {lanes};").replace('"../', f'"{ROOT}/csrc/')
    source, target = tmp_path / "planted.cpp", tmp_path / "planted.o"
    source.write_text(f"""{planted}
        using namespace sslops;
        void planted(float* x, long n) {{
          for (long k = 0; k < n; k += kLanes) store(x + k, round_to_bf16(max(load(x + k), load(x))));
        }}""")
    subprocess.run([*compiler, "-O3", "-w", "-c", source, "-o", target], check=True)
    assert (len(scalar_in_loops(target)) > BOUND) == (lanes == 16)


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
)
def test_aarch64(tmp_path: Path) -> None:
    """Every kernel on NEON's vectors, and some run beside their formulas"""
    flags = "-O3 -DNDEBUG -std=c++17 -Icsrc -ffp-contract=fast -fno-math-errno -Wall -Wextra -Werror -Wno-psabi"
    compiler = ["aarch64-linux-gnu-g++", *flags.split(), "-DSSLOPS_ISA=portable"]

    def compile(source: Path) -> Path:
        target = tmp_path / f"{source.stem}.{source.parent.name}.o"
        subprocess.run([*compiler, "-c", source, "-o", target], cwd=ROOT, check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        kernels = list(pool.map(compile, sorted(ROOT.glob("csrc/cpu/*.cpp"))))
        rest = list(pool.map(compile, [*ROOT.glob("csrc/common/*.cpp"), ROOT / "tests/aarch64/main.cpp"]))
    for file in kernels:
        scalar = scalar_in_loops(file, AARCH64)
        assert len(scalar) <= MORE_ON_AARCH64.get(file.name.split(".")[0], BOUND), (file.name, scalar)
    subprocess.run([*compiler, *kernels, *rest, "-o", tmp_path / "main", "-static"], check=True)
    run = subprocess.run(["qemu-aarch64", tmp_path / "main"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
