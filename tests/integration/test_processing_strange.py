"""Collaborators that hand in what nobody expects, answer with coroutines, or call back into the manager."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Sequence
from decimal import Decimal
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from crashing import call
from reference_validator import Managed

from shmelim.eliminations.rules import deadlines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MINERS = ("a", "b", "c")


@pytest.fixture(params=["direct", "rpc"])
def managed(request: pytest.FixtureRequest, new_name: Callable[[], str], tmp_path: Path) -> Iterator[Managed]:
    with Managed(request.param, new_name(), tmp_path, call_deadline_s=2) as made:
        made.validator.register(*MINERS)
        yield made


@pytest.fixture
def directly(new_name: Callable[[], str], tmp_path: Path) -> Iterator[Managed]:
    with Managed("direct", new_name(), tmp_path) as made:
        made.validator.register(*MINERS)
        yield made


class Unreadable(Sequence[Any]):
    """It raises wherever it is looked at."""

    def __len__(self) -> int:
        raise ConnectionRefusedError("its process is gone")

    def __getitem__(self, _: Any) -> Any:
        raise ConnectionRefusedError("its process is gone")

    def __str__(self) -> str:
        raise ConnectionRefusedError("its process is gone")

    __repr__ = __str__


class UnreadableRow:
    @property
    def get(self) -> Any:
        raise ConnectionRefusedError("its process is gone")


class Unhashable(str):
    """Text that is no key."""

    __slots__ = ()

    def __hash__(self) -> int:
        raise TypeError("unhashable")


# ---------------------------------------------------------------------- one miner's odd value


@pytest.mark.parametrize(
    "why",
    [Unreadable(), np.array(["PLAGIARISM", 0.2]), {"reason": "PLAGIARISM"}, object(), (float("nan"),), (), None],
    ids=type,
)
def test_a_challenge_reason_that_nobody_understands_eliminates_all_the_same(directly: Managed, why: Any) -> None:
    directly.validator.probation.failed = {"a": ("PLAGIARISM", 0.1), "b": why, "c": ("PLAGIARISM", 0.1)}
    directly.tick()
    assert directly.reasons.keys() == set(MINERS)
    directly.validator.probation.failed = {"b": why}
    directly.manager.process_eliminations()
    assert directly.validator.probation.failed == {}, "and is forgotten"


@pytest.mark.parametrize("key", [5, b"b", None, "", "x" * 300, "\ud800"], ids=ascii)
def test_a_challenge_reason_of_nobody_keeps_nobody_from_being_eliminated(directly: Managed, key: Any) -> None:
    why = ("PLAGIARISM", 0.1)
    directly.manager.challengeperiod_manager.get_all_elimination_reasons = lambda: {"a": why, key: why, "c": why}
    directly.manager.challengeperiod_manager.has_elimination_reasons = lambda: True
    directly.tick()
    assert directly.reasons.keys() == {"a", "c"}
    assert any("challenge-period elimination" in text for text in directly.alerts)


@pytest.mark.parametrize("row", [UnreadableRow(), {"hotkey": 5}, 7, None], ids=type)
def test_a_row_that_cannot_be_read_is_passed_over_and_told(directly: Managed, row: Any) -> None:
    ledgers: Any = directly.manager.position_manager.perf_ledger_manager
    ledgers.get_perf_ledger_eliminations = lambda: [{"hotkey": "a"}, row, {"hotkey": "c"}]
    directly.tick()
    assert directly.reasons.keys() == {"a", "c"}
    assert any("number 1 of the list" in text for text in directly.alerts)


def test_a_hotkey_may_be_text_of_another_class(directly: Managed) -> None:
    ledgers: Any = directly.manager.position_manager.perf_ledger_manager
    ledgers.get_perf_ledger_eliminations = lambda: [{"hotkey": Unhashable("a")}, {"hotkey": np.str_("b")}]
    directly.tick()
    assert directly.reasons.keys() == {"a", "b"}


@pytest.mark.parametrize("entry", [5, b"b", None, "", object(), Unreadable()], ids=type)
def test_an_entry_of_the_bucket_that_is_not_a_hotkey_is_told_and_the_others_are_judged(
    directly: Managed, entry: Any
) -> None:
    for hotkey in MINERS:
        directly.validator.lose(hotkey, 0.2)
    listed = [Unhashable("a"), entry, "c"]
    directly.manager.challengeperiod_manager.get_hotkeys_by_bucket = lambda _: listed
    directly.tick()
    assert directly.reasons.keys() == {"a", "c"}
    assert any("the scored bucket holds what is not a hotkey" in text for text in directly.alerts)


@pytest.mark.parametrize(
    ("judged", "eliminated"),
    [
        ((True, float("nan")), True),
        ((np.True_, Decimal(20)), True),
        ((True, 10**400), True),
        ((True, "20"), True),
        (True, False),
        ((True,), False),
        (None, False),
        ((np.array([True, False]), 1.0), False),
    ],
    ids=repr,
)
def test_an_odd_judgement_is_that_miners_alone(directly: Managed, judged: Any, eliminated: bool) -> None:
    for hotkey in MINERS:
        directly.validator.lose(hotkey, 0.2 if hotkey != "b" else 0.3)
    rule = directly.environment._drawdown
    directly.environment._drawdown = lambda ledger: judged if ledger.drawdown() == 0.3 else rule(ledger)
    directly.tick()
    assert directly.reasons.keys() == {"a", "c"} | ({"b"} if eliminated else set())
    assert bool(directly.alerts) is not eliminated


# ---------------------------------------------------------------------- what is said to be done, and is not


def test_a_position_that_is_listed_as_open_and_not_found_is_not_settled(managed: Managed) -> None:
    validator, positions = managed.validator, managed.collaborators.position_manager
    validator.open_position("a")
    validator.lose("a", 0.2)
    by_uuid = positions.get_miner_position_by_uuid
    positions.get_miner_position_by_uuid = lambda *_: None
    managed.tick()
    assert [debt["kind"] for debt in managed.debts] == ["positions"]
    assert any("listed as open" in text for text in managed.alerts)
    positions.get_miner_position_by_uuid = by_uuid
    managed.tick()
    assert validator.is_flat("a")
    assert managed.debts == []


def test_a_position_that_went_meanwhile_is_settled(managed: Managed) -> None:
    validator, positions = managed.validator, managed.collaborators.position_manager
    holding = validator.open_position("a")
    validator.lose("a", 0.2)
    by_uuid = positions.get_miner_position_by_uuid

    def gone(hotkey: str, uuid: str) -> Any:
        validator.book.drop(holding)
        return by_uuid(hotkey, uuid)

    positions.get_miner_position_by_uuid = gone
    managed.tick()
    assert (managed.debts, managed.alerts) == ([], [])


def test_a_queue_of_asyncio_is_told_nothing_and_people_are(directly: Managed) -> None:
    directly.validator.open_position("a")
    directly.validator.lose("a", 0.2)
    directly.manager.shared_queue_websockets = asyncio.Queue()
    directly.tick()
    assert any("put answered with a coroutine" in text for text in directly.alerts)
    assert directly.debts == []


@pytest.mark.parametrize("method", ["clear_elimination_reasons", "pop_elimination_reasons"])
def test_reasons_that_nobody_forgets_are_told(directly: Managed, method: str) -> None:
    async def forget(*_: Any) -> None:
        raise AssertionError("nobody runs it")

    directly.validator.probation.fail("a", "PLAGIARISM", 0.1)
    setattr(directly.manager.challengeperiod_manager, method, forget)
    directly.tick()
    assert any(f"{method} answered with a coroutine" in text for text in directly.alerts)
    assert directly.reasons == {"a": "PLAGIARISM"}


# ---------------------------------------------------------------------- a fork in mid-tick


def reasons_after_a_tick(managed: Managed) -> tuple[dict[str, str], bool]:
    managed.tick()
    return managed.reasons, managed.validator.is_flat("b")


@pytest.mark.parametrize("hangs", ["the ledger", "a lock of our own"])
def test_what_hangs_in_a_parent_does_not_in_its_forked_child(
    new_name: Callable[[], str], tmp_path: Path, gate: threading.Event, hangs: str
) -> None:
    parent = os.getpid()
    with Managed("rpc", new_name(), tmp_path, call_deadline_s=0.3) as managed:
        validator, judge = managed.validator, managed.environment._drawdown
        managed.manager.position_locks = None
        validator.register(*MINERS)
        validator.open_position("b")
        validator.lose("b", 0.2)

        def wait() -> None:
            if os.getpid() == parent:
                gate.wait()

        def judge_slowly(ledger: Any) -> Any:
            if ledger.drawdown() == 0.2:
                wait()
            return judge(ledger)

        if hangs == "the ledger":
            managed.environment._drawdown = judge_slowly
        else:
            validator.faults.at("holding", wait, times=None)
        managed.tick()
        assert (managed.reasons == {}) == (hangs == "the ledger")
        assert deadlines.left_behind()
        assert call(lambda: reasons_after_a_tick(managed)) == ({"b": "MAX_TOTAL_DRAWDOWN"}, True)


# ---------------------------------------------------------------------- calling back

POINTS = ["registry", "all failed", "ledgers", "cancel", "holdings", "holding", "price", "store", "store!", "slash", "slash!", "websockets", "slack"]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("point", POINTS)
def test_a_tick_within_a_tick_is_left_to_that_one(managed: Managed, point: str) -> None:
    validator, manager = managed.validator, managed.manager
    manager.position_locks = None
    for hotkey in ("a", "b"):
        validator.open_position(hotkey)
        validator.lose(hotkey, 0.2)

    def call_back() -> None:
        manager.process_eliminations()
        manager.handle_mdd_eliminations()

    if point == "slack":
        validator.faults.fail("cancel")
    validator.faults.at(point, call_back)
    for _ in range(2):
        managed.tick()
    assert sorted(validator.collateral.slashes()) == ["a", "b"]
    for hotkey in ("a", "b"):
        assert [len(holding.trades) for holding in validator.book.on_disk(hotkey)] == [2]
    assert managed.debts == []


@pytest.mark.parametrize("point", ["cancel", "store", "slash", "slash!"])
@pytest.mark.parametrize("what", ["remove", "delete", "clear", "sync", "end", "no contract", "close"])
def test_what_calls_back_doubles_and_loses_nothing(managed: Managed, what: str, point: str) -> None:
    validator, manager = managed.validator, managed.manager
    manager.position_locks = None
    contract = manager.contract_manager
    for hotkey in ("a", "b"):
        validator.open_position(hotkey)
        validator.limit_orders.place(hotkey)
        validator.lose(hotkey, 0.2)
    acts = {
        "remove": lambda: manager.remove_elimination("a"),
        "delete": lambda: manager.delete_eliminations(["a", "b"]),
        "clear": manager.clear_eliminations,
        "sync": lambda: manager.sync_eliminations([]),
        "end": lambda: validator.ending.update(now=True),
        "no contract": lambda: setattr(manager, "contract_manager", None),
        "close": lambda: manager.handle_eliminated_miner("a"),
    }
    validator.faults.at(point, acts[what])
    managed.tick()
    validator.ending.clear()
    manager.contract_manager = contract
    for _ in range(2):
        managed.tick()
    assert managed.reasons.keys() == {"a", "b"}
    assert sorted(validator.collateral.slashes()) == ["a", "b"]
    assert validator.is_flat("a")
    assert validator.is_flat("b")
    assert managed.debts == []


def test_a_contract_that_is_exchanged_in_a_tick_takes_what_comes_after(managed: Managed) -> None:
    validator, manager = managed.validator, managed.manager
    taken: list[tuple[str, str]] = []

    def contract(name: str) -> Any:
        def slash(hotkey: str, slash_proportion: float | None = None) -> bool:
            taken.append((name, hotkey))
            manager.contract_manager = contract("the other")
            return True

        return SimpleNamespace(slash_miner_collateral_proportion=slash)

    manager.contract_manager = contract("one")
    for hotkey in ("a", "b"):
        validator.lose(hotkey, 0.2)
    managed.tick()
    assert taken == [("one", "a"), ("the other", "b")]
    assert managed.debts == []
