"""Fused ops in torch's library: one pair of ops (forward, backward) each, for eager calls, torch.compile and export."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _check
from .backend import BACKENDS, refusal
from .distributed import agreed

_LIBRARY = torch.library.Library("sslops", "FRAGMENT")
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    torch.dtype: "ScalarType",
    bool: "bool",
    float: "float",
    int: "SymInt",
    int | None: "SymInt?",
    str: "str",
    list[float]: "float[]",
}


def _is_spread(x: Any) -> bool:
    return getattr(x, "group", "") != ""


def _guarded(name: str, x: Any, kernel: Callable[[], Any]) -> Any:
    """What holds for every kernel, however it is called: it can take these tensors, and autocast is off.

    (Kernels are given the operands' dtype; autocast would round what they multiply on top of that.)
    """
    if x.backend not in BACKENDS or x.backend == "eager":
        _check.bad_value(name, "backend", "a backend with kernels", repr(x.backend))
    device = x[0].device
    for dtype in (x[0].dtype, getattr(x, "operand_dtype", x[0].dtype)):
        reason = refusal(x.backend, name, device, dtype, _is_spread(x))
        if reason is not None:
            raise RuntimeError(f"{name}: backend {x.backend!r} cannot run here: {reason}")
    if forward_ad._current_level >= 0:
        raise RuntimeError(f"{name}: fused kernels have no forward-mode derivative; use backend='eager'")
    with torch.autocast(device.type, enabled=False):
        return kernel()


def register(
    name: str,
    arguments: type[NamedTuple],
    *,
    saved: Sequence[str] = (),
    gradients: Sequence[str] = (),
    forward: Callable[..., Any],
    forward_fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    backward_fake: Callable[..., Any] | None = None,
    kept: Callable[[Any], Any] = lambda x: x,
    unit: str | None = None,
) -> None:
    """Registers `name(arguments) -> (result, *saved)` and `name_backward(grad, arguments, *saved)`.

    arguments: a NamedTuple that begins with the tensor a backend is chosen by and has a field `backend`. The functions
    take one: forward(x), backward(grad, x, *saved), and the fakes alike. With a field `group`, the name of a process
    group or "", forward gets tensors whose shapes and dtypes are those of all ranks. The first output is the result;
    the saved ones, if any, are kept for backward and have no gradient. The backward op returns one gradient for each
    argument named in `gradients`. Differentiating it raises: that is for backend="eager". Without a backward nothing
    is differentiable. kept(x): the arguments as backward gets them, those tensors None that it does not need.
    unit: the saved output that backward does not get: the gradient itself where grad is 1, or empty. In eager mode on
    the CPU it is handed out once, scaled in place (half precision only under 1): from there on it is the caller's.
    Hooks on saved tensors do not see it.
    """
    fields = get_type_hints(arguments)
    names, count = list(fields), len(fields)
    inputs = [f"{_SCHEMA_TYPES[kind]} {field}" for field, kind in fields.items()]
    kept_inputs = [f"Tensor {each}" for each in saved]

    def define(op: str, lead: int, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
        """lead: how many values come before the arguments"""

        def parts(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return *values[:lead], arguments._make(values[lead : lead + count]), *values[lead + count :]

        def run(*values: Any) -> Any:
            given = parts(values)
            x = given[lead]
            if lead == 0 and _is_spread(x):
                return _guarded(name, x, lambda: on_all_ranks(x))
            return _guarded(name, x, lambda: implementation(*given))

        def on_all_ranks(x: Any) -> Any:
            with agreed(name, x.group, [value for value in x if isinstance(value, Tensor)]) as tensors:
                same = iter(tensors)
                return implementation(type(x)._make(next(same) if isinstance(v, Tensor) else v for v in x))

        _LIBRARY.define(op + schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(op, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sslops::{op}", lambda *values: fake(*parts(values)), lib=_LIBRARY)

    outputs = ", ".join(["Tensor result", *kept_inputs])
    define(name, 0, f"({', '.join(inputs)}) -> ({outputs})", forward, forward_fake)
    if backward is None or backward_fake is None:
        return
    outputs = ", ".join(["Tensor"] * len(gradients))
    of_forward = [f"Tensor {each}" for each in saved if each != unit]
    schema = f"({', '.join(['Tensor grad', *inputs, *of_forward])}) -> ({outputs})"
    define(f"{name}_backward", 1, schema, backward, backward_fake)
    backward_op = getattr(torch.ops.sslops, f"{name}_backward")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        extra = dict(zip(saved, output[1:] if saved else (), strict=True))
        inputs = kept(arguments._make(inputs))
        ctx.mark_non_differentiable(*extra.values())
        ctx.unit = extra.pop(unit, None) if unit else None
        ctx.set_materialize_grads(False)  # of what is kept: zeros of its size at every backward
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)), *extra.values())

    def differentiate(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if tensor else value for tensor, value in zip(ctx.is_tensor, ctx.rest, strict=True)]
        ready, ctx.unit = ctx.unit, None
        # vmap's have another key, and no value that can be read
        plain = type(grad) is Tensor and torch._C._dispatch_keys(grad).has(torch._C.DispatchKey.CPU)
        eager = plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        factor = grad.item() if eager and ready is not None and ready.numel() else None
        if ready is not None and (factor == 1 or (factor is not None and ready.dtype == torch.float32)):
            values = ready if factor == 1 else ready.mul_(grad)
        else:
            del ready  # its memory is of use to the kernel
            values = backward_op(grad, *inputs, *tensors)
        found = dict(zip(gradients, values if isinstance(values, tuple) else (values,), strict=True))
        return tuple(found[n] if n in found and t else None for n, t in zip(names, ctx.is_tensor, strict=True))

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{name}: fused kernels have no second derivative; use backend='eager'")

    torch.library.register_autograd(f"sslops::{name}", differentiate, setup_context=setup_context, lib=_LIBRARY)
    torch.library.register_autograd(f"sslops::{name}_backward", refuse, lib=_LIBRARY)
