"""No elimination is lost for a side field: what is kept of a row, and what is said of the rest."""

from __future__ import annotations

from decimal import Decimal
from enum import Enum
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from shmelim.eliminations.record import MAX_RECORD_BYTES, encode
from shmelim.eliminations.salvage import salvage

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = 1_700_000_000_000
WHOLE = {
    "hotkey": "a",
    "dd": 0.5,
    "reason": "LIQUIDATED",
    "elimination_initiated_time_ms": NOW - 5,
    "price_info": {"BTCUSD": (1.5, NOW)},
    "return_info": {},
}


class Hostile:
    """Raises whatever is asked of it."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __repr__(self) -> str:
        raise RuntimeError

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    def __hash__(self) -> int:
        raise RuntimeError


class Unnamed:
    def __str__(self) -> str:
        raise RuntimeError


class Kind(Enum):
    NUMBER = 5


def test_what_can_be_stored_is_kept_as_it_is() -> None:
    record, notes = salvage(MappingProxyType(WHOLE), NOW)
    assert record == WHOLE | {"price_info": {"BTCUSD": [1.5, NOW]}}
    assert notes == []


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [  # ids of their own: some values raise when they are looked at
        pytest.param(*case, id=f"{number} {case[0]}")
        for number, case in enumerate(
            [
                ("dd", Decimal("0.25"), 0.25),
                ("dd", Fraction(1, 4), 0.25),
                ("dd", "much", None),
                ("dd", object(), None),
                ("dd", Hostile(), None),
                ("dd", [0.1], None),
                ("reason", None, "UNKNOWN"),
                ("reason", 5, "UNKNOWN"),
                ("reason", Hostile(), "UNKNOWN"),
                ("reason", "\ud800", "UNKNOWN"),
                ("elimination_initiated_time_ms", NOW + 0.5, NOW),
                ("elimination_initiated_time_ms", Decimal(NOW), NOW),
                ("elimination_initiated_time_ms", None, NOW),
                ("elimination_initiated_time_ms", float("nan"), NOW),
                ("elimination_initiated_time_ms", float("inf"), NOW),
                ("elimination_initiated_time_ms", "yesterday", NOW),
                ("elimination_initiated_time_ms", Hostile(), NOW),
                ("price_info", {"BTC/USD": Decimal("1.5"), 7: 1.5}, {"BTC/USD": 1.5, "7": 1.5}),
                ("price_info", {"BTC/USD": (Decimal("1.5"), NOW)}, {"BTC/USD": [1.5, NOW]}),
                ("price_info", [1], None),
                ("price_info", {"BTC/USD": Hostile(), "ETH/USD": 2.0}, {"BTC/USD": None, "ETH/USD": 2.0}),
                ("price_info", {"BTC/USD": "x" * (2 << 20)}, {"BTC/USD": None}),
                ("return_info", {"all": {1, 2}}, {"all": [1, 2]}),
                ("return_info", {"x": 1 << 70}, {"x": float(1 << 70)}),
                ("return_info", {"x": Kind.NUMBER}, {"x": 5}),
                ("return_info", {"x": np.array([1.5])}, {"x": None}),
                ("own", np.float32(0.5), 0.5),
            ]
        )
    ],
)
def test_of_anything_else_the_nearest_that_can_be_stored_is_kept(field: str, value: Any, kept: Any) -> None:
    record, notes = salvage(WHOLE | {field: value}, NOW)
    assert record == WHOLE | {"price_info": {"BTCUSD": [1.5, NOW]}} | {field: kept}
    assert (notes != []) == (field != "own")
    assert all(field in note for note in notes)
    encode(record)


def test_values_that_contain_themselves_end_somewhere() -> None:
    endless: list[Any] = []
    endless.append(endless)
    record, _ = salvage(WHOLE | {"return_info": {"x": endless}}, NOW)
    assert record["hotkey"] == "a"
    encode(record)


@pytest.mark.parametrize("count", [2, 40])
def test_of_a_record_that_is_too_large_the_largest_fields_go(count: int) -> None:
    fields = {f"field {number}": "x" * (1 << 19) for number in range(count)}
    record, notes = salvage(WHOLE | fields | {"reason": "PLAGIARISM"}, NOW)
    assert len(encode(record)) <= MAX_RECORD_BYTES
    assert record["reason"] == "PLAGIARISM"
    assert sum(record[name] is not None for name in fields) == 1
    assert len(notes) == count - 1


@pytest.mark.parametrize(
    "fields",
    [
        lambda: {"k" * 2_000_000: 1},
        lambda: {f"{number:07}" * 20: number for number in range(10_000)},
        lambda: {f"{number:07}": number for number in range(200_000)},
        lambda: {f"{number:07}": "x" * 20 for number in range(200_000)},
        lambda: {f"{number:07}": None for number in range(MAX_RECORD_BYTES + 1)},
    ],
    ids=["a long name", "long names", "many numbers", "many texts", "more fields than bytes"],
)
def test_names_that_are_too_large_go_with_their_fields(fields: Callable[[], dict[str, Any]]) -> None:
    record, notes = salvage(WHOLE | fields(), NOW)
    assert len(encode(record)) <= MAX_RECORD_BYTES
    assert {name: record[name] for name in WHOLE} == WHOLE | {"price_info": {"BTCUSD": [1.5, NOW]}}
    assert max(map(len, notes)) < 200


def test_a_reason_that_is_too_large_goes_too() -> None:
    record, _ = salvage({"hotkey": "a", "reason": "x" * MAX_RECORD_BYTES}, NOW)
    assert (record["reason"], record["elimination_initiated_time_ms"]) == ("UNKNOWN", NOW)


@pytest.mark.parametrize(
    "row", [None, 5, "a", [], {}, {"reason": "x"}, {"hotkey": ""}, {"hotkey": b"a"}, {"hotkey": "x" * 256}]
)
def test_a_row_that_names_no_miner_is_refused(row: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        salvage(row, NOW)


def test_a_name_that_cannot_be_stored_costs_the_name_alone() -> None:
    record, notes = salvage(WHOLE | {"a\ud800": 1, "price_info": {"\udfff": 2}}, NOW)
    assert {key: record[key] for key in WHOLE} == WHOLE | {"price_info": {"\\udfff": 2}}
    assert record["a\\ud800"] == 1
    assert any("a\\ud800" in note for note in notes)
    assert salvage(WHOLE | {Unnamed(): 4}, NOW)[0]["Unnamed"] == 4
