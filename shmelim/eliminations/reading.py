"""The reads of eliminations, for every object that has their table: readers, clients and managers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

import msgspec
import numpy as np

from shmelim.eliminations.record import decode as decode_record
from shmelim.eliminations.rows import (
    PREFIX,
    Status,
    decode_departures,
    decode_eliminations,
    decode_hotkeys,
    decode_rows,
    departed_in,
    eliminations_in,
)
from shmelim.errors import CorruptSegmentError
from shmelim.shm import HEADS, ITEMS, KEYS, VALUES, Lookups, flag_choice, flag_test

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from shmelim.shm import TableInfo, WriterInfo

T = TypeVar("T")

_ELIMINATED = int(Status.ELIMINATED)
_DEPARTED = int(Status.DEPARTED)
_REGISTERED = int(Status.REGISTERED)
_RE_REGISTERED = int(Status.DEPARTED | Status.REGISTERED)
_BOOL = np.dtype(np.bool_)
_STATUSES = tuple(Status(flags) for flags in range(256))


class Snapshot(NamedTuple):
    """Everything as of one version; the dicts are the caller's own, in order of elimination and departure."""

    version: int
    eliminations: dict[str, dict[str, Any]]
    departed: dict[str, dict[str, int]]
    registered: set[str]


class Reading(Lookups):
    """Reads from shared memory, without asking anybody; what they return is the caller's own.

    A subclass sets ``_table`` before the first of them.
    """

    _head = PREFIX.size
    _member = _ELIMINATED

    # ------------------------------------------------------------------ one hotkey

    @flag_test(_ELIMINATED)
    def is_hotkey_eliminated(self, hotkey: str) -> bool:
        """Tell whether a hotkey is eliminated. One probe of shared memory."""
        return self._flags(hotkey) & _ELIMINATED != 0

    @flag_test(_RE_REGISTERED)
    def is_hotkey_re_registered(self, hotkey: str) -> bool:
        """Tell whether a hotkey that once left the metagraph is in it now. One probe of shared memory."""
        return self._flags(hotkey) & _RE_REGISTERED == _RE_REGISTERED

    @flag_choice(_STATUSES)
    def status(self, hotkey: str) -> Status:
        """Return all that the table says of a hotkey, as flags. One probe of shared memory."""
        return _STATUSES[self._flags(hotkey)]

    def _refuse(self, key: object) -> NoReturn:
        raise TypeError(f"a hotkey must be text, not {type(key).__name__}: {key!r:.60}")

    def get_elimination(self, hotkey: str) -> dict[str, Any] | None:
        """Return a hotkey's elimination record, or None."""
        record = self._record(hotkey)
        return None if record is None else _decode(record)

    def hotkey_in_eliminations(self, hotkey: str) -> dict[str, Any] | None:
        """Return a hotkey's elimination record, or None; the field's other name for `get_elimination`."""
        record = self._record(hotkey)
        return None if record is None else _decode(record)

    # What stood for a copy of at most 5 s ago answers from the current state.
    get_elimination_local_cache = get_elimination

    def read(self, hotkey: str, decode: Callable[[memoryview], T]) -> T | None:
        """Run ``decode`` on a record's msgpack bytes where they stand, without copying them.

        Parameters
        ----------
        hotkey
            The hotkey.
        decode
            Called with a read-only view, perhaps several times, and perhaps over bytes that are being
            overwritten: only a call during which nothing was published counts. It must copy what it keeps.

        Returns
        -------
        The result of ``decode``, or None where the hotkey is not eliminated.

        """
        return self._read(hotkey, decode)

    def get_departed_hotkey_info(self, hotkey: str) -> dict[str, int] | None:
        """Return ``{"detected_ms": …}`` of a hotkey that left the metagraph once, or None."""
        found = self._table.get(self._key(hotkey))
        if found is None or not found.flags & _DEPARTED:
            return None
        return {"detected_ms": PREFIX.unpack_from(found.data)[0]}

    get_departed_hotkey_info_local_cache = get_departed_hotkey_info

    # ------------------------------------------------------------------ many at once

    def are_eliminated(self, hotkeys: Iterable[str]) -> NDArray[np.bool_]:
        """Tell of many hotkeys whether they are eliminated, all as of one version.

        Parameters
        ----------
        hotkeys
            Any number of hotkeys; a list, a tuple, or a numpy array of byte strings is quickest.

        Returns
        -------
        numpy.ndarray
            Of bool, shape ``(n,)``, in the order of the hotkeys.

        Raises
        ------
        TypeError
            One of them is no text.

        """
        keys = hotkeys if type(hotkeys) is list else _listed(hotkeys)
        answers = np.empty(len(keys), _BOOL)
        if not self._fill(keys, answers, _ELIMINATED):
            self._fill_in_any_case(keys, answers, _ELIMINATED)
        return answers

    def statuses(self, hotkeys: Iterable[str]) -> list[Status]:
        """Return all that the table says of many hotkeys, in their order and as of one version."""
        keys = _listed(hotkeys)
        answers = np.empty(len(keys), np.uint8)
        if not self._fill(keys, answers, 0):
            self._fill_in_any_case(keys, answers, 0)
        return [_STATUSES[flags] for flags in answers.tolist()]

    def get_eliminated_hotkeys(self) -> set[str]:
        """Return the hotkeys that are eliminated."""
        return set(self._hotkeys())

    def _hotkeys(self) -> list[str]:
        """Return the hotkeys that are eliminated, in order."""
        found = self._collect(_ELIMINATED, KEYS)
        if found is not None:
            return decode_hotkeys(found[1])
        entries = self._table.snapshot().entries
        return [key.decode() for key, entry in entries.items() if entry.flags & _ELIMINATED]

    def get_eliminations_from_memory(self) -> list[dict[str, Any]]:
        """Return all elimination records, in the order of first elimination."""
        found = self._collect(_ELIMINATED, VALUES)
        return list(self._replayed_eliminations().values()) if found is None else decode_rows(found[1])

    def get_eliminations_dict(self) -> dict[str, dict[str, Any]]:
        """Return all elimination records by hotkey, in the order of first elimination."""
        found = self._collect(_ELIMINATED, ITEMS)
        return self._replayed_eliminations() if found is None else decode_eliminations(found[1])

    get_eliminations_local_cache = get_eliminations_dict

    def _replayed_eliminations(self) -> dict[str, dict[str, Any]]:
        return eliminations_in(self._table.snapshot().entries)

    def pack_eliminations(self) -> bytes:
        """Return all elimination records in their order, as a msgpack array: to be passed on undecoded."""
        found = self._collect(_ELIMINATED, VALUES)
        return msgspec.msgpack.encode(self.get_eliminations_from_memory()) if found is None else found[1]

    @property
    def eliminations(self) -> dict[str, dict[str, Any]]:
        """A copy of all elimination records by hotkey: changing it changes nothing else."""
        return self.get_eliminations_dict()

    def get_departed_hotkeys(self) -> dict[str, dict[str, int]]:
        """Return ``{hotkey: {"detected_ms": …}}`` of all that left the metagraph, in the order they did."""
        found = self._collect(_DEPARTED, HEADS)
        return departed_in(self._table.snapshot().entries) if found is None else decode_departures(found[1])

    @property
    def departed_hotkeys(self) -> dict[str, dict[str, int]]:
        """A copy of :meth:`get_departed_hotkeys`."""
        return self.get_departed_hotkeys()

    def snapshot(self) -> Snapshot:
        """Return everything as of one version."""
        eliminated = self._collect(_ELIMINATED, ITEMS)
        departed = self._collect(_DEPARTED, HEADS)
        registered = self._collect(_REGISTERED, KEYS)
        if eliminated and departed and registered and eliminated[0] == departed[0] == registered[0]:
            return Snapshot(
                eliminated[0],
                decode_eliminations(eliminated[1]),
                decode_departures(departed[1]),
                set(decode_hotkeys(registered[1])),
            )
        version, entries = self._table.snapshot()
        present = {key.decode() for key, entry in entries.items() if entry.flags & _REGISTERED}
        return Snapshot(version, eliminations_in(entries), departed_in(entries), present)

    # ------------------------------------------------------------------ the table and its writer

    @property
    def version(self) -> int:
        """A number that changes with every published change (generation << 48 | sequence)."""
        return self._table.version

    @property
    def writer(self) -> WriterInfo:
        """The writer: pid, whether it is alive, age of its heartbeat in seconds, state, start time."""
        return self._table.writer()

    @property
    def table(self) -> TableInfo:
        """Sizes and counts of the table."""
        return self._table.info()

    @property
    def retries(self) -> int:
        """How often a read of this reader started over because a publish overtook it."""
        return self._table.retries

    @property
    def num_departed_hotkeys(self) -> int:
        """How many hotkeys left the metagraph once. One load."""
        return self._table.count_flag(1)

    def wait_for_change(self, timeout: float | None = None, since: int | None = None) -> bool:
        """Wait for a publish.

        Parameters
        ----------
        timeout
            Seconds; None waits for ever.
        since
            The version that counts as known; default: the one at the call.

        Returns
        -------
        bool
            False if nothing was published in time.

        """
        return self._table.wait_for_change(timeout, since)


def _listed(hotkeys: Iterable[str]) -> list[str] | tuple[str, ...] | NDArray[np.bytes_]:
    """Return hotkeys in a form that can be looked up at once."""
    if isinstance(hotkeys, np.ndarray):
        return np.ascontiguousarray(hotkeys) if hotkeys.dtype.kind == "S" else hotkeys.tolist()
    if isinstance(hotkeys, str):
        raise TypeError("hotkeys must be a list of hotkeys, not one hotkey")
    return hotkeys if isinstance(hotkeys, (list, tuple)) else list(hotkeys)


def _decode(record: bytes) -> dict[str, Any]:
    try:
        return decode_record(record)
    except ValueError as error:
        raise CorruptSegmentError(f"a record in shared memory cannot be decoded: {error}") from error
