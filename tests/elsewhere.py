"""A second device for machines that have none: torch's functions see it, and refuse what a real one would."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("xpu", 0)


class Elsewhere(TorchFunctionMode):
    """Tensors are moved there by to() and made there by `device=`; in memory they are the CPU's.

    Tensors of two devices do not meet, but for copies and numbers in 0-d tensors; and it has no float64, as Apple's.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.device.__get__:
            return DEVICE if _is_there(args[0]) else func(*args)
        wanted = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.device)]
        args, kwargs = tree_map(lambda x: torch.device("cpu") if x == DEVICE else x, (args, kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        moves = bool(wanted) or func is Tensor.copy_
        if not moves and len({_is_there(x) for x in tensors if x.dim() or _is_there(x)}) > 1:
            raise RuntimeError(f"{func.__name__}: tensors of two devices")
        out = func(*args, **kwargs)
        there = DEVICE in wanted if wanted else any(map(_is_there, tensors[:1] if func is Tensor.copy_ else tensors))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if there and any(x.dtype in (torch.float64, torch.complex128) for x in made):
            raise TypeError(f"{func.__name__}: this device has no float64")
        if any(x is y and _is_there(x) != there for x in made for y in tensors):
            out = out.clone()
            made = [out]
        for x in made:
            x.is_elsewhere = there
        return out


def _is_there(x: Tensor) -> bool:
    return getattr(x, "is_elsewhere", False)


def moved(module: nn.Module) -> nn.Module:
    for x in [*module.parameters(), *module.buffers()]:
        x.data = x.data.clone()  # other memory, as a move gives
        x.is_elsewhere = True
    return module
