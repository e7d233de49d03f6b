"""Finds launch configs for the Triton kernels on the GPU that is here, and files them in kernels/triton/<op>.json.

SEEDS and configs near each listed one that compile without a fault (offline.py) are timed through the same launcher.
One takes the place of a listed one only if it gives the same result and is faster by MARGIN, in turn with it; what was
measured goes to benchmarks/tuned/<device>.json. New configs change tests/triton_kernels/resources.tsv.

A file of configs joins with a function in tests/triton_kernels: tuning(operands, width, kernel, device) -> the call to
time.
"""

import argparse
import contextlib
import copy
import importlib
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from sslops.kernels.triton import launch
from tests.triton_kernels import offline

from ._compare import interleave
from ._process import die_with_parent

ROOT = Path(__file__).parents[1]

MARGIN = 0.98
CHOICES = {
    "BLOCK_M": (64, 128, 256),
    "BLOCK_N": (32, 64, 128, 256),
    "BLOCK_K": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}
# Op, kernel and width -> configs for half precision: more blocks on a multiprocessor without spills, or fewer tiles.
SEEDS = {
    ("nt_xent", "flash", "128"): [(64, 64, 128, 4, 2), (64, 64, 128, 4, 3)],
    ("nt_xent", "flash", "256"): [(128, 64, 256, 8, 2)],
    ("nt_xent", "forward", "128"): [(128, 64, 128, 4, 2), (64, 64, 128, 4, 2)],
    ("info_nce", "forward", "256"): [(128, 64, 256, 8, 2)],
    ("relic", "forward", "128"): [(128, 64, 64, 8, 2)],
    ("off_diagonal", "panel", "8192"): [(128, 256, 64, 8, 3)],
}
# Two orders of summation and of rounding apart; a wrong config is off by more.
TOLERANCE = {"half": 2e-2, "tf32": 2e-3, "tf32x3": 1e-4, "ieee": 1e-4}

Config = dict[str, int]


class Task(NamedTuple):
    op: str
    operands: str
    width: str
    kernel: str


def listed(op: str, chip: str) -> list[tuple[Task, Config]]:
    """Half precision comes first: it is what a GPU is for"""
    table = launch.configs(op)
    found = table.get(chip, table["default"])
    return [
        (Task(op, o, w, k), c)
        for o, widths in found.items()
        for w, kernels in widths.items()
        for k, c in kernels.items()
    ]


def candidates(task: Task, incumbent: Config) -> list[Config]:
    """What registers, shared memory and spills on paper speak for comes first"""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    seeds = [dict(zip(names, seed, strict=True)) for seed in SEEDS.get((task.op, task.kernel, task.width), [])]
    seeds = [incumbent | seed for seed in seeds] if task.operands == "half" else []
    widest = incumbent["BLOCK_K"] if task.operands == "tf32x3" else math.inf  # of more columns its error is larger
    return seeds + [config for config in near(incumbent) if config not in seeds and config["BLOCK_K"] <= widest]


def near(incumbent: Config) -> list[Config]:
    """The configs that differ from it in one number, then those that differ in two"""
    found = []
    for changes in (1, 2):
        for names in itertools.combinations(CHOICES, changes):
            for values in itertools.product(*(CHOICES[name] for name in names)):
                if all(incumbent[name] != value for name, value in zip(names, values, strict=True)):
                    found.append({**incumbent, **dict(zip(names, values, strict=True))})
    return found


@contextlib.contextmanager
def filing(task: Task, chip: str) -> Iterator[Callable[[Config], None]]:
    """A function that makes the launcher find another config for the task, inside of the context"""
    table = copy.deepcopy(launch.configs(task.op))
    kernels = table.setdefault(chip, table["default"])[task.operands][task.width]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if task.operands == "tf32" else "ieee"
    try:
        with mock.patch.object(launch, "configs", return_value=table):
            yield lambda config: kernels.__setitem__(task.kernel, config)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def call(task: Task, device: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    module = importlib.import_module(f"tests.triton_kernels.{task.op}")
    return module.tuning(task.operands, int(task.width), task.kernel, device)


def faults(task: Task, chip: str, config: Config) -> list[str]:
    """What is wrong with the kernels that the call would launch on the chip; needs no GPU"""
    with filing(task, chip) as use, offline.record(chip) as launches:
        use(config)
        run = call(task, "meta")
        launches.clear()
        run()
    assert launches, f"{task} launches nothing"
    return [fault for _, fault in (offline.compiled(task.op, chip, "", work) for work in launches) if fault]


def same(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], tolerance: float) -> bool:
    return all(
        (a.float() - b.float()).norm() <= tolerance * b.float().norm() for a, b in zip(got, expected, strict=True)
    )


def best(task: Task, chip: str, incumbent: Config, candidates: Iterator[Config], deadline: float) -> dict[str, Any]:
    """The fastest of them on the GPU that is here, and how it compares"""
    with filing(task, chip) as use:

        def variant(config: Config) -> tuple[Callable[[], None], Callable[[None], object]]:
            return lambda: use(config), lambda _: run()

        use(incumbent)
        run = call(task, "cuda")
        expected = run()
        times: list[tuple[float, Config]] = []
        for config in candidates:
            if time.monotonic() > deadline:
                break
            use(config)
            try:
                right = same(run(), expected, TOLERANCE[task.operands])
            except triton.TritonError as error:  # more than the chip has
                print(f"  {config}: {error}")
                continue
            if not right:
                print(f"  {config}: another result")
                continue
            times.append((interleave({"": variant(config)}, rounds=7)[""]["median"], config))
        challenger = min(times, key=lambda pair: pair[0], default=(0.0, incumbent))[1]
        final = interleave({"listed": variant(incumbent), "best": variant(challenger)}, rounds=51)
    ms = {name: final[name]["median"] for name in final}
    if ms["best"] > MARGIN * ms["listed"]:
        return {"config": incumbent, "ms": ms["listed"], "tried": len(times)}
    return {"config": challenger, "ms": ms["best"], "tried": len(times), "listed": incumbent, "listed_ms": ms["listed"]}


def dump(table: dict, indent: int = 0) -> str:
    """JSON with a config a line"""
    if not any(isinstance(value, dict) for value in table.values()):
        return json.dumps(table)
    space = " " * (indent + 2)
    lines = (f"{space}{json.dumps(name)}: {dump(value, indent + 2)}" for name, value in table.items())
    return "{\n" + ",\n".join(lines) + "\n" + " " * indent + "}"


def keep(task: Task, chip: str, device: str, found: dict[str, Any], root: Path = ROOT) -> None:
    """Files what was found if it is another config or the first of its kind on this device"""
    file = root / f"kernels/triton/{task.op}.json"
    table = json.loads(file.read_text())
    kernels = table.setdefault(chip, copy.deepcopy(table["default"]))[task.operands][task.width]
    log = root / f"benchmarks/tuned/{device}.json"
    measured = json.loads(log.read_text()) if log.exists() else {}
    name = " ".join(task)
    if name not in measured or found["config"] != kernels[task.kernel]:
        kernels[task.kernel] = found["config"]
        file.write_text(dump(table) + "\n")
        measured[name] = found
        log.parent.mkdir(exist_ok=True)
        log.write_text(json.dumps(dict(sorted(measured.items())), indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=offline.TUNED, default=offline.TUNED)
    parser.add_argument("--minutes", type=float, default=30)
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes

    # Forked before CUDA starts: these only compile.
    with ProcessPoolExecutor(mp_context=get_context("fork"), initializer=die_with_parent) as pool:
        pool.submit(abs, 0).result()
        torch.cuda.init()
        device = torch.device("cuda", torch.cuda.current_device())
        chip, folder = launch.chip(device), re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower())
        if chip not in offline.CHIPS:
            sys.exit(f"{chip} is not among the chips of offline.py: {', '.join(offline.CHIPS)}")
        versions = {"torch": torch.__version__, "triton": triton.__version__, "date": time.strftime("%Y-%m-%d")}
        work = [(task, candidates(task, config)) for op in arguments.op for task, config in listed(op, chip)]
        for k, (task, configs) in enumerate(work):
            share = time.monotonic() + (deadline - time.monotonic()) / (len(work) - k)
            checks = [(config, pool.submit(faults, task, chip, config)) for config in configs]
            sound = (config for config, check in checks if not check.result())
            found = best(task, chip, dict(listed(task.op, chip))[task], sound, share)
            for _, check in checks:
                check.cancel()
            keep(task, chip, folder, {**found, **versions})
            gain = f", {found['listed_ms'] / found['ms']:.2f}x faster than listed" if "listed" in found else ""
            print(
                f"{' '.join(task)}: {found['ms']:.4g} ms{gain}, {found['tried']} tried: {found['config']}", flush=True
            )


if __name__ == "__main__":
    main()
