"""What a contender must offer: a host that owns and changes the state, and readers in other processes."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from bench.records import COMPACT_FROM, compact, maker_for

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Host", "Peer", "Place", "Reader", "installed", "program"]


@dataclass(frozen=True)
class Place:
    """Where one contender runs with one number of records, and where it may leave things.

    Attributes
    ----------
    name
        Short and nobody else's; what stands in ``/dev/shm`` begins with it, or is shmelim's of that name.
    directory
        Its own, removed afterwards.
    size
        How many records.
    durable
        Changes must be on disk before they return, where the contender can do that.
    short
        Records without prices and returns.

    """

    name: str
    directory: Path
    size: int
    durable: bool = False
    short: bool = False

    def make(self, number: int, stamp: int = 0) -> dict:
        return compact(number, stamp) if self.short else maker_for(self.size)(number, stamp)

    def records(self) -> list[dict]:
        return [self.make(number) for number in range(self.size)]

    @property
    def large(self) -> bool:
        return self.size >= COMPACT_FROM


class Host:
    """Owns the state, in a process of its own, with all servers that takes.

    The constructor returns when the state is filled and readers can come.
    """

    facts: Any = None
    """What readers must be told, besides the place."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def put(self, record: dict) -> None:
        """Replace one record, as a single change."""
        raise NotImplementedError

    def sync(self, records: list[dict]) -> None:
        """Make these the whole state."""
        raise NotImplementedError

    def close(self) -> None:
        """End all that was started."""


class Reader:
    """One reading process's view. Each operation is an attribute that is called as its users call it."""

    check: Any
    """``check(hotkey) -> bool``"""
    get: Any
    """``get(hotkey) -> dict | None``"""
    check_many: Any
    """``check_many(hotkeys) -> sequence of bool``"""
    everything: Any
    """``everything() -> list of all records``"""
    put: Any = None
    """``put(record)``, only where nobody but this process can change what it reads"""

    def close(self) -> None:
        """Let go of everything."""


class Peer:
    """A contender.

    Attributes
    ----------
    how
        How it is used here.
    limits
        What it does not do, for the footnote of its row.
    own_copies
        Each reader holds a copy of all records.
    durable
        Can make changes durable, and then has another host for syncs than for reads.

    """

    how: ClassVar[str]
    limits: ClassVar[str]
    own_copies: ClassVar[bool] = False
    durable: ClassVar[bool] = False
    environment: ClassVar[Mapping[str, str]] = {}
    host: ClassVar[type[Host]] = Host
    reader: ClassVar[type[Reader]]

    @classmethod
    def missing(cls) -> str | None:
        """Say what is not installed, or None."""
        return None

    @classmethod
    def version(cls) -> str:
        """Return the version of what is compared."""
        raise NotImplementedError

    @classmethod
    def too_much(cls, size: int, operation: str | None = None) -> str | None:  # noqa: ARG003
        """Say why this is not measured with so many records, or None; without an operation: nothing of it."""
        return None


def installed(*modules: str) -> str | None:
    """Say which of these modules cannot be imported, or None."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)} (pip install 'shmelim[bench]')" if absent else None


def program(name: str) -> str | None:
    """Say that a program is not on the path, or None."""
    return None if shutil.which(name) else f"not installed: {name} (a package of the operating system)"


def distribution(name: str) -> str:
    """Return the version of an installed distribution, with its name."""
    return f"{name} {importlib.metadata.version(name)}"
