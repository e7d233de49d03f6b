"""Loops over elements run on vectors: where one is wider than the registers, or the compiler has no instruction for it,
comparisons, selections and conversions silently become scalar code, a lane after the other."""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from sslops import _C

ROOT = Path(__file__).parents[1]
# All innermost loops of an object together. Not 0: some are for the last few elements.
BOUND = 15
MORE = {"prototypes": 30}  # joins tiles of 256 logits in double: once a tile, once a pair of crops
SCALAR = re.compile(r"v?(u?comis[sd]|cmp\w*s[sd]|cvt\w*2s[sd]|cvtt?s[sd]2\w+|(min|max)s[sd])")
INSTRUCTION = re.compile(r"^ *([0-9a-f]+):\t(\S+)(?: +(?:([0-9a-f]+) <)?)?", re.MULTILINE)

pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="knows the instructions of x86-64 only"),
    pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, of binutils"),
]


def scalar_in_loops(file: Path) -> list[str]:
    """The scalar comparisons, selections and conversions of floating-point numbers in its innermost loops, but those
    beside the call of a function: loops over rows close a row, and call logf, once for all its elements."""
    disassemble = ["objdump", "-d", "--no-show-raw-insn", str(file)]
    text = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
    found = []
    for section in text.split("\nDisassembly of section ")[1:]:
        code = [(int(at, 16), name, int(to or "0", 16)) for at, name, to in INSTRUCTION.findall(section)]
        calls = [at for at, name, _ in code if name == "call"]
        loops = sorted(((to, at) for at, name, to in code if name[0] == "j" and 0 < to < at), key=lambda x: x[1] - x[0])
        for at, name, _ in code:
            if SCALAR.fullmatch(name):
                begin, end = next(((begin, end) for begin, end in loops if begin <= at < end), (0, 0))
                outer = any(begin <= b < e <= end and (b, e) != (begin, end) for b, e in loops)
                if begin and not outer and not any(begin <= call < end for call in calls):
                    found.append(f"{name} at {at:x}")
    return found


def objects() -> list[Path]:
    built = ROOT / "build" / sysconfig.get_platform() / "csrc" / "cpu"
    return [file for source in sorted(ROOT.glob("csrc/cpu/*.cpp")) for file in sorted(built.glob(f"{source.stem}.*.o"))]


@pytest.mark.parametrize("file", objects(), ids=lambda file: file.stem)
def test_no_scalar_code_in_loops(file: Path) -> None:
    assert len(scalar := scalar_in_loops(file)) <= MORE.get(file.name.split(".")[0], BOUND), scalar


@pytest.mark.skipif(not objects(), reason="nothing was built here")
def test_every_isa_is_seen() -> None:
    assert {file.suffixes[0][1:] for file in objects()} == set(str(_C.build_info()["isas"]).split(","))


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
