"""Every case on four threads, against one thread's bits; under ThreadSanitizer, every access to shared memory.

tests/fuzz/sanitized.sh thread python -m tests.fuzz.races
"""

import sys

import torch

import sslops

from ..cases import CASES
from ..test_promises import EXEMPT


def main() -> int:
    z = torch.randn(2, 700, 40)
    large = {
        "nt_xent": lambda b: sslops.nt_xent(*z.unbind(), reduction="none", backend=b),
        "info_nce": lambda b: sslops.info_nce(z[0], z[1], torch.ones(900, 40), reduction="none", backend=b),
        "relic": lambda b: sslops.relic(z[0], z[1], temperature=0.1, alpha=1.0, beta=0.5, reduction="none", backend=b),
        "vicreg": lambda b: sslops.vicreg(z[0], z[1], backend=b),
        "barlow_twins": lambda b: sslops.barlow_twins(z[0], z[1], backend=b),
    }
    z.requires_grad_()
    other = []
    small = {str(c): c.run_with_gradients for c in CASES if ("same_bits", c.op) not in EXEMPT}
    for name, call in (small | large).items():
        found = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            out = call("cpu")
            found.append(out if isinstance(out, list) else [out, *torch.autograd.grad(out.sum(), z)])
        if not all(map(torch.equal, *found)):
            other.append(name)
    print(f"{len(small | large)} cases on 1 and 4 threads:", f"other bits of {other}" if other else "the same bits")
    return bool(other)


if __name__ == "__main__":
    sys.exit(main())
