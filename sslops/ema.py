"""EMA: a model that is the moving average of another, kept by one native call per step."""

import functools
import math
import operator
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _check
from .ops.ema_update import Pairs, check_momentum, check_seed

__all__ = ["EMA", "cosine_momentum"]


def cosine_momentum(steps: int, start: float = 0.996, end: float = 1.0) -> Callable[[int], float]:
    """The momentum at step k: from `start` at 0 along half a cosine to `end` at `steps`, and `end` from there on.

    Source: Grill et al., Bootstrap Your Own Latent, arXiv:2006.07733, Section 3.2.
    """
    _check.positive("cosine_momentum", steps=steps)
    for value in (start, end):
        check_momentum("cosine_momentum", value, None)
    return functools.partial(_cosine, steps, start, end)


def _cosine(steps: int, start: float, end: float, step: int) -> float:  # of the module, for pickle
    return end - (end - start) * (math.cos(math.pi * min(step / steps, 1.0)) + 1) / 2


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


def _is_dtensor(x: Tensor) -> bool:
    return _is(x, "tensor", "DTensor")


def _local(name: str, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """What this rank has of two DTensors; other tensors as they are"""
    if not _is_dtensor(x) and not _is_dtensor(source):
        return x, source
    mesh, placements = (getattr(x, each, None) for each in ("device_mesh", "placements"))
    if (mesh, placements) != tuple(getattr(source, each, None) for each in ("device_mesh", "placements")):
        got = f"{getattr(source, 'placements', type(source).__name__)}"
        _check.bad_value("EMA", f"online.{name}", f"placed as in target, {placements}", got)
    return x._local_tensor, source._local_tensor  # type: ignore[attr-defined]


class _Members:
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
        self._sharded: list[Any] = [x for x in chain(self.parameters.values(), self.buffers.values()) if _is_dtensor(x)]
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


def _kinds(tensors: list[Tensor]) -> list[tuple[torch.dtype, torch.device, torch.Size]]:
    return [(x.dtype, x.device, x.shape) for x in tensors]


class _Plan(NamedTuple):
    """What a step does, while the models have the same tensors of the same kinds."""

    members: tuple[_Members, _Members]
    targets: list[Tensor]
    kinds: list[tuple[torch.dtype, torch.device, torch.Size]]
    averaged: list[Pairs]
    copied: list[Pairs]  # one, or none
    rounded: bool

    def holds(self) -> bool:
        """Reads all tensors, too."""
        for members in self.members:
            members.reshard()
        if not all(members.unchanged() for members in self.members):
            return False
        changed = [pairs.read() for pairs in (*self.averaged, *self.copied)]
        return not any(changed) or _kinds(self.targets) == self.kinds


class EMA:
    """Keeps `target` the exponential moving average of `online`: target <- m target + (1 - m) online at each `step()`.

    Parameters and persistent buffers are paired by name, once, and again when either module gets new ones. Each must
    exist in `online`, which may have more of them (BYOL's predictor). Shared parameters are updated once. DDP,
    FullyShardedDataParallel, checkpoint and torch.compile wrappers on either side do not matter. Of DTensors, as
    fully_shard makes them, each rank updates what it has: wrap both models alike, and step between backward and the
    next forward. Start from a copy: `target = copy.deepcopy(online)`, before fully_shard.

    Args:
        target: the average; changed in place, under no_grad, whether or not it requires grad.
        online: the model that is trained.
        momentum: a number in [0, 1]; a callable that gives it for the step's number, from 0 on (see `cosine_momentum`);
            or a 0-d float32 or float64 tensor on the model's device, read there at each step (CUDA graphs).
        buffers: what happens to floating-point buffers, "average" or "copy". Others are always copied.
            A copied buffer has the same dtype on both sides, or two floating-point ones.
        half: how float16 and bfloat16 targets are kept. "stochastic": rounded up or down at random, right on average,
            no extra memory. "master": averaged in float32 inside this object, and rounded to nearest into the target;
            what others write to the target is overwritten. "nearest": rounded to nearest, which near momentum 1 keeps
            the target from moving.
        seed: of the stochastic rounding.
        backend: as in `ema_update_`.

    Attributes:
        steps: how many were taken.

    Raises:
        TypeError, ValueError: as `ema_update_`; a name of `target` that `online` lacks; tensors that share memory
            across the two models.

    With buffers="average" the result is that of timm's ModelEmaV3, except that timm moves shared parameters once for
    each of their names.
    """

    def __init__(
        self,
        target: nn.Module,
        online: nn.Module,
        momentum: float | Tensor | Callable[[int], float] = 0.996,
        *,
        buffers: str = "average",
        half: str = "stochastic",
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        if not callable(momentum):
            check_momentum("EMA", momentum, None)
        _check.choice("EMA", "buffers", buffers, ("average", "copy"))
        _check.choice("EMA", "half", half, ("stochastic", "master", "nearest"))
        if isinstance(seed, Tensor) or seed is None:
            _check.bad_type("EMA", "seed", "an int", type(seed).__name__)
        check_seed("EMA", seed, None)
        self._target, self._online, self.momentum, self.steps = target, online, momentum, 0
        self._buffers, self._half, self._backend = buffers, half, backend
        self._seed = torch.tensor(seed, dtype=torch.int64)
        self._masters: dict[str, Tensor] = {}
        self._pair()
        with torch.no_grad():
            self._validate()

    @property
    def target(self) -> nn.Module:
        return self._target

    @property
    def online(self) -> nn.Module:
        return self._online

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_plan"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pair()

    def _pair(self) -> None:
        """Sets the plan, or leaves all as it was and raises."""
        members = target, online = _Members(self._target), _Members(self._online)
        averaged: dict[tuple[int, int], tuple[str, Tensor, Tensor]] = {}  # shared parameters once
        copied: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
        for kind in ("parameters", "buffers"):
            sources = getattr(online, kind)
            for name, x in getattr(target, kind).items():
                if name not in sources:
                    _check.bad_value("EMA", f"online.{name}", f"one of target's {kind}", "none of that name")
                own, source = _local(name, x, sources[name])
                if kind == "parameters" or (x.is_floating_point() and self._buffers == "average"):
                    averaged.setdefault((id(own), id(source)), (name, own, source))
                else:
                    copied[0].append(own)
                    copied[1].append(source)
        targets = [x for _, x, _ in averaged.values()]
        device = targets[0].device if targets else self._seed.device
        masters: dict[str, Tensor] = {}
        rounded = False
        direct: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
        mastered: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
        for name, x, source in averaged.values():
            is_half = x.dtype in (torch.float16, torch.bfloat16)
            if is_half and self._half == "master":
                kept = self._masters.get(name)
                start = x.detach() if kept is None or kept.shape != x.shape else kept
                masters[name] = start.to(device, torch.float32)
                for tensors, member in zip(mastered, (masters[name], source, x), strict=True):
                    tensors.append(member)
            else:
                direct[0].append(x)
                direct[1].append(source)
                rounded |= is_half and self._half == "stochastic"
        pairs = [Pairs("EMA", lists) for lists in (direct, mastered) if lists[0]]
        copies = [Pairs("EMA", copied, copied=True)] if copied[0] else []
        plan = _Plan(members, targets, _kinds(targets), pairs, copies, rounded)
        plan.holds()
        self._plan, self._masters, self._seed = plan, masters, self._seed.to(device)

    def _validate(self) -> None:
        for pairs in (*self._plan.averaged, *self._plan.copied):
            pairs.check()

    def step(self, momentum: float | Tensor | None = None) -> None:
        """One update; `momentum` instead of the usual one, this time. 0 makes the target a copy of `online`.

        Inside torch.compile it is a graph break, and an error under make_fx; `ema_update_` is neither.
        """
        if torch.compiler.is_compiling():  # not as a decorator, which would import torch._dynamo for all
            torch.compiler.disable(self._step)(momentum)
        else:
            self._step(momentum)

    @torch.no_grad()
    def _step(self, momentum: float | Tensor | None) -> None:
        if not self._plan.holds():
            self._pair()
        if momentum is None:
            momentum = self.momentum(self.steps) if callable(self.momentum) else self.momentum
        check_momentum("EMA", momentum, self._seed.device)
        self._validate()
        for pairs in self._plan.averaged:
            pairs.update(momentum, self._seed if self._plan.rounded else None, self._backend)
        for pairs in self._plan.copied:
            pairs.update(0.0, None, self._backend)
        if self._plan.rounded:
            self._seed += 1
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """What, beside the target's own state, resumes exactly: {"steps", "seed", "masters"}."""
        return {"steps": self.steps, "seed": int(self._seed), "masters": dict(self._masters)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what state_dict() gave; the momentum, its schedule and the options are not part of it."""
        steps, seed, masters = state["steps"], state["seed"], state["masters"]
        for name, value in (("steps", steps), ("seed", seed)):
            if isinstance(value, bool) or not isinstance(value, int):
                _check.bad_type("EMA", f"state[{name!r}]", "an int", type(value).__name__)
        check_seed("EMA", seed, None)
        if masters.keys() != self._masters.keys():
            names = sorted(masters.keys() ^ self._masters.keys())
            _check.bad_value("EMA", "state['masters']", "the names of this model's half-precision tensors", names)
        for name, master in self._masters.items():
            if master.shape != masters[name].shape:
                wanted = f"shape {list(master.shape)}"
                _check.bad_value("EMA", f"state['masters'][{name!r}]", wanted, list(masters[name].shape))
        for name, master in self._masters.items():
            master.copy_(masters[name])
        self.steps = steps
        self._seed.fill_(seed)
