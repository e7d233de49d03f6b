"""Argument checks: each error names the op, the argument, what was wanted and what came.

TypeError for the wrong kind of thing (not a tensor, an integer dtype), ValueError for a wrong value, shape or pairing.
"""

import math
import numbers
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn, get_args, get_type_hints

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
ID_DTYPES = (torch.int64,)
_LARGEST = sys.float_info.max  # integers go beyond


class Of(NamedTuple):
    """What a tensor argument must be."""

    # "N D": a name is the same number wherever it stands, or that of an integer argument; "*" is any; "": 0-d;
    # "...": any dimensions, and one another's; "N ...": further ones
    shape: str
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    like: str = ""  # of the dtype of this argument
    strided: bool = False  # kernels take any strides; contiguous otherwise
    spread: bool = False  # with a group, the rank's part of a batch: rows [.., B, D] or ids [B]
    along: int | None = None  # the dimension that is spread, of what is no embeddings beside them and no ids
    optional: bool = False  # found in the annotation: Tensor | None
    below: Callable[[Any], int] | None = None  # indices in [0, below(the arguments))
    ignored: str = ""  # the argument that is the one value which need not be
    counts: str = ""  # the argument [B] that says how many of each row are looked at
    each: bool = False  # a list of such tensors


def first(x: Any) -> Any:
    """The tensor that a backend is chosen by"""
    return x[0][0] if isinstance(x[0], list) else x[0]


def declared(arguments: type[Any]) -> dict[str, Of]:
    """The arguments that are `Annotated[Tensor, Of(...)]`"""
    hints = get_type_hints(arguments, include_extras=True)
    found = {
        name: next((each for each in get_args(kind)[1:] if isinstance(each, Of)), None) for name, kind in hints.items()
    }
    return {
        name: of._replace(optional=get_args(hints[name])[0] == Tensor | None)
        for name, of in found.items()
        if of is not None
    }


def tensors(op: str, given: Mapping[str, Any], declared: Mapping[str, Of]) -> None:
    """That the tensors among the arguments given are what they are declared to be, one another's in shape, dtype and
    device.
    """
    sizes: dict[str, int] = {}
    device: torch.device | None = None
    whole: torch.Size | None = None  # the shape of "..."
    for name, of, value in _each(op, given, declared):
        wanted = of.shape.split()
        if not isinstance(value, Tensor):
            bad_type(op, name, f"a tensor [{', '.join(wanted)}]", type(value).__name__)
        if value.layout != torch.strided:
            bad_type(op, name, "a dense tensor", value.layout)
        if value.dtype not in of.dtypes:
            kind = (
                "a floating-point tensor" if of.dtypes == FLOAT_DTYPES else " or ".join(str(d)[6:] for d in of.dtypes)
            )
            bad_type(op, name, kind, value.dtype)
        shape = value.shape
        if of.shape == "...":
            whole = shape if whole is None else whole
            if shape != whole:
                bad_value(op, name, f"shape {list(whole)}", list(shape))
        else:
            if len(shape) < len(wanted) if wanted[-1:] == ["..."] else len(shape) != len(wanted):
                bad_value(op, name, f"shape [{', '.join(wanted)}]", list(shape))
            before = len(sizes)
            for dimension, size in zip(wanted, shape, strict=False):
                if dimension in ("*", "..."):
                    continue
                known = sizes.setdefault(dimension, given.get(dimension, size))
                if known != size:
                    names = {dimension: known, **dict(list(sizes.items())[:before])}
                    bad_value(
                        op, name, f"shape [{', '.join(str(names.get(each, each)) for each in wanted)}]", list(shape)
                    )
        if of.like and value.dtype != (like := given[of.like]).dtype:
            bad_value(op, name, f"the dtype of {of.like}, {like.dtype}", value.dtype)
        device = value.device if device is None else device
        if value.device != device:
            bad_value(op, name, f"the device of {next(iter(given))}, {device}", value.device)


def _each(op: str, given: Mapping[str, Any], declared: Mapping[str, Of]) -> Iterator[tuple[str, Of, Any]]:
    """The tensors that are there, one by one"""
    for name, of in declared.items():
        value = given[name]
        if of.each:
            if not value:
                bad_value(op, name, "at least one tensor", "none")
            yield from ((f"{name}[{k}]" if len(value) > 1 else name, of, each) for k, each in enumerate(value))
        elif value is not None or not of.optional:
            yield name, of, value


def indices(op: str, x: Any, declared: Mapping[str, Of]) -> None:
    """That those of x's tensors that are indices are in range: looked at on the CPU only."""
    for name, of in declared.items():
        if of.below is not None and getattr(x, name) is not None:
            ignored, counts = getattr(x, of.ignored, None), getattr(x, of.counts, None)
            id_range(op, of.below(x), ignored, counts, **{name: getattr(x, name)})


def ids64(x: Any) -> Any:
    """int32 indices as int64 ones; anything else as it is"""
    return x.long() if isinstance(x, Tensor) and x.dtype == torch.int32 else x


def output(op: str, name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """A tensor of this very shape, dtype and device: kernels rely on it when `torch.ops.sslops` is called directly.

    Of one without elements the shape says nothing to them.
    """
    if not isinstance(x, Tensor):
        bad_type(op, name, f"a tensor {list(shape)}", type(x).__name__)
    same_shape = tuple(x.shape) == tuple(shape) or x.numel() == 0 == math.prod(shape)
    if x.dtype != dtype or not same_shape or x.device != device or x.layout != torch.strided:
        got = f"{x.dtype} {list(x.shape)} on {x.device}, {x.layout}"
        bad_value(op, name, f"{dtype} {list(shape)} on {device}", got)


def bad_type(op: str, argument: str, wanted: str, got: object) -> NoReturn:
    raise TypeError(f"{op}: {argument}: wanted {wanted}, got {got}")


def bad_value(op: str, argument: str, wanted: str, got: object) -> NoReturn:
    raise ValueError(f"{op}: {argument}: wanted {wanted}, got {got}")


def choice(op: str, argument: str, value: str, choices: Sequence[str]) -> None:
    if not (isinstance(value, str) and value in choices):  # an array's comparison has no truth
        bad_value(op, argument, "one of " + ", ".join(choices), repr(value))


def flag(op: str, argument: str, value: bool) -> None:
    if not isinstance(value, bool):
        bad_type(op, argument, "True or False", repr(value))


def id_range(op: str, end: int, ignored: int | None = None, counts: Tensor | None = None, /, **tensors: Tensor) -> None:
    """All in [0, end), or ignored, or behind the first counts[b] of a row: looked at on the CPU only."""
    for name, x in tensors.items():
        if x.device.type == "cpu" and x.numel():
            low, high = torch.aminmax(x)
            if low < 0 or high >= end:
                bad = (x < 0) | (x >= end)
                if ignored is not None:
                    bad &= x != ignored
                if counts is not None:
                    bad &= torch.arange(x.shape[1]) < counts[:, None]
                for position in bad.nonzero()[:1].tolist():
                    wanted = f"an index from 0 to {end - 1}" + (f", or {ignored}" if ignored is not None else "")
                    bad_value(op, f"{name}{position}", wanted, int(x[tuple(position)]))


def same_device(op: str, first_name: str, first: Tensor, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.device != first.device:
            bad_value(op, name, f"the device of {first_name}, {first.device}", x.device)


def scalars(op: str, x: Any, names: Iterable[str], signed: Collection[str] = ()) -> dict[str, Any]:
    """Those of x's arguments that are finite numbers, positive unless they are signed, or floating-point tensors of one
    element, whose values are not looked at: as float, or 0-d and at least float32.
    """
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(x, name)
        if not isinstance(value, Tensor):
            number(op, name, value, name in signed)
            found[name] = float(value)
            continue
        if not value.is_floating_point():
            bad_type(op, name, "a floating-point tensor", value.dtype)
        if value.numel() != 1:
            bad_value(op, name, "a number or a tensor of one element", f"shape {list(value.shape)}")
        if value.device != first(x).device:
            bad_value(op, name, f"the embeddings' device, {first(x).device}", value.device)
        found[name] = value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))
    return found


def number(op: str, name: str, value: float, signed: bool) -> None:
    """Finite, and positive unless signed"""
    (finite if signed else positive)(op, **{name: value})


def finite(op: str, **numbers: float) -> None:
    for name, value in numbers.items():
        _number(op, name, value)
        if not -_LARGEST <= value <= _LARGEST:
            bad_value(op, name, "a finite number", value)


def non_negative(op: str, **numbers: float) -> None:
    """Finite numbers, at least 0."""
    for name, value in numbers.items():
        _number(op, name, value)
        if not 0 <= value <= _LARGEST:
            bad_value(op, name, "a finite number, at least 0", value)


def positive(op: str, **numbers: float) -> None:
    """Finite numbers above 0."""
    for name, value in numbers.items():
        _number(op, name, value)
        if not 0 < value <= _LARGEST:
            bad_value(op, name, "a positive finite number", value)


def probability(op: str, **numbers: float) -> None:
    """Numbers in [0, 1]."""
    for name, value in numbers.items():
        _number(op, name, value)
        if not 0 <= value <= 1:
            bad_value(op, name, "a number in [0, 1]", value)


def fraction(op: str, **numbers: float) -> None:
    """Numbers in [0, 1)."""
    for name, value in numbers.items():
        _number(op, name, value)
        if not 0 <= value < 1:
            bad_value(op, name, "a number in [0, 1)", value)


def _number(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        bad_type(op, name, "a number", type(value).__name__)


def count(op: str, argument: str, value: int, lowest: int, highest: int | None = None) -> None:
    """An integer between `lowest` and `highest`, both included."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        bad_type(op, argument, "an integer", type(value).__name__)
    if value < lowest or (highest is not None and value > highest):
        bad_value(op, argument, f"at least {lowest}" if highest is None else f"{lowest} to {highest}", value)


def grid(op: str, grid: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """Tokens along as many axes as one of these says."""
    if not isinstance(grid, Sequence):
        bad_type(op, "grid", "a tuple of integers", type(grid).__name__)
    if len(grid) not in axes:
        bad_value(op, "grid", " or ".join(f"{each} numbers" for each in axes), tuple(grid))
    for k, each in enumerate(grid):
        count(op, f"grid[{k}]", each, 0, 2**31 - 1)
    return tuple(grid)


def batch(op: str, argument: str, x: Tensor, ranks: int = 1) -> None:
    """At least two rows, on all ranks together, and a column."""
    if x.shape[0] * ranks < 2 or x.shape[1] < 1:
        bad_value(op, argument, "at least 2 rows, to have a variance, and a column", list(x.shape))
