"""Which devices this build has code for, and how a native function is launched on one."""

from collections.abc import Callable

import torch

from sslops import _C

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is no code for the device; None if there is."""
    archs = _C.build_info()["cuda_archs"]
    if archs is None:
        return "this build of sslops has no CUDA code"
    major, minor = torch.cuda.get_device_capability(device)
    for kind, _, arch in (name.partition("_") for name in archs.split(",")):
        built = divmod(int(arch), 10)
        if built <= (major, minor) and (kind == "compute" or built[0] == major):  # PTX, or code for this generation
            return None
    return f"this build of sslops has code for {archs}, not for sm_{major}{minor}"


def refuses_but_floats(device: torch.device, dtype: torch.dtype) -> str | None:
    """As above, for kernels of float32, float16 and bfloat16."""
    return refuses(device, dtype) if dtype in DTYPE_CODES else f"no {dtype} kernel: float32, float16 and bfloat16"


def launch(device: torch.device, native: Callable[..., None], *arguments: object) -> None:
    """native(*arguments, stream) on the device's current stream"""
    with torch.cuda.device(device):
        native(*arguments, torch.cuda.current_stream().cuda_stream)
