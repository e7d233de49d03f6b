"""Memory over thousands of steps of every case, refused ones too: what grows with the steps is a leak.

python -m tests.fuzz.leaks [--steps 3000]
"""

import argparse
import contextlib
import sys

import torch

from ..cases import CASES
from .long_run import resident


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=3000)
    steps = parser.parse_args().steps
    leaks = []
    for case in CASES:
        broken = {name: x[..., :0] for name, x in case.inputs.items()}

        def take(count: int, case=case, broken=broken) -> None:
            for _ in range(count):
                case.run_with_gradients("cpu")
                with contextlib.suppress(TypeError, ValueError):
                    case.run("cpu", broken)

        take(200)
        before = resident()
        take(steps)
        grown = resident() - before
        leaks += [f"{case}: {grown:.1f} MB"] if grown > 2 else []
    print(f"{len(CASES)} cases, {steps} steps each:", "; ".join(leaks) or "nothing grew by more than 2 MB")
    return bool(leaks)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
