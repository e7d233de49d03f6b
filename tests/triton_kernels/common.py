"""What the modules of several ops share."""

import torch
from torch import Tensor

OPERANDS = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}


def multiply(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> None:
    """launch.multiply on a CPU, whose addmm has no out_dtype"""
    torch.addmm(out, a.float(), b.float(), alpha=alpha, beta=beta, out=out)
