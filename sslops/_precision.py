"""Which dtype a matmul's operands have."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """What autocast would make of x as the operand of a matmul; without autocast, x's own dtype."""
    device = x.device.type
    if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype
