"""Compiles the Triton kernels for a chip on all cores, without it, into Triton's cache: `python -m benchmarks.ahead`.

The launches are those that offline.py lists. Triton's JIT compiles them itself, told by a driver of ours which chip
there is, so that it finds them again under its own key when it runs on that chip.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tests.triton_kernels import offline

from ._process import die_with_parent


class Driver:
    """What the JIT asks before it compiles"""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _start(chip: str) -> None:
    die_with_parent()
    driver.set_active(Driver(offline.CHIPS[chip].target))


def _compile(index: int) -> str | None:
    """What went wrong"""
    op, _, call, work = _works[index]
    try:
        work.compile()
    except Exception as error:  # ptxas gives up on some
        return f"{op} {call} {work.kernel.__name__} {work}: {error}"
    return None


def main() -> int:
    global _works
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", choices=offline.CHIPS, default="sm_90")
    parser.add_argument("--op", nargs="+", choices=offline.OPS, default=offline.OPS)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    start = time.monotonic()
    offline.OPS = arguments.op
    _works = offline.works([arguments.chip])  # inherited by the forked workers: a Launch cannot be pickled
    pool = ProcessPoolExecutor(
        arguments.workers, mp_context=get_context("fork"), initializer=_start, initargs=(arguments.chip,)
    )
    with pool:
        # exact float32, which no one trains in, at last
        order = sorted(range(len(_works)), key=lambda k: _works[k][2].startswith(("ieee", "tf32x3")))
        jobs = [pool.submit(_compile, index) for index in order]
        faults = []
        for done, job in enumerate(as_completed(jobs), 1):
            if job.result():
                faults.append(job.result())
                print(job.result(), flush=True)
            if done % 20 == 0 or done == len(jobs):
                print(f"{done} of {len(jobs)} kernels, {time.monotonic() - start:.0f} s", flush=True)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
