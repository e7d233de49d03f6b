"""EMA: a model that is the moving average of another, kept by one native call per step."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _check
from ._members import Members, Names, Pair, Rules, Selection, pair, power_iterations
from .ops.ema_update import Pairs, check_momentum, check_seed, ema_update_

__all__ = ["EMA", "cosine_momentum", "ema_avg_fn"]


def cosine_momentum(steps: int, start: float = 0.996, end: float = 1.0) -> Callable[[int], float]:
    """The momentum at step k: from `start` at 0 along half a cosine to `end` at `steps`, and `end` from there on.

    Source: Grill et al., Bootstrap Your Own Latent, arXiv:2006.07733, Section 3.2.
    """
    _check.positive("cosine_momentum", steps=steps)
    _check.probability("cosine_momentum", start=start, end=end)
    return functools.partial(_cosine, steps, start, end)


def _cosine(steps: int, start: float, end: float, step: int) -> float:  # of the module, for pickle
    return end - (end - start) * (math.cos(math.pi * min(step / steps, 1.0)) + 1) / 2


def ema_avg_fn(decay: float | Tensor) -> Callable[[Sequence[Tensor], Sequence[Tensor], int | Tensor], None]:
    """The `multi_avg_fn` of torch.optim.swa_utils.AveragedModel, and so of Lightning's WeightAveraging.

    averaged <- decay averaged + (1 - decay) current, in one native call for each device and dtype. float16 and bfloat16
    are rounded at random, right on average, by the number of the update: a resumed run takes the same numbers. What is
    neither floating-point nor complex is copied. Tensors as in `ema_update_`.
    """
    return functools.partial(_average, check_momentum("ema_avg_fn", decay, None))


@torch.no_grad()
def _average(decay: float | Tensor, averaged: Sequence[Tensor], current: Sequence[Tensor], count: int | Tensor) -> None:
    if averaged[0].is_floating_point() or averaged[0].is_complex():
        ema_update_(averaged, current, decay, seed=count)
    else:
        for x, source in zip(averaged, current, strict=True):
            x.copy_(source)


def _kinds(tensors: list[Tensor]) -> list[tuple[torch.dtype, torch.device, torch.Size]]:
    return [(x.dtype, x.device, x.shape) for x in tensors]


class _Update(NamedTuple):
    """A native call on one device."""

    pairs: Pairs
    device: torch.device
    copied: bool
    stream: int | None  # of random numbers, where there is stochastic rounding: one for each device


class _Plan(NamedTuple):
    """What a step does, while the models have the same tensors of the same kinds."""

    members: tuple[Members, Members]
    pairs: list[Pair]
    tensors: list[Tensor]
    kinds: list[tuple[torch.dtype, torch.device, torch.Size]]
    moved: list[tuple[Tensor, Tensor]]  # sources of other devices, each behind what it is copied into
    updates: list[_Update]
    iterations: list[Callable[[], object]]

    def holds(self) -> bool:
        """Reads all tensors, too."""
        for members in self.members:
            members.reshard()
        if not all(members.unchanged() for members in self.members):
            return False
        changed = [update.pairs.read() for update in self.updates]
        return not (any(changed) or self.moved) or _kinds(self.tensors) == self.kinds


@torch.no_grad()
def _exchange(x: Tensor, y: Tensor) -> None:
    kept = x.clone()
    x.copy_(y)
    y.copy_(kept)


@torch.no_grad()
def _put(x: Tensor, value: Tensor) -> None:
    x.copy_(value)


class EMA(nn.Module):
    """Keeps `target` the exponential moving average of `online`: target <- m target + (1 - m) online at each `step()`.

    Parameters and persistent buffers are paired by name, once, and again when either module gets new ones. Each must
    exist in `online`, which may have more of them (BYOL's predictor). Shared parameters are updated once. DDP,
    FullyShardedDataParallel, checkpoint and torch.compile wrappers on either side do not matter. Of DTensors, as
    fully_shard makes them, each rank updates what it has: wrap both models alike, and step between backward and the
    next forward. Start from a copy: `target = copy.deepcopy(online)`, before fully_shard. The target may lie on another
    device, or its layers on several: what it averages is then copied over at each step.

    Averaged are float32, float16, bfloat16, float64, complex64 and complex128; other tensors are copied. What both
    models share stays as it is (a frozen base, say). A spectral norm's vectors are no average of the online model's:
    they take a step of their power iteration on the average.

    The two models are not submodules of this one, so that a module may hold all three. Its state_dict has this one's
    own state: "steps", "seed" and, for each half-precision tensor of half="master", "masters.<name>".

    Args:
        target: the average; changed in place, under no_grad, whether or not it requires grad.
        online: the model that is trained.
        momentum: a number in [0, 1]; a callable that gives it for the step's number, from 0 on (see `cosine_momentum`);
            or a 0-d float32 or float64 tensor on the model's device, read there at each step (CUDA graphs).
        buffers: what happens to floating-point and complex buffers, "average" or "copy".
            A copied buffer has the same dtype on both sides, or two floating-point ones.
        include, exclude: which tensors this is about, all if None; the others are left alone, and `online` need not
            have them. Names, those of modules for all that is inside, patterns as fnmatch has them ("*.bias"), or a
            function of the name and the online model's tensor: `include=lambda name, x: x.requires_grad`.
        copied: which are copied rather than averaged, parameters too; given as those are.
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
            across the two models and are trained; a name that means no tensor; parameters without a shape (LazyLinear).

    With buffers="average" the result is that of timm's ModelEmaV3, except that timm moves shared parameters once for
    each of their names and copies complex tensors.
    """

    __setattr__ = object.__setattr__  # type: ignore[assignment]  # torch's would make submodules of the models

    def __init__(
        self,
        target: nn.Module,
        online: nn.Module,
        momentum: float | Tensor | Callable[[int], float] = 0.996,
        *,
        buffers: str = "average",
        include: Names | None = None,
        exclude: Names | None = None,
        copied: Names | None = None,
        half: str = "stochastic",
        seed: int = 0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, module in (("target", target), ("online", online)):
            if not isinstance(module, nn.Module):
                _check.bad_type("EMA", name, "a module", type(module).__name__)
        if not callable(momentum):
            check_momentum("EMA", momentum, None)
        _check.choice("EMA", "buffers", buffers, ("average", "copy"))
        _check.choice("EMA", "half", half, ("stochastic", "master", "nearest"))
        if isinstance(seed, Tensor) or seed is None:
            _check.bad_type("EMA", "seed", "an int", type(seed).__name__)
        given = (("include", include), ("exclude", exclude), ("copied", copied))
        selections = [None if names is None else Selection(argument, names) for argument, names in given]
        self._rules = Rules(buffers == "average", *selections)
        self._target, self._online, self.momentum, self.steps = target, online, momentum, 0
        self._half, self._backend = half, backend
        self._seed = torch.tensor(check_seed("EMA", seed, None), dtype=torch.int64, device="cpu")
        self._masters: dict[str, Tensor] = {}
        self._plan: _Plan | None = None
        self._swapped = False
        with torch.no_grad():
            for update in self._current().updates:
                update.pairs.check()
                update.pairs.backend(backend)

    @property
    def target(self) -> nn.Module:
        return self._target

    @property
    def online(self) -> nn.Module:
        return self._online

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": None}

    def _current(self) -> _Plan:
        """The plan for the tensors that the models have now; or leaves all as it was and raises."""
        if self._plan is not None and self._plan.holds():
            return self._plan
        members = target, online = Members(self._target), Members(self._online)
        iterations = list(power_iterations(self._target))
        pairs = pair(target, online, self._rules, {id(vector) for _, vectors in iterations for vector in vectors})
        devices: dict[torch.device, list[Pair]] = {}
        for each in pairs:
            devices.setdefault(each.target.device, []).append(each)
        masters: dict[str, Tensor] = {}
        moved: list[tuple[Tensor, Tensor]] = []
        updates: list[_Update] = []
        for stream, (device, group) in enumerate(devices.items()):
            updates += self._updates(stream, device, group, masters, moved)
        averaged = {id(each.target) for each in pairs if each.averaged}
        tensors = [x for each in pairs for x in (each.target, each.source)]
        steps = [step for step, vectors in iterations if any(id(vector) in averaged for vector in vectors)]
        plan = _Plan(members, pairs, tensors, _kinds(tensors), moved, updates, steps)
        plan.holds()
        self._plan, self._masters = plan, masters
        self._seed = self._seed.to(tensors[0].device if tensors else "cpu")
        return plan

    def _updates(
        self,
        stream: int,
        device: torch.device,
        pairs: list[Pair],
        masters: dict[str, Tensor],
        moved: list[tuple[Tensor, Tensor]],
    ) -> list[_Update]:
        """Of one device's targets; adds to `masters` and `moved`."""
        lists: dict[str, tuple[list[Tensor], list[Tensor], list[Tensor]]]
        tensors: tuple[Tensor, ...]
        lists = {kind: ([], [], []) for kind in ("direct", "mastered", "copied")}
        rounded = False
        for name, x, source, averaged in pairs:
            if source.device != device:
                moved.append((torch.empty_like(source, device=device), source))
                source = moved[-1][0]
            if not averaged:
                kind, tensors = "copied", (x, source)
            elif self._half == "master" and x.dtype in (torch.float16, torch.bfloat16):
                kept = self._masters.get(name)
                start = x.detach() if kept is None or kept.shape != x.shape else kept
                masters[name] = start.to(device, torch.float32)
                kind, tensors = "mastered", (masters[name], source, x)
            else:
                kind, tensors = "direct", (x, source)
                rounded |= self._half == "stochastic" and x.dtype in (torch.float16, torch.bfloat16)
            for found, member in zip(lists[kind], tensors, strict=False):
                found.append(member)
        streams = {"direct": stream if rounded else None}
        return [
            _Update(Pairs("EMA", found, copied=kind == "copied"), device, kind == "copied", streams.get(kind))
            for kind, found in lists.items()
            if found[0]
        ]

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
        if self._swapped:
            raise RuntimeError("EMA: step() inside swap(): the models' weights are exchanged")
        plan = self._current()
        if momentum is None:
            momentum = self.momentum(self.steps) if callable(self.momentum) else self.momentum
        momentum = check_momentum("EMA", momentum, self._seed.device)
        for update in plan.updates:
            update.pairs.check()
        for copy, source in plan.moved:
            copy.copy_(source)
        for pairs, device, copied, stream in plan.updates:
            if copied:
                pairs.update(0.0, None, self._backend)
                continue
            seed = self._seed.to(device) + (stream << 32) if stream else self._seed
            here = momentum.to(device) if isinstance(momentum, Tensor) else momentum
            pairs.update(here, None if stream is None else seed, self._backend)
        if isinstance(momentum, Tensor) or 0 < momentum < 1:
            for iteration in plan.iterations:
                iteration()
        if any(update.stream is not None for update in plan.updates):
            self._seed += 1
        self.steps += 1

    @contextlib.contextmanager
    def swap(self) -> Iterator[nn.Module]:
        """`with ema.swap() as model:` has the average in `online`, for evaluation, and its own weights in `target`.

        Afterwards all is back, whatever happened inside. The values are exchanged where they lie, tensor by tensor:
        optimizers, wrappers and captured graphs do not notice, and no copy of the model is made; only of tensors whose
        dtypes differ, which online gets rounded. `step()` is refused inside.
        """
        if self._swapped:
            raise RuntimeError("EMA: swap() inside swap()")
        with contextlib.ExitStack() as undo:
            self._swap(undo)
            yield self._online

    def _swap(self, undo: contextlib.ExitStack) -> None:
        plan = self._current()
        with torch.no_grad():
            for update in plan.updates:
                update.pairs.check()
        self._swapped = True
        undo.callback(setattr, self, "_swapped", False)
        swapped = set()
        for _, x, source, _ in plan.pairs:
            if x.numel() == 0 or x.data_ptr() in swapped:  # the same memory under two names
                continue
            swapped.add(x.data_ptr())
            if x.dtype == source.dtype:
                _exchange(x, source)
                undo.callback(_exchange, x, source)
            else:
                undo.callback(_put, source, source.clone())
                _put(source, x)
        for members in plan.members:
            undo.callback(members.reshard)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._current()
        destination[prefix + "steps"] = torch.tensor(self.steps, dtype=torch.int64, device="cpu")
        destination[prefix + "seed"] = self._seed.clone()
        destination.update({f"{prefix}masters.{name}": master for name, master in self._masters.items()})

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """All of it, or nothing where a part is missing or wrong."""
        self._current()
        count = torch.empty((), dtype=torch.int64, device="cpu")
        wanted = {prefix + "steps": count, prefix + "seed": count}
        wanted |= {f"{prefix}masters.{name}": master for name, master in self._masters.items()}
        missing = [name for name in wanted if name not in state_dict]
        wrong = []
        for name, x in wanted.items():
            got = state_dict.get(name, x)
            if not isinstance(got, Tensor) or got.shape != x.shape or (x.dtype, got.dtype).count(torch.int64) == 1:
                found = f"{got.dtype} {list(got.shape)}" if isinstance(got, Tensor) else type(got).__name__
                wrong.append(f"EMA: {name}: wanted a tensor, {x.dtype} {list(x.shape)}, got {found}")
        missing_keys += missing
        error_msgs += wrong
        if strict:
            unexpected_keys += [name for name in state_dict if name.startswith(prefix) and name not in wanted]
        if missing or wrong:
            return
        for name, master in self._masters.items():
            master.copy_(state_dict[f"{prefix}masters.{name}"])
        self.steps = int(state_dict[prefix + "steps"])
        self._seed.copy_(state_dict[prefix + "seed"])
