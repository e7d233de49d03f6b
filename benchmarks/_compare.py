"""What a row of a benchmark is: its case, its variants timed by sslops/_timer.py, and what is written down of them."""

import functools
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from sslops import _timer
from sslops._timer import Variant, cuda_peak, interleave


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


@functools.cache
def products_are_slow(dtype: torch.dtype) -> bool:
    """Whether this CPU has no instructions for torch's: in bfloat16 one of 2048 x 2048 then takes 13 seconds"""
    a = torch.randn(256, 256).to(dtype)
    start = time.perf_counter()
    torch.mm(a, a)
    return 2 * 256**3 / (time.perf_counter() - start) < 5e9


def eager_and_compiled(ours: Callable, eager: Callable, lean: Callable | None = None) -> dict[str, Callable]:
    """Ours beside the usual eager form and the strongest one that we found, if that is another, and both compiled"""
    written = {"eager": eager} | ({"lean eager": lean} if lean else {})
    compiled = {name.replace("eager", "compile"): torch.compile(form, dynamic=False) for name, form in written.items()}
    return {"sslops": ours, **written, **compiled}


# From the command line, by conftest.py. beside: of the variants that are not ours these only, and the limit. busy: how
# many other processes spin.
settings = SimpleNamespace(seconds=6.0, only_ours=False, beside=None, busy=0)


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
    if settings.busy:
        facts["busy"] = settings.busy
    failed: dict[str, str] = {}
    times = interleave(variants, seconds=settings.seconds, failed=failed, ours=ours)
    medians = {name: value["median"] for name, value in times.items() if value}
    ratios = {name: median / medians[ours] for name, median in medians.items()}
    benchmark.extra_info.update(
        _plain(facts), threads=torch.get_num_threads(), ours=ours, limit=limit, times_ms=times, ratios=ratios
    )
    if failed:
        benchmark.extra_info["failed"] = failed
    if torch.cuda.is_available():
        benchmark.extra_info["peak_mb"] = {n: cuda_peak(variants[n]) if n in medians else None for n in times}
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


def peak_memory(setup: str, statement: str) -> float | None:
    """`_timer.peak_memory` in the project's folder"""
    return _timer.peak_memory(setup, statement, Path(__file__).parents[1])
