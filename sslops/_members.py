"""Which tensors of two models belong together, and what becomes of each: averaged, copied, or left alone."""

import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from . import _check

Names = str | Iterable[str] | Callable[[str, Tensor], bool]

_AVERAGED = (*_check.FLOAT_DTYPES, torch.complex64, torch.complex128)


def _unwrap(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):  # torch.compile's
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


_WRAPPERS = ("", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def _is(x: object, module: str, name: str) -> bool:
    """Whether x is of a class of torch.distributed's; without importing it: then there is none."""
    home = sys.modules.get(f"torch.distributed.{module}")
    return home is not None and isinstance(x, getattr(home, name))


def is_dtensor(x: Tensor) -> bool:
    return _is(x, "tensor", "DTensor")


def _local(name: str, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """What this rank has of two DTensors; other tensors as they are"""
    if not is_dtensor(x) and not is_dtensor(source):
        return x, source
    mesh, placements = (getattr(x, each, None) for each in ("device_mesh", "placements"))
    if (mesh, placements) != tuple(getattr(source, each, None) for each in ("device_mesh", "placements")):
        got = f"{getattr(source, 'placements', type(source).__name__)}"
        _check.bad_value("EMA", f"online.{name}", f"placed as in target, {placements}", got)
    return x._local_tensor, source._local_tensor  # type: ignore[attr-defined]


class Members:
    """A module's parameters and persistent buffers by name, and whether they are still the same objects."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self._dicts: list[dict[str, Any]] = []
        self._gathering: list[Any] = [part for part in module.modules() if _is(part, "fsdp", "FSDPModule")]
        self.reshard()
        for path, part in _unwrap(module).named_modules(remove_duplicate=False):
            prefix = [word for word in path.split(".") if word not in _WRAPPERS]
            for found, members in ((self.parameters, part._parameters), (self.buffers, part._buffers)):
                for name, x in members.items():
                    if x is not None and name not in part._non_persistent_buffers_set:
                        found[".".join([*prefix, name])] = x
            self._dicts += [part._parameters, part._buffers, part._modules]
        self._sharded: list[Any] = [x for x in chain(self.parameters.values(), self.buffers.values()) if is_dtensor(x)]
        self._objects = list(self._current())

    def reshard(self) -> None:
        """What fully_shard gathered for a forward pass and kept: an update of that would be lost."""
        for part in self._gathering:
            part.reshard()

    def _current(self) -> Iterator[object]:
        return chain((x._local_tensor for x in self._sharded), *map(dict.values, self._dicts))

    def unchanged(self) -> bool:
        same_number = len(self._sharded) + sum(map(len, self._dicts)) == len(self._objects)
        return same_number and all(map(operator.is_, self._current(), self._objects))


class Pair(NamedTuple):
    name: str
    target: Tensor  # what this rank has of it
    source: Tensor
    averaged: bool  # or copied


class Selection:
    """Names that the user gives: tensors', modules' for all inside, patterns of fnmatch's, or a function's choice."""

    def __init__(self, argument: str, names: Names) -> None:
        self._argument = argument
        self._chosen: tuple[str, ...] | Callable[[str, Tensor], bool]
        if callable(names) and not isinstance(names, nn.Module):
            self._chosen = names
            return
        given = () if isinstance(names, (Tensor, nn.Module)) else names  # whose parts are no names
        self._chosen = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else ()
        if not self._chosen or not all(isinstance(name, str) for name in self._chosen):
            _check.bad_type("EMA", argument, "names, patterns or a function of name and tensor", repr(names))

    def __call__(self, name: str, x: Tensor) -> bool:
        if callable(self._chosen):
            return bool(self._chosen(name, x))
        return any(_matches(pattern, name) for pattern in self._chosen)

    def check(self, names: Iterable[str]) -> None:
        """Raises for a pattern that means none of these: a slip, as good as always."""
        for pattern in () if callable(self._chosen) else self._chosen:
            if not any(_matches(pattern, name) for name in names):
                _check.bad_value("EMA", self._argument, "names of target's tensors or modules", repr(pattern))


def _matches(pattern: str, name: str) -> bool:
    return name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


class Rules(NamedTuple):
    """What becomes of a tensor; None where nothing was said."""

    average_buffers: bool
    include: Selection | None
    exclude: Selection | None
    copied: Selection | None


def pair(target: Members, online: Members, rules: Rules, vectors: set[int]) -> list[Pair]:
    """By name, shared parameters once. vectors: the ids of buffers that are averaged whatever the rules say."""
    names = [*target.parameters, *target.buffers]
    for selection in (rules.include, rules.exclude, rules.copied):
        if selection is not None:
            selection.check(names)
    found: dict[tuple[int, int], Pair] = {}
    for kind in ("parameters", "buffers"):
        sources = getattr(online, kind)
        for name, x in getattr(target, kind).items():
            source = sources.get(name, x)  # for a function to look at
            if rules.include is not None and not rules.include(name, source):
                continue
            if rules.exclude is not None and rules.exclude(name, source):
                continue
            if name not in sources:
                _check.bad_value("EMA", f"online.{name}", f"one as among target's {kind}", "none of that name")
            for side, tensor in (("target", x), ("online", source)):
                if is_lazy(tensor):
                    wanted = "a parameter that has its shape (run a batch through the model first)"
                    _check.bad_value("EMA", f"{side}.{name}", wanted, type(tensor).__name__)
            if x is source:
                if x.requires_grad:
                    _check.bad_value("EMA", f"target.{name}", "a tensor of its own, or a frozen one", "online's own")
                continue
            copied = kind == "buffers" and not rules.average_buffers
            copied = copied or (rules.copied is not None and rules.copied(name, source))
            averaged = x.dtype in _AVERAGED and (id(x) in vectors or not copied)
            own, source = _local(name, x, source)
            if own.shape != source.shape:
                _check.bad_value(
                    "EMA", f"online.{name}", f"the shape of target's, {list(own.shape)}", list(source.shape)
                )
            found.setdefault((id(own), id(source)), Pair(name, own, source, averaged))
    return list(found.values())


def power_iterations(module: nn.Module) -> Iterator[tuple[Callable[[], object], list[Tensor]]]:
    """Of the spectral norms inside: what takes a step of their iteration, and the vectors that it improves."""
    for part in _unwrap(module).modules():
        if isinstance(part, ParametrizationList):
            norms = [norm for norm in part if isinstance(norm, _SpectralNorm) and hasattr(norm, "_u")]
            if norms:
                yield partial(_iterate, part, norms), [vector for norm in norms for vector in (norm._u, norm._v)]
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                vectors = [getattr(part, f"{hook.name}_{each}") for each in "uv"]
                yield partial(hook.compute_weight, part, do_power_iteration=True), vectors


def _iterate(weight: ParametrizationList, norms: Sequence[nn.Module]) -> None:
    """They take a step whenever they are asked for the weight in training."""
    modes = [norm.training for norm in norms]
    try:
        for norm in norms:
            norm.training = True
        weight()
    finally:
        for norm, mode in zip(norms, modes, strict=True):
            norm.training = mode
