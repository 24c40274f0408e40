"""Reading eliminations from shared memory, in any process, without asking anybody."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, Mapping, ValuesView
from functools import cache, partial
from threading import TIMEOUT_MAX
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeAlias

from shmelim.eliminations.reading import Reading, listed
from shmelim.eliminations.rows import Status
from shmelim.errors import CorruptSegmentError, NotServingError, ReaderClosedError, StaleError
from shmelim.shm import Namespace, SharedNamespace, TableReader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shmelim.shm import Position

WhenStale: TypeAlias = Literal["serve", "raise", "refuse"]

_WHEN_STALE: Final = ("serve", "raise", "refuse")
_ALL: Final = Status.ELIMINATED | Status.DEPARTED | Status.REGISTERED


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
    max_staleness
        Seconds that the table may be old (see :attr:`staleness`); None sets no limit.
    when_stale
        What a read does of a table that is older, or of unknown age. ``"serve"``: it answers, and :attr:`stale`
        tells; a check costs nothing more. ``"raise"``: every read of hotkeys and records raises ``StaleError``.
        ``"refuse"``: the checks that decide on an order answer so that none is accepted, whatever the hotkey:
        :meth:`is_hotkey_eliminated`, ``in``, :meth:`are_eliminated` and :meth:`is_hotkey_re_registered` say True,
        :meth:`status` and :meth:`statuses` all three flags. What returns records, or counts them, raises
        ``StaleError``: there is nothing safe to make up. So it is for the intake of orders, and not for what acts
        on a hotkey because it is eliminated. The last two look at the age before each read: about 10 µs.

    Raises
    ------
    NotServingError
        Nothing is served under that name, nor was left there by a writer that died.
    StaleError
        By reads, where ``when_stale`` says so; making a reader does not look at the age.
    ValueError, TypeError
        The name is not a legal one; ``max_staleness`` is not a number of seconds, or ``when_stale`` needs it.
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

    max_staleness: float | None = None
    """Seconds that the table may be old; None sets no limit."""
    when_stale: WhenStale = "serve"
    """What a read does where the table is older."""

    def __init__(
        self,
        name: str,
        *,
        wait: float | None = None,
        owner: int | None = None,
        max_staleness: float | None = None,
        when_stale: WhenStale = "serve",
    ) -> None:
        self.name = name
        self._owner = owner
        self._private = False
        self.max_staleness, self.when_stale = _checked(max_staleness, when_stale)
        self._attach(SharedNamespace(name, owner=owner), wait)
        if when_stale == "refuse":
            # Rather than a branch in each check; and not in __new__, whose signature help() would show.
            self.__class__ = _refusing(type(self))

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
        limit = None if self.when_stale == "serve" else self.max_staleness
        try:
            self._table = TableReader.attached(namespace, wait, max_staleness=limit)
        except NotServingError as error:
            from shmelim.table.naming import is_a_table  # noqa: PLC0415  # nothing that a reader pays for

            if isinstance(namespace, SharedNamespace) and is_a_table(namespace.name):
                error.hint = f"there is a table of that name: shmelim.table.Reader({namespace.name!r}) reads it"
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        if self._private:
            raise TypeError("a reader over private memory cannot be pickled: no other process has that memory")
        arguments: dict[str, Any] = {"owner": self._owner}
        arguments |= {"max_staleness": self.max_staleness, "when_stale": self.when_stale}
        return partial(plain(type(self)), **arguments), (self.name,)

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

    # ------------------------------------------------------------------ how old it is

    @property
    def source(self) -> str | None:
        """Whom this host's table follows, as its follower was told; None where its writer is the source itself."""
        return self._table.source()

    @property
    def position(self) -> Position | None:
        """How far the follower is: ``term``, ``line``, ``seq`` and more; None where the writer is the source."""
        return self._table.position()

    @property
    def as_of(self) -> int | None:
        """When the source had nothing newer, in ms since 1970 by the engine's clock; None if not known."""
        position = self._table.position()
        return position.as_of or None if position is not None else None

    @property
    def staleness(self) -> float | None:
        """How old the table is at most, in seconds; None where that is not known.

        Of a table that follows another host's: how long ago it was confirmed that the source had nothing newer, by
        CLOCK_BOOTTIME, which no setting of the clock moves and which goes on while the machine sleeps. Of a local
        one: 0.0 while its writer lives, then how long ago it gave its last heartbeat, by CLOCK_MONOTONIC, which
        leaves out what the machine slept. It is not known before a follower confirmed anything, or where the
        writer's clock is not this process' (another time namespace). Some microseconds.
        """
        return self._table.staleness()

    @property
    def stale(self) -> bool:
        """Whether the table is older than :attr:`max_staleness`, or of unknown age; False without a limit."""
        if self.max_staleness is None:
            return False
        age = self.staleness
        return age is None or age > self.max_staleness

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
            what = f"{self.table.flag_counts[0]} eliminated"
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


def _checked(max_staleness: object, when_stale: object) -> tuple[float | None, WhenStale]:
    if when_stale not in _WHEN_STALE:
        raise ValueError(f"when_stale must be one of {', '.join(map(repr, _WHEN_STALE))}, not {when_stale!r}")
    if max_staleness is None:
        if when_stale != "serve":
            raise ValueError(f"when_stale={when_stale!r} needs max_staleness, in seconds")
        return None, "serve"
    from shmelim.system.arguments import seconds  # noqa: PLC0415  # as most readers ask for none

    return float(seconds("max_staleness", max_staleness, most=TIMEOUT_MAX)), when_stale


class _Refusing(EliminationReader):
    """The checks of a reader that accepts no order where its table is too old."""

    def is_hotkey_eliminated(self, hotkey: str | None) -> bool:
        try:
            return super().is_hotkey_eliminated(hotkey)
        except StaleError:
            return True

    def is_hotkey_re_registered(self, hotkey: str | None) -> bool:
        try:
            return super().is_hotkey_re_registered(hotkey)
        except StaleError:
            return True

    def status(self, hotkey: str | None) -> Status:
        try:
            return super().status(hotkey)
        except StaleError:
            return _ALL

    def __contains__(self, hotkey: Any) -> bool:
        try:
            return super().__contains__(hotkey)
        except StaleError:
            return True

    def are_eliminated(self, hotkeys: Iterable[str | None]) -> NDArray[np.bool_]:
        keys, numpy = listed(hotkeys)
        try:
            return super().are_eliminated(keys)
        except StaleError:
            return numpy.ones(len(keys), bool)  # type: ignore[no-any-return]

    def statuses(self, hotkeys: Iterable[str | None]) -> list[Status]:
        keys, _ = listed(hotkeys)
        try:
            return super().statuses(keys)
        except StaleError:
            return [_ALL] * len(keys)


@cache
def _refusing(kind: type[EliminationReader]) -> type[EliminationReader]:
    """Return a class of readers as the refusing one that looks like it."""
    looks = {name: getattr(kind, name) for name in ("__doc__", "__module__", "__qualname__")}
    return type(kind.__name__, (_Refusing, kind), looks)


def plain(kind: type[EliminationReader]) -> type[EliminationReader]:
    """Return the class that a refusing one was made of, or the class itself."""
    return kind.__bases__[1] if issubclass(kind, _Refusing) else kind
