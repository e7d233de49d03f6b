"""Ops as torch's library has them: the schema of an op's arguments, and the library itself."""

from collections.abc import Callable, Iterable, Sequence
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


Outputs = Out | tuple[Out, ...]
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

    def lower(self, x: Any) -> list[Any]:
        if not self.numbers:
            return list(x)
        values: list[Any] = []
        for name, value in zip(x._fields, x, strict=True):
            if name not in self.numbers:
                values.append(value)
            elif isinstance(value, Tensor):
                values += [value, 0.0]
            else:
                values += [None, value]
        return values

    def lift(self, values: Sequence[Any]) -> Any:
        if not self.numbers:
            return self.arguments(*values)
        taken = iter(values)
        found = []
        for name in self.arguments._fields:
            value = next(taken)
            if name in self.numbers:
                number = next(taken)
                value = number if value is None else value
            found.append(value)
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
