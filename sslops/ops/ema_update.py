"""The momentum update of a model's average: target <- m target + (1 - m) source, all tensors in one pass."""

import numbers
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import _C, _check, _torch
from .._random import RandomStream, philox
from .._schema import define
from ..backend import kernel, resolve

_CHUNK = 16384  # the random numbers of each tensor begin at a multiple of it (kChunk in csrc/common/ema_update.h)


def round_stochastically(x: Tensor, dtype: torch.dtype, seed: int, first: int) -> Tensor:
    """x in `dtype`, up or down at random so as to be right on average; x[k] uses the bits of element first + k."""
    words = philox(seed, RandomStream.EMA_UPDATE, first // 8, (x.numel() + 7) // 8, x.device)
    bits = torch.stack([words & 0xFFFF, words >> 16], dim=2).flatten()[: x.numel()].view(x.shape)
    info = torch.finfo(dtype)
    leading = torch.ldexp(torch.ones_like(x), torch.frexp(x).exponent - 1).clamp(min=info.smallest_normal)
    units = x.abs() / leading / info.eps  # exact, as is all that follows: no float64, which some devices lack
    below = units.floor()
    up = units - below >= 1 - bits.to(x.dtype) / 65536
    return torch.where(x.isfinite(), (below + up) * info.eps * leading * x.sign(), x).to(dtype)


def reference(
    targets: Sequence[Tensor],
    sources: Sequence[Tensor],
    shadows: Sequence[Tensor],
    momentum: float | Tensor,
    seed: int | Tensor | None,
) -> None:
    """In float32 (float64 for float64), a step of at most half the way from the nearer end.

    Where the difference is no number (infinities, or it overflows) the weighted sum. Momentum 1 and 0 are copies,
    whatever the other side holds.
    """
    m = momentum if isinstance(momentum, Tensor) else torch.tensor(momentum, dtype=torch.float64, device="cpu")
    m = m.clamp(0, 1)
    first = 0
    for k, (target, source) in enumerate(zip(targets, sources, strict=True)):
        wide = torch.float64 if target.dtype in (torch.float64, torch.complex128) else torch.float32
        old, new = (_parts(x).to(wide) for x in (target, source))
        from_source = (m < 0.5).to(target.device)
        weight = torch.where(m < 0.5, m, 1 - m).to(wide).to(target.device)
        near, far = torch.where(from_source, new, old), torch.where(from_source, old, new)
        difference = far - near
        moved = torch.where(difference.isfinite(), near + weight * difference, (1 - weight) * near + weight * far)
        moved = torch.where(weight == 0, near, moved)
        if seed is not None and target.dtype in (torch.float16, torch.bfloat16):
            moved = round_stochastically(moved, target.dtype, int(seed), first)
        moved = torch.view_as_complex(moved) if target.is_complex() else moved
        target.copy_(torch.where((weight == 0) & ~from_source, target, moved.to(target.dtype)))
        if shadows:
            shadows[k].copy_(target)
        first += -(-old.numel() // _CHUNK) * _CHUNK


def _parts(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


_LISTS = ("targets", "sources", "shadows")


def _refuse(op: str, lists: Sequence[Sequence[Tensor]], problem: tuple[str, int, int, int, int]) -> NoReturn:
    what, which, k, other_which, other_k = problem
    x, name = lists[which][k], f"{_LISTS[which]}[{k}]"
    if what == "dtype":
        _check.bad_type(op, name, "a floating-point tensor of at most 64 bits, complex64 or complex128", x.dtype)
    elif what == "other dtype":
        _check.bad_type(op, name, f"the dtype of targets[{k}], {lists[0][k].dtype}", x.dtype)
    elif what == "shape":
        _check.bad_value(op, name, f"the shape of targets[{k}], {list(lists[0][k].shape)}", list(x.shape))
    elif what == "device":
        _check.bad_value(op, name, f"the device of targets[0], {lists[0][0].device}", x.device)
    elif what == "memory":
        _check.bad_value(op, name, "a tensor with memory of its own", f"{type(x).__name__}, {x.layout}, on {x.device}")
    elif what == "shadowed":
        _check.bad_type(op, name, "float32, to have a shadow", x.dtype)
    elif what == "shadow":
        _check.bad_type(op, name, "float16 or bfloat16", x.dtype)
    elif what == "itself":
        _check.bad_value(op, name, "elements that do not share memory", f"strides {list(x.stride())}")
    other = f"{_LISTS[other_which]}[{other_k}]"
    _check.bad_value(op, name, "memory that no other tensor shares", f"a tensor that overlaps {other}")


class Pairs:
    """Targets and their sources as the kernels take them; another update is cheap while no tensor has moved."""

    def __init__(self, op: str, lists: Sequence[list[Tensor]], *, copied: bool = False) -> None:
        """lists: targets, sources and shadows; the last may be empty. op: what errors name.

        copied: an update copies, whatever the momentum; any dtype will do that a target and its source share.
        """
        for name, tensors in zip(_LISTS[1:], lists[1:], strict=True):
            if len(tensors) != len(lists[0]) and (tensors or name == "sources"):
                _check.bad_value(op, name, f"one for each of the {len(lists[0])} targets", len(tensors))
        self._op, self._lists, self._copied = op, lists, copied
        self._native = _C.EmaPairs()
        self._work: object = None
        self._memory: dict[str, Any] = {}

    def read(self) -> bool:
        """Looks where the tensors are now, to be called before each update; False if nothing has changed."""
        try:
            self._problem = self._native.read(*self._lists, self._copied)
        except TypeError:
            for name, tensors in zip(_LISTS, self._lists, strict=True):
                for k, x in enumerate(tensors):
                    if not isinstance(x, Tensor):
                        _check.bad_type(self._op, f"{name}[{k}]", "a tensor", type(x).__name__)
            raise
        before, self._work = self._work, self._native.work
        if changed := bool(self._problem[0]) or self._work is not before:
            lazy = (k for k in self._native.lazy if any(x[k].is_neg() or x[k].is_conj() for x in self._lists if x))
            self._by_copy = {*self._native.strided, *lazy}
            if len(self._native.updated) < len(self._lists[0]):  # empty ones, or the same twice
                self._refuse_lazy()
        return changed

    def _refuse_lazy(self) -> None:
        for name, tensors in zip(_LISTS, self._lists, strict=True):
            for k, x in enumerate(tensors):
                if is_lazy(x):
                    _check.bad_value(self._op, f"{name}[{k}]", "a tensor that has its shape", type(x).__name__)

    def check(self) -> None:
        """Raises for tensors, as they were read, that cannot be updated."""
        if torch.is_grad_enabled():
            for name, tensors in (("targets", self._lists[0]), ("shadows", self._lists[2])):
                for k, x in enumerate(tensors):
                    if x.requires_grad:
                        wanted = "torch.no_grad() around the call"
                        _check.bad_value(self._op, f"{name}[{k}]", wanted, "a tensor that requires grad")
        if self._problem[0]:
            _refuse(self._op, self._lists, self._problem)

    def backend(self, wanted: str | None) -> str:
        """The one that updates these; errors name the caller's op."""
        try:
            return resolve("ema_update", self._lists[0][0].device, self._lists[0][0].dtype, wanted)
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"{self._op}{str(error).removeprefix('ema_update')}") from None

    @torch.no_grad()
    def update(self, momentum: float | Tensor, seed: int | Tensor | None, backend: str | None) -> None:
        if _torch.in_jit_trace() or _torch.in_make_fx():
            raise RuntimeError(f"{self._op}: the trace would not record it")
        targets, _, shadows = self._lists
        if not targets:
            return
        chosen = self.backend(backend)
        if chosen == "eager":
            updated = self._part(self._native.updated)
            if self._copied:
                torch._foreach_copy_(*updated[:2])
            else:
                reference(*updated, momentum, seed)
            return
        if self._by_copy:
            self._update_copies(momentum, seed, chosen)
            return
        kernel(chosen, "ema_update").forward(self._work, targets[0].device, momentum, seed, self._memory)
        torch.autograd.graph.increment_version([*targets, *shadows] if shadows else targets)

    def _update_copies(self, momentum: float | Tensor, seed: int | Tensor | None, backend: str) -> None:
        """With contiguous copies in the places of those: a tensor's place decides on its random numbers."""
        updated = self._native.updated
        lists = self._part(updated)
        copies = [list(part) for part in lists]
        for place, k in enumerate(updated):
            if k in self._by_copy:
                for part in filter(None, copies):
                    part[place] = part[place].contiguous().resolve_neg().resolve_conj()
        inner = Pairs(self._op, copies, copied=self._copied)
        inner.read()
        inner.check()
        inner.update(momentum, seed, backend)
        for k in (0, 2):
            for x, copy in zip(lists[k], copies[k], strict=True):
                if copy is not x:
                    x.copy_(copy)

    def _part(self, indices: Sequence[int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        targets, sources, shadows = ([x[k] for k in indices] if x else [] for x in self._lists)
        return targets, sources, shadows


def check_momentum(op: str, momentum: float | Tensor, device: torch.device | None) -> float | Tensor:
    """A number in [0, 1], NumPy's too, as a float; or a 0-d float32 or float64 tensor on `device` (any if None), whose
    value is not read.
    """
    if isinstance(momentum, Tensor):
        if momentum.dtype not in (torch.float32, torch.float64):
            _check.bad_type(op, "momentum", "a float32 or float64 tensor (bfloat16 rounds 0.999 to 1)", momentum.dtype)
        if momentum.dim() != 0:
            _check.bad_value(op, "momentum", "a number or a 0-d tensor", f"shape {list(momentum.shape)}")
        if device is not None and momentum.device != device:
            _check.bad_value(op, "momentum", f"the targets' device, {device}", momentum.device)
        return momentum
    if isinstance(momentum, bool) or not isinstance(momentum, (float, int, numbers.Real)):
        _check.bad_type(op, "momentum", "a number or a 0-d tensor", type(momentum).__name__)
    if not 0 <= momentum <= 1:
        _check.bad_value(op, "momentum", "a number in [0, 1]", momentum)
    return float(momentum)


def check_seed(op: str, seed: int | Tensor | None, device: torch.device | None) -> int | Tensor | None:
    """An integer of 64 bits, NumPy's too, as an int; a 0-d int64 tensor on `device` (any if None); or None."""
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            _check.bad_type(op, "seed", "an int64 tensor", seed.dtype)
        if seed.dim() != 0:
            _check.bad_value(op, "seed", "a number or a 0-d tensor", f"shape {list(seed.shape)}")
        if device is not None and seed.device != device:
            _check.bad_value(op, "seed", f"the targets' device, {device}", seed.device)
        return seed
    if seed is None:
        return None
    if isinstance(seed, bool) or not isinstance(seed, (int, numbers.Integral)):
        _check.bad_type(op, "seed", "an int, a 0-d int64 tensor or None", type(seed).__name__)
    if not -(2**63) <= seed < 2**63:
        _check.bad_value(op, "seed", "an int of 64 bits", seed)
    return int(seed)


def _update(
    targets: list[Tensor],
    sources: list[Tensor],
    shadows: list[Tensor],
    momentum: float | Tensor,
    seed: int | Tensor | None,
    backend: str | None,
) -> None:
    device = targets[0].device if targets and isinstance(targets[0], Tensor) else None
    momentum = check_momentum("ema_update_", momentum, device)
    seed = check_seed("ema_update_", seed, device)
    pairs = Pairs("ema_update_", (targets, sources, shadows))
    pairs.read()
    pairs.check()
    pairs.update(momentum, seed, backend)


def _impl(
    targets: list[Tensor],
    sources: list[Tensor],
    shadows: list[Tensor],
    momentum: Tensor | None,
    momentum_value: float,
    seed: Tensor | None,
    seed_value: int | None,
    backend: str,
) -> None:
    _update(
        targets, sources, shadows, momentum_value if momentum is None else momentum,
        seed_value if seed is None else seed, backend,
    )  # fmt: skip


# By hand: register's ops return what they make, and these lists are written in place.
define(
    "ema_update_",
    "(Tensor(a!)[] targets, Tensor[] sources, Tensor(b!)[] shadows, Tensor? momentum, float momentum_value, "
    "Tensor? seed, int? seed_value, str backend) -> ()",
    _impl,
    lambda *arguments: None,
)


def _listed(name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(tensors, Tensor) or not hasattr(tensors, "__iter__"):
        _check.bad_type("ema_update_", name, "tensors, a list of them or parameters()", type(tensors).__name__)
    return list(tensors)


def ema_update_(
    targets: Iterable[Tensor],
    sources: Iterable[Tensor],
    momentum: float | Tensor,
    *,
    shadows: Iterable[Tensor] | None = None,
    seed: int | Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Momentum update in place, target <- momentum * target + (1 - momentum) * source, all tensors in one native call.

    Computed as a step from the nearer end, target + (1 - momentum) * (source - target) for momentum >= 0.5: equal
    tensors stay as they are, infinities too, momentum 1 leaves every bit of the targets, momentum 0 copies. Arithmetic
    is float32, for float64 targets float64. No gradient flows.

    Args:
        targets, sources: tensors, or a module's parameters(), pair by pair of one shape; float32, float16, bfloat16 or
            float64 in any mix, or both complex64 or complex128; contiguous or not, all on one device. A target that
            comes twice with the same source (shared parameters) is updated once.
        momentum: a number in [0, 1], or a 0-d float32 or float64 tensor on the targets' device, which on CUDA is read
            there: no synchronisation, and a captured graph takes its current value. Such a value is clamped to [0, 1];
            NaN gives NaN. A schedule inside a compiled step should be a tensor: a number that changes recompiles.
        shadows: for each target, then float32, a float16 or bfloat16 tensor that receives the new value, rounded.
        seed: None rounds float16 and bfloat16 targets to nearest. Near momentum 1 they then stop moving, as a step is
            less than half a unit in the last place. With an int, or a 0-d int64 tensor on the targets' device, they are
            rounded up or down at random so as to be right on average. The choice is a function of the seed, the
            tensor's place in the lists and the element's place in it (in memory, if a target and its source are laid
            out alike), the same on every device and for every number of threads; each step needs another seed.
        backend: "cpu", "cuda" or "eager"; the fastest that can run here if None (see `sslops.explain`).

    Raises:
        TypeError, ValueError: lists of unequal length, other shapes, dtypes or devices than these, a momentum outside
            [0, 1], a target that requires grad outside torch.no_grad(), a target that shares memory with another
            tensor. Nothing has been written then. (A compiled call does not see that a target requires grad.)
        RuntimeError: the backend that was asked for cannot run here; torch.jit.trace is on, which would not record it.

    Source: He et al., Momentum Contrast for Unsupervised Visual Representation Learning, arXiv:1911.05722, Eq. 2.
    """
    targets, sources = _listed("targets", targets), _listed("sources", sources)
    shadows = [] if shadows is None else _listed("shadows", shadows)
    if targets and (torch.compiler.is_compiling() or _torch.in_modes()):
        backend = resolve("ema_update", targets[0].device, targets[0].dtype, backend)
        with torch.no_grad():
            torch.ops.sslops.ema_update_(
                targets, sources, shadows,
                momentum if isinstance(momentum, Tensor) else None,
                0.0 if isinstance(momentum, Tensor) else float(momentum),
                seed if isinstance(seed, Tensor) else None, None if isinstance(seed, Tensor) else seed, backend,
            )  # fmt: skip
        return
    _update(targets, sources, shadows, momentum, seed, backend)
