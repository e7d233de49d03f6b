"""All that needs a GPU, in one command: `python benchmarks/gpu.py --out DIR`.

Stages: build, tests, sanitizer, tune, bench. Each has --minutes, and what one of its steps leaves of them the next one
has; one that fails or runs out of them does not stop the others, and the exit status says whether any did. What they
change in the tree (launch configs, results) is packed into DIR/changes.tar.gz: unpack it in the root of a clone. Needs
torch with CUDA, Triton, pytest, pytest-benchmark, ninja and pybind11, and no network.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
STAGES = ("build", "tests", "sanitizer", "tune", "bench")
CHANGED = ("kernels/triton", "benchmarks/tuned", "benchmarks/results", "RESULTS.md")


class Step(NamedTuple):
    stage: str
    what: str
    command: list[str]


def steps(wheels: list[str], minutes: float) -> list[Step]:
    python = sys.executable
    ops = sorted(file.stem.removeprefix("bench_") for file in ROOT.glob("benchmarks/bench_*.py"))
    tests = [f"tests/test_{op}.py" for op in ops if (ROOT / f"tests/test_{op}.py").exists()]
    options = ["--small", "--benchmark-disable", "--only-ours", "--device=cuda"]
    small = [python, "-m", "pytest", "-q", "-x", *(f"benchmarks/bench_{op}.py" for op in ops if op != "limits")]
    small += options
    peers = Step("build", "other libraries' wheels", [python, "-m", "pip", "install", "-q", "--no-deps", *wheels])
    return [
        *([peers] if wheels else []),
        Step("build", "the native core, in place", [python, "setup.py", "-q", "build_ext", "--inplace"]),
        Step("build", "which backend each op takes", [python, "-m", "sslops"]),
        Step("tests", "of the ops, on the CPU and the GPU", [python, "-m", "pytest", "-q", "-m", "not slow", *tests]),
        *(
            Step(
                "sanitizer",
                f"{tool} on small shapes",
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *small],
            )
            for tool in ("memcheck", "racecheck", "synccheck")
        ),
        Step(
            "tune",
            "launch configs of the Triton kernels",
            [python, "benchmarks/tune.py", "--minutes", f"{0.9 * minutes}"],
        ),
        *(
            Step("bench", op, [python, "-m", "benchmarks", "--device", "cuda", "--seconds", "2", "--save", "--op", op])
            for op in sorted(ops, key=lambda op: op != "limits")
        ),
    ]


def run(step: Step, seconds: float, log: Path) -> str:
    """ok, or what went wrong; what the step prints goes to the log and to stdout"""
    with log.open("a") as file:
        print(f"\n===== {step.stage}: {step.what}\n$ {' '.join(step.command)}", file=file, flush=True)
        begin = file.tell()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if step.stage == "sanitizer":  # each tensor an allocation, so that past its end is past an allocation's
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
            return "ok" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            with log.open() as written:
                written.seek(begin)
                print(*written.read().splitlines()[-40:], sep="\n", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for log.txt, summary.txt, changes.tar.gz"
    )
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=STAGES, help="default: all, in this order")
    parser.add_argument("--dry-run", action="store_true", help="say what each stage would do here, and do nothing")
    parser.add_argument("--minutes", type=float, default=9.5, help="of each stage; default: %(default)s")
    parser.add_argument(
        "--wheels", nargs="*", default=[], metavar="FILE", help="of libraries to measure beside: memeff, inf-cl, ..."
    )
    arguments = parser.parse_args()
    chosen = [step for step in steps(arguments.wheels, arguments.minutes) if step.stage in arguments.stage]
    if arguments.dry_run:
        for step in chosen:
            missing = "" if shutil.which(step.command[0]) else f" ({step.command[0]} is not here)"
            print(f"{step.stage}: {step.what}{missing}\n  $ {shlex.join(step.command)}")
        return 0

    arguments.out.mkdir(parents=True, exist_ok=True)
    left = dict.fromkeys(STAGES, 60 * arguments.minutes)
    lines = []
    for step in chosen:
        start = time.monotonic()
        try:
            result = run(step, left[step.stage], arguments.out / "log.txt") if left[step.stage] > 1 else "no time left"
        except OSError as error:  # the tool is not there
            result = f"failed: {error}"
        took = time.monotonic() - start
        left[step.stage] -= took
        lines.append(f"{step.stage:<10} {step.what:<38} {took:5.0f} s  {result}")
    with tarfile.open(arguments.out / "changes.tar.gz", "w:gz") as archive:
        for name in CHANGED:
            if (ROOT / name).exists():
                archive.add(ROOT / name, name, filter=lambda item: None if "__pycache__" in item.name else item)
    summary = "\n".join(lines)
    (arguments.out / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}")
    return int(any(not line.endswith(" ok") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
