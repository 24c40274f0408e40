"""Places in the file system as callers name them: checked by the name of the argument, and absolute once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

Place: TypeAlias = str | os.PathLike[str]


def place(what: str, given: Place) -> Path:
    """Return a place as an absolute path; ``TypeError`` or ``ValueError`` names the argument `what` and its value.

    An empty text is nobody's wish, and mostly a variable that is not set: it does not mean where the process is.
    """
    path = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(path, str):
        raise TypeError(f"{what} must be a path, not {given!r}")
    if not path or "\0" in path:
        raise ValueError(f"{what} must be a path, not {given!r}, which is empty or has a NUL character")
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        raise ValueError(f"{what} must be a path, not {given!r}, which no file can be called") from None
    return Path(path).absolute()


def place_or_none(what: str, given: Place | None) -> Path | None:
    """Return the same; None where there is none."""
    return None if given is None else place(what, given)


def places(what: str, given: Iterable[Place]) -> list[Path]:
    """Return several; a single one, whose letters could be taken for many, is a ``TypeError``."""
    if isinstance(given, str | bytes | os.PathLike) or not isinstance(given, Iterable):
        raise TypeError(f"{what} must be a list of paths, not {given!r}")
    return [place(what, each) for each in given]
