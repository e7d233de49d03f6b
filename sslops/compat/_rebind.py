"""Other libraries' names, bound to ours."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any


def parameters(x: Any) -> list[tuple[str, object, object]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(x).parameters.values()]


theirs: dict[Any, Any] = {}  # ours -> what it replaces


class Patch:
    """Modules or classes whose names are bound to ours, until unpatch() or the end of the outermost `with` block."""

    def __init__(self, homes: Callable[[], Iterable[Any]], ours: Sequence[Any]) -> None:
        self._homes, self._ours = homes, ours
        self._first = self._rebind([(theirs[x], x) for x in ours])

    def _rebind(self, changes: list[tuple[Any, Any]]) -> bool:
        """Whether there was anything to change"""
        changed, found = {id(old): new for old, new in changes}, False
        for home in self._homes():
            for name, value in list(vars(home).items()):
                if id(value) in changed:
                    setattr(home, name, changed[id(value)])
                    found = True
        return found

    def unpatch(self) -> None:
        """Binds every name to the library's own object again."""
        self._rebind([(x, theirs[x]) for x in self._ours])

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        if self._first:
            self.unpatch()
