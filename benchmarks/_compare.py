"""Honest comparisons: variants interleaved in one process, medians with quartiles; out of memory is a result.

On a GPU a time is the GPU's: it sleeps while the host launches, so that no kernel waits for the host. What the host
takes to launch is a number of its own, "host"; of a variant that waits for the GPU it holds that wait.
"""

import gc
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch


class Case(NamedTuple):
    """What a row is measured for"""

    shape: tuple[int, ...]
    dtype: torch.dtype
    part: str  # forward, backward, both, memory

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{str(self.dtype).removeprefix('torch.')}-{self.part}"


def cases(shapes: str, dtypes: str, parts: str) -> list[Case]:
    """All combinations: cases("512x128 4096x128", "float32 bfloat16", "both")"""
    return [
        Case(tuple(map(int, shape.split("x"))), getattr(torch, dtype), part)
        for shape, dtype, part in itertools.product(shapes.split(), dtypes.split(), parts.split())
    ]


Variant = Callable[[], object] | tuple[Callable[[], Any], Callable[[Any], object]]
Times = dict[str, dict[str, float] | None]

# From the command line, by conftest.py. beside: of the variants that are not ours these only, and the limit.
settings = SimpleNamespace(seconds=6.0, only_ours=False, beside=None)

CYCLES = 2e6  # of a GPU's clock in a millisecond, about


def out_of_memory(error: BaseException) -> bool:
    # torch has no class of its own for the CPU's allocator.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _time(variant: Variant, sleep: float = 0.0) -> tuple[float, float | None]:
    """Milliseconds that a variant takes on a GPU, which first sleeps `sleep` ms, and those that the host takes

    Without a GPU: those of the host, and None.
    """
    arguments: list[object] = []
    if isinstance(variant, tuple):
        prepare, variant = variant
        arguments.append(prepare())
    if not torch.cuda.is_available():
        start = time.perf_counter()
        variant(*arguments)
        return (time.perf_counter() - start) * 1e3, None
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if sleep:
        torch.cuda._sleep(int(sleep * CYCLES))
    begin.record()
    start = time.perf_counter()
    variant(*arguments)
    host = (time.perf_counter() - start) * 1e3
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), host


def interleave(
    variants: Mapping[str, Variant],
    *,
    seconds: float | None = None,
    rounds: int | None = None,
    failed: dict[str, str] | None = None,
    ours: str | None = None,
) -> Times:
    """Times the variants in turn, round after round, so that a busy machine hits all of them.

    variants: functions, or pairs of which the first makes, untimed, what the second takes.
    rounds: as many as fit into `seconds` if None, at least 3 and at most 101. Returns for each variant the median, the
    quartiles and the minimum in milliseconds, and the host's median where that is another; None for one that runs out
    of memory. Given `failed`, an error of one that is not ours goes there, and is None too.
    """
    seconds = settings.seconds if seconds is None else seconds
    times: dict[str, list[tuple[float, float | None]]] = {}
    sleeps = {}

    def attempt(name: str, sleep: float = 0.0) -> tuple[float, float | None] | None:
        try:
            return _time(variants[name], sleep)
        except Exception as error:
            if not out_of_memory(error):
                if failed is None or name == ours:
                    raise
                failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            times.pop(name, None)
            return None

    for name in variants:  # compilation, allocation, thread pools; on a GPU once more, for how long launching takes
        taken = attempt(name)
        if taken and taken[1] is not None:
            taken = attempt(name)
        if taken:
            times[name], sleeps[name] = [], min(2 * (taken[1] or 0.0), 50.0)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        done = 0
        while done < (rounds or 3) or (rounds is None and done < 101 and time.perf_counter() - start < seconds):
            for name in list(times):
                if (taken := attempt(name, sleeps[name])) is not None:
                    times[name].append(taken)
            done += 1
    finally:
        gc.enable()
    result: Times = dict.fromkeys(variants)
    for name, values in times.items():
        taken, hosts = zip(*values, strict=True)
        low, median, high = statistics.quantiles(taken, n=4)
        result[name] = {"median": median, "low": low, "high": high, "min": min(taken), "rounds": done}
        if None not in hosts:
            result[name]["host"] = statistics.median(hosts)
    return result


def record(
    benchmark: Any, variants: Mapping[str, Variant], ours: str = "sslops", limit: str | None = None, **facts: object
) -> dict[str, float]:
    """pytest-benchmark times our variant; all of them, interleaved, go beside it. Returns their medians over ours.

    limit: the variant that does only what cannot be avoided. facts: what tells this row from others (m=, d=, dtype=),
    and flop= or bytes=, the work that our rate is counted in.
    """
    if settings.beside is not None:
        variants = {name: variants[name] for name in variants if name in (ours, limit, *settings.beside)}
    if settings.only_ours:
        variants = {ours: variants[ours]}
    prepare, run = variants[ours] if isinstance(variants[ours], tuple) else (None, variants[ours])
    setup = prepare and (lambda: ((prepare(),), {}))
    if benchmark.disabled:
        benchmark.pedantic(run, setup=setup)
        return {}
    failed: dict[str, str] = {}
    times = interleave(variants, failed=failed, ours=ours)
    medians = {name: value["median"] for name, value in times.items() if value}
    ratios = {name: median / medians[ours] for name, median in medians.items()}
    benchmark.extra_info.update(
        _plain(facts), threads=torch.get_num_threads(), ours=ours, limit=limit, times_ms=times, ratios=ratios
    )
    if failed:
        benchmark.extra_info["failed"] = failed
    if torch.cuda.is_available():
        benchmark.extra_info["peak_mb"] = {n: _cuda_peak(variants[n]) if n in medians else None for n in times}
    benchmark.pedantic(run, setup=setup, rounds=3)
    return ratios


def record_memory(benchmark: Any, peak_mb: Mapping[str, float | None], ours: str = "sslops", **facts: object) -> None:
    """A row of peak_memory()'s results, beside record()'s rows of the same facts."""
    benchmark.extra_info.update(_plain(facts), ours=ours, peak_mb=dict(peak_mb))
    benchmark.pedantic(lambda: None)


def _plain(facts: Mapping[str, object]) -> dict[str, object]:
    return {k: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for k, v in facts.items()}


def matmul(flop: float, dtype: torch.dtype, device: str) -> Variant:
    """One product of square matrices of so many FLOP, by the library that torch takes there."""
    n = max(64, round((flop / 2) ** (1 / 3) / 64) * 64)
    k = max(8, round(flop / 2 / n / n / 8) * 8)
    a, b = torch.randn(n, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
    out = a.new_empty(n, n)
    return lambda: torch.mm(a, b, out=out)


def _cuda_peak(variant: Variant) -> float:
    """MB that the variant adds to what is allocated"""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _time(variant)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_memory(setup: str, statement: str) -> float | None:
    """MB that `statement`, run again, adds at its peak to the resident set of a fresh process; None: out of memory.

    setup: runs before it, in the project's folder.
    """
    script = f"""
import gc
from benchmarks._compare import out_of_memory
def status(name):  # not getrusage's peak, which a child inherits
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(name))
{setup}
try:
    {statement}  # compilation, thread pools
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:  # the peak so far is forgotten
        file.write("5")
    before = status("VmRSS")
    {statement}
    print(status("VmHWM") - before)
except Exception as error:
    if not out_of_memory(error):
        raise
    print("out of memory")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parents[1], check=True, stdout=subprocess.PIPE, text=True
    )
    answer = done.stdout.splitlines()[-1]
    return None if answer == "out of memory" else float(answer)
