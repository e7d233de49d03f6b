"""Ops as torch's library has them: the schema of an op's arguments, and the library itself."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

LIBRARY = torch.library.Library("sslops", "FRAGMENT")
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    torch.dtype: "ScalarType",
    bool: "bool",
    float: "float",
    int: "SymInt",
    int | None: "SymInt?",
    str: "str",
    list[bool]: "bool[]",
    list[float]: "float[]",
    list[int]: "SymInt[]",
}


class Out(NamedTuple):
    """An output of an op, on the device of its first argument"""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


Outputs = Out | tuple[Out | list[Out], ...]
SIGNED = Annotated[float | Tensor, "any finite number"]  # the others are positive


class Schema:
    """An op's arguments as torch's schema has them: a number that may be a tensor is two of them."""

    def __init__(self, arguments: type[Any]) -> None:
        hints = get_type_hints(arguments)
        self.arguments, self.numbers = arguments, [name for name, kind in hints.items() if kind == float | Tensor]
        self.signed = {name for name, kind in get_type_hints(arguments, include_extras=True).items() if kind == SIGNED}
        self.lists = {name for name, kind in hints.items() if kind == list[Tensor]}
        self.floats = [name for name, kind in hints.items() if kind is float]
        self.names: list[str] = []  # as the schema has them
        parts = []
        for name, kind in hints.items():
            self.names.append(name)
            if name in self.numbers:
                self.names.append(f"{name}_value")
                parts += [f"Tensor? {name}", f"float {name}_value"]
            else:
                parts.append(f"{_SCHEMA_TYPES[kind]} {name}")
        self.text, self.count = ", ".join(parts), len(parts)
        self._numbers_at = [self.names.index(name) for name in self.numbers]
        single, several = (Tensor, Tensor | None, float | Tensor), list[Tensor]
        self._single = [k for k, kind in enumerate(hints.values()) if kind in single]
        self._several = [k for k, kind in enumerate(hints.values()) if kind == several]
        self._dtypes = [k for k, kind in enumerate(hints.values()) if kind is torch.dtype]

    def lower(self, x: Any) -> list[Any]:
        values = list(x)
        for at in self._numbers_at:
            values[at : at + 1] = (values[at], 0.0) if isinstance(values[at], Tensor) else (None, values[at])
        return values

    def lift(self, values: Sequence[Any]) -> Any:
        found = list(values)
        for at in reversed(self._numbers_at):
            number = found.pop(at + 1)
            if found[at] is None:
                found[at] = number
        return self.arguments(*found)

    def tensors(self, x: Any) -> list[Tensor]:
        """Those in lists too, behind the others"""
        found = [x[k] for k in self._single if isinstance(x[k], Tensor)]
        for k in self._several:
            found += x[k]
        return found

    def is_double(self, x: Any) -> bool:
        """Whether any of its tensors is, or any of the dtypes that it names"""
        dtypes = [value.dtype for value in self.tensors(x)] + [x[k] for k in self._dtypes]
        return torch.float64 in dtypes

    def parted(self, x: Any) -> tuple[list[Any], list[Tensor]]:
        """x with `...` and, for lists, their lengths instead of its tensors; and these"""
        rest = list(x)
        for k in self._single:
            if isinstance(rest[k], Tensor):
                rest[k] = ...
        for k in self._several:
            rest[k] = len(rest[k])
        return rest, self.tensors(x)

    def joined(self, rest: list[Any], tensors: Iterator[Tensor]) -> Any:
        found = list(rest)
        for k in self._single:
            if found[k] is ...:
                found[k] = next(tensors)
        for k in self._several:
            found[k] = [next(tensors) for _ in range(found[k])]
        return self.arguments(*found)


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Those in lists too"""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list):
            found += [each for each in value if isinstance(each, Tensor)]
    return found


def define(op: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    LIBRARY.define(op + schema, tags=torch.Tag.pt2_compliant_tag)
    LIBRARY.impl(op, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sslops::{op}", fake, lib=LIBRARY)
