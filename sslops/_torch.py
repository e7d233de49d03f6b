"""Names that torch does not promise to keep; apart from its underscored ops, all of them that we use."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable[..., Any])
# Whether a tensor is a wrapper around one, of a transform of torch.func that has ended
is_left_by_func: Callable[[Tensor], bool] = torch._C._functorch.is_dead_tensor_wrapper  # type: ignore[attr-defined]
_KEYS = (("cpu", torch._C.DispatchKey.CPU), ("cuda", torch._C.DispatchKey.CUDA))


def constant(function: _Function) -> _Function:
    """A trace takes its answer: torch.compiler.assume_constant_result without its import of torch._dynamo"""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def in_func() -> bool:
    """Inside a transform of torch.func"""
    return torch._C._are_functorch_transforms_active()


def in_modes() -> bool:
    """Under a mode that sees every op: fake tensors, make_fx, a user's"""
    return torch._C._len_torch_dispatch_stack() > 0


def in_jit_trace() -> bool:
    return torch._C._is_tracing()


def in_make_fx() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def readable(x: Tensor) -> str:
    """ "cpu" or "cuda", where its memory is; "" of a tensor that has none to read, such as one of vmap's"""
    if type(x) is not Tensor:
        return ""
    keys = torch._C._dispatch_keys(x)
    return next((name for name, key in _KEYS if keys.has(key)), "")


def process_group(name: str) -> Any:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type]
