"""Making a record of what a rule found, whatever stands in it: no elimination is lost for a side field.

What callers hand in is refused where it cannot be stored, so that they hear of it; what a ledger or a challenge
reason carries is beyond their reach, and the miner is eliminated all the same. So each field is stored as far as
it can be, and what was changed is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from typing import Any, Final

import msgspec

from shmelim.eliminations.record import (
    FILLED_IN,
    MAX_HOTKEY_BYTES,
    MAX_NESTING,
    MAX_RECORD_BYTES,
    UNKNOWN,
    check_hotkey,
    encode,
    normalise,
)
from shmelim.system.containers import plain_container
from shmelim.system.text import printable

_REASON, _TIME = FILLED_IN
_NAMED: Final = frozenset({"hotkey", "dd", "price_info", "return_info", *FILLED_IN})
_MOST_FIELDS: Final = 10_000  # so many fit without their values, those with long names left out
_LONG: Final = 48  # bytes of a name
_HEADER: Final = 5  # bytes before a text
_SMALL: Final = MAX_RECORD_BYTES >> 4  # such a value of a field that has a meaning stays
_SHOWN: Final = 60  # characters of a name


def salvage(data: Any, now_ms: int) -> tuple[dict[str, Any], list[str]]:
    """Return the record that `data` is, with what had to be changed so that it can be stored, in words.

    A reason that is missing becomes ``UNKNOWN``, a time that is none `now_ms` (ms since 1970, UTC); other values
    that have no stored form become None, or are left out where the record would be too large. ValueError or
    TypeError where it is not a mapping with a valid hotkey.
    """
    try:
        record = normalise(data)
        encode(record)
    except Exception:  # a stranger's object may raise anything where it is looked at
        return _pieced_together(data, now_ms)
    return (record, []) if record.keys() >= set(FILLED_IN) else _pieced_together(data, now_ms)


def _pieced_together(data: Any, now_ms: int) -> tuple[dict[str, Any], list[str]]:
    fields = data if isinstance(data, Mapping) else plain_container(data)
    if not isinstance(fields, Mapping):
        raise TypeError(f"an elimination record must be a dict, not {type(data).__name__}")
    hotkey = fields.get("hotkey")
    check_hotkey(hotkey)  # type: ignore[arg-type]  # which refuses what is not text
    record: dict[str, Any] = normalise({"hotkey": hotkey})  # which makes plain text of it
    notes: list[str] = []
    left_out = 0
    for key, value in fields.items():
        name = _name(key)
        if name == "hotkey":
            continue
        if len(record) >= _MOST_FIELDS and name not in _NAMED:
            left_out += 1
            continue
        if isinstance(key, str) and name != key:
            notes.append(f"the name {name:.{_SHOWN}} was changed")
        kept, whole = _kept(name, value)
        if not whole:
            became = "dropped" if kept is None else "changed"
            notes.append(f"{name:.{_SHOWN}}, {_named(value)}, was {became}")
        record[name] = kept
    if left_out:
        notes.append(f"{left_out} fields after the first {_MOST_FIELDS} were left out")
    if record.get(_REASON) is None:
        record[_REASON] = UNKNOWN
        notes.append(f"{_REASON}: {UNKNOWN}")
    if record.get(_TIME) is None:
        record[_TIME] = now_ms
        notes.append(f"{_TIME}: the present time")
    _make_fit(record, notes)
    return normalise(record), notes


def _kept(name: str, value: Any) -> tuple[Any, bool]:
    """Return what can be stored of a field, None where that is nothing, and whether it is all of it."""
    for whole in (True, False):
        try:
            form = value if whole else round(value) if name == _TIME else _converted(value)
            return normalise({"hotkey": "-", name: form})[name], whole
        except Exception:  # noqa: S112 - a stranger's object may raise anything where it is looked at
            continue
    return None, value is None


def _name(key: Any) -> str:
    """Return the name under which a field is stored, escaped where it is no text that can be."""
    try:
        name = str(key)
        name.encode()
    except UnicodeEncodeError:
        return printable(name)
    except Exception:  # its own str
        return type(key).__name__
    return name


def _named(value: Any) -> str:
    try:
        return f"{type(value).__name__} {value!r:.60}"
    except Exception:  # its own repr
        return type(value).__name__


def _converted(value: Any, depth: int = 0) -> Any:
    """Return a value in which each part that has no stored form is the nearest that has one, or None."""
    if depth > MAX_NESTING:
        return None
    if value is None or isinstance(value, (str, bool, float)):
        return value
    if isinstance(value, (Decimal, Fraction, int)):
        return value if isinstance(value, int) and -(1 << 63) <= value < 1 << 64 else float(value)
    if isinstance(value, Enum):
        return _converted(value.value, depth + 1)
    container = value if isinstance(value, (Mapping, list, tuple, set, frozenset)) else plain_container(value)
    if isinstance(container, Mapping):
        return {_name(key): _stored(item, depth) for key, item in container.items()}
    return value if container is None else [_stored(item, depth) for item in container]


def _stored(value: Any, depth: int) -> Any:
    """Return a converted value, or None where it still has no stored form."""
    try:
        converted = _converted(value, depth + 1)
        normalise({"hotkey": "-", "value": converted})
    except Exception:
        return None
    return converted


def _make_fit(record: dict[str, Any], notes: list[str]) -> None:
    """Leave out the largest fields until the record is not too large: the value, or all where the name is long."""
    sizes = {name: (len(name.encode()) + _HEADER, len(msgspec.msgpack.encode(record[name]))) for name in record}
    total = sum(map(sum, sizes.values())) + 2 * MAX_HOTKEY_BYTES
    for name in sorted(sizes, key=lambda name: sum(sizes[name]), reverse=True):
        of_name, of_value = sizes[name]
        if total <= MAX_RECORD_BYTES:
            return
        if name in _NAMED and of_value <= _SMALL:
            continue
        total -= of_value
        if of_name > _LONG:
            total -= of_name
            del record[name]
        else:
            record[name] = UNKNOWN if name == _REASON else None
        notes.append(f"{name:.{_SHOWN}}, of {max(of_name, of_value)} bytes, was too large")
