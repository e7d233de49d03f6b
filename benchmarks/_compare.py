"""Honest comparisons: variants interleaved in one process, medians; memory in a process of its own."""

import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Variant = Callable[[], object]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def interleave(
    variants: Mapping[str, Variant], *, seconds: float = 6.0, rounds: int | None = None
) -> dict[str, dict[str, float]]:
    """Times the variants in turn, round after round, so that a busy machine hits all of them.

    rounds: as many as fit into `seconds` if None, at least 5 and at most 101. Returns for each variant the median, the
    quartiles and the minimum in milliseconds.
    """
    start = time.perf_counter()
    for _ in range(2):  # compilation, allocation, thread pools
        warm_up = time.perf_counter()
        for run in variants.values():
            run()
        _synchronize()
    now = time.perf_counter()
    if rounds is None:
        rounds = max(5, min(101, int((seconds - (warm_up - start)) / max(now - warm_up, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, run in variants.items():
                begin = time.perf_counter()
                run()
                _synchronize()
                times[name].append((time.perf_counter() - begin) * 1e3)
    finally:
        gc.enable()
    result = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        result[name] = {"median": median, "low": low, "high": high, "min": min(values), "rounds": rounds}
    return result


def record(benchmark: Any, variants: Mapping[str, Variant], ours: str = "sslops", **facts: object) -> dict[str, float]:
    """pytest-benchmark times our variant; all of them, interleaved, go beside it. Returns their medians over ours.

    facts: numbers to keep with the result, such as the FLOP or bytes that the limit is counted in.
    """
    times = interleave(variants)
    medians = {name: value["median"] for name, value in times.items()}
    ratios = {name: medians[name] / medians[ours] for name in medians}
    benchmark.extra_info.update(facts, threads=torch.get_num_threads(), times_ms=times, ratios=ratios)
    benchmark.pedantic(variants[ours], rounds=5, warmup_rounds=1)
    return ratios


def peak_memory(setup: str, statement: str) -> float:
    """MB that `statement` adds to the peak resident set of a fresh process, after `setup`."""
    script = f"""
def peak():  # not getrusage's, which a child inherits
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
{setup}
before = peak()
{statement}
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])
