"""Batches that lie spread over the processes of a group: what ops gather, sum and check through torch.distributed.

Values are those of the gathered batch, the same on every rank. A rank's gradient is W dL/d(its own input), W the number
of ranks: DDP averages gradients, and makes of it the gradient of the gathered batch. What is built on a value must be
the same on every rank. Registered ops know a group by its name; "" is this process alone.
"""

import contextlib
import functools
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import _check, _torch
from ._schema import LIBRARY, define

__all__ = [
    "Group",
    "Part",
    "agreed",
    "all_gather",
    "all_reduce",
    "gather_views",
    "gathered",
    "gathered_arguments",
    "gathered_ids",
    "in_step",
    "mean",
    "name",
    "own_rows",
    "part",
    "pass_on",
    "rank",
    "reduce_scatter",
    "size",
]

Group = Any  # str | ProcessGroup | None; torch may be built without torch.distributed


@_torch.constant
def name(op: str, group: Group) -> str:
    """The name of `group`: "world", a ProcessGroup that this process is in, or None; "" if it is this process alone.

    Raises TypeError or ValueError for anything else, and where torch.distributed is not initialised.
    """
    if group is None:
        return ""
    if isinstance(group, str) and group != "world":
        _check.bad_value(op, "group", '"world", a ProcessGroup or None', repr(group))
    if not (dist.is_available() and dist.is_initialized()):
        _check.bad_value(op, "group", "torch.distributed initialised (init_process_group)", f"{group!r} without it")
    if group == "world":
        group = dist.group.WORLD
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        _check.bad_value(op, "group", "a group that this process is in", "new_group's answer to those outside it")
    if not isinstance(group, dist.ProcessGroup):
        _check.bad_type(op, "group", '"world", a ProcessGroup or None', type(group).__name__)
    return group.group_name if group.size() > 1 else ""


def resolved(group: str) -> Any:
    """The ProcessGroup of that name; None for \"\"."""
    return _torch.process_group(group) if group else None


def is_known(group: str) -> bool:
    try:
        return resolved(group) is not None
    except (RuntimeError, KeyError, AttributeError):  # torch without distributed has no groups
        return False


class Part(NamedTuple):
    """Which rows of a gathered batch are this rank's, as kernels with a distributed form take it."""

    first: int
    rows: int
    group: Any  # ProcessGroup


def part(group: str, rows: int) -> Part:
    return Part(rank(group) * rows, rows, resolved(group))


@_torch.constant
def size(group: str) -> int:
    return resolved(group).size() if group else 1


@_torch.constant
def rank(group: str) -> int:
    return resolved(group).rank() if group else 0


# ---- collectives, for the implementations of registered ops ----


def all_gather(x: Tensor, group: str, dim: int = 0) -> Tensor:
    """The ranks' x side by side along `dim`"""
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
    out = x.new_empty((size(group), *x.shape))
    collective(out.view(-1), x.contiguous().view(-1), group=resolved(group))
    return out.movedim(0, dim).flatten(dim, dim + 1).contiguous()


def gather_views(views: list[Tensor], group: str) -> Tensor:
    """[V, N, D] from the ranks' V views [B, D]"""
    return all_gather(torch.stack(views), group, 1)


def all_reduce(x: Tensor, group: str, how: str) -> Tensor:
    """The sum of the ranks' x, or their maximum"""
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[how], group=resolved(group))
    return out


def reduce_scatter(x: Tensor, group: str, dim: int) -> Tensor:
    """This rank's part, along `dim`, of the sum of the ranks' x: the way back from all_gather"""
    collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    parts = x.unflatten(dim, (size(group), -1)).movedim(dim, 0).contiguous()
    out = x.new_empty(parts.shape[1:])
    collective(out.view(-1), parts.view(-1), group=resolved(group))
    return out


@contextlib.contextmanager
def pass_on(tensors: list[Tensor], group: str) -> Iterator[list[Tensor]]:
    """`tensors` go to the next rank of the ring, and those of the rank before, of the same shapes, come meanwhile: they
    are there, and these free, at the end of the `with`. Empty ones do not travel.
    """
    come, among, moves = [torch.empty_like(x) for x in tensors], resolved(group), []
    after, before = ((among.rank() + step) % among.size() for step in (1, -1))
    for tag, (x, to) in enumerate(zip(tensors, come, strict=True)):
        if x.numel():
            moves.append(dist.P2POp(dist.isend, x, group=among, group_peer=after, tag=tag))
            moves.append(dist.P2POp(dist.irecv, to, group=among, group_peer=before, tag=tag))
    works = dist.batch_isend_irecv(moves) if moves else []
    try:
        yield come
    finally:  # after an error too: the memory is still read and written
        for work in works:
            work.wait()


# ---- the same on every rank ----


class _Agreement:
    """What one op knows about its ranks in one group."""

    def __init__(self) -> None:
        self.tensors: list[tuple[torch.Size, torch.dtype]] | None = None  # when all were last known to agree
        self.options = ""
        self.code = torch.empty(0)
        self.unread: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()


_agreements: weakref.WeakKeyDictionary[Any, dict[str, _Agreement]] = weakref.WeakKeyDictionary()
_asked: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # calls and agreements of a group's ranks
_HOST_WAITS = {"cpu"}  # for every check, where that is no synchronisation
_FAILED = -1  # instead of a number of rows


def _require_equal(op: str, codes: Tensor, options: str) -> None:
    rows, options_hashes, hashes = codes.t().tolist()
    if failed := [rank for rank, each in enumerate(rows) if each == _FAILED]:
        _check.bad_value(op, "group", "no error on any rank", f"one on ranks {failed}")
    if len(set(options_hashes)) > 1:
        got = f"equal ones on ranks {_alike(options_hashes)} only; here {options}"
        _check.bad_value(op, "group", "the same options on all ranks", got)
    if len(set(rows)) > 1:
        _check.bad_value(op, "group", "batches of one size on all ranks", f"{rows} rows")
    if len(set(hashes)) > 1:
        got = f"equal ones on ranks {_alike(hashes)} only"
        _check.bad_value(op, "group", "inputs of one shape and dtype on all ranks", got)


def _alike(hashes: list[int]) -> list[list[int]]:
    return [[rank for rank, other in enumerate(hashes) if other == each] for each in dict.fromkeys(hashes)]


def _known(op: str, group: str) -> _Agreement:
    return _agreements.setdefault(resolved(group), {}).setdefault(op, _Agreement())


def _count(group: str) -> int:
    count = _asked[resolved(group)] = _asked.get(resolved(group), 0) + 1
    return count


_F = TypeVar("_F", bound=Callable[..., Any])


def in_step(function: _F) -> _F:
    """A public function of a group whose first communication is `agreed`: if a rank's own arguments are refused before
    that, the other ranks hear of it there and raise too. (Not on a GPU, where their hosts do not wait for it.)
    """
    op = function.__qualname__

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("group") is None or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        group, before = "", 0
        with contextlib.suppress(TypeError, ValueError):  # which the function raises itself
            group = name(op, kwargs["group"])
        if group:
            before = _count(group)
        try:
            return function(*args, **kwargs)
        except Exception:
            if group and _count(group) == before + 1 and torch.device("cpu") in resolved(group)._device_types:
                all_gather(torch.tensor([[_FAILED, 0, 0]]), group)
            raise

    return run  # type: ignore[return-value]


@contextlib.contextmanager
def agreed(op: str, group: str, tensors: list[Tensor], options: str = "") -> Iterator[list[Tensor]]:
    """`tensors`, if the other ranks have tensors of the same shapes and dtypes, and the same options; ValueError on
    every rank if not.

    Shapes travel at every call, but the host waits for them only when its own are not those of the last call. A rank
    that differs has thus been waiting. The others have not, and would wait for it on the device: it goes with them once
    more, with NaN of the last call's shapes, and then raises. They get NaN, and raise at their next call.
    """
    device = tensors[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        yield tensors  # a graph has the shapes of its warm-up
        return
    known = _known(op, group)
    _count(group)
    while known.unread and (known.unread[0][1] is None or known.unread[0][1].query()):
        _require_equal(op, known.unread.popleft()[0], known.options)
    own = [(x.shape, x.dtype) for x in tensors]
    changed, code = own != known.tensors or options != known.options, known.code
    if changed:
        hashes = [zlib.crc32(text.encode()) for text in (options, repr(own))]
        code = torch.tensor([len(tensors[0]), *hashes], device=device)
    codes = all_gather(code[None], group)  # [W, 3]
    waits_always = device.type in _HOST_WAITS
    if changed or waits_always:
        try:
            _require_equal(op, codes, options)
        except ValueError:
            if not waits_always and known.tensors is not None and bool((codes == known.code).all(1).any()):
                yield [_stand_in(shape, dtype, device) for shape, dtype in known.tensors]
            raise
    else:
        known.unread.append(_read_later(codes))
    known.tensors, known.options, known.code = own, options, code
    yield tensors


def _stand_in(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, torch.nan if dtype.is_floating_point else 0, dtype=dtype, device=device)


def _read_later(x: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """x on its way to the host, and when it will be there"""
    if not x.is_cuda:
        return x, None
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(x.device))
    return host, event


# ---- what public functions call, in a trace or not ----


def options(arguments: dict[str, Any]) -> str:
    """What must be the same on all ranks besides shapes: the choices, and which tensors there are. On the CPU numbers
    too: on a GPU a schedule's would keep the host waiting at every step, and they leave no rank waiting.
    """
    kinds: tuple[type, ...] = (bool, str, torch.dtype, Tensor, type(None))
    on_cpu = not any(isinstance(x, Tensor) and x.device.type not in _HOST_WAITS for x in arguments.values())
    kinds = (*kinds, float, int) if on_cpu and not torch.compiler.is_compiling() else kinds
    texts = [
        f"{name}={'a tensor' if isinstance(x, Tensor) else x}" for name, x in arguments.items() if isinstance(x, kinds)
    ]
    return ", ".join(texts)


def _define(op: str, schema: str, forward: Any, fake: Any, setup_context: Any, backward: Any) -> None:
    define(op, schema, forward, fake)
    torch.library.register_autograd(f"sslops::{op}", backward, setup_context=setup_context, lib=LIBRARY)


def _gather(x: Tensor, group: str, dim: int, op: str, options: str = "") -> Tensor:
    with agreed(op, group, [x.movedim(dim, 0)], options) as (rows,):
        return all_gather(rows.movedim(0, dim), group, dim)


def _resized(x: Tensor, dim: int, rows: int) -> Tensor:
    return x.new_empty([*x.shape[:dim], rows, *x.shape[dim + 1 :]])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rest = inputs[1:]


_define(
    "all_gather",
    '(Tensor x, str group, int dim, str op, str options="") -> Tensor',
    _gather,
    lambda x, group, dim, op, options="": _resized(x, dim, x.shape[dim] * size(group)),
    _keep,
    lambda ctx, grad: (torch.ops.sslops.reduce_scatter(grad, *ctx.rest[:3]), None, None, None, None),
)
_define(
    "reduce_scatter",
    "(Tensor x, str group, int dim, str op) -> Tensor",
    lambda x, group, dim, op: reduce_scatter(x, group, dim),
    lambda x, group, dim, op: _resized(x, dim, x.shape[dim] // size(group)),
    _keep,
    lambda ctx, grad: (torch.ops.sslops.all_gather(grad, *ctx.rest), None, None, None),
)


def _all_reduce(x: Tensor, group: str, how: str, op: str, options: str = "") -> Tensor:
    if not op:
        return all_reduce(x, group, how)
    with agreed(op, group, [x[None]], options) as (own,):
        return all_reduce(own[0], group, how)


_define(
    "all_reduce",
    '(Tensor x, str group, str how, str op, str options="") -> Tensor',  # op: whose ranks must agree, or "": they do
    _all_reduce,
    lambda x, group, how, op, options="": torch.empty_like(x),
    _keep,
    lambda ctx, grad: (grad * size(ctx.rest[0]), None, None, None, None),  # of a sum
)


def mean(x: Tensor, group: str, op: str = "", options: str = "") -> Tensor:
    """Of the ranks' x. A rank's gradient is that of its own x. op: whose options must agree, or "": they do."""
    return torch.ops.sslops.all_reduce(x, group, "sum", op, options) / size(group) if group else x


def gathered(op: str, group: str, *tensors: Tensor, options: str = "") -> tuple[Tensor, ...]:
    """The ranks' [.., B, D], of one shape, as [.., N, D] in float32 (or float64), differentiable where they are."""
    if not group:
        return tensors
    wide = torch.stack(tensors).to(torch.promote_types(tensors[0].dtype, torch.float32))
    together = torch.ops.sslops.all_gather(wide, group, wide.dim() - 2, op, options).unbind()
    return tuple(t if x.requires_grad else t.detach() for t, x in zip(together, tensors, strict=True))


def gathered_ids(op: str, group: str, ids: Tensor | None) -> Tensor | None:
    """The ranks' [.., B] as [.., N]"""
    return None if ids is None else _side_by_side(f"{op}'s ids", group, ids, ids.dim() - 1)


def _side_by_side(what: str, group: str, x: Tensor, dim: int) -> Tensor:
    """Differentiable where it is"""
    if not group:
        return x
    together: Tensor = torch.ops.sslops.all_gather(x, group, dim, what)
    return together if x.requires_grad else together.detach()


def gathered_arguments(
    op: str, group: str, arguments: dict[str, Tensor | None], along: dict[str, int], options: str
) -> dict[str, Tensor | None]:
    """The parts of a batch together: embeddings as `gathered` has them, ids, and others along their dimensions."""
    embeddings = {
        name: x for name, x in arguments.items() if x is not None and x.is_floating_point() and name not in along
    }
    together: dict[str, Tensor | None] = {}
    together |= zip(embeddings, gathered(op, group, *embeddings.values(), options=options), strict=True)
    for name, x in arguments.items():
        if name in along and x is not None:
            together[name] = _side_by_side(f"{op}'s {name}", group, x, along[name] % x.dim())
        elif name not in embeddings:
            together[name] = gathered_ids(op, group, x)
    return together


def own_rows(x: Tensor, group: str, parts: int = 1) -> Tensor:
    """This rank's rows of each of the `parts` of x [parts * N]"""
    return x.view(parts, size(group), -1)[:, rank(group)].flatten() if group else x
