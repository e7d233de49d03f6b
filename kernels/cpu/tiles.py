"""What the CPU kernels take, and how their scratch is made."""

from typing import Any

import torch

# Not what the user may have set as defaults: the native core reads these through pointers.
FLOAT32: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the CPU kernels cannot take such tensors; None if they can."""
    if dtype not in DTYPE_CODES:
        return f"no {dtype} kernel: float32, float16 and bfloat16"
    return None
