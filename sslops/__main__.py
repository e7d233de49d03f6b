"""`python -m sslops`: what is installed, and which backend each op takes on this machine, or why it does not."""

import importlib.util
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
        print(f"\nfloat32 on {device}")
        for op in ops():
            taken, trouble = choice(op, device, torch.float32)
            if trouble:
                print(f"  {trouble}")
            for backend in BACKENDS:
                state = "taken" if backend == taken else refusal(backend, op, device, torch.float32) or "available"
                print(f"  {op:<20}{backend:<8}{state}")


if __name__ == "__main__":
    main()
