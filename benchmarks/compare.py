"""Runs the benchmarks; also our kernels of another commit against those of this tree, in turn, if both are right."""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import render

ROUNDS = 5
# What makes torch's libraries use no more than an instruction set: its own loops and Inductor's, oneDNN's and MKL's.
LIBRARIES = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}


def pytest(tree: Path, *options: str) -> int:
    """A run of pytest in `tree`, with the sslops that is there; its exit status"""
    isa = next((option.removeprefix("--isa=") for option in options if option.startswith("--isa=")), "")
    environment = {**os.environ, **LIBRARIES.get(isa, {}), "PYTHONPATH": str(tree)}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *options], cwd=tree, env=environment).returncode


def measure(options: list[str], tree: Path = render.ROOT) -> tuple[dict, int]:
    """What conftest.py writes to --rows, and pytest's exit status"""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.jsonl")
        storing = ("--benchmark-quiet", f"--rows={file}", "--benchmark-disable-gc")
        failed = pytest(tree, "--no-header", "-p", "no:cacheprovider", "-W", "ignore", *storing, *options)
        reports = render.reports(file) if file.exists() else []
    if not reports or not reports[0]["benchmarks"]:
        raise SystemExit("nothing was measured")
    (report,) = reports
    core = Path(report["machine_info"]["sslops"])
    if not core.is_relative_to(tree):
        raise SystemExit(f"measured {core}, which is not of {tree}")
    return report, failed


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A built work tree of another commit, with this tree's benchmarks"""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        subprocess.run(["git", "worktree", "add", "--detach", tree, revision], cwd=render.ROOT, check=True)
        try:
            subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, check=True)
            shutil.rmtree(tree / "benchmarks", ignore_errors=True)
            shutil.copytree(render.ROOT / "benchmarks", tree / "benchmarks")
            shutil.copy(render.ROOT / "sslops/_timer.py", tree / "sslops")
            yield tree
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", tree], cwd=render.ROOT, check=True)


def compare(trees: dict[str, Path], ops: list[str], options: list[str]) -> str:
    """A table of our times in each of two trees. Wrong kernels have no speed: SystemExit where their tests are red."""
    for name, tree in trees.items():
        tests = [f"tests/test_{op}.py" for op in ops]
        if pytest(tree, "-x", "-m", "not slow", *tests):
            raise SystemExit(f"the tests of {name} are red: no speed is reported")
    medians: dict[str, dict[str, list[float]]] = {}
    for _ in range(ROUNDS):
        for name, tree in trees.items():
            report, failed = measure([f"--rootdir={tree}", "--only-ours", *options], tree)
            if failed:
                raise SystemExit(f"the benchmarks of {name} failed")
            for op, rows in render.rows_of(report, "").items():
                for row in rows:
                    if "times_ms" in row:
                        key = " ".join([op, *(f"{k}={v}" for k, v in render.facts(row).items())])
                        medians.setdefault(key, {}).setdefault(name, []).append(row["times_ms"][row["ours"]]["median"])
    lines = []
    before, after = trees
    for key, times in medians.items():
        ratios = [new / old for old, new in zip(times[before], times[after], strict=True)]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        lines.append(
            [key, *(f"{statistics.median(t):.4g} ms" for t in times.values()), f"{ratio:.3f} ({low:.3f} to {high:.3f})"]
        )
    return render.markdown(["", before, after, f"{after} over {before}"], lines)


def main(revision: str, ops: list[str], options: list[str]) -> int:
    with checked_out(revision) as tree:
        print(compare({revision: tree, "this tree": render.ROOT}, ops, options))
    return 0
