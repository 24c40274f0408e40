"""The reads of eliminations, for every object that has their table: readers, clients and managers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from shmelim.eliminations.record import decode as decode_record
from shmelim.eliminations.record import decode_unchecked, refuse_hotkey
from shmelim.eliminations.rows import (
    PREFIX,
    Row,
    Status,
    decode_departures,
    decode_eliminations,
    decode_hotkeys,
    decode_rows,
    entry_row,
    pack,
)
from shmelim.errors import CorruptSegmentError
from shmelim.shm import (
    HEADS,
    ITEMS,
    KEYS,
    LOADING_NUMPY,
    VALUES,
    Lookups,
    TableInfo,
    decoded,
    flag_choice,
    flag_test,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")

_ELIMINATED = int(Status.ELIMINATED)
_DEPARTED = int(Status.DEPARTED)
_REGISTERED = int(Status.REGISTERED)
_RE_REGISTERED = int(Status.DEPARTED | Status.REGISTERED)
_STATUSES = tuple(Status(flags) for flags in range(256))

# Loaded by the first question about many hotkeys at a time: who asks about one at a time does without.
_numpy: Any = None


class Snapshot(NamedTuple):
    """Everything as of one version; the dicts and the set are the caller's own.

    Examples
    --------
    >>> from shmelim import EliminationManager
    >>> with EliminationManager(None, None, None, running_unit_tests=True) as manager:
    ...     left = manager.update_metagraph(["5Fa", "5Gx"])
    ...     new = manager.append_elimination_row("5Gx", 11.5, "MAX_TOTAL_DRAWDOWN")
    ...     snapshot = manager.reader.snapshot()
    >>> list(snapshot.eliminations), snapshot.departed, sorted(snapshot.registered)
    (['5Gx'], {}, ['5Fa', '5Gx'])

    """

    version: int
    """As :attr:`EliminationReader.version`."""
    eliminations: dict[str, dict[str, Any]]
    """Hotkey to record, in the order of first elimination."""
    departed: dict[str, dict[str, int]]
    """Hotkey to ``{"detected_ms": ms since 1970, UTC}``, in the order of departure."""
    registered: set[str]
    """The hotkeys that are in the metagraph."""


class Reading(Lookups):
    """Reads from shared memory, without asking anybody; a subclass sets ``_table`` before the first of them.

    A hotkey may be any text, or None, who is neither eliminated nor anything else; what is neither raises
    ``TypeError``. Dicts, lists and sets that are returned are the caller's own. Times are in ms since 1970, UTC.
    """

    _head = PREFIX.size
    _member = _ELIMINATED

    # ------------------------------------------------------------------ one hotkey

    @flag_test(_ELIMINATED)
    def is_hotkey_eliminated(self, hotkey: str | None) -> bool:
        """Tell whether a hotkey is eliminated: one probe of shared memory, about 30 ns."""
        return self._flags(hotkey) & _ELIMINATED != 0

    @flag_test(_RE_REGISTERED)
    def is_hotkey_re_registered(self, hotkey: str | None) -> bool:
        """Tell whether a hotkey that once left the metagraph is in it now; one probe."""
        return self._flags(hotkey) & _RE_REGISTERED == _RE_REGISTERED

    @flag_choice(_STATUSES)
    def status(self, hotkey: str | None) -> Status:
        """Return all that the table says of a hotkey, as flags; one probe."""
        return _STATUSES[self._flags(hotkey)]

    _refuse = staticmethod(refuse_hotkey)

    @decoded(decode_unchecked)
    def get_elimination(self, hotkey: str | None) -> dict[str, Any] | None:
        """Return a hotkey's elimination record, or None; about 0.5 µs for a record of 0.5 kB.

        It has ``hotkey``, ``reason``, ``elimination_initiated_time_ms`` and whatever else was stored.
        """
        record = self._record(hotkey)
        try:
            return None if record is None else decode_record(record)
        except ValueError as error:
            raise CorruptSegmentError(f"a record in shared memory cannot be decoded: {error}") from error

    hotkey_in_eliminations = get_elimination
    # What stood for a copy of at most 5 s ago answers from the current state.
    get_elimination_local_cache = get_elimination

    def read(self, hotkey: str | None, decode: Callable[[memoryview], T]) -> T | None:
        """Return what ``decode`` makes of a record's msgpack bytes where they stand, uncopied; None without one.

        It is called with a read-only view, perhaps several times, and perhaps over bytes that are being
        overwritten: only a call during which nothing was published counts, and so does what that raises. It must
        copy what it keeps.
        """
        return self._read(hotkey, decode)

    def get_departed_hotkey_info(self, hotkey: str | None) -> dict[str, int] | None:
        """Return ``{"detected_ms": …}`` of a hotkey that once left the metagraph, or None; one probe."""
        found = self._table.get(self._key(hotkey))
        if found is None or not found.flags & _DEPARTED:
            return None
        return {"detected_ms": PREFIX.unpack_from(found.data)[0]}

    get_departed_hotkey_info_local_cache = get_departed_hotkey_info

    # ------------------------------------------------------------------ many at once

    def are_eliminated(self, hotkeys: Iterable[str | None]) -> NDArray[np.bool_]:
        """Tell of many hotkeys whether they are eliminated, in their order and as of one version: ``(n,)`` bools.

        About 12 ns a hotkey. A list, a tuple, or a numpy array of byte strings is quickest; a single text raises
        ``TypeError``. The first call in a process loads numpy.
        """
        keys, numpy = (hotkeys, _numpy) if _numpy and type(hotkeys) is list else listed(hotkeys)
        answers: NDArray[np.bool_] = numpy.empty(len(keys), bool)
        if not self._fill(keys, answers, _ELIMINATED):
            self._fill_in_any_case(keys, answers, _ELIMINATED)
        return answers

    def statuses(self, hotkeys: Iterable[str | None]) -> list[Status]:
        """Return all that the table says of many hotkeys; otherwise as :meth:`are_eliminated`."""
        keys, numpy = listed(hotkeys)
        answers = numpy.empty(len(keys), numpy.uint8)
        if not self._fill(keys, answers, 0):
            self._fill_in_any_case(keys, answers, 0)
        return [_STATUSES[flags] for flags in answers.tolist()]

    def packed_with_version(self, flag: int, form: int) -> tuple[int, bytes]:
        """Return the version and msgpack of all entries with a flag, in order."""
        found = self._collect(flag, form)
        if found is not None:
            return found
        version, entries = self._table.snapshot()
        return version, pack(entries, flag, form)

    def _packed(self, flag: int, form: int) -> bytes:
        return self.packed_with_version(flag, form)[1]

    def _hotkeys(self) -> list[str]:
        """Return the hotkeys that are eliminated, in order."""
        return decode_hotkeys(self._packed(_ELIMINATED, KEYS))

    def get_eliminated_hotkeys(self) -> set[str]:
        """Return the hotkeys that are eliminated; about 0.1 µs a hotkey."""
        return set(self._hotkeys())

    def get_eliminations_from_memory(self) -> list[dict[str, Any]]:
        """Return all elimination records, in the order of first elimination; about 2 µs a record."""
        return decode_rows(self.pack_eliminations())

    def get_eliminations_dict(self) -> dict[str, dict[str, Any]]:
        """Return all elimination records by hotkey, in the order of first elimination; about 2 µs a record."""
        return decode_eliminations(self._packed(_ELIMINATED, ITEMS))

    get_eliminations_local_cache = get_eliminations_dict

    def pack_eliminations(self) -> bytes:
        """Return all elimination records in their order, as a msgpack array: to be passed on undecoded."""
        return self._packed(_ELIMINATED, VALUES)

    def encoded_elimination(self, hotkey: str) -> bytes | None:
        """Return a hotkey's elimination record as msgpack, or None."""
        return self._record(hotkey)

    def row(self, hotkey: str) -> Row | None:
        """Return all that is known of a hotkey, or None; of one that is text in UTF-8."""
        found = self._table._entry(hotkey.encode())  # noqa: SLF001  # get(), without its tuple
        return None if found is None else entry_row(hotkey, *found)

    @property
    def eliminations(self) -> dict[str, dict[str, Any]]:
        """What :meth:`get_eliminations_dict` returns: changing it changes nothing else."""
        return self.get_eliminations_dict()

    def get_departed_hotkeys(self) -> dict[str, dict[str, int]]:
        """Return ``{hotkey: {"detected_ms": …}}``, in the order in which they left the metagraph."""
        return decode_departures(self._packed(_DEPARTED, HEADS))

    @property
    def departed_hotkeys(self) -> dict[str, dict[str, int]]:
        """What :meth:`get_departed_hotkeys` returns: changing it changes nothing else."""
        return self.get_departed_hotkeys()

    def snapshot(self) -> Snapshot:
        """Return everything as of one version, which separate calls may not; about 2 µs a record."""
        forms = (_ELIMINATED, ITEMS), (_DEPARTED, HEADS), (_REGISTERED, KEYS)
        found = [self._collect(*form) for form in forms]
        versions = {each[0] for each in found if each is not None}
        if None in found or len(versions) > 1:
            version, entries = self._table.snapshot()
            found = [(version, pack(entries, *form)) for form in forms]
        (version, eliminated), (_, departed), (_, registered) = cast("list[tuple[int, bytes]]", found)
        return Snapshot(
            version, decode_eliminations(eliminated), decode_departures(departed), set(decode_hotkeys(registered))
        )

    # ------------------------------------------------------------------ the table

    @property
    def root_id(self) -> int:
        """What tells the table's root segment from every other one, of whatever name."""
        return self._table.identity().root_id

    @property
    def table(self) -> TableInfo:
        """How full the table is: ``entries``, ``capacity`` in slots, sizes in bytes; as of one version."""
        return self._table.info()

    @property
    def num_departed_hotkeys(self) -> int:
        """How many hotkeys once left the metagraph."""
        return self._table.count_flag(1)


def _load_numpy() -> Any:
    global _numpy  # noqa: PLW0603
    with LOADING_NUMPY:
        import numpy  # noqa: ICN001, PLC0415

    _numpy = numpy
    return numpy


def listed(hotkeys: Any) -> tuple[Any, Any]:
    """Return hotkeys as a list, a tuple, or an array of byte strings; and numpy."""
    numpy = _numpy or _load_numpy()
    return (hotkeys if type(hotkeys) is list else _listed(hotkeys, numpy)), numpy


def _listed(hotkeys: Any, numpy: Any) -> Any:
    if isinstance(hotkeys, numpy.ndarray):
        if hotkeys.ndim != 1:
            raise TypeError(f"an array of hotkeys must have one dimension, not {hotkeys.ndim}")
        return numpy.ascontiguousarray(hotkeys) if hotkeys.dtype.kind == "S" else hotkeys.tolist()
    if isinstance(hotkeys, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"hotkeys must be a list of hotkeys, not one {type(hotkeys).__name__}")
    return hotkeys if isinstance(hotkeys, (list, tuple)) else list(hotkeys)
