"""The CUDA sources executed on the CPU, plainly and under sanitizers, which must catch what is planted below.

A new csrc/cuda/<op>.cu joins with a driver <op>.cpp here, whose main() returns 0 if all is right, and an entry in
DRIVERS.
"""

import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"

# Each driver with the other sources that it needs.
OPS = (
    "ema_update",
    "gather_patches",
    "gather_tokens",
    "masked_prediction",
    "multi_block_mask",
    "random_mask",
    "random_token_corruption",
    "restore_tokens",
)
DRIVERS = {"probe": [], **{op: [f"cpu/{op}.cpp", "common/huge_pages.cpp", "common/parallel.cpp"] for op in OPS}}
SANITIZERS = {
    "plain": "",
    "memory": "-fsanitize=address,undefined -fno-sanitize-recover=all",
    "threads": "-fsanitize=thread",
}


def compiled(sanitizer: str, csrc: Path, *arguments: str | Path) -> None:
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas"]
    flags = ["-std=c++20", "-O1", "-g", "-DNDEBUG", "-pthread", *warnings, "-DSSLOPS_ISA=portable"]
    command = ["g++", *flags, *SANITIZERS[sanitizer].split(), f"-I{csrc}", f"-I{HERE}", *map(str, arguments)]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Callable[[str, str, Path], subprocess.CompletedProcess[str]]:
    """(driver, sanitizer, csrc): the driver's run. What it links from csrc/cpu and csrc/common is compiled once."""
    folder = tmp_path_factory.mktemp("objects")

    @functools.cache
    def linked(source: str, sanitizer: str) -> Path:
        out = folder / f"{source.replace('/', '-')}.{sanitizer}.o"
        compiled(sanitizer, CSRC, "-c", CSRC / source, "-o", out)
        return out

    def run(driver: str, sanitizer: str, csrc: Path) -> subprocess.CompletedProcess[str]:
        objects = [linked(source, sanitizer) for source in DRIVERS[driver]]
        compiled(sanitizer, csrc, HERE / f"{driver}.cpp", *objects, "-ldl", "-o", folder / driver)
        return subprocess.run([folder / driver], capture_output=True, text=True, timeout=300)

    return run


def shares(driver: str) -> bool:
    """Whether its threads wait for one another; the others' writes that overlap are values that differ."""
    return "sync" in (CSRC / "cuda" / f"{driver}.cu").read_text()


RUNS = [(driver, each) for driver in DRIVERS for each in SANITIZERS if each != "threads" or shares(driver)]


@pytest.mark.parametrize(("driver", "sanitizer"), RUNS)
def test_cuda_source_runs_clean(driver: str, sanitizer: str, run) -> None:
    done = run(driver, sanitizer, CSRC)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


@pytest.mark.parametrize(
    ("driver", "file", "sanitizer", "right", "wrong", "report"),
    [
        ("ema_update", "ema_update.cu", "threads", "__syncthreads();", "", "data race"),
        ("ema_update", "vector.cuh", "memory", "k < n ? p[k] : T{};", "p[k];", "heap-buffer-overflow"),
        ("ema_update", "ema_update.cu", "plain", "seed.value, group)", "seed.value, group + 1)", "differs"),
        (
            "ema_update",
            "ema_update.cu",
            "memory",
            "count, device_rows + at)",
            "count, device_rows)",
            "AddressSanitizer",
        ),
        ("ema_update", "ema_update.cu", "plain", "r < count; r += blockDim.x)", "r < count; r += count)", "differs"),
        ("random_mask", "random_mask.cu", "threads", "    __syncthreads();\n    for", "    for", "data race"),
        ("random_mask", "random_mask.cu", "threads", "first + i);\n    __syncthreads();", "first + i);", "data race"),
        ("random_mask", "random_mask.cu", "plain", "row, j / 4)", "row, j / 4 + 1)", "differs"),
        ("random_mask", "random_mask.cu", "plain", "right < blocks.size", "right <= blocks.size", "differs"),
        ("multi_block_mask", "multi_block_mask.cu", "plain", "(1u << lane) - 1", "(2u << lane) - 1", "differs"),
        ("restore_tokens", "restore_tokens.cu", "plain", "id >= 0 && id < s.length", "id < s.length", "differs"),
        (
            "restore_tokens",
            "restore_tokens.cu",
            "memory",
            "if (e < size) parts",
            "parts",
            "heap-buffer-overflow",
        ),
        ("restore_tokens", "restore_tokens.cu", "threads", "    __syncthreads();\n  };", "  };", "data race"),
        ("gather_tokens", "gather_tokens.cu", "memory", "n >= 0 && n < ids.rows", "n >= 0", "AddressSanitizer"),
        (
            "gather_tokens",
            "gather_tokens.cu",
            "memory",
            "d - j < kSize ? d - j : kSize",
            "kSize",
            "heap-buffer-overflow",
        ),
        ("gather_tokens", "gather_tokens.cu", "plain", "names += __popc(found)", "names |= found != 0", "differs"),
        ("gather_patches", "gather_patches.cu", "memory", "size - e < kSize ? size - e : kSize", "kSize", "AddressSan"),
        ("gather_patches", "gather_patches.cu", "plain", "p.width % kSize == 0 && ", "", "differs"),
        ("gather_patches", "gather_patches.cu", "memory", "(k), id) : 0", "(k), id) - 1 : 0", "AddressSan"),
        ("masked_prediction", "patches.cuh", "plain", "(short_of << 32) / by + 1", "(short_of << 32) / by", "differs"),
        (
            "masked_prediction",
            "masked_prediction.cu",
            "plain",
            "e + u < s.n ? x[u] - mean : 0.f",
            "e < s.n ? x[u] - mean : 0.f",
            "differs",
        ),
        ("masked_prediction", "masked_prediction.cu", "plain", ": grad[i]) * mask[i]", ": grad[i])", "differs"),
    ],
    ids=[
        "a missing barrier",
        "a read past the end",
        "other random numbers",
        "packets over one another",
        "rows not searched",
        "a tile written while it is read",
        "a tile read while it is written",
        "another block's random numbers",
        "a block too wide",
        "a place that is taken",
        "an id that is not looked at in the decoder",
        "lanes without a column",
        "shares joined while they are written",
        "an id that is not looked at",
        "a row's end that is not looked at",
        "an id that comes twice",
        "a patch's end that is not looked at",
        "values that are not side by side",
        "a patch before the first",
        "a quotient one too small",
        "a mean of more than there is",
        "a mask's weight",
    ],
)
def test_a_planted_fault_is_found(
    driver: str, file: str, sanitizer: str, right: str, wrong: str, report: str, run, tmp_path: Path
) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    source = csrc / "cuda" / file
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    done = run(driver, sanitizer, csrc)
    assert done.returncode != 0
    assert report in done.stdout + done.stderr


def test_every_cuda_source_has_a_driver() -> None:
    assert {file.stem for file in CSRC.glob("cuda/*.cu")} == set(DRIVERS)
