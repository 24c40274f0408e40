"""Everything that a table holds as of one version, and what differs between two of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

K = TypeVar("K", bound=str | bytes)
V = TypeVar("V")


class Snapshot(Mapping[K, V]):
    """A table as of one version: a read-only mapping in the order in which its keys came, and this process' own.

    Values are decoded anew each time they are asked for, so that what a caller does to one changes nothing else.
    Made by :meth:`Reader.snapshot`. Immutable, so thread- and fork-safe.

    Attributes
    ----------
    version : int
        As :attr:`Reader.version`.

    Examples
    --------
    >>> from shmelim.table import Writer
    >>> with Writer(None) as writer:
    ...     _ = writer.replace_all({"a": [1], "b": [2]})
    ...     before = writer.reader().snapshot()
    ...     _ = writer.remove("a")
    >>> dict(before)
    {'a': [1], 'b': [2]}

    """

    __slots__ = ("_decode", "_records", "version")

    def __init__(self, version: int, records: dict[K, Any], decode: Callable[[Any], V]) -> None:
        self.version = version
        self._records = records
        self._decode = decode

    def __getitem__(self, key: K) -> V:
        return self._decode(self._records[key])

    def __contains__(self, key: object) -> bool:
        return key in self._records

    def __iter__(self) -> Iterator[K]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of version {self.version}: {len(self)} values>"

    def differences(self, since: Snapshot[K, V]) -> Changes[K, V]:
        """Return what differs here from an earlier snapshot of the same table; about 0.1 µs a key."""
        old, new, decode = since._records, self._records, self._decode
        put = {key: decode(record) for key, record in new.items() if key not in old or old[key] != record}
        return Changes(self, put, [key for key in old if key not in new])


class Changes(NamedTuple, Generic[K, V]):
    """What differs between two versions of a table."""

    snapshot: Snapshot[K, V]
    """The later of the two, to ask about the next changes with."""
    put: dict[K, V]
    """Values that are new or others than before, by key."""
    removed: list[K]
    """Keys that are gone."""
