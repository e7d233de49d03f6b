"""Other libraries' losses and utilities on our ops: import them from `sslops.compat.lightly`, or patch the library."""

import importlib
import importlib.util
import inspect
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ._rebind import Patch, parameters, theirs
from .open_clip import patch_open_clip
from .transformers import patch_transformers

__all__ = ["Patch", "patch_lightly", "patch_open_clip", "patch_solo", "patch_transformers"]


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
    ours, classes = [], []
    for path, objects in replaced.items():
        path, _, owner = path.partition(":")
        try:
            home: Any = importlib.import_module(path)
        except ImportError as error:
            said = f"{distribution} {found} does not import {path}: {error}"
            raise ImportError(f"patch_{package}: {said}; wanted {wanted}") from error
        if owner:
            home = getattr(home, owner, None)
            classes.append(home)
        for x in objects:
            there = getattr(home, x.__name__, None)
            if there is None or parameters(there) != parameters(x):
                said = f"wanted {x.__name__}{inspect.signature(x)}, {distribution} {found} has "
                said += str(there and inspect.signature(there))
                raise ImportError(f"patch_{package}: {path}: {said}; wanted {wanted}")
            if there is not x:
                theirs[x] = there
            ours.append(x)
    return Patch(
        lambda: [*(x for path, x in list(sys.modules.items()) if path.split(".")[0] == package), *classes], ours
    )


def patch_lightly() -> Patch:
    """Binds lightly's names to ours, in all its modules: lightly.loss.NTXentLoss and where it is defined alike.

    Call it before your own `from lightly... import`: names that are bound elsewhere already stay as they are (and an
    original BarlowTwinsLoss or VICRegLoss cannot be constructed by them, as it looks itself up in its module). Modules
    that were made before stay as they are. See `sslops.compat.lightly` for what is replaced.

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
    return _patch("solo", "solo-learn", "1.0.6 (its repository's; the last release, 1.0.2, is too old)")
