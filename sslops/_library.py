"""Fused ops in torch's library: one pair of ops (forward, backward) each, for eager calls, torch.compile and export."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _check
from .backend import BACKENDS, refusal

_LIBRARY = torch.library.Library("sslops", "FRAGMENT")


def _guarded(name: str, arguments: list[str], implementation: Callable[..., Any]) -> Callable[..., Any]:
    """What holds for every kernel, however it is called: it can take these tensors, and autocast is off.

    (Kernels are given the operands' dtype; autocast would round what they multiply on top of that.)
    """
    x_at, operand_at, backend_at = arguments[0] == "grad", arguments.index("operand_dtype"), arguments.index("backend")

    def run(*values: Any) -> Any:
        x, operand, backend = values[x_at], values[operand_at], values[backend_at]
        if backend not in BACKENDS or backend == "eager":
            _check.bad_value(name, "backend", "a backend with kernels", repr(backend))
        for dtype in (x.dtype, operand):
            reason = refusal(backend, name, x.device, dtype)
            if reason is not None:
                raise RuntimeError(f"{name}: backend {backend!r} cannot run here: {reason}")
        if forward_ad._current_level >= 0:
            raise RuntimeError(f"{name}: fused kernels have no forward-mode derivative; use backend='eager'")
        with torch.autocast(x.device.type, enabled=False):
            return implementation(*values)

    return run


def register(
    name: str,
    *,
    arguments: str,
    saved: str,
    gradients: Sequence[str],
    forward: Callable[..., Any],
    forward_fake: Callable[..., Any],
    backward: Callable[..., Any],
    backward_fake: Callable[..., Any],
) -> None:
    """Registers `name(arguments) -> (Tensor, saved)` and `name_backward(Tensor grad, arguments, saved)`.

    The first output is the result; the saved ones, if any, are kept for backward and have no gradient. The backward op
    returns one gradient for each argument named in `gradients`. Differentiating it raises: that is for backend="eager".
    Among the arguments are operand_dtype and backend, and the first one is the tensor that a backend is chosen by.
    """
    names = [argument.split()[1] for argument in arguments.split(", ")]
    outputs = f"(Tensor result, {saved})" if saved else "Tensor"
    backward_arguments = ", ".join(filter(None, ["Tensor grad", arguments, saved]))
    gradient_outputs = ", ".join(["Tensor"] * len(gradients))
    schemas = {
        name: (f"({arguments}) -> {outputs}", names, forward, forward_fake),
        f"{name}_backward": (
            f"({backward_arguments}) -> ({gradient_outputs})",
            ["grad", *names],
            backward,
            backward_fake,
        ),
    }
    for op, (schema, op_names, implementation, fake) in schemas.items():
        _LIBRARY.define(op + schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(op, _guarded(name, op_names, implementation), "CompositeExplicitAutograd")
        torch.library.register_fake(f"sslops::{op}", fake, lib=_LIBRARY)

    backward_op = getattr(torch.ops.sslops, f"{name}_backward")

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        kept = output[1:] if saved else ()
        ctx.mark_non_differentiable(*kept)
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)), *kept)

    def differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if tensor else value for tensor, value in zip(ctx.is_tensor, ctx.rest, strict=True)]
        found = dict(zip(gradients, backward_op(grad, *inputs, *tensors), strict=True))
        return tuple(found[n] if n in found and t else None for n, t in zip(names, ctx.is_tensor, strict=True))

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{name}: fused kernels have no second derivative; use backend='eager'")

    torch.library.register_autograd(f"sslops::{name}", differentiate, setup_context=setup_context, lib=_LIBRARY)
    torch.library.register_autograd(f"sslops::{name}_backward", refuse, lib=_LIBRARY)
