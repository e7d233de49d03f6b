"""Fused ops in torch's library: one pair of ops (forward, backward) each, for eager calls, torch.compile and export.

An op is one NamedTuple of arguments that crosses every seam as it is: the public function builds it, checks, reference,
kernels and fakes take it, and torch's schema is derived from its fields.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor

from . import _check, _torch, distributed
from ._levels import through_levels
from ._precision import compute_dtype
from ._schema import LIBRARY, Out, Outputs, Schema, define, tensors_in
from .backend import BACKENDS, is_distributed, kernel, require, resolve

__all__ = ["Out", "register"]


def _guarded(name: str, x: Any, run: Callable[[], Any]) -> Any:
    """What holds for every kernel, however it is called: it can take these tensors, and autocast is off.

    (Kernels are given the operands' dtype; autocast would round what they multiply on top of that.)
    """
    if x.backend not in BACKENDS or x.backend == "eager":
        _check.bad_value(name, "backend", "a backend with kernels", repr(x.backend))
    first = _check.first(x)
    device = first.device
    _require(name, x, first.dtype)
    if (operand := getattr(x, "operand_dtype", first.dtype)) != first.dtype:
        _require(name, x, operand)
    if _torch.in_forward_mode():
        raise RuntimeError(f"{name}: fused kernels have no forward-mode derivative; use backend='eager'")
    if not torch.is_autocast_enabled(device.type):
        return run()
    with torch.autocast(device.type, enabled=False):
        return run()


def _require(name: str, x: Any, dtype: torch.dtype, form: str = "") -> None:
    require(x.backend, name, _check.first(x).device, dtype, _is_spread(x), form)


def _is_spread(x: Any) -> bool:
    return getattr(x, "group", "") != ""


def _named(x: Any) -> dict[str, Any]:
    return dict(zip(x._fields, x, strict=True))


def _options(x: Any) -> str:
    return distributed.options({k: v for k, v in _named(x).items() if k not in ("group", "version")})


def _replaced(x: Any, **values: Any) -> Any:
    return type(x)(*map(values.get, x._fields, x))


def register(
    name: str,
    arguments: type[Any],
    outputs: Callable[[Any], Outputs],
    *,
    reference: Callable[[Any], Any],
    check: Callable[[Any], None] = lambda x: None,
    form: Callable[[Any], str] = lambda x: "",
    gradients: Sequence[str] = (),
    forward: Callable[[Any], Any] | None = None,
    backward: Callable[..., Any] | None = None,
    kept: Callable[[Any], Any] | None = None,
    unit: str | Sequence[str] = (),
) -> Callable[..., Any]:
    """The op as a function of its arguments and the backend asked for, or None; and of what is still to be done to
    arguments that have passed all checks, if anything.

    In torch's library it is `name(arguments) -> outputs` and `name_backward(grad, arguments, *saved) -> gradients`.

    arguments: a NamedTuple, whose first field is the tensor that a backend is chosen by (or a list of tensors). Tensors
        say what they must be, `Annotated[Tensor, Of("N D")]`: checked in ordinary calls and in direct ones of
        torch.ops.sslops. Fields with a default are filled in here: `backend`, `operand_dtype` (what autocast makes of
        the first tensor) and `needs_grad: list[bool]`, for each of `gradients` whether it will be wanted (without that
        field, all are). With a field `group`, the name of a process group or "", tensors that are `spread` are the
        rank's part of a batch, and their shapes and dtypes those of all ranks; the reference, and kernels without a
        distributed form, get the gathered ones.
    outputs(x): an Out, or a NamedTuple of them, which is its return annotation. The first is the result, the others are
        kept for backward and have no gradient; those of `unit` may be list[Out]. What forward does not return must be
        empty.
    reference(x): the eager form, of the same outputs as far as the public function uses them.
    check(x): what the declarations do not say.
    form(x): what these arguments ask of a kernel that it may lack (`backend.refusal`), or "".
    gradients: the arguments that have one, of the argument's own shape and dtype; [0] where it is not wanted; a list's
        is a list.
    forward(x), backward(grad, x, *saved): the kernel's, or what is to be done around it. Differentiating backward
        raises: that is for backend="eager".
    kept(x): the arguments as backward gets them, those tensors None that it does not need; all of them without it.
    unit: the outputs that backward does not get, one for each gradient: that gradient itself where grad is 1, or a list
        of it (a list's gradients are one each, or in one piece along the first dimension), of its dtype or float32, or
        empty. In eager mode they are handed out once, scaled in place (half precision only under 1): from there on they
        are the caller's. A compiled graph scales a copy. Hooks on saved tensors do not see them.
    """
    schema, declared = Schema(arguments), _check.declared(arguments)
    placed = [(field, arguments._fields.index(field), of.strided) for field, of in declared.items()]
    spread = [field for field, of in declared.items() if of.spread]
    along = {field: dim for field in spread if (dim := declared[field].along) is not None}

    def default_forward(x: Any) -> Any:
        return kernel(x.backend, name).forward(x)

    def default_backward(grad: Tensor, x: Any, *saved: Tensor) -> Any:
        return kernel(x.backend, name).backward(grad, x, *saved)

    run_forward, run_backward = forward or default_forward, backward or default_backward

    def specs(x: Any) -> tuple[Out | list[Out], ...]:
        found = outputs(x)
        return (found,) if isinstance(found, Out) else found

    def gradient_specs(x: Any) -> list[Out | list[Out]]:
        wanted = getattr(x, "needs_grad", [True] * len(gradients))
        found: list[Out | list[Out]] = []
        for field, want in zip(gradients, wanted, strict=True):
            value = getattr(x, field)
            if field in schema.lists:
                found.append([Out(tuple(each.shape) if want else (0,), each.dtype) for each in value])
            elif isinstance(value, Tensor):
                found.append(Out(tuple(value.shape) if want else (0,), value.dtype))
            else:  # a number, or None
                found.append(Out(() if field in schema.numbers and want else (0,)))
        return found

    def wide(x: Any) -> torch.dtype:
        """The dtype that a backend is chosen by: float64 if any is"""
        return torch.float64 if schema.is_double(x) else _check.first(x).dtype

    def verify(x: Any) -> None:
        """What a direct call of torch.ops.sslops could have wrong"""
        _check.tensors(name, _named(x), declared)
        for field in schema.numbers:
            if isinstance(value := getattr(x, field), Tensor):
                _check.output(name, field, value, (), torch.float32, _check.first(x).device)
            else:
                _check.number(name, field, value, field in schema.signed)
        if _is_spread(x) and not distributed.is_known(x.group):
            _check.bad_value(name, "group", "the name of a process group", repr(x.group))
        check(x)
        if len(getattr(x, "needs_grad", gradients)) != len(gradients):
            _check.bad_value(name, "needs_grad", f"{len(gradients)} flags", x.needs_grad)
        if (widest := wide(x)) != _check.first(x).dtype and x.backend in BACKENDS:
            _require(name, x, widest)
        if (asked := form(x)) and x.backend in BACKENDS:
            _require(name, x, _check.first(x).dtype, asked)
        _check.indices(name, x, declared)

    def dense(x: Any) -> Any:
        """As kernels read it: signs are in the memory, and values side by side unless any strides will do"""
        moved = {}
        for field, k, strided in placed:
            value = x[k]
            if value is not None and (stored := _in_memory(value, strided)) is not value:
                moved[field] = stored
        return _replaced(x, **moved) if moved else x

    def on_all_ranks(x: Any) -> Any:
        tensors = [value for value in x if isinstance(value, Tensor)]
        with distributed.agreed(name, x.group, tensors, _options(x)) as tensors:
            same = iter(tensors)
            return run_forward(type(x)(*(next(same) if isinstance(v, Tensor) else v for v in x)))

    def run(x: Any) -> Any:
        x = dense(x)
        found = _guarded(name, x, lambda: on_all_ranks(x) if _is_spread(x) else run_forward(x))
        if isinstance(found, Tensor):
            return found
        return found if len(found) == len(names) else (*found, *_empties(x, specs(x)[len(found) :]))

    def implementation(*values: Any) -> Any:
        x = schema.lift(values)
        verify(x)
        return run(x)

    def fake(*values: Any) -> Any:
        x = schema.lift(values)
        return _bare(_empties(x, specs(x)))

    def run_back(grad: Tensor, x: Any, saved: Sequence[Tensor]) -> Any:
        x = dense(x)
        read = [_in_memory(value, False) for value in (grad, *saved)]
        return _guarded(name, x, lambda: run_backward(read[0], x, *read[1:]))

    def backward_implementation(grad: Tensor, *values: Any) -> Any:
        x, saved = schema.lift(values[: schema.count]), values[schema.count :]
        verify(x)
        for field in gradients:
            if isinstance(value := getattr(x, field), Tensor) and not value.is_floating_point():
                _check.bad_type(name, field, "a floating-point tensor, to have a gradient", value.dtype)
        wanted: dict[str, Any] = dict(zip(("grad", *names[1:]), specs(x), strict=True))
        for field, value in zip(("grad", *of_forward), (grad, *saved), strict=True):
            _check.output(name, field, value, wanted[field].shape, wanted[field].dtype, _check.first(x).device)
        return run_back(grad, x, saved)

    def backward_fake(grad: Tensor, *values: Any) -> Any:
        x = schema.lift(values[: schema.count])
        return _bare(_empties(x, gradient_specs(x)))

    returned = get_type_hints(outputs)["return"]
    kinds = {"result": Out} if returned is Out else get_type_hints(returned)
    names = tuple(kinds)
    units = [unit] if isinstance(unit, str) else list(unit)
    saved, of_forward = names[1:], [each for each in names[1:] if each not in units]
    results = ", ".join(f"Tensor{'[]' if kind == list[Out] else ''} {each}" for each, kind in kinds.items())
    define(name, f"({schema.text}) -> ({results})", implementation, fake)
    op = getattr(torch.ops.sslops, name)

    def call(x: Any, backend: str | None, prepared: Callable[[Any], Any] = lambda x: x) -> Any:
        _check.tensors(name, _named(x), declared)
        filled = _check.scalars(name, x, schema.numbers, schema.signed)
        check(x)
        filled |= {field: float(getattr(x, field)) for field in schema.floats}  # an integer may have too many digits
        group = getattr(x, "group", "")
        # What is not the same of the gathered batch needs a distributed form.
        needed = "" if getattr(x, "synced", True) else group
        filled["backend"] = resolve(name, _check.first(x).device, wide(x), backend, needed, form(x))
        if "operand_dtype" in x._fields:
            filled["operand_dtype"] = compute_dtype(_check.first(x))
        if group and not is_distributed(filled["backend"], name):
            own = {field: getattr(x, field) for field in spread}
            options = _options(_replaced(x, **filled))
            filled |= distributed.gathered_arguments(name, group, own, along, options)
            if filled["backend"] != "eager":
                filled["group"] = ""
        in_levels = not torch.compiler.is_compiling() and _torch.in_func()
        if "needs_grad" in x._fields:
            values = [filled.get(field, getattr(x, field)) for field in gradients]
            filled["needs_grad"] = [torch.is_grad_enabled() and _wants(value, in_levels) for value in values]
        traced = is_traced() or any(
            type(each) not in _PLAIN or _torch.is_left_by_func(each) for each in schema.tensors(x)
        )
        if not traced:
            _check.indices(name, x, declared)
        x = prepared(x)
        if filled["backend"] == "eager":
            return reference(_replaced(x, **filled))
        for field in schema.numbers:
            if isinstance(filled[field], Tensor):
                filled[field] = filled[field].float()
        x = _replaced(x, **filled)
        if in_levels and gradients:
            return through_levels(name, op, schema.lower(x), transformed_context, differentiate_library)
        if traced:
            return op(*schema.lower(x))
        if not (gradients and torch.is_grad_enabled()):
            return run(x)
        others: list[Tensor] = []
        result = direct(x, others, *differentiable(x))
        return (result, *others) if saved else result

    if not gradients:
        return call
    inputs = ", ".join(["Tensor grad", schema.text, *(f"Tensor {each}" for each in of_forward)])
    results = ", ".join("Tensor[]" if field in schema.lists else "Tensor" for field in gradients)
    define(f"{name}_backward", f"({inputs}) -> ({results})", backward_implementation, backward_fake)
    backward_op = getattr(torch.ops.sslops, f"{name}_backward")

    places = {each: k for k, each in enumerate(names)}
    units_at, of_forward_at = [places[each] for each in units], [places[each] for each in of_forward]

    def keep(ctx: Any, x: Any, output: Sequence[Any]) -> None:
        """What differentiate needs"""
        ctx.unit = [output[k] for k in units_at]
        ctx.rest, tensors = schema.parted(kept(x) if kept else x)
        ctx.save_for_backward(*tensors, *[output[k] for k in of_forward_at])

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Any, dict[str, Any]]:
        """The arguments that were kept, and what belongs to each of `gradients`"""
        tensors = iter(ctx.saved_tensors)
        x, of_outputs = schema.joined(ctx.rest, tensors), list(tensors)
        ready, ctx.unit = ctx.unit, []
        there = any(each.numel() for each in tensors_in(ready))
        compiling = torch.compiler.is_compiling()
        plain = "" if compiling else _torch.readable(grad)  # not vmap's (is_grads_batched)
        eager = plain and not torch.is_grad_enabled()
        factor = grad.item() if there and eager and plain == "cpu" else None  # a GPU is not waited for
        # in place not by inf or NaN: zeros, of what has no part in the result, stay zeros
        finite = eager and (factor is None or math.isfinite(factor))
        scales = finite and all(each.dtype == torch.float32 for each in tensors_in(ready))
        if there and (factor == 1 or scales or compiling):
            if factor != 1:
                scaled = torch.Tensor.mul_ if factor is not None else _scaled
                ready = [
                    [scaled(part, grad) for part in each] if isinstance(each, list) else scaled(each, grad)
                    for each in ready
                ]
            of = (getattr(x, field) for field in gradients)
            results = tuple(_handed(each, value) for each, value in zip(ready, of, strict=True))
        else:
            ready.clear()  # their memory is of use to the kernel
            transformed = getattr(ctx, "transformed", False)
            if eager and not transformed and not is_traced():
                results = run_back(grad, x, of_outputs)
            else:
                read = [grad, *schema.lower(x), *of_outputs]
                if transformed:
                    results = through_levels(name, backward_op, read, lambda *_: None, refuse)
                else:
                    results = backward_op(*read)
        return x, dict(zip(gradients, results if isinstance(results, tuple) else (results,), strict=True))

    def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        output = output if saved else (output,)
        ctx.mark_non_differentiable(*tensors_in(output[1:]))
        ctx.set_materialize_grads(False)  # of what is kept: zeros of its size at every backward
        keep(ctx, schema.lift(inputs), output)

    def differentiate_library(ctx: Any, grad: Tensor, *_: None) -> tuple[Any, ...]:
        x, found = differentiate(ctx, grad)
        given = {field: value for field, value in _named(x).items() if isinstance(value, Tensor)}
        for field in schema.lists:
            given[field] = getattr(x, field)
            found.setdefault(field, [None] * len(given[field]))
        return tuple(found.get(field) if field in given else None for field in schema.names)

    def transformed_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        setup_context(ctx, inputs, output)
        ctx.unit, ctx.transformed = [], True

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{name}: fused kernels have no second derivative; use backend='eager'")

    torch.library.register_autograd(f"sslops::{name}", differentiate_library, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(f"sslops::{name}_backward", refuse, lib=LIBRARY)

    def differentiable(x: Any) -> list[Tensor]:
        found: list[Tensor] = []
        for field in gradients:
            if isinstance(value := getattr(x, field), Tensor):
                found.append(value)
            elif field in schema.lists:
                found += value
        return found

    # Where nothing traces: the same functions without torch.library around them, a third of a small batch's time.
    # autograd sees only what has a gradient; the other outputs leave by a list.
    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, others: list[Tensor], *inputs: Tensor) -> Any:
            ctx.given = [isinstance(getattr(x, field), Tensor) for field in gradients]
            output = run(x)
            if not saved:
                output = (output,)
            others += output[1:]
            keep(ctx, x, output)
            return output[0]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            _, found = differentiate(ctx, grad)
            flat: list[Tensor | None] = [None, None]
            for each, given in zip(found.values(), ctx.given, strict=True):
                if isinstance(each, list):
                    flat += each
                elif given:
                    flat.append(each)
            return tuple(flat)

    direct = Direct.apply
    return call


def _scaled(unit: Tensor, grad: Tensor) -> Tensor:
    """By a number that is not known; 0 stays 0"""
    return torch.where(unit == 0, unit, unit * grad)


def _handed(gradient: Any, value: Any) -> Any:
    """As autograd wants it for that argument"""
    if isinstance(gradient, list):
        values = value if isinstance(value, list) else [value]
        if len(gradient) == 1 < len(values):
            gradient = gradient[0].split([len(each) for each in values])
        parts = [part.to(of.dtype) for part, of in zip(gradient, values, strict=False)] or [None for _ in values]
        return parts if isinstance(value, list) else parts[0]
    return gradient.to(value.dtype) if isinstance(value, Tensor) else gradient


_PLAIN = (Tensor, torch.nn.Parameter)  # others may have no memory to read: torch knows what to do with them


def _wants(value: Any, in_levels: bool) -> bool:
    """A gradient: in torch.func's levels, where a tensor does not know of the outer ones, any tensor may"""
    if isinstance(value, Tensor):
        return in_levels or value.requires_grad
    return isinstance(value, list) and any(_wants(each, in_levels) for each in value)


def is_traced() -> bool:
    """Whether something looks at the ops that are called: compile, export, dispatch modes, jit.trace, torch.func"""
    return torch.compiler.is_compiling() or _torch.in_modes() or _torch.in_jit_trace() or _torch.in_func()


def _in_memory(value: Any, strided: bool) -> Any:
    if isinstance(value, list):
        found = [_in_memory(each, strided) for each in value]
        return value if all(map(operator.is_, found, value)) else found
    if value.is_neg():
        value = value.resolve_neg()
    return value if strided or value.is_contiguous() else value.contiguous()


def _empties(x: Any, specs: Sequence[Any]) -> tuple[Any, ...]:
    new_empty = _check.first(x).new_empty
    return tuple(list(_empties(x, s)) if isinstance(s, list) else new_empty(s.shape, dtype=s.dtype) for s in specs)


def _bare(values: tuple[Tensor, ...]) -> Any:
    return values if len(values) > 1 else values[0]
