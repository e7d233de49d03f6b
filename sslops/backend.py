"""Where a backend is chosen, refused with a reason, and explained.

A backend is a folder of kernels: `sslops.kernels.<backend>.<op>`; what the cpu and the cuda backend do by the same
native call is in `sslops.kernels.native`. A file that is not there is a backend that the op does not have. `eager`, the
reference in `sslops/ops/<op>.py`, runs everywhere and comes last.
"""

import functools
import importlib
import importlib.util
import os
import pkgutil
from types import ModuleType

import torch
from torch import Tensor

from . import _torch

__all__ = [
    "BACKENDS",
    "check_name",
    "choice",
    "explain",
    "is_distributed",
    "kernel",
    "ops",
    "refusal",
    "require",
    "resolve",
]

# Per device type, fastest first.
_ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
BACKENDS = ("cpu", "cuda", "triton", "eager")


def ops() -> list[str]:
    """Names of the ops."""
    from . import ops as package

    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


@functools.cache
def _home(backend: str, op: str) -> str | None:
    """The name of the module with the kernel"""
    folders = (backend, "native") if backend in ("cpu", "cuda") else (backend,)
    names = (f"sslops.kernels.{folder}.{op}" for folder in folders)
    return next((name for name in names if _exists(name)), None)


@functools.cache
def kernel(backend: str, op: str) -> ModuleType:
    """The module with the kernel that there is."""
    name = _home(backend, op)
    if name is None:
        raise ModuleNotFoundError(f"{op} has no {backend} kernel")
    return importlib.import_module(name)


@_torch.constant
def is_distributed(backend: str, op: str) -> bool:
    """Whether it takes a batch that lies spread over ranks as it is. The others take the gathered batch."""
    return backend != "eager" and getattr(kernel(backend, op), "DISTRIBUTED", False)


@functools.cache
def refusal(
    backend: str, op: str, device: torch.device, dtype: torch.dtype, distributed: bool = False, form: str = ""
) -> str | None:
    """Why `backend` cannot run `op` there, for a batch spread over ranks if distributed; None if it can.

    form: "", or the option that not every kernel has; a kernel's module lists those that it LACKS.
    """
    if backend == "eager":
        return None
    if _home(backend, op) is None:
        return f"{op} has no {backend} kernel"
    if backend not in _ORDER.get(device.type, ()):
        return f"the {backend} backend does not run on {device.type} tensors"
    if backend == "triton" and not _exists("triton"):
        return "triton is not installed"
    if distributed and not is_distributed(backend, op):
        return f"{op}'s {backend} kernel has no distributed form"
    if form in getattr(kernel(backend, op), "LACKS", ()):
        return f"{op}'s {backend} kernel has no {form}"
    reason: str | None = kernel(backend, op).refuses(device, dtype)
    return reason


def require(
    backend: str, op: str, device: torch.device, dtype: torch.dtype, distributed: bool = False, form: str = ""
) -> None:
    """RuntimeError, with the reason, where `refusal` has one"""
    reason = refusal(backend, op, device, dtype, distributed, form)
    if reason is not None:
        raise RuntimeError(f"{op}: backend {backend!r} cannot run here: {reason}")


@functools.cache
def _choose(op: str, device: torch.device, dtype: torch.dtype, wanted: str | None, distributed: bool, form: str) -> str:
    if wanted is not None:
        check_name(op, wanted)
        require(wanted, op, device, dtype, distributed, form)
        return wanted
    backends = (*_ORDER.get(device.type, ()), "eager")
    return next(b for b in backends if refusal(b, op, device, dtype, distributed, form) is None)


def check_name(op: str, wanted: str | None) -> None:
    """That it is a backend's name, or None."""
    if wanted is not None and not isinstance(wanted, str):
        raise TypeError(f"{op}: backend: wanted a name or None, got {wanted!r}")
    if wanted is not None and wanted not in BACKENDS:
        raise ValueError(f"{op}: backend: wanted one of {', '.join(BACKENDS)}, got {wanted!r}")


@_torch.constant
def resolve(
    op: str, device: torch.device, dtype: torch.dtype, wanted: str | None, group: str = "", form: str = ""
) -> str:
    """The backend that runs `op` there: `wanted`, else $SSLOPS_BACKEND, else the fastest that can.

    group: the name of a process group whose ranks share the batch, or "". form: as in `refusal`.

    Raises ValueError for an unknown name and RuntimeError, with the reason, for a backend that cannot run.
    """
    check_name(op, wanted)
    if wanted is None:
        wanted = os.environ.get("SSLOPS_BACKEND") or None
    return _choose(op, device, dtype, wanted, group != "", form)


def choice(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str | None, str]:
    """The backend that a call without `backend=` takes; or None and what is wrong with $SSLOPS_BACKEND."""
    try:
        return resolve(op, device, dtype, None), ""
    except (RuntimeError, ValueError) as error:
        return None, f"SSLOPS_BACKEND={os.environ['SSLOPS_BACKEND']}: {error}"


def explain(op: str, *tensors: Tensor) -> str:
    """Which backend `op` takes for these tensors (a CPU float32 tensor if none is given) and why not the others.

    Examples:
        >>> print(sslops.explain("nt_xent", z0, z1))
    """
    if not (isinstance(op, str) and op in ops()):
        raise ValueError(f"explain: op: wanted one of {', '.join(ops())}, got {op!r}")
    for x in tensors:
        if not isinstance(x, Tensor):
            raise TypeError(f"explain: tensors: wanted tensors, got {type(x).__name__}")
    device = tensors[0].device if tensors else torch.device("cpu")
    dtype = tensors[0].dtype if tensors else torch.float32
    lines = [f"{op} on {device}, {dtype}:"]
    chosen, trouble = choice(op, device, dtype)
    if trouble:
        lines.append(f"  {trouble}")
    for backend in BACKENDS:
        reason = refusal(backend, op, device, dtype)
        lines.append(f"  {backend:<8}{'taken' if backend == chosen else reason or 'available'}")
    route = getattr(importlib.import_module(f"sslops.ops.{op}"), "cheaper_route", None)
    if route and tensors and tensors[0].dim() == 2:
        shape = list(tensors[0].shape)
        lines.append(f"  route   {route(*shape, chosen)}, the cheaper exact one for [N, D] = {shape}")
    return "\n".join(lines)
