"""Reading eliminations from shared memory, in any process, without asking anybody."""

from __future__ import annotations

import time
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from typing import Any, Self

from shmelim.eliminations.reading import Reading
from shmelim.errors import CorruptSegmentError, NotServingError, ReaderClosedError
from shmelim.shm import Namespace, SharedNamespace, TableReader

_WAIT_PAUSE = 0.01


class EliminationReader(Reading, Mapping[str, dict[str, Any]]):
    """The current eliminations, read from shared memory: a read-only mapping of hotkey to record.

    Every method answers from the state that is current when it is called, also while the writer is dead, and
    needs no system call (after the first read of a grown table, which maps the new segment). Returned dicts
    and lists are the caller's own. Hotkeys are texts: None is in no table, anything else raises ``TypeError``.

    A lookup of one hotkey is one probe, plus decoding where a record is returned; it costs about as much as one in
    a dict, or about a microsecond where the compiled read path is missing. ``len`` is one load; iteration, and
    everything that returns all records, decodes a snapshot.

    Thread-safe: threads may share one reader. Fork-safe: it works on in a child. Pickles as its name: it attaches
    again where it is unpickled. A context manager, which closes it; one that is not closed keeps its memory until
    nobody refers to it any more.

    Parameters
    ----------
    name
        The name that is served: 1 to 16 of ``a-z 0-9 _ -``.
    wait
        Seconds to wait for a writer's first publish; None fails at once.
    owner
        The uid whose segments are trusted; None trusts this user's and root's.

    Raises
    ------
    NotServingError
        Nothing is served under that name, nor was left there by a writer that died.
    ValueError
        The name is not a legal one.
    CorruptSegmentError, UntrustedSegmentError, SegmentFormatError
        What stands in shared memory cannot be read. A read, too, raises the first where bytes contradict each
        other, and another ``SegmentError`` where the table has moved to a segment that cannot be mapped.
    UnsupportedPlatformError
        The compiled read path is missing, and this machine needs it.

    Examples
    --------
    A manager in direct mode serves its own process alone; elsewhere it is ``EliminationReader("shmelim")``.

    >>> from shmelim import EliminationManager
    >>> manager = EliminationManager(None, None, None, running_unit_tests=True)
    >>> manager.append_elimination_row("5Gx", 11.5, "MAX_TOTAL_DRAWDOWN", t_ms=1_700_000_000_000)
    True
    >>> reader = manager.reader
    >>> reader.is_hotkey_eliminated("5Gx"), reader.is_hotkey_eliminated("5Fa")
    (True, False)
    >>> "5Gx" in reader, len(reader), reader["5Gx"]["dd"]
    (True, 1, 11.5)
    >>> reader.are_eliminated(["5Gx", "5Fa"])
    array([ True, False])
    >>> reader.status("5Gx")
    <Status.ELIMINATED: 1>
    >>> manager.shutdown()

    """

    def __init__(self, name: str, *, wait: float | None = None, owner: int | None = None) -> None:
        self.name = name
        self._owner = owner
        self._private = False
        self._attach(SharedNamespace(name, owner=owner), wait)

    @classmethod
    def over(cls, namespace: Namespace) -> Self:
        """Read the table in a namespace that this process already has."""
        reader = cls.__new__(cls)
        reader.name = namespace.name
        reader._owner = None  # noqa: SLF001
        reader._private = not isinstance(namespace, SharedNamespace)  # noqa: SLF001
        reader._attach(namespace, None)  # noqa: SLF001
        return reader

    def _attach(self, namespace: Namespace, wait: float | None) -> None:
        deadline = time.monotonic() + (wait or 0.0)
        while True:
            try:
                self._table = TableReader(namespace)
            except NotServingError as error:
                if time.monotonic() >= deadline:
                    from shmelim.table.naming import is_a_table  # noqa: PLC0415  # nothing that a reader pays for

                    if isinstance(namespace, SharedNamespace) and is_a_table(namespace.name):
                        error.hint = (
                            f"there is a table of that name: shmelim.table.Reader({namespace.name!r}) reads it"
                        )
                    raise
                time.sleep(_WAIT_PAUSE)
            else:
                return

    def __reduce__(self) -> tuple[Any, ...]:
        if self._private:
            raise TypeError("a reader over private memory cannot be pickled: no other process has that memory")
        return _attach_again, (type(self), self.name, self._owner)

    def close(self) -> None:
        """Let go of the table: every later read raises ``ReaderClosedError``. Idempotent.

        Its memory is given back once no thread is in the middle of a read any more. A closed reader still pickles
        as its name.
        """
        self._table.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------ the mapping

    def __len__(self) -> int:
        return self._table.count_flag(0)

    def __getitem__(self, hotkey: str) -> dict[str, Any]:
        record = self.get_elimination(hotkey)
        if record is None:
            raise KeyError(hotkey)
        return record

    def __iter__(self) -> Iterator[str]:
        return iter(self._hotkeys())

    def items(self) -> ItemsView[str, dict[str, Any]]:
        """Return hotkeys and records as of one version: a view of the caller's own copy."""
        return self.get_eliminations_dict().items()

    def values(self) -> ValuesView[dict[str, Any]]:
        """Return the records as of one version: a view of the caller's own copy."""
        return self.get_eliminations_dict().values()

    def __repr__(self) -> str:
        try:
            what = f"{len(self)} eliminated"
        except ReaderClosedError:
            what = "closed"
        return f"<{type(self).__name__} {self.name!r}: {what}>"

    def verify(self) -> int:
        """Check every record's checksum and that lookups find each entry; return the number of entries.

        ``CorruptSegmentError`` has the first contradiction found. Takes some microseconds an entry.
        """
        snapshot = self._table.snapshot(verify=True)
        keys = list(snapshot.entries)
        flags = self._table.flags_of(keys)
        if self.version == snapshot.version:
            for key, found in zip(keys, flags.tolist(), strict=True):
                if found != snapshot.entries[key].flags:
                    raise CorruptSegmentError(f"{self.name!r}: a lookup of {key!r} does not find its entry")
        return len(keys)


def _attach_again(cls: type[EliminationReader], name: str, owner: int | None) -> EliminationReader:
    return cls(name, owner=owner)
