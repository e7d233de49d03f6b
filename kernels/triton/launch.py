"""What every Triton kernel's launcher needs: which chip, which launch config, which precision, whether at all."""

import contextlib
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_TRITON = (3, 6)
FUSED = {"enable_fp_fusion": True}  # triton 3.9 warns where this is left open, 3.10 will not fuse


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel can run there; None if it can."""
    if dtype not in DTYPES:
        return f"no {dtype} kernel: float32, float16 and bfloat16"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than {'.'.join(map(str, OLDEST_TRITON))}"
    if triton.knobs.runtime.interpret:
        return None
    if device.type != "cuda":
        return f"triton does not run on {device.type} tensors"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    return None


def wanted(gradients: Iterable[Tensor], needs_grad: list[bool]) -> tuple[Tensor, ...]:
    """Those that are wanted, [0] for the others"""
    return tuple(g if want else g.new_empty(0) for g, want in zip(gradients, needs_grad, strict=True))


@functools.cache
def chip(device: torch.device) -> str:
    """The name under which a device's launch configs are filed: sm_90, gfx942, ..."""
    if device.type != "cuda":
        return "default"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def processors(device: torch.device) -> int:
    """How many multiprocessors it has; an H100's where it is no GPU"""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@contextlib.contextmanager
def on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device's current stream."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
    else:
        yield


def precision(op: str, dtype: torch.dtype) -> str:
    """An op's tl.dot's input_precision for operands of `dtype`: float32 as torch.mm would multiply, half as it is"""
    if dtype != torch.float32:
        return "ieee"
    # Follows torch.set_float32_matmul_precision and allow_tf32 too, whose getters raise once this one was set.
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    # NVIDIA's matrix units have no float32: three products of two TF32 parts, where an op's configs have them. What the
    # units cut off (tests/triton_kernels/gpu_arithmetic.py) allows a tl.dot few terms: too few for info_nce, relic and
    # supcon, whose weights are multiplied in the kernel too, by slices of BLOCK_K columns, each of which makes S anew;
    # supcon's gradient would be 3.4e-5 off where 2.9e-5 is promised. AMD's units have float32.
    return "tf32x3" if torch.version.hip is None and "tf32x3" in configs(op)["default"] else "ieee"


@functools.cache
def configs(op: str) -> dict[str, Any]:
    """`<op>.json`: chip -> half, tf32, tf32x3 or ieee -> width -> kernel -> launch config; a chip's own are complete"""
    return json.loads(Path(__file__).with_name(f"{op}.json").read_text())


def nearest(op: str, device: torch.device, dtype: torch.dtype, width: int) -> dict[str, dict[str, int]]:
    """The configs of the smallest listed width that holds `width`, else of the widest; unknown chips: `default`."""
    table = configs(op)
    widths = table.get(chip(device), table["default"])[precision(op, dtype) if dtype == torch.float32 else "half"]
    listed = sorted(map(int, widths))
    kernels = widths[str(next((w for w in listed if w >= width), listed[-1]))]
    return {kernel: config | FUSED for kernel, config in kernels.items()}


def spans(n: int, step: int, wanted: int) -> tuple[int, int]:
    """n in `wanted` spans, or fewer: how long each is, in whole steps, and how many there are"""
    span = triton.cdiv(triton.cdiv(n, max(1, wanted)), step) * step
    return span, triton.cdiv(n, span)


def multiply(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> None:
    """out = beta out + alpha a b, float32 whatever the operands; out is not read where beta is 0"""
    if a.dtype == torch.float32:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    else:  # out_dtype with a float32 `out` to add to: from torch 2.10 on, the oldest that we take
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=out)


def half_scale(operand: torch.dtype, values: Callable[[], Tensor], dim: int | None = None) -> Tensor | None:
    """What takes the largest of values, [] or along dim, near the top of float16, which has 5 bits of exponent; None
    for other operands, whose values are not asked for.
    """
    if operand != torch.float16:
        return None
    return 2.0**14 / torch.linalg.vector_norm(values(), float("inf"), dim=dim).clamp(min=1e-30)


def row_a_program(width: int) -> dict[str, Any]:
    """The launch config of kernels whose programs have a row each, and read it in pieces"""
    return {"BLOCK_D": min(triton.next_power_of_2(width), 128), "num_warps": 8, **FUSED}


def scale_of(temperature: float | Tensor) -> tuple[Tensor | None, float]:
    """The temperature if it is on the device, where it stays, or log2(e) / tau: exp(s / tau) = exp2(s * scale)"""
    return (temperature.float(), 0.0) if isinstance(temperature, Tensor) else (None, math.log2(math.e) / temperature)
