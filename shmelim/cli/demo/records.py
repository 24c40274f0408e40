"""The demo's records, made so that a reader can prove a torn record and a mixed snapshot.

Every record carries the ``stamp`` of the sync that wrote it, or that was the last one when it was added. A sync
writes all records anew with the next stamp, so one snapshot never holds two. Every record ends in a ``checksum``
over all its other fields, so parts of two records never make a whole one. And each sync eliminates either all of
the hotkeys of one camp and none of the other's, or the reverse, so that a batch of checks can be mixed too.
"""

from __future__ import annotations

import random
import zlib
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from shmelim.eliminations.record import EliminationReason

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_STEADY: Final = 120
_CAMP: Final = 60
_SINGLE: Final = 60
_SEED: Final = 2025
_FIRST_MS: Final = 1_738_000_000_000
_YEAR_MS: Final = 365 * 86_400_000
_PRICES: Final = {"BTC/USD": 97_000.0, "ETH/USD": 3_400.0, "SOL/USD": 190.0, "EUR/USD": 1.08, "USD/JPY": 149.0}
_REASONS: Final = [reason.value for reason in EliminationReason]


class Cast(NamedTuple):
    """Which hotkey plays which part.

    Attributes
    ----------
    steady
        Eliminated from the first sync to the end.
    even, odd
        The two camps: eliminated in syncs with an even stamp, or with an odd one.
    single
        Added, replaced and removed one at a time.
    first
        Eliminated as the first change of the second writer.
    never
        Never eliminated.

    """

    steady: list[str]
    even: list[str]
    odd: list[str]
    single: list[str]
    first: str
    never: list[str]

    @classmethod
    def of(cls, hotkeys: Sequence[str]) -> Cast:
        """Give each hotkey its part, the same ones every time."""
        rest = iter(random.Random(_SEED).sample(sorted(hotkeys), len(hotkeys)))  # noqa: S311 - parts, no secrets

        def take(count: int) -> list[str]:
            return [next(rest) for _ in range(count)]

        return cls(take(_STEADY), take(_CAMP), take(_CAMP), take(_SINGLE), next(rest), list(rest))


def real_departed_hotkeys() -> resources.abc.Traversable:
    """Return the list of departed hotkeys that comes with the package."""
    return resources.files("shmelim") / "data" / "default_departed_hotkeys.json"


def make_record(hotkey: str, stamp: int, serial: int) -> dict[str, Any]:
    """Return a hotkey's record, the same for the same arguments, another in many fields for others.

    Parameters
    ----------
    hotkey
        Decides reason and time.
    stamp
        The sync that it belongs to.
    serial
        The change that wrote it.

    """
    own = random.Random(f"{_SEED} {hotkey}")  # noqa: S311 - plausible figures, no secrets
    reason = own.choice(_REASONS)
    at_ms = _FIRST_MS + own.randrange(_YEAR_MS)
    pairs = own.sample(sorted(_PRICES), own.randint(1, len(_PRICES)))
    moving = random.Random(serial)  # noqa: S311
    return seal(
        {
            "hotkey": hotkey,
            "dd": None if reason == EliminationReason.ZOMBIE.value else round(moving.uniform(0.02, 0.3), 4),
            "reason": reason,
            "elimination_initiated_time_ms": at_ms,
            "price_info": {pair: round(_PRICES[pair] * moving.uniform(0.9, 1.1), 5) for pair in pairs},
            "return_info": {
                "return": round(moving.uniform(0.7, 1.1), 6),
                "n_positions": moving.randint(1, 400),
                "omega": round(moving.uniform(0.1, 3.0), 4),
            },
            "stamp": stamp,
            "serial": serial,
        }
    )


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with the checksum over all its other fields."""
    return {**record, "checksum": _checksum(record)}


def is_whole(record: dict[str, Any]) -> bool:
    """Tell whether a record is one that was sealed, and not parts of several."""
    others = {field: value for field, value in record.items() if field != "checksum"}
    return record.get("checksum") == _checksum(others)


def are_mixed(records: Iterable[dict[str, Any]]) -> bool:
    """Tell whether records that were read as one state are of more than one."""
    return len({record.get("stamp") for record in records}) > 1


def are_halves_mixed(even: Sequence[bool], odd: Sequence[bool]) -> bool:
    """Tell whether the answers for the two camps, read as one state, are of more than one."""
    return not ((all(even) and not any(odd)) or (all(odd) and not any(even)))


def _checksum(fields: dict[str, Any]) -> int:
    return zlib.crc32(msgspec.msgpack.encode(fields, order="sorted"))
