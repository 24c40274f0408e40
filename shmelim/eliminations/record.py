"""What an elimination record is: its rules, and the bytes it is stored as.

A record is a dict of JSON-like values. :func:`normalise` turns whatever a caller hands in (numpy scalars,
tuples, enum members) into plain Python values or refuses it with an error that names the place;
:func:`encode` and :func:`decode` are the msgpack codec of the store, the shared table and the channel;
:func:`check_record` is the first two in one step, and :func:`prepare` fills in what a record lacks, too.

Everything here is a pure function: safe from any thread, and nothing of the argument is kept or changed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from enum import Enum
from math import isfinite
from types import NoneType
from typing import Any, NamedTuple, NoReturn, TypeVar

import msgspec

from shmelim.shm import DEEPEST, Kind, is_plain, scan
from shmelim.system.containers import plain_container

T = TypeVar("T")

DEPARTED_HOTKEYS_KEY = "departed_hotkeys"
ELIMINATIONS_KEY = "eliminations"
MAX_RECORD_BYTES = 1 << 20
MAX_HOTKEY_BYTES = 255
MAX_NESTING = DEEPEST
UNKNOWN = "UNKNOWN"
SINCE_2020_MS = 1_577_836_800_000
DAY_MS = 86_400_000

_REASON = "reason"
_TIME = "elimination_initiated_time_ms"
FILLED_IN = (_REASON, _TIME)  # the fields that are, where they are missing
_MIN_INT = -(1 << 63)
_MAX_INT = (1 << 64) - 1
_SHOWN = 64

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(dict[str, Any])

decode_unchecked = _decoder.decode
"""What :func:`decode` does where nothing is wrong with the bytes; msgspec.DecodeError for others."""


class EliminationReason(str, Enum):  # noqa: UP042 - StrEnum would change str() of a member, which callers log
    """Why a miner was eliminated; a record carries the value, which is the member's name.

    Examples
    --------
    >>> EliminationReason.ZOMBIE == "ZOMBIE", EliminationReason("LIQUIDATED").value
    (True, 'LIQUIDATED')

    """

    ZOMBIE = "ZOMBIE"
    PLAGIARISM = "PLAGIARISM"
    MAX_TOTAL_DRAWDOWN = "MAX_TOTAL_DRAWDOWN"
    FAILED_CHALLENGE_PERIOD_TIME = "FAILED_CHALLENGE_PERIOD_TIME"
    FAILED_CHALLENGE_PERIOD_DRAWDOWN = "FAILED_CHALLENGE_PERIOD_DRAWDOWN"
    LIQUIDATED = "LIQUIDATED"


class _NotStorableError(TypeError):
    """A value that has no stored form."""


def refuse_hotkey(hotkey: object, /) -> NoReturn:
    """Raise TypeError for a hotkey that is not text, which no read may take for one that is not there."""
    raise TypeError(f"a hotkey must be text, not {type(hotkey).__name__}: {_short(hotkey)}")


def check_hotkey(hotkey: str) -> bytes:
    """Return the UTF-8 bytes of a hotkey; TypeError or ValueError for one that is not fit to be a key."""
    if not isinstance(hotkey, str):
        refuse_hotkey(hotkey)
    try:
        key = hotkey.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"hotkey {_short(hotkey)} is not valid Unicode text ({error.reason})") from None
    if not key:
        raise ValueError("a hotkey must not be empty")
    if len(key) > MAX_HOTKEY_BYTES:
        raise ValueError(f"hotkey {_short(hotkey)} has {len(key)} bytes; at most {MAX_HOTKEY_BYTES} are allowed")
    return key


def is_hotkey(value: Any) -> bool:
    """Tell whether :func:`check_hotkey` accepts a value."""
    try:
        check_hotkey(value)
    except (ValueError, TypeError):
        return False
    return True


def normalise(data: Mapping[str, Any], hotkey: str | None = None) -> dict[str, Any]:
    """Check a record and return it as a new dict of plain Python values, its keys in the same order.

    Enum members and other ``str`` subclasses become ``str``, numpy scalars the Python number they are, tuples
    lists, mappings dicts, NaN and infinities None. ``elimination_initiated_time_ms`` may be a float that is a
    whole number, as old files have it. Reason and time may be missing, or None, and are left out then. ``hotkey``
    is whom the record must be of; None takes its word.

    ValueError says that there is no hotkey, that it is another one or not a valid one, or which limit of nesting
    or size is exceeded; TypeError the path of a value that has the wrong type or no stored form,
    as in ``record['price_info']['BTC/USD']``. About 7 µs for a record of 0.5 kB.
    """
    if not isinstance(data, Mapping):
        container = plain_container(data)  # type: ignore[unreachable]  # a proxy may stand for one
        if not isinstance(container, dict):
            raise TypeError(f"an elimination record must be a dict, not {type(data).__name__}: {_short(data)}")
        data = container
    own = data.get("hotkey", hotkey)
    if isinstance(own, str):
        check_hotkey(own)
    if hotkey is not None and hotkey != own:
        check_hotkey(hotkey)
    try:
        record = _plain_dict(data, 1, [MAX_RECORD_BYTES])
    except _NotStorableError as error:
        steps = "".join(f"[{_short(step)}]" for step in _path_to_culprit(data))
        raise TypeError(f"record{steps} cannot be stored: {error}") from None
    if "hotkey" not in record:
        whose = "" if hotkey is None else f" of hotkey {_short(hotkey)}"
        raise ValueError(f"the elimination record{whose} lacks the required field 'hotkey'")
    for field in FILLED_IN:
        if record.get(field) is None:
            record.pop(field, None)
    _check_types(record)
    if hotkey is not None and record["hotkey"] != hotkey:
        raise ValueError(f"the record is of hotkey {_short(record['hotkey'])}, not of {_short(hotkey)}")
    return record


def encode(record: dict[str, Any]) -> bytes:
    """Return the msgpack bytes of a record that :func:`normalise` made; ValueError beyond 1 MiB."""
    encoded = _encoder.encode(record)
    if len(encoded) > MAX_RECORD_BYTES:
        raise ValueError(
            f"the record of hotkey {_short(record.get('hotkey'))} has {len(encoded)} bytes; "
            f"at most {MAX_RECORD_BYTES} are allowed"
        )
    return encoded


def decode(buffer: bytes | bytearray | memoryview) -> dict[str, Any]:
    """Return the record in msgpack bytes, sharing nothing with the buffer; ValueError for any other bytes."""
    try:
        return _decoder.decode(buffer)
    except ValueError as error:
        raise ValueError(f"{len(buffer)} bytes are not an elimination record: {error}") from error


class Checked(NamedTuple):
    """A record that can be stored, but for what it lacks."""

    hotkey: str
    record: bytes
    lacks: tuple[str, ...] = ()  # fields that are to be filled in
    note: str | None = None  # what is odd about it


def check_record(
    data: Mapping[str, Any], hotkey: str | None = None, plausible: tuple[int, int] | None = None
) -> Checked:
    """Return hotkey and bytes of a record that :func:`normalise` and :func:`encode` accept, and what it lacks.

    `plausible` are the first and the last time that an elimination may have begun, in ms since 1970, UTC.
    """
    plausible = plausible_times() if plausible is None else plausible
    if is_plain(data):
        # Nearly all are as they are to be; whatever is wrong with one is found and named below.
        with suppress(ValueError, TypeError, OverflowError):
            encoded = _encoder.encode(data)
            if (own := usual_hotkey(encoded, plausible)) is not None and hotkey in {None, own}:
                return Checked(own, encoded)
    record = normalise(data, hotkey)
    lacks = tuple(field for field in FILLED_IN if field not in record)
    notes = []
    if _TIME in record and not plausible[0] <= record[_TIME] <= plausible[1]:
        notes.append(f"{_TIME} is not plausible")
    fields = data if isinstance(data, Mapping) else plain_container(data)
    if infinite := [_short(key) for key, value in dict(fields or ()).items() if _has_infinite(value)]:
        notes.append(f"not finite, and None: {', '.join(infinite)}")
    return Checked(record["hotkey"], encode(record), lacks, "; ".join(notes) or None)


def usual_hotkey(encoded: bytes, plausible: tuple[int, int]) -> str | None:
    """Return whose a record in msgpack is, which can be stored as it stands; None where it needs another look."""
    found = scan(encoded, _REQUIRED, _OPTIONAL) if len(encoded) <= MAX_RECORD_BYTES else None
    if found is None:
        return None
    hotkey, time_ms, _ = found
    size = len(hotkey) if hotkey.isascii() else len(hotkey.encode())
    is_usual = plausible[0] <= time_ms <= plausible[1] and 0 < size <= MAX_HOTKEY_BYTES
    return hotkey if is_usual else None


def plausible_times(since_ms: int = SINCE_2020_MS) -> tuple[int, int]:
    """Return the first and the last time that an elimination may have begun, in ms since 1970, UTC."""
    return since_ms, time.time_ns() // 1_000_000 + DAY_MS


def complete(checked: Checked, stored: bytes | msgspec.Raw | None) -> tuple[bytes, str | None]:
    """Fill in what a record lacks, from the `stored` one of its hotkey where there is one; with a note."""
    if not checked.lacks:
        return checked.record, checked.note
    known = {_REASON: UNKNOWN, _TIME: time.time_ns() // 1_000_000}
    if stored is not None:
        known |= decode(bytes(stored))
    record = decode(checked.record) | {field: known[field] for field in checked.lacks}
    note = f"filled in: {', '.join(checked.lacks)}"
    return encode(record), note if checked.note is None else f"{note}; {checked.note}"


def prepare(data: Mapping[str, Any], hotkey: str | None = None) -> tuple[str, bytes]:
    """Return hotkey and bytes of a record, complete; errors as of :func:`check_record`."""
    checked = check_record(data, hotkey)
    return checked.hotkey, complete(checked, None)[0]


def check_listed(records: Iterable[T]) -> Iterable[T]:
    """Return records, those of a proxy as a list; TypeError for what can be iterated over and yet lists none."""
    if not isinstance(records, Iterable):
        records = plain_container(records) or records  # type: ignore[unreachable]  # a proxy may stand for one
    if isinstance(records, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(records, Iterable):
        raise TypeError(f"eliminations must be a list of records, not {type(records).__name__}")
    return records


def check_hotkeys(hotkeys: Iterable[str]) -> list[str]:
    """Return hotkeys as a list without repetitions; ValueError or TypeError for one that cannot be a key."""
    if isinstance(hotkeys, (str, bytes, bytearray, memoryview)) or not isinstance(hotkeys, Iterable):
        raise TypeError(f"hotkeys must be a list or set of hotkeys, not {type(hotkeys).__name__}")
    listed = list(dict.fromkeys(hotkeys))
    for hotkey in listed:
        check_hotkey(hotkey)
    return listed


def generate_row(
    hotkey: str,
    current_dd: float | None,
    reason: str,
    t_ms: int | None = None,
    price_info: Mapping[str, Any] | None = None,
    return_info: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build an elimination record from its parts, stored as given; whoever stores it checks it.

    ``t_ms`` is in milliseconds since 1970, UTC; None means now.
    """
    return {
        "hotkey": hotkey,
        "dd": current_dd,
        "reason": reason.value if isinstance(reason, Enum) else reason,
        "elimination_initiated_time_ms": time.time_ns() // 1_000_000 if t_ms is None else t_ms,
        "price_info": dict(price_info) if price_info else {},
        "return_info": dict(return_info) if return_info else {},
    }


def differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two records differ, each with its old and its new value; None where it is absent.

    >>> differing({"dd": 10.0, "reason": "ZOMBIE"}, {"dd": 11.5, "reason": "ZOMBIE", "note": "seen"})
    {'dd': (10.0, 11.5), 'note': (None, 'seen')}
    """
    pairs = {field: (old.get(field), new.get(field)) for field in {**old, **new}}
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


_NUMBER_OR_NONE = {float, int, NoneType}
_DICT_OR_NONE = {dict, NoneType}
_FIELDS = (
    ("hotkey", {str}, "text"),
    (_REASON, {str}, "text"),
    (_TIME, {int}, "a whole number of milliseconds"),
    ("dd", _NUMBER_OR_NONE, "a number or None"),
    ("price_info", _DICT_OR_NONE, "a dict or None"),
    ("return_info", _DICT_OR_NONE, "a dict or None"),
)
# The same as kinds of values in msgpack.
_REQUIRED = ((b"hotkey", int(Kind.TEXT)), (_TIME.encode(), int(Kind.INTEGER)), (_REASON.encode(), int(Kind.TEXT)))
_OPTIONAL = (
    (b"dd", int(Kind.NOTHING | Kind.INTEGER | Kind.NUMBER)),
    (b"price_info", int(Kind.NOTHING | Kind.MAP)),
    (b"return_info", int(Kind.NOTHING | Kind.MAP)),
)


def _check_types(record: dict[str, Any]) -> None:
    """Hold the named fields of a plain record to their types; a float time becomes the int it is."""
    time_ms = record.get(_TIME)
    if type(time_ms) is float and time_ms.is_integer() and _MIN_INT <= time_ms <= _MAX_INT:
        record[_TIME] = int(time_ms)
    for field, kinds, wanted in _FIELDS:
        value = record.get(field)
        if type(value) not in kinds and (field in record or field not in FILLED_IN):
            whose = "" if field == "hotkey" else f" (hotkey {_short(record['hotkey'])})"
            given = f"{type(value).__name__} {_short(value)}"
            raise TypeError(f"record[{field!r}] must be {wanted}, not {given}{whose}")


def _plain_dict(data: Mapping[Any, Any], depth: int, room: list[int]) -> dict[str, Any]:
    """Copy a mapping. `room` is what is left of 1 MiB, each value counted with the least it can take encoded.

    The count ends the walk early where one list stands in another many times over: a few objects in memory
    can spell out more values than there are atoms.
    """
    _enter(len(data), depth, room)
    plain: dict[str, Any] = {}
    for key, value in data.items():
        if type(key) is not str or not key.isascii():
            if not isinstance(key, str):
                raise _NotStorableError(
                    f"the key {_short(key)} is of type {type(key).__name__}; keys must be text"
                )
            key = _plain_text(key)  # noqa: PLW2901 - the loop's own key, made plain
        kind = type(value)
        # The plain types first: they are nearly all there is.
        if (
            (kind is float and isfinite(value))
            or (kind is str and len(value) <= _SHOWN and value.isascii())
            or (kind is int and _MIN_INT <= value <= _MAX_INT)
            or value is None
            or kind is bool
        ):
            plain[key] = value
        else:
            plain[key] = _plain(value, depth, room)
    return plain


def _plain_list(values: list[Any] | tuple[Any, ...], depth: int, room: list[int]) -> list[Any]:
    _enter(len(values), depth, room)
    return [_plain(value, depth, room) for value in values]


def _enter(count: int, depth: int, room: list[int]) -> None:
    if depth > MAX_NESTING:
        raise ValueError(f"the record is nested more than {MAX_NESTING} levels deep (does it contain itself?)")
    _take(room, count)


def _path_to_culprit(value: Any) -> list[Any]:
    """Return the keys and indexes that lead to what cannot be stored; slow, which an error may be."""
    container = plain_container(value)
    for step, item in container.items() if isinstance(container, dict) else enumerate(container or ()):
        try:
            _plain(item, 1, [MAX_RECORD_BYTES])
        except _NotStorableError:
            return [step, *_path_to_culprit(item)]
    return []


def _plain(value: Any, depth: int, room: list[int]) -> Any:  # noqa: PLR0911 - one flat dispatch
    """Return the plain form of any one value, or raise for one that has none."""
    kind = type(value)
    if kind is float:
        return value if isfinite(value) else None
    if value is None or kind is bool:
        return value
    if isinstance(value, str):
        _take(room, len(value))
        return _plain_text(value)
    if kind is dict or isinstance(value, Mapping):
        return _plain_dict(value, depth + 1, room)
    if isinstance(value, (list, tuple)):
        return _plain_list(value, depth + 1, room)
    number = _plain_number(value)
    if number is not None:
        return number if isfinite(number) else None
    if isinstance(value, Enum) and isinstance(value.value, str):
        return _plain_text(value.value)
    container = plain_container(value)
    if container is not None:
        return _plain(container, depth, room)
    raise _NotStorableError(f"a value of type {kind.__module__}.{kind.__qualname__} has no JSON form")


def _plain_number(value: Any) -> float | None:
    """Return the Python number that a number is, numpy's scalars included; None for anything else."""
    if isinstance(value, float):
        return float(value)
    if not isinstance(value, int):
        numpy: Any = sys.modules.get("numpy")  # not imported for this: its scalars cannot come without it
        if not isinstance(value, getattr(numpy, "generic", ())):
            return None
        if isinstance(value, numpy.floating):
            return float(value)
        if isinstance(value, numpy.bool_):
            return bool(value)
        # numpy counts time spans among its integers; they are not numbers to us.
        if not isinstance(value, numpy.integer) or isinstance(value, numpy.timedelta64):
            return None
    number = int(value)
    if not _MIN_INT <= number <= _MAX_INT:
        raise _NotStorableError(f"{_short(number)} does not fit into 64 bits")
    return number


def _plain_text(value: str) -> str:
    text = value if type(value) is str else str.__str__(value)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise _NotStorableError(f"{_short(text)} is not valid Unicode text ({error.reason})") from None
    return text


def _take(room: list[int], count: int) -> None:
    room[0] -= count
    if room[0] < 0:
        raise ValueError(f"the record takes more than {MAX_RECORD_BYTES} bytes, the most that is allowed")


def _has_infinite(value: Any) -> bool:
    """Tell whether a value is, or holds, a number that is not finite; of what cannot be looked at it does not."""
    with suppress(Exception):
        if isinstance(value, Mapping):
            return any(map(_has_infinite, value.values()))
        if isinstance(value, (list, tuple)):
            return any(map(_has_infinite, value))
        return not isinstance(value, (str, int, bool, NoneType)) and not isfinite(value)
    return False


def _short(value: object) -> str:
    """Show a value in a message, cut to a bearable length and printable in any encoding."""
    try:
        shown = ascii(value) if not isinstance(value, str) or not value.isprintable() else repr(value)
    except Exception:  # a foreign object's own repr must not hide the error at hand
        shown = f"<{type(value).__name__}>"
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 1]}…"
