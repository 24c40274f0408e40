"""SPEC 2: what an elimination record is, what of it is required, and what is refused."""

import json
import multiprocessing
from collections import UserDict, UserList
from enum import Enum
from types import MappingProxyType

import numpy as np
import pytest
from contract_validator import DAY, START, row

from shmelim import DEPARTED_HOTKEYS_KEY, EliminationReason, ValidatorEnvironment


def without(hotkey, *fields):
    return {field: value for field, value in row(hotkey).items() if field not in fields}


def last_event(manager):
    return manager._server_proxy.get_history_rpc(limit=1)[0]


@pytest.fixture
def unchanged(manager):
    """Whatever the test has refused must have changed nothing."""
    manager.sync_eliminations([row("kept")])
    events = manager._server_proxy.get_history_rpc(limit=1)
    yield
    assert manager.eliminations == {"kept": row("kept")}
    assert manager._server_proxy.get_history_rpc(limit=1) == events


# ---------------------------------------------------------------------- fields


@pytest.mark.parametrize(
    "fields",
    [
        {"dd": 10.5},
        {"dd": 0.105},
        {"dd": None},
        {"reason": "whatever the validator says"},
        {"price_info": {"BTC/USD": 1.5}},
        {"price_info": {"BTCUSD": [1.5, START], "BTCUSD_prev": [1.4, START - 1]}},
        {"price_info": {}, "return_info": {}},
        {"return_info": {"deep": {"list": [1, 2.5, None, True, "text"]}}},
        {"further": {"deep": [1, {"x": -0.5}]}, "another": None, "a_third": [2**63, -(2**63)]},
    ],
    ids=str,
)
def test_a_record_is_stored_as_given(manager, fields):
    given = row("a", **fields)
    assert manager.add_elimination("a", given) is True
    found = manager.get_elimination("a")
    assert found == given
    assert list(found) == list(given), "the order of the keys, too"
    assert json.loads(json.dumps(found)) == given


def test_price_info_with_tuples_as_the_field_writes_it(manager):
    manager.add_elimination("a", row("a", price_info={"BTCUSD": (1.5, START), "BTCUSD_prev": (1.4, START)}))
    stored = manager.get_elimination("a")["price_info"]
    assert {pair: tuple(found) for pair, found in stored.items()} == {
        "BTCUSD": (1.5, START),
        "BTCUSD_prev": (1.4, START),
    }


def test_the_reasons_and_the_key_of_departures():
    assert {reason.name: reason.value for reason in EliminationReason} == {
        name: name
        for name in (
            "ZOMBIE", "PLAGIARISM", "MAX_TOTAL_DRAWDOWN", "FAILED_CHALLENGE_PERIOD_TIME",
            "FAILED_CHALLENGE_PERIOD_DRAWDOWN", "LIQUIDATED",
        )
    }  # fmt: skip
    assert DEPARTED_HOTKEYS_KEY == "departed_hotkeys"


@pytest.mark.parametrize("reason", EliminationReason)
def test_a_reason_may_be_the_enum_and_is_stored_as_its_value(manager, reason):
    manager.add_elimination("a", row("a", reason=reason))
    assert manager.get_elimination("a")["reason"] == reason.value
    assert not isinstance(manager.get_elimination("a")["reason"], Enum)


# ---------------------------------------------------------------------- only the hotkey is required


def test_a_missing_reason_is_stored_as_unknown(manager):
    manager.add_elimination("a", without("a", "reason"))
    assert manager.get_elimination("a")["reason"] == "UNKNOWN"


def test_a_missing_time_is_the_time_of_receipt(manager):
    manager.add_elimination("a", without("a", "elimination_initiated_time_ms"))
    at_ms = manager.get_elimination("a")["elimination_initiated_time_ms"]
    assert abs(at_ms - manager._server_proxy.health_check_rpc()["timestamp_ms"]) < DAY


def test_a_sync_of_bare_hotkeys_loses_none(manager):
    manager.sync_eliminations([{"hotkey": "a"}, {"hotkey": "b"}])
    assert list(manager.eliminations) == ["a", "b"]


def test_a_filled_in_field_keeps_its_value_while_rows_lack_it(manager):
    rows = [without("a", "reason", "elimination_initiated_time_ms")]
    manager.sync_eliminations(rows)
    before, event = manager.eliminations, last_event(manager)
    manager.sync_eliminations(rows)
    assert (manager.eliminations, last_event(manager)) == (before, event)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_float_that_is_not_finite_is_stored_as_none(manager, value):
    manager.add_elimination("a", row("a", dd=value, return_info={"x": [value]}))
    found = manager.get_elimination("a")
    assert (found["dd"], found["return_info"]) == (None, {"x": [None]})


def test_the_event_notes_what_was_filled_in(manager):
    manager.add_elimination("a", without("a", "reason"))
    assert "reason" in last_event(manager)["note"]


def test_one_warning_a_call_says_so(make, caplog):
    make("direct").sync_eliminations([without(hotkey, "reason") for hotkey in "abc"])
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


@pytest.mark.parametrize("at_ms", [0, 5, START // 1000, START + 10_000 * DAY])
def test_a_time_that_is_not_plausible_is_kept(manager, at_ms):
    manager.add_elimination("a", row("a", elimination_initiated_time_ms=at_ms))
    assert manager.get_elimination("a")["elimination_initiated_time_ms"] == at_ms


@pytest.mark.parametrize("at_ms", [5, START + 10_000 * DAY])
def test_a_time_that_is_not_plausible_is_noted(manager, at_ms):
    manager.add_elimination("a", row("a", elimination_initiated_time_ms=at_ms))
    assert "elimination_initiated_time_ms" in (last_event(manager)["note"] or "")


def test_a_time_that_is_not_plausible_deletes_nothing(validate):
    validator = validate("direct")
    validator.register("a", "b")
    validator.tick()
    validator.manager.add_elimination("a", row("a", elimination_initiated_time_ms=5))
    validator.open("a")
    validator.leave("a")
    validator.tick()
    assert "a" in validator.reasons
    assert validator.positions.book["a"]


def test_a_time_that_is_not_plausible_closes_nothing_at_that_time(validate):
    validator = validate("direct")
    validator.register("a")
    validator.open("a")
    later = validator.now_ms + 400 * DAY
    validator.liquidate("a", elimination_initiated_time_ms=later)
    validator.tick()
    (position,) = validator.positions.get_positions_for_one_hotkey("a")
    assert position.is_closed_position
    assert position.orders[-1].processed_ms < later


def test_what_is_plausible_is_the_environments():
    assert ValidatorEnvironment(plausible_since_ms=5).plausible_since_ms == 5
    assert ValidatorEnvironment().plausible_since_ms == 1_577_836_800_000


# ---------------------------------------------------------------------- what is refused


@pytest.mark.usefixtures("unchanged")
class TestRefused:
    def test_a_record_without_a_hotkey(self, manager):
        for call in (
            lambda: manager.sync_eliminations([row("a"), without("b", "hotkey")]),
            lambda: manager.write_eliminations_to_disk([without("b", "hotkey")]),
        ):
            with pytest.raises(ValueError, match="hotkey"):
                call()

    def test_a_record_of_another_hotkey(self, manager):
        with pytest.raises(ValueError, match="'b'"):
            manager.add_elimination("a", row("b"))

    @pytest.mark.parametrize("value", [object, {1, 2}, b"bytes", 2**64, {5: "x"}, "\ud800", 1j], ids=ascii)
    def test_a_value_that_cannot_be_stored_by_the_path_of_it(self, manager, value):
        with pytest.raises(TypeError, match="deep"):
            manager.add_elimination("a", row("a", deep={"list": [1, value]}))

    @pytest.mark.parametrize("data", [None, [], "text", 5])
    def test_what_is_not_a_record_at_all(self, manager, data):
        with pytest.raises(TypeError):
            manager.add_elimination("a", data)

    def test_a_record_over_1_mib(self, manager):
        with pytest.raises(ValueError, match="1048576"):
            manager.add_elimination("a", row("a", pad="x" * (1 << 20)))

    @pytest.mark.parametrize("place", [0, 1, 2])
    def test_a_list_with_one_bad_record_as_a_whole(self, manager, place):
        rows = [row("a"), row("b")]
        rows.insert(place, row("c", bad=object()))
        for call in (manager.sync_eliminations, manager.write_eliminations_to_disk):
            with pytest.raises(TypeError, match="bad"):
                call(rows)

    def test_a_long_list_with_one_bad_record_at_its_end_as_a_whole(self, manager):
        with pytest.raises(TypeError, match="bad"):
            manager.sync_eliminations([*(row(f"h{n}") for n in range(4100)), row("c", bad=object())])

    @pytest.mark.parametrize("rows", ["", "ab", b"ab", {}, None, 5, ["a"]], ids=repr)
    def test_what_is_not_a_list_of_records(self, manager, rows):
        with pytest.raises(TypeError):
            manager.sync_eliminations(rows)
        with pytest.raises(TypeError):
            manager.write_eliminations_to_disk(rows)


def test_almost_1_mib_is_taken(manager):
    large = row("a", pad="x" * ((1 << 20) - 500))
    manager.add_elimination("a", large)
    assert manager.get_elimination("a") == large


# ---------------------------------------------------------------------- what stands for plain values


@pytest.mark.parametrize(
    ("value", "stored"),
    [
        (np.float64(0.25), 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.uint8(7), 7),
        (np.bool_(True), True),  # noqa: FBT003
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_numpy_scalar_is_stored_as_the_python_number_it_is(manager, value, stored):
    manager.add_elimination("a", row("a", further=[value]))
    (found,) = manager.get_elimination("a")["further"]
    assert (found, type(found)) == (stored, type(stored))


def test_a_numpy_time_and_drawdown(manager):
    manager.add_elimination("a", row("a", dd=np.float64(0.5), elimination_initiated_time_ms=np.int64(START)))
    found = manager.get_elimination("a")
    assert (found["dd"], found["elimination_initiated_time_ms"]) == (0.5, START)


@pytest.fixture(scope="module")
def elsewhere():
    """A manager of multiprocessing, for its proxies."""
    with multiprocessing.get_context("spawn").Manager() as manager:
        yield manager


@pytest.mark.parametrize("kind", [MappingProxyType, UserDict, "dict"])
@pytest.mark.parametrize("how", ["add", "sync", "inside"])
def test_any_mapping_is_taken(manager, elsewhere, kind, how):
    make = elsewhere.dict if kind == "dict" else kind
    if how == "add":
        manager.add_elimination("a", make(row("a")))
    elif how == "sync":
        manager.sync_eliminations([make(row("a"))])
    else:
        manager.add_elimination("a", row("a", price_info=make(row("a")["price_info"])))
    assert manager.eliminations == {"a": row("a")}


@pytest.mark.parametrize("kind", [tuple, iter, UserList])
def test_any_sequence_of_records_is_taken(manager, kind):
    manager.sync_eliminations(kind([row("a"), row("b")]))
    assert list(manager.eliminations) == ["a", "b"]


def test_a_proxy_of_a_list_is_taken(manager, elsewhere):
    manager.sync_eliminations(elsewhere.list([row("a"), row("b")]))
    assert list(manager.eliminations) == ["a", "b"]


@pytest.mark.parametrize("kind", ["UserList", "list"])
def test_any_sequence_in_a_record_is_taken(manager, elsewhere, kind):
    make = UserList if kind == "UserList" else elsewhere.list
    manager.add_elimination("a", row("a", further=make([1, 2])))
    assert manager.get_elimination("a")["further"] == [1, 2]


def test_what_was_given_stays_the_callers(manager):
    given = row("a", further=(1, 2), reason=EliminationReason.ZOMBIE)
    manager.add_elimination("a", given)
    assert given == row("a", further=(1, 2), reason=EliminationReason.ZOMBIE)
    given["return_info"].clear()
    assert manager.get_elimination("a")["return_info"] == {"n": 0}
