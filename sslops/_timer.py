"""Honest comparisons: variants interleaved in one process, medians with quartiles; out of memory is a result.

On a GPU a time is the GPU's: it sleeps while the host launches, so that no kernel waits for the host. What the host
takes to launch is a number of its own, "host"; of a variant that waits for the GPU it holds that wait.
"""

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Variant = Callable[[], object] | tuple[Callable[[], Any], Callable[[Any], object]]
Times = dict[str, dict[str, float] | None]


CYCLES = 2e6  # of a GPU's clock in a millisecond, about


def out_of_memory(error: BaseException) -> bool:
    # torch has no class of its own for the CPU's allocator.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def _time(variant: Variant, sleep: float = 0.0) -> tuple[float, float | None]:
    """Milliseconds that a variant takes on a GPU, which first sleeps `sleep` ms, and those that the host takes

    Without a GPU: those of the host, and None.
    """
    run, arguments = (variant[1], [variant[0]()]) if isinstance(variant, tuple) else (variant, [])
    if not torch.cuda.is_available():
        start = time.perf_counter()
        run(*arguments)
        return (time.perf_counter() - start) * 1e3, None
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if sleep:
        torch.cuda._sleep(int(sleep * CYCLES))
    begin.record()
    start = time.perf_counter()
    run(*arguments)
    host = (time.perf_counter() - start) * 1e3
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), host


def _order(names: list[str], turn: int) -> list[str]:
    """Williams' square: in twice as many turns as there are names, each follows each other twice"""
    n = len(names)
    order = [names[((k + 1) // 2 * (-1 if k % 2 else 1) + turn) % n] for k in range(n)]
    return order if turn % (2 * n) < n else order[::-1]


def interleave(
    variants: Mapping[str, Variant],
    *,
    seconds: float = 6.0,
    rounds: int | None = None,
    failed: dict[str, str] | None = None,
    ours: str | None = None,
) -> Times:
    """Times the variants in turn, round after round, so that a busy machine hits all of them; each comes after each
    other as often as the rounds allow, since it pays for the caches and the pages that the one before it leaves.

    variants: functions, or pairs of which the first makes, untimed, what the second takes.
    rounds: as many as fit into `seconds` if None, at least 3 and at most 101. Returns for each variant the median, the
    quartiles and the minimum in milliseconds, and the host's median where that is another; None for one that runs out
    of memory. Given `failed`, an error of one that is not ours goes there, and is None too.
    """
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
            for name in _order(list(times), done):
                if (taken := attempt(name, sleeps[name])) is not None:
                    times[name].append(taken)
            done += 1
    finally:
        gc.enable()
    result: Times = dict.fromkeys(variants)
    for name, values in times.items():
        measured = [value for value, _ in values]
        low, median, high = statistics.quantiles(measured, n=4)
        found = {"median": median, "low": low, "high": high, "min": min(measured), "rounds": done}
        hosts = [host for _, host in values if host is not None]
        if hosts:
            found["host"] = statistics.median(hosts)
        result[name] = found
    return result


def cuda_peak(variant: Variant) -> float:
    """MB that the variant adds to what is allocated"""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _time(variant)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_memory(setup: str, statement: str, folder: Path | None = None) -> float | None:
    """MB that `statement`, run again, adds at its peak to the resident set of a fresh process; None: out of memory.

    setup: runs before it, in the folder.
    """
    script = f"""
import gc
from sslops._timer import out_of_memory
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
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    answer = done.stdout.splitlines()[-1]
    return None if answer == "out of memory" else float(answer)
