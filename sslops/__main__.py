"""`python -m sslops`: what is installed, and which backend each op takes on this machine, or why it does not.

`python -m sslops bench OP` measures an op here.
"""

import importlib.util
import signal
import sys

import torch

from . import _C, __version__
from .backend import BACKENDS, choice, ops, refusal


def _triton_version() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    import triton

    return str(triton.__version__)


def _cuda_core() -> str:
    """Whether the CUDA code in this build runs on the current device: known only by running some of it."""
    archs = _C.build_info()["cuda_archs"]
    if archs is None:
        return "not built"
    if not torch.cuda.is_available():
        return f"built for {archs}; no CUDA device here"
    out = torch.empty(1000, dtype=torch.int32, device="cuda")
    try:
        _C.cuda_iota(out.data_ptr(), out.numel(), torch.cuda.current_stream().cuda_stream)
    except RuntimeError as error:
        return f"built for {archs}; fails on {torch.cuda.get_device_name()}: {error}"
    right = torch.equal(out, torch.arange(1000, dtype=torch.int32, device="cuda"))
    return f"built for {archs}; {'runs' if right else 'gives wrong results'} on {torch.cuda.get_device_name()}"


def main() -> None:
    info = _C.build_info()
    rows = {
        "sslops": f"{__version__} (core {info['version']}, compiler {info['compiler']})",
        "python": sys.version.split()[0],
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads, loops on its pool: {info['threads']}",
        "triton": _triton_version(),
        "CPU": f"{info['isa']} (built: {info['isas']})",
        "CUDA": _cuda_core(),
    }
    for name, text in rows.items():
        print(f"{name:<8}{text}")
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    for device in devices:
        print("\n" + _table(device))


def _table(device: torch.device) -> str:
    """Ops by backends: the one taken in brackets, "-" where there is no kernel, numbers for the other reasons"""
    rows, reasons, troubles = [["", *BACKENDS]], [], set()
    for op in ops():
        taken, trouble = choice(op, device, torch.float32)
        troubles |= {trouble} - {""}
        cells = []
        for backend in BACKENDS:
            reason = refusal(backend, op, device, torch.float32)
            if reason is None:
                cells.append("[yes]" if backend == taken else "yes")
            elif reason.startswith(f"{op} has no "):
                cells.append("-")
            else:
                if reason not in reasons:
                    reasons.append(reason)
                cells.append(str(reasons.index(reason) + 1))
        rows.append([op, *cells])
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    lines = [f"float32 on {device}; in brackets: taken unless backend= asks for another", *sorted(troubles)]
    lines += ["".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, *(f"{number}: {reason}" for number, reason in enumerate(reasons, 1))])


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `python -m sslops | head`
    if sys.argv[1:2] == ["bench"]:
        from ._bench import main as bench

        bench(sys.argv[2:])
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        main()
