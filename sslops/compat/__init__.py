"""Other libraries' losses and utilities on our ops: import them from `sslops.compat.lightly`, or patch the library."""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from .transformers import patch_transformers

__all__ = ["Patch", "patch_lightly", "patch_solo", "patch_transformers"]

_theirs: dict[Any, Any] = {}  # ours -> what it replaces


class Patch:
    """A library whose names are bound to ours, until unpatch() or the end of the outermost `with` block."""

    def __init__(self, package: str, ours: Sequence[Any]) -> None:
        self._package, self._ours = package, ours
        self._first = self._rebind([(_theirs[x], x) for x in ours])

    def _rebind(self, changes: list[tuple[Any, Any]]) -> bool:
        """Whether there was anything to change"""
        changed, found = {id(old): new for old, new in changes}, False
        for path, module in list(sys.modules.items()):
            if path.split(".")[0] == self._package:
                for name, value in list(vars(module).items()):
                    if id(value) in changed:
                        setattr(module, name, changed[id(value)])
                        found = True
        return found

    def unpatch(self) -> None:
        """Binds every name to the library's own object again."""
        self._rebind([(x, _theirs[x]) for x in self._ours])

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        if self._first:
            self.unpatch()


def _parameters(x: Any) -> list[tuple[str, object, object]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(x).parameters.values()]


def _patch(package: str, distribution: str, wanted: str) -> Patch:
    replaced = importlib.import_module(f"{__name__}.{package}").REPLACED
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"patch_{package}: wanted {distribution} {wanted}, which is not installed")
    try:
        found = version(distribution)
    except PackageNotFoundError:
        found = "on sys.path"  # a clone: the signatures decide
    else:
        if found.split(".")[0] != wanted.split(".")[0]:
            raise ImportError(f"patch_{package}: wanted {distribution} {wanted}, got {found}")
    ours = []
    for home, objects in replaced.items():
        try:
            module = importlib.import_module(home)
        except ImportError as error:
            said = f"{distribution} {found} does not import {home}: {error}"
            raise ImportError(f"patch_{package}: {said}; wanted {wanted}") from error
        for x in objects:
            theirs = getattr(module, x.__name__, None)
            if theirs is None or _parameters(theirs) != _parameters(x):
                said = f"wanted {x.__name__}{inspect.signature(x)}, {distribution} {found} has "
                said += str(theirs and inspect.signature(theirs))
                raise ImportError(f"patch_{package}: {home}: {said}; wanted {wanted}")
            if theirs is not x:
                _theirs[x] = theirs
            ours.append(x)
    return Patch(package, ours)


def patch_lightly() -> Patch:
    """Binds lightly's names to ours, in all its modules: lightly.loss.NTXentLoss and where it is defined alike.

    Call it before your own `from lightly... import`: names that are bound elsewhere already stay as they are (and an
    original BarlowTwinsLoss or VICRegLoss cannot be constructed by them, as it looks itself up in its module). Modules
    that were made before stay as they are. lightly_train takes its losses from lightly: import it afterwards. See
    `sslops.compat.lightly` for what is replaced.

    Returns:
        A handle: `unpatch()` undoes it, as does the end of a `with` block. Patching again is harmless.

    Raises:
        ImportError: lightly is not there, is not version 1, or has other signatures than 1.6; nothing is patched then.
    """
    return _patch("lightly", "lightly", "1.6")


def patch_solo() -> Patch:
    """Binds solo-learn's names to ours, in all its modules: those that solo.methods imported by name, too.

    For version 1.0.6, which only its repository has: the last release, 1.0.2, is refused. Returns and raises as
    `patch_lightly`; see `sslops.compat.solo` for what is replaced.
    """
    return _patch("solo", "solo-learn", "1.0.6, from its repository: the last release, 1.0.2, is too old")
