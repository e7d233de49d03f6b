"""Which devices this build has code for."""

import functools

import torch

from sslops import _C


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why there is no code for the device; None if there is."""
    archs = _C.build_info()["cuda_archs"]
    if archs is None:
        return "this build of sslops has no CUDA code"
    if torch.version.hip is not None:  # whose devices call themselves cuda, with capabilities like NVIDIA's
        return "this build of sslops has CUDA code, and this torch is for ROCm"
    major, minor = torch.cuda.get_device_capability(device)
    for kind, _, arch in (name.partition("_") for name in archs.split(",")):
        built = divmod(int(arch), 10)
        if built <= (major, minor) and (kind == "compute" or built[0] == major):  # PTX, or code for this generation
            return _trouble(device)
    return f"this build of sslops has code for {archs}, not for sm_{major}{minor}"


@functools.cache
def _trouble(device: torch.device) -> str | None:
    """What comes of the smallest launch, of nothing to do; once, as an older driver refuses every later one too"""
    try:
        with torch.cuda.device(device):
            _C.cuda_iota(0, 0, torch.cuda.current_stream().cuda_stream)
    except RuntimeError as error:
        return f"sslops' CUDA code does not run here: {error}"
    return None
