"""What fails in a tick: one miner's failure stops nobody else, is told once, and is made good by a later tick."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
from reference_validator import InjectedError, Managed
from reference_validator.scoring import NothingMovedError

from shmelim.eliminations.debts import ATTEMPTING, IN_DOUBT, OWED
from shmelim.errors import NotServingError, StateUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

TEN = [f"miner{number}" for number in range(10)]
THIRD = TEN[2]


@pytest.fixture(params=["direct", "rpc"])
def managed(request: pytest.FixtureRequest, new_name: Callable[[], str], tmp_path: Path) -> Iterator[Managed]:
    with Managed(request.param, new_name(), tmp_path) as made:
        yield made


@pytest.fixture
def directly(new_name: Callable[[], str], tmp_path: Path) -> Iterator[Managed]:
    with Managed("direct", new_name(), tmp_path) as made:
        yield made


def ten_to_eliminate(managed: Managed) -> None:
    validator = managed.validator
    validator.register(*TEN)
    for hotkey in TEN:
        validator.open_position(hotkey)
        validator.limit_orders.place(hotkey)
        validator.lose(hotkey, 0.2)


def complete(managed: Managed) -> list[str]:
    """The miners to whom everything was done that an elimination owes."""
    slashes = managed.validator.collateral.slashes()
    owing = {debt["hotkey"] for debt in managed.debts}
    return [
        hotkey
        for hotkey in TEN
        if hotkey in managed.reasons
        and managed.validator.is_flat(hotkey)
        and slashes.count(hotkey) == 1
        and hotkey not in owing
    ]


# ---------------------------------------------------------------------- the 3rd of 10


@pytest.mark.parametrize("point", ["cancel", "cancel!", "holdings", "lock", "holding", "price", "store", "store!"])
def test_failure_at_the_3rd_of_10_leaves_9_complete_and_is_made_good(managed: Managed, point: str) -> None:
    ten_to_eliminate(managed)
    if point == "price":
        # No hotkey there: the third of those who are closed at a fetched price.
        calls = iter(range(10))
        managed.validator.faults.at(point, lambda: next(calls) == 2 and _raise(), times=3)
    else:
        managed.validator.faults.fail(point, hotkey=THIRD)
    managed.tick()
    assert complete(managed) == [hotkey for hotkey in TEN if hotkey != THIRD]
    assert len(managed.alerts) == 1
    assert THIRD in managed.alerts[0]
    managed.tick()
    assert complete(managed) == TEN
    assert len(managed.alerts) == 1


def _raise() -> None:
    raise InjectedError("no price")


def test_3rd_of_10_that_cannot_be_recorded_is_recorded_by_the_next_tick(managed: Managed) -> None:
    ten_to_eliminate(managed)
    judge = managed.environment._drawdown
    seen: list[Any] = []

    def fail_at_the_third(ledger: Any) -> Any:
        seen.append(ledger)
        if len(seen) == 3:
            raise InjectedError("no drawdown")
        return judge(ledger)

    managed.environment._drawdown = fail_at_the_third
    managed.tick()
    assert complete(managed) == [hotkey for hotkey in TEN if hotkey != THIRD]
    assert len(managed.alerts) == 1
    managed.tick()
    assert complete(managed) == TEN


def test_failure_that_lasts_is_told_once_until_it_went_well(managed: Managed) -> None:
    ten_to_eliminate(managed)
    lasting = managed.validator.faults.fail("store", hotkey=THIRD, times=None)
    for _ in range(4):
        managed.tick()
    assert lasting.happened == 4
    assert len(managed.alerts) == 1
    assert [debt["attempts"] for debt in managed.debts] == [4]
    managed.validator.faults.clear()
    managed.tick()
    assert complete(managed) == TEN
    managed.tick()
    assert len(managed.alerts) == 1


def test_row_of_the_perf_ledger_that_is_bad_is_its_miners_failure(managed: Managed) -> None:
    ledgers = managed.manager.position_manager.perf_ledger_manager
    good = {
        "reason": "LIQUIDATED",
        "elimination_initiated_time_ms": managed.validator.now_ms,
        "dd": 0.6,
        "own": [1],
    }
    rows: list[Any] = [{"hotkey": hotkey, **good} for hotkey in TEN]
    del rows[2]["reason"]
    rows[4]["dd"] = object()
    rows[6] = "no row"
    del rows[8]["hotkey"]
    ledgers.get_perf_ledger_eliminations = lambda: rows
    for _ in range(2):
        managed.tick()
    assert list(managed.reasons) == [TEN[place] for place in (0, 1, 3, 5, 7, 9)]
    assert managed.manager.get_elimination(TEN[0])["own"] == [1], "its own fields stay"
    assert len(managed.alerts) == 4
    assert "'reason'" in managed.alerts[0]
    assert "number 6 of the list" in managed.alerts[2]
    rows[2]["reason"] = "LIQUIDATED"
    managed.tick()
    assert THIRD in managed.reasons


def test_reason_that_cannot_be_recorded_waits_and_makes_no_tick_due(
    new_name: Callable[[], str], tmp_path: Path
) -> None:
    with Managed("rpc", new_name(), tmp_path) as managed:
        validator = managed.validator
        validator.register("a", "b")
        managed.tick()
        validator.probation.fail("a", "PLAGIARISM", None)
        validator.probation.fail("b", "PLAGIARISM", "much")
        managed.tick(0)
        assert managed.reasons == {"a": "PLAGIARISM"}
        assert set(validator.probation.failed) == {"a", "b"}
        asked = validator.faults.count("in stage")
        managed.tick(1000)
        assert validator.faults.count("in stage") == asked, "what failed waits for the interval"
        validator.probation.fail("b", "PLAGIARISM", 0.1)
        managed.tick(1000)
        assert managed.reasons == {"a": "PLAGIARISM", "b": "PLAGIARISM"}
        assert validator.probation.failed == {}
        assert len(managed.alerts) == 1


# ---------------------------------------------------------------------- steps and collaborators


@pytest.mark.parametrize(
    "point", ["registry", "liquidated", "has failed", "all failed", "in stage", "ledgers", "slack", "websockets"]
)
def test_step_that_fails_stops_no_later_step_and_is_repeated(managed: Managed, point: str) -> None:
    validator = managed.validator
    validator.register("a", "b", "c", "d")
    validator.open_position("a")
    managed.tick()
    validator.deregister("d")
    validator.lose("a", 0.7)
    validator.probation.fail("b", "PLAGIARISM", None)
    validator.lose("c", 0.2)
    validator.faults.fail(point, times=5)
    if point == "slack":
        validator.faults.fail("store", hotkey="a")
    managed.tick()
    assert len(managed.reasons) >= 2
    validator.faults.clear()
    managed.tick(0)
    managed.tick()
    wanted = {"a": "LIQUIDATED", "b": "PLAGIARISM", "c": "MAX_TOTAL_DRAWDOWN", "d": "ZOMBIE"}
    if point == "liquidated":
        wanted["a"] = "MAX_TOTAL_DRAWDOWN"  # which comes next
    assert managed.reasons == wanted
    assert managed.debts == []
    assert sorted(validator.collateral.slashes()) == ["a", "b", "c"]


def test_channel_error_of_a_collaborator_is_that_miners_failure(managed: Managed) -> None:
    """The validator's own services use channels as well."""
    ten_to_eliminate(managed)
    managed.validator.faults.fail("holdings", NotServingError("positions are not served"), hotkey=THIRD)
    managed.tick()
    assert complete(managed) == [hotkey for hotkey in TEN if hotkey != THIRD]
    managed.tick()
    assert complete(managed) == TEN


def test_server_that_is_away_fails_the_tick_and_nothing_is_lost(
    new_name: Callable[[], str], tmp_path: Path
) -> None:
    with Managed("rpc", new_name(), tmp_path) as managed:
        ten_to_eliminate(managed)
        restart = managed.manager.restart_server
        managed.validator.faults.at("store!", restart, hotkey=TEN[4])
        managed.validator.faults.at("slash!", restart, hotkey=TEN[7])
        for _ in range(3):
            managed.tick()
        assert complete(managed) == TEN
        assert sorted(managed.validator.collateral.slashes()) == TEN


def test_live_position_that_could_not_be_saved_is_saved_by_a_later_pass(
    new_name: Callable[[], str], tmp_path: Path
) -> None:
    """A manager that hands out its own objects shows the position as closed, and the disk knows nothing of it."""
    with Managed("direct", new_name(), tmp_path, live=True) as managed:
        ten_to_eliminate(managed)
        managed.validator.faults.fail("store", hotkey=THIRD)
        managed.tick()
        [holding] = managed.validator.book.holdings(THIRD)
        assert holding.closed
        assert not managed.validator.is_flat(THIRD)
        managed.tick()
        assert complete(managed) == TEN


def test_position_that_cannot_be_read_keeps_none_of_its_miners_others_open(directly: Managed) -> None:
    validator = directly.validator
    validator.register("a")
    for pair in ("BTC/USD", "ETH/USD", "EUR/USD"):
        validator.open_position("a", pair)
    validator.lose("a", 0.2)
    positions = directly.manager.position_manager
    list_them = positions.get_positions_for_one_hotkey

    def without_a_pair(hotkey: str, **options: Any) -> list[Any]:
        listed = list_them(hotkey, **options)
        del listed[1].trade_pair
        return listed

    positions.get_positions_for_one_hotkey = without_a_pair
    directly.tick()
    assert [holding.closed for holding in validator.book.on_disk("a")] == [True, False, True]
    assert [debt["kind"] for debt in directly.debts] == ["positions"]
    assert len(directly.alerts) == 1
    positions.get_positions_for_one_hotkey = list_them
    directly.tick()
    assert validator.is_flat("a")
    assert directly.debts == []


def test_hanging_position_lock_keeps_others_from_nothing_but_their_turn(directly: Managed) -> None:
    ten_to_eliminate(directly)
    held = directly.validator.locks.get_lock(THIRD, "BTC/USD")
    held.acquire()
    ticking = threading.Thread(target=directly.tick)
    ticking.start()
    try:
        while directly.validator.faults.count("lock", THIRD) < 2:
            pass
        assert complete(directly) == TEN[:2]
    finally:
        held.release()
        ticking.join()
    assert complete(directly) == TEN


# ---------------------------------------------------------------------- slashes


def state_of_slash(managed: Managed) -> list[str]:
    return [debt["state"] for debt in managed.debts if debt["kind"] == "slash"]


@pytest.mark.parametrize("moved", [False, True])
def test_contract_that_raises_leaves_the_slash_in_doubt(managed: Managed, moved: bool) -> None:
    ten_to_eliminate(managed)
    managed.validator.faults.fail("slash!" if moved else "slash", hotkey=THIRD)
    for _ in range(3):
        managed.tick()
    assert managed.validator.collateral.slashes().count(THIRD) == moved
    assert state_of_slash(managed) == [IN_DOUBT]
    assert len(managed.alerts) == 1
    assert "nobody knows" in managed.alerts[0]
    assert len(complete(managed)) == 9
    assert managed.manager._server_proxy.resolve_slash_rpc(THIRD, made=moved)
    managed.tick()
    assert managed.validator.collateral.slashes().count(THIRD) == 1
    assert complete(managed) == TEN


def test_contract_that_answers_false_leaves_the_slash_in_doubt(managed: Managed) -> None:
    managed.validator.register("a")
    managed.validator.lose("a", 0.2)
    managed.validator.collateral.answer = False
    managed.tick()
    assert state_of_slash(managed) == [IN_DOUBT]
    assert len(managed.alerts) == 1


def test_slash_that_was_certainly_not_made_is_made_by_a_later_tick(managed: Managed) -> None:
    ten_to_eliminate(managed)
    managed.validator.faults.fail("slash", NothingMovedError("refused"), hotkey=THIRD, times=2)
    managed.tick()
    assert state_of_slash(managed) == [OWED]
    for _ in range(2):
        managed.tick()
    assert len(managed.alerts) == 1
    assert complete(managed) == TEN


class Away(SystemExit):
    """What ends a process, as a signal's handler raises it."""


@pytest.mark.parametrize("point", ["slash", "slash!"])
def test_slash_that_is_broken_off_is_in_doubt_before_anything_else_happens(managed: Managed, point: str) -> None:
    ten_to_eliminate(managed)
    managed.validator.faults.fail(point, Away(), hotkey=THIRD)
    with pytest.raises(Away):
        managed.tick()
    assert IN_DOUBT in state_of_slash(managed)
    managed.tick()
    assert sorted(complete(managed)) == [hotkey for hotkey in TEN if hotkey != THIRD]
    assert state_of_slash(managed) == [IN_DOUBT]


@pytest.mark.parametrize("method", ["begin_slash_rpc", "settle_debt_rpc", "fail_debt_rpc"])
def test_outcome_that_could_not_be_recorded_is_recorded_later(directly: Managed, method: str) -> None:
    """The server is away after it began an attempt, after the contract moved money, or after it refused to."""
    ten_to_eliminate(directly)
    server = directly.manager._server_proxy
    original = getattr(server, method)
    lost: list[Any] = []

    def lose_the_answer(hotkey: str, *arguments: Any) -> Any:
        is_slash = method == "begin_slash_rpc" or arguments[0] == "slash"
        if hotkey == THIRD and is_slash and not lost:
            lost.append(original(hotkey, *arguments) if method == "begin_slash_rpc" else None)
            raise NotServingError("gone")
        return original(hotkey, *arguments)

    if method == "fail_debt_rpc":
        directly.validator.faults.fail("slash", NothingMovedError("refused"), hotkey=THIRD)
    setattr(server, method, lose_the_answer)
    if method == "begin_slash_rpc":
        with pytest.raises(StateUnavailableError):
            directly.tick()
        assert state_of_slash(directly) == [OWED], "the contract was not called"
    else:
        directly.tick()
        assert state_of_slash(directly) == [ATTEMPTING]
    assert lost
    for _ in range(2):
        directly.tick()
    assert complete(directly) == TEN
    assert sorted(directly.validator.collateral.slashes()) == TEN


def test_two_ticks_at_once_make_nothing_twice(managed: Managed) -> None:
    ten_to_eliminate(managed)
    together = threading.Barrier(2)

    def tick() -> None:
        together.wait()
        managed.manager._processor.handle_mdd_eliminations()

    threads = [threading.Thread(target=tick) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert complete(managed) == TEN
    assert [len(holding.trades) for hotkey in TEN for holding in managed.validator.book.on_disk(hotkey)] == [
        2
    ] * 10


# ---------------------------------------------------------------------- hostile names


@pytest.mark.parametrize("hotkey", ["../victim", "/etc", "..", ".", ".hidden", "a/b", "a\0b"])
def test_hotkey_leads_nowhere_out_of_the_miners_directory(directly: Managed, hotkey: str) -> None:
    validator = directly.validator
    victims = [
        validator.directory / "victim",
        validator.miners_directory / ".hidden",
        validator.miners_directory / "a" / "b",
    ]
    for victim in victims:
        victim.mkdir(parents=True)
    validator.register("other")
    directly.manager.append_elimination_row(hotkey, None, "ZOMBIE", validator.now_ms)
    directly.tick(10**9)
    assert hotkey not in directly.reasons
    assert all(victim.exists() for victim in victims)
