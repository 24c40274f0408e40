"""Reading eliminations from shared memory, in any process, without asking anybody."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, ItemsView, Iterator, Mapping, ValuesView
from typing import TYPE_CHECKING, Any, Final, Literal, Self, get_args

from shmelim.eliminations.reading import Reading
from shmelim.eliminations.rows import Status
from shmelim.errors import CorruptSegmentError, NotServingError, ShmelimError, StaleError
from shmelim.shm import Namespace, SharedNamespace, TableReader

if TYPE_CHECKING:
    from shmelim.shm.following import Position

WhenStale = Literal["serve", "raise", "refuse"]

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
    again where it is unpickled.

    Parameters
    ----------
    name
        The name that is served: 1 to 16 of ``a-z 0-9 _ -``.
    wait
        Seconds to wait for a writer's first publish; None fails at once.
    owner
        The uid whose segments are trusted; None trusts this user's and root's.
    max_staleness
        Seconds that a table which follows one of another host may be old (:attr:`staleness`); None: any. A table
        whose writer is on this host is always current.
    when_stale
        What a read of an older one does. ``"serve"``: it answers, at no cost. ``"raise"``: StaleError.
        ``"refuse"``: every hotkey counts as eliminated (``is_hotkey_eliminated``, ``are_eliminated``, ``status``,
        ``in``), so that whoever asks before an order refuses it; other reads answer. The last two add about 3 µs.

    Raises
    ------
    StaleError
        By reads, with ``when_stale="raise"``.
    NotServingError
        Nothing is served under that name, nor was left there by a writer that died.
    ValueError
        The name is not a legal one; ``max_staleness`` is negative, or ``when_stale`` none of the three.
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

    _limit: tuple[float | None, WhenStale] = (None, "serve")

    def __init__(
        self,
        name: str,
        *,
        wait: float | None = None,
        owner: int | None = None,
        max_staleness: float | None = None,
        when_stale: WhenStale = "serve",
    ) -> None:
        if when_stale not in get_args(WhenStale):
            raise ValueError(f"when_stale must be one of {', '.join(get_args(WhenStale))}, not {when_stale!r}")
        if max_staleness is not None and not max_staleness >= 0:
            raise ValueError(f"max_staleness {max_staleness!r} must be 0 or more seconds")
        self.name = name
        self._owner = owner
        self._private = False
        self._attach(SharedNamespace(name, owner=owner), wait)
        if max_staleness is not None and when_stale != "serve":
            # Another class, and not a question in each read: who has no limit pays for none.
            self._limit = max_staleness, when_stale
            self.__class__ = _limited(type(self))

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
        kind = type(self).__mro__[1] if self._limit[0] is not None else type(self)
        return _attach_again, (kind, self.name, self._owner, *self._limit)

    # ------------------------------------------------------------------ whose it is, and how old

    @property
    def source(self) -> str | None:
        """Whom the table follows, as its follower names it; None where its writer is on this host."""
        return self._table.followed()[0] or None

    @property
    def position(self) -> Position | None:
        """How far the table follows: ``term``, ``line``, ``seq`` of what it has; None where it follows nobody."""
        return self._table.followed()[1]

    @property
    def as_of(self) -> int | None:
        """When the source was known last to have nothing newer, in ms since 1970 by the engine's clock.

        None where the table follows nobody, or that is not known yet.
        """
        position = self._table.followed()[1]
        return position.as_of or None if position is not None else None

    @property
    def staleness(self) -> float:
        """Seconds since the source was known to have nothing newer; never less than is true.

        0 where the table's writer is on this host, living or dead: nobody else can have changed anything.
        ``math.inf`` where nothing is known yet. By CLOCK_BOOTTIME: setting the time changes nothing.
        """
        source, position = self._table.followed()
        if not source:
            return 0.0
        if position is None or not position.confirmed:
            return float("inf")
        return max(0.0, (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - position.confirmed) / 1e9)

    def _is_stale(self) -> bool:
        limit, then = self._limit
        age = self.staleness
        if limit is None or age <= limit:
            return False
        if then == "raise":
            raise StaleError(
                f"{self.name!r} follows {self.source!r}, and is {age:.1f} s old: more than {limit:g} s",
                hint="see `shmelim fleet status`: is the follower here running, and the publisher there?",
            )
        return True

    def close(self) -> None:
        """End reading: every later read raises ``ShmelimError``. Idempotent.

        The memory is given back with the reader itself, since a thread may be in the middle of a read.
        """
        self.__class__ = _ClosedReader

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
        return f"<{type(self).__name__} {self.name!r}: {len(self)} eliminated>"

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


def _attach_again(
    cls: type[EliminationReader], name: str, owner: int | None, limit: float | None, then: WhenStale
) -> EliminationReader:
    return cls(name, owner=owner, max_staleness=limit, when_stale=then)


@functools.cache
def _limited(cls: type[EliminationReader]) -> type[EliminationReader]:
    """Return a class whose reads look at the table's age first."""

    def looking(read: Callable[..., Any], stale: Callable[..., Any] | None) -> Callable[..., Any]:
        @functools.wraps(read)
        def method(self: EliminationReader, *arguments: Any, **named: Any) -> Any:
            is_stale = self._is_stale()
            answer = read(self, *arguments, **named)
            return stale(answer) if is_stale and stale is not None else answer

        return method

    members = {name: looking(getattr(cls, name), _WHEN_REFUSED.get(name)) for name in _READS}
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__, **members})


def _all_eliminated(answers: Any) -> Any:
    answers[:] = True
    return answers


_WHEN_REFUSED: Final[dict[str, Callable[[Any], Any]]] = {
    "is_hotkey_eliminated": lambda _: True,
    "__contains__": lambda _: True,
    "are_eliminated": _all_eliminated,
    "status": lambda found: found | Status.ELIMINATED,
    "statuses": lambda found: [each | Status.ELIMINATED for each in found],
}
_READS: Final = (
    *_WHEN_REFUSED,
    *("is_hotkey_re_registered", "get_elimination", "hotkey_in_eliminations", "get_elimination_local_cache"),
    *("read", "get_departed_hotkey_info", "get_departed_hotkey_info_local_cache", "packed_with_version"),
    *("encoded_elimination", "snapshot", "__len__"),
)
"""What looks into the table; other reads are made of these."""


class _ClosedReader(EliminationReader):
    """What a reader becomes when it is closed."""

    def __getattribute__(self, name: str) -> Any:
        if name in {"name", "close", "__class__", "__enter__", "__exit__", "__del__"}:
            return object.__getattribute__(self, name)
        raise ShmelimError(f"this reader of {object.__getattribute__(self, 'name')!r} is closed")

    def close(self) -> None:
        pass

    def _closed(self, *_: object) -> Any:
        return self.anything

    __contains__ = __len__ = __iter__ = __getitem__ = __reduce__ = _closed

    def __repr__(self) -> str:
        return f"<closed EliminationReader {self.name!r}>"
