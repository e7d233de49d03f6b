"""EMA: a model that is the moving average of another, kept by one native call per step."""

import math
import operator
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from . import _check
from .ops.ema_update import Pairs, check_momentum

__all__ = ["EMA", "cosine_momentum"]


def cosine_momentum(steps: int, start: float = 0.996, end: float = 1.0) -> Callable[[int], float]:
    """The momentum at step k: from `start` at 0 along half a cosine to `end` at `steps`, and `end` from there on.

    Source: Grill et al., Bootstrap Your Own Latent, arXiv:2006.07733, Section 3.2.
    """

    def momentum(step: int) -> float:
        return end - (end - start) * (math.cos(math.pi * min(step / steps, 1.0)) + 1) / 2

    return momentum


def _unwrap(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):  # torch.compile's
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


class _Members:
    """A module's parameters and persistent buffers by name, and whether they are still the same objects."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self._dicts: list[dict[str, Any]] = []
        for path, part in _unwrap(module).named_modules(remove_duplicate=False):
            prefix = [word for word in path.split(".") if word not in ("", "_orig_mod", "_fsdp_wrapped_module")]
            for found, members in ((self.parameters, part._parameters), (self.buffers, part._buffers)):
                for name, x in members.items():
                    if x is not None and name not in part._non_persistent_buffers_set:
                        found[".".join([*prefix, name])] = x
            self._dicts += [part._parameters, part._buffers, part._modules]
        self._objects = list(self._current())

    def _current(self) -> Iterator[object]:
        return chain.from_iterable(map(dict.values, self._dicts))

    def unchanged(self) -> bool:
        same_number = sum(map(len, self._dicts)) == len(self._objects)
        return same_number and all(map(operator.is_, self._current(), self._objects))


class EMA:
    """Keeps `target` the exponential moving average of `online`: target <- m target + (1 - m) online at each `step()`.

    Parameters and persistent buffers are paired by name, once, and again when either module gets new ones. Each must
    exist in `online`, which may have more of them (BYOL's predictor). Shared parameters are updated once. DDP, FSDP and
    torch.compile wrappers on either side do not matter. Start from a copy: `target = copy.deepcopy(online)`.

    Args:
        target: the average; changed in place, under no_grad, whether or not it requires grad.
        online: the model that is trained.
        momentum: a number in [0, 1]; a callable that gives it for the step's number, from 0 on (see `cosine_momentum`);
            or a 0-d float32 or float64 tensor on the model's device, read there at each step (CUDA graphs).
        buffers: what happens to floating-point buffers, "average" or "copy". Integer buffers are always copied.
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
        self.target, self.online, self.momentum, self.steps = target, online, momentum, 0
        self._buffers, self._half, self._backend = buffers, half, backend
        self._seed = torch.tensor(seed, dtype=torch.int64)
        self._masters: dict[str, Tensor] = {}
        self._pair()
        with torch.no_grad():
            for pairs in self._groups:
                pairs.check()

    def _pair(self) -> None:
        self._members = target, online = _Members(self.target), _Members(self.online)
        averaged: dict[tuple[int, int], tuple[str, Tensor, Tensor]] = {}  # shared parameters once
        self._copied: tuple[list[Tensor], list[Tensor]] = [], []
        for kind in ("parameters", "buffers"):
            sources = getattr(online, kind)
            for name, x in getattr(target, kind).items():
                if name not in sources:
                    _check.bad_value("EMA", f"online.{name}", f"one of target's {kind}", "none of that name")
                source = sources[name]
                if kind == "parameters" or (x.is_floating_point() and self._buffers == "average"):
                    averaged.setdefault((id(x), id(source)), (name, x, source))
                    continue
                if x.shape != source.shape:
                    _check.bad_value("EMA", f"online.{name}", f"target's shape, {list(x.shape)}", list(source.shape))
                self._copied[0].append(x)
                self._copied[1].append(source)
        self._first = next((x for _, x, _ in averaged.values()), None)
        device = self._seed.device if self._first is None else self._first.device
        self._seed = self._seed.to(device)
        self._rounded = False
        direct: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
        mastered: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
        for name, x, source in averaged.values():
            is_half = x.dtype in (torch.float16, torch.bfloat16)
            if is_half and self._half == "master":
                self._masters[name] = self._masters.get(name, x.detach()).to(device, torch.float32)
                for tensors, member in zip(mastered, (self._masters[name], source, x), strict=True):
                    tensors.append(member)
            else:
                direct[0].append(x)
                direct[1].append(source)
                self._rounded |= is_half and self._half == "stochastic"
        self._groups = [Pairs("EMA", lists) for lists in (direct, mastered) if lists[0]]

    def step(self, momentum: float | Tensor | None = None) -> None:
        """One update; `momentum` instead of the usual one, this time. 0 makes the target a copy of `online`.

        Inside torch.compile it is a graph break; `ema_update_` is not.
        """
        if torch.compiler.is_compiling():  # not as a decorator, which would import torch._dynamo for all
            torch.compiler.disable(self._step)(momentum)
        else:
            self._step(momentum)

    @torch.no_grad()
    def _step(self, momentum: float | Tensor | None) -> None:
        moved = self._first is not None and self._first.device != self._seed.device
        if moved or not all(members.unchanged() for members in self._members):
            self._pair()
        if momentum is None:
            momentum = self.momentum(self.steps) if callable(self.momentum) else self.momentum
        check_momentum("EMA", momentum, self._seed.device)
        for pairs in self._groups:
            pairs.check()
        for pairs in self._groups:
            pairs.update(momentum, self._seed if self._rounded else None, self._backend)
        if self._copied[0]:
            torch._foreach_copy_(*self._copied)
        if self._rounded:
            self._seed += 1
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """What, beside the target's own state, resumes exactly: {"steps", "seed", "masters"}."""
        return {"steps": self.steps, "seed": int(self._seed), "masters": dict(self._masters)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what state_dict() gave; the momentum, its schedule and the options are not part of it."""
        masters = state["masters"]
        if masters.keys() != self._masters.keys():
            names = sorted(masters.keys() ^ self._masters.keys())
            _check.bad_value("EMA", "state['masters']", "the names of this model's half-precision tensors", names)
        for name, master in self._masters.items():
            if master.shape != masters[name].shape:
                wanted = f"shape {list(master.shape)}"
                _check.bad_value("EMA", f"state['masters'][{name!r}]", wanted, list(masters[name].shape))
        for name, master in self._masters.items():
            master.copy_(masters[name])
        self.steps = state["steps"]
        self._seed.fill_(state["seed"])
