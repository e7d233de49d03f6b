"""All that a GPU machine is needed for, in three calls of ten minutes: `python -m benchmarks.gpu --out DIR --call 1`.

1. build, compile ahead, every op against float64, the rows that matter most, the tests;
2. profiles, memory and race checks, tuning;  3. what failed again (--again DIR/tests.jsonl), all rows.

There is one deadline. Each step may take its share of what is left, what it leaves the later ones have, and one that
fails or is stopped stops no other. DIR is written as things happen and is complete after every step and after SIGTERM:
log.txt, summary.txt, smoke.jsonl, rows.jsonl (`benchmarks.render --add` stores them), tests.jsonl, tests.xml and
changes.tar.gz, the launch configs that tuning changed. Needs torch with CUDA, Triton, pytest with xdist and benchmark,
ninja and pybind11, and no network.
"""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from ._process import die_with_parent

ROOT = Path(__file__).parents[1]

CHANGED = ("kernels/triton", "benchmarks/tuned")
GRACE = 8.0  # seconds between SIGINT, upon which pytest writes its reports, and SIGKILL
SIZE = 15 * 2**20  # bytes of a file that is brought back
BENCHES = (  # in the order of what matters
    "limits", "nt_xent", "info_nce", "barlow_twins", "vicreg", "relic", "masked_prediction", "ema_update",
    "gather_patches", "restore_tokens", "gather_tokens", "cross_correlation", "random_mask", "multi_block_mask",
    "random_token_corruption",
    "routes",
)  # fmt: skip
# Not for a GPU: what builds, what counts lines, what spreads over processes on the CPU, and the benchmarks' own.
ELSEWHERE = ("benchmarks", "core", "distributed", "dropin", "layout", "pretrain", "wheel")


class Step(NamedTuple):
    what: str
    share: float  # of the time, beside the other steps' shares
    command: list[str]  # {minutes}: how long it may take
    environment: dict[str, str] | None = None


def benches() -> list[str]:
    """All files, those that the order does not name at last"""
    found = [file.stem.removeprefix("bench_") for file in ROOT.glob("benchmarks/bench_*.py")]
    ordered = sorted(found, key=lambda op: (BENCHES.index(op) if op in BENCHES else len(BENCHES), op))
    return [f"benchmarks/bench_{op}.py" for op in ordered]


def steps(
    call: int, out: Path, chip: str = "sm_90", *, rehearse: bool = False, wheels: tuple[str, ...] = (),
    again: Path | None = None,
) -> list[Step]:  # fmt: skip
    """rehearse: the same on the CPU, small shapes, Triton's interpreter"""
    python, device = sys.executable, "cpu" if rehearse else "cuda"
    arch = chip.removeprefix("sm_")
    cuda = {"SSLOPS_BUILD_CUDA": "0"} if rehearse else {"SSLOPS_BUILD_CUDA": "1", "SSLOPS_CUDA_ARCHS": arch}
    interpreted = {"TRITON_INTERPRET": "1"} if rehearse else {}
    workers = str(max(1, len(os.sched_getaffinity(0)) - 2))
    bench = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "--benchmark-quiet", *benches()]
    bench += [f"--device={device}", "--threads=1", "--minutes={minutes}", f"--rows={out / 'rows.jsonl'}"]
    dry = [*bench[:-1], "--only-ours", "--benchmark-disable"]  # without the rows
    small = [*dry, "--small", "-k", "not ema"]
    bench += ["--small", "-k", "not limits and not ema"] if rehearse else []
    tests = [str(file.relative_to(ROOT)) for file in sorted(ROOT.glob("tests/test_*.py"))]
    tests = [name for name in tests if name[len("tests/test_") : -len(".py")] not in ELSEWHERE]
    test = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *tests]
    test += ["-p", "benchmarks.outcomes", f"--outcomes={out / 'tests.jsonl'}"]
    test += ["-n", workers, "-k", device, f"--junitxml={out / 'tests.xml'}"]
    deterministic = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
    each = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # tensor an allocation: past its end is past an allocation's

    peers = Step("other libraries' wheels", 10, [python, "-m", "pip", "install", "-q", "--no-deps", *wheels])
    build = [
        *([peers] if wheels else []),
        Step("the native core, in place", 90, [python, "setup.py", "-q", "build_ext", "--inplace"], cuda),
        Step("which backend each op takes", 20, [python, "-m", "sslops"]),
    ]
    ahead = [python, "-m", "benchmarks.ahead", "--chip", chip]
    if call == 1:
        smoke = [python, "-m", "benchmarks.smoke", "--device", device, "--out", str(out / "smoke.jsonl")]
        return [
            *build,
            Step("Triton kernels compiled ahead", 60, ahead + (["--op", "relic"] if rehearse else [])),
            Step("every op against float64", 80, smoke, interpreted),
            Step("the rows that matter most", 140, [*bench, "--key", "--beside=eager", "--seconds=0.5"]),
            Step("tests", 160, test, deterministic),
        ]
    if call == 2:
        profile = ["ncu", "--clock-control", "none", "--launch-count", "60", "--section", "SpeedOfLight"]
        profile += ["--section", "Occupancy", "--section", "LaunchStats"]
        once = [*dry, "--key"]
        checks = [
            Step(f"{tool} on small shapes", 70, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *small],
                 each)
            for tool in ("memcheck", "racecheck")
        ]  # fmt: skip
        return [
            *build,
            Step("small shapes, to compile them", 50, small),
            Step("the key rows once", 30, once),
            Step("profile of the key rows", 60, [*profile, *once]),
            *checks,
            Step("launch configs of the Triton kernels", 170, [python, "-m", "benchmarks.tune", "--minutes={minutes}"]),
        ]
    retry = [Step("what failed, again", 120, [*test, f"--again={again}"], deterministic)] if again else []
    return [
        *build,
        Step("Triton kernels compiled ahead", 60, ahead + (["--op", "relic"] if rehearse else [])),
        *retry,
        Step("all rows", 300, [*bench, "--seconds=1"]),
    ]


class Stopped(Exception):
    """By SIGTERM or SIGINT"""


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(step: Step, seconds: float, log: Path) -> str:
    """ok, or what went wrong; what the step prints goes to the log and its end to stdout"""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **(step.environment or {})}
    command = [part.replace("{minutes}", f"{max(0.0, seconds - 2 * GRACE) / 60:.2f}") for part in step.command]
    with log.open("ab") as file:
        file.write(f"\n===== {step.what}\n$ {shlex.join(command)}\n".encode())
        file.flush()
        begin = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
    try:
        status = process.wait(max(0.1, seconds - GRACE))
        return "ok" if status == 0 else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return f"stopped after {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # whatever is left of it, its own children too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        with log.open("rb") as written:
            written.seek(begin)
            print(*written.read().decode(errors="replace").splitlines()[-40:], sep="\n", flush=True)


def write(out: Path, lines: list[str]) -> None:
    """All of DIR that no step writes by itself, within what may be brought back"""
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    fresh = out / "changes.tar.gz.new"
    with tarfile.open(fresh, "w:gz") as archive:
        for name in CHANGED:
            if (ROOT / name).exists():
                archive.add(ROOT / name, name, filter=lambda item: None if "__pycache__" in item.name else item)
    fresh.replace(out / "changes.tar.gz")
    for file in out.iterdir():
        if file.stat().st_size > SIZE:  # its end says more than its beginning
            file.write_bytes(file.read_bytes()[-SIZE:])


def go(
    plan: list[Step],
    seconds: float,
    out: Path,
    run: Callable[[Step, float, Path], str] = run,
    clock: Callable[[], float] = time.monotonic,
) -> list[str]:
    """A line for each step; `seconds` after it begins it has ended"""
    out.mkdir(parents=True, exist_ok=True)
    start = clock()
    lines: list[str] = []
    write(out, lines)
    for k, step in enumerate(plan):
        begun = clock()
        left = start + seconds - begun
        limit = left * step.share / sum(later.share for later in plan[k:])
        try:
            result = run(step, limit, out / "log.txt") if left > GRACE else "no time left"
        except OSError as error:  # the tool is not there
            result = f"failed: {error}"
        except Stopped as stopped:
            lines.append(f"{step.what:<38} {clock() - begun:5.0f} s of {limit:4.0f}  {stopped} stopped all")
            write(out, lines)
            return lines
        lines.append(f"{step.what:<38} {clock() - begun:5.0f} s of {limit:4.0f}  {result}")
        write(out, lines)
    return lines


def schedule(plan: list[Step], seconds: float) -> Iterator[str]:
    """When each step is stopped if all take as long as they may"""
    total, at = sum(step.share for step in plan), 0.0
    for step in plan:
        end = at + seconds * step.share / total
        missing = "" if shutil.which(step.command[0]) else f" ({step.command[0]} is not here)"
        yield f"{at:4.0f} to {end:4.0f} s: {step.what}{missing}\n  $ {shlex.join(step.command)}"
        at = end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--call", type=int, choices=[1, 2, 3], default=1)
    parser.add_argument("--minutes", type=float, default=9.4, help="for all of it; default: %(default)s")
    parser.add_argument("--chip", default="sm_90", help="that is built for; default: %(default)s")
    parser.add_argument("--again", type=Path, metavar="FILE", help="tests.jsonl of a call before")
    parser.add_argument("--wheels", nargs="*", default=[], metavar="FILE", help="of libraries to measure beside")
    parser.add_argument("--rehearse", action="store_true", help="the same plan on a CPU: small shapes, the interpreter")
    parser.add_argument("--dry-run", action="store_true", help="say what each step would do, and do nothing")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    plan = steps(
        arguments.call, out, arguments.chip, rehearse=arguments.rehearse, wheels=tuple(arguments.wheels),
        again=arguments.again and arguments.again.resolve(),
    )  # fmt: skip
    if arguments.dry_run:
        print(*schedule(plan, 60 * arguments.minutes), sep="\n")
        return 0
    with stoppable():
        lines = go(plan, 60 * arguments.minutes, out)
    print("", *lines, sep="\n")
    return int(any(not line.endswith(" ok") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
