"""What fails in a tick: one miner's failure stops nobody else, is told once, and is made good by a later tick."""

from __future__ import annotations

import threading
from decimal import Decimal
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from reference_validator import HOUR, InjectedError, Managed, adapter
from reference_validator.scoring import NothingMovedError
from ten_miners import TEN, THIRD, complete, state_of_slash, ten_to_eliminate

from shmelim.eliminations.debts.states import IN_DOUBT
from shmelim.eliminations.rules import tick
from shmelim.errors import NotServingError, StateUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


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


@pytest.mark.parametrize(
    "point", ["registry", "cancel", "holdings", "lock", "store", "price", "slash", "websockets"]
)
def test_a_collaborator_that_speaks_of_a_server_of_its_own_ends_nobody_elses_tick(
    directly: Managed, point: str
) -> None:
    """The error of this package says that the processing's server is away: here somebody else's is."""
    ten_to_eliminate(directly)
    hotkey = None if point in ("registry", "price", "websockets") else THIRD
    directly.validator.faults.fail(point, StateUnavailableError("the price service is away"), hotkey=hotkey)
    directly.tick()
    assert len(complete(directly)) >= 9
    assert any("price service" in alert for alert in directly.alerts)


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


def test_row_of_the_perf_ledger_is_lost_only_if_it_names_no_miner(managed: Managed) -> None:
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
    assert list(managed.reasons) == [TEN[place] for place in (0, 1, 2, 3, 4, 5, 7, 9)]
    assert managed.manager.get_elimination(TEN[0])["own"] == [1], "its own fields stay"
    assert managed.reasons[THIRD] == "UNKNOWN"
    assert managed.manager.get_elimination(TEN[4])["dd"] is None
    assert len(managed.alerts) == 2
    assert "number 6 of the list" in managed.alerts[0]


def test_reason_that_cannot_be_recorded_waits_and_makes_no_tick_due(
    new_name: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Managed("rpc", new_name(), tmp_path) as managed:
        validator, state = managed.validator, managed.manager._processor.context.state
        validator.register("a", "b", "c")
        managed.tick()
        validator.probation.fail("a", "PLAGIARISM", None)
        validator.probation.fail("c", "PLAGIARISM", None)
        eliminate = state.eliminate

        def fail_for_c(hotkey: str, *more: Any) -> str:
            if hotkey == "c":
                raise InjectedError("cannot be recorded")
            return eliminate(hotkey, *more)

        monkeypatch.setattr(state, "eliminate", fail_for_c)
        managed.tick(0)
        assert managed.reasons == {"a": "PLAGIARISM"}
        assert set(validator.probation.failed) == {"a", "c"}
        asked = validator.faults.count("in stage")
        managed.tick(1000)
        assert validator.faults.count("in stage") == asked, "what failed waits for the interval"
        validator.probation.fail("b", "PLAGIARISM", 0.1)
        monkeypatch.undo()
        managed.tick(1000)
        assert managed.reasons == {"a": "PLAGIARISM", "b": "PLAGIARISM", "c": "PLAGIARISM"}
        assert validator.probation.failed == {}
        assert len(managed.alerts) == 1


@pytest.mark.parametrize("nobody", ["x" * 256, None], ids=["too long", "None"])
def test_a_reason_of_nobody_keeps_no_other_standing(managed: Managed, nobody: Any) -> None:
    """Else he who is taken back, or registers again, is eliminated once more for what was recorded long ago."""
    validator = managed.validator
    validator.register("a", "b")
    managed.tick()
    validator.probation.failed |= {"a": ("PLAGIARISM", None), nobody: ("PLAGIARISM", None)}
    managed.tick()
    assert managed.reasons == {"a": "PLAGIARISM"}
    assert len(managed.alerts) == 1
    for step in (validator.deregister, validator.register, managed.manager.remove_elimination):
        step("a")
        managed.tick()
    assert managed.reasons == {}
    assert validator.collateral.slashes() == ["a"]


def test_a_step_that_always_fails_makes_no_tick_of_every_call(new_name: Callable[[], str], tmp_path: Path) -> None:
    with Managed("rpc", new_name(), tmp_path) as managed:
        lasting = managed.validator.faults.fail("liquidated", times=None)
        managed.tick()
        for _ in range(1200):  # 20 minutes
            managed.tick(1000)
        # After 10, 20, 40, 80, 160 s and from then on with the interval of 5 minutes.
        assert 6 <= lasting.happened <= 10
        managed.validator.faults.clear()
        managed.tick()
        asked = managed.validator.faults.count("liquidated")
        managed.tick(299_000)
        assert managed.validator.faults.count("liquidated") == asked, "it went well, and waits for the interval"


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


def test_a_validator_without_locks_closes_a_position_once(managed: Managed) -> None:
    ten_to_eliminate(managed)
    managed.manager.position_locks = None
    together = threading.Barrier(3)
    managed.validator.pass_time(HOUR)

    def tick() -> None:
        together.wait()
        managed.manager.process_eliminations()

    ticking = [threading.Thread(target=tick) for _ in range(3)]
    for thread in ticking:
        thread.start()
    for thread in ticking:
        thread.join()
    managed.tick()
    assert complete(managed) == TEN
    for hotkey in TEN:
        assert [len(holding.trades) for holding in managed.validator.book.on_disk(hotkey)] == [2]
    assert sorted(managed.validator.collateral.slashes()) == TEN


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("it cannot be said")


@pytest.mark.parametrize("point", ["lock", "cancel", "slash", "price"])
def test_an_error_that_cannot_be_said_stops_nobody_else(directly: Managed, point: str) -> None:
    ten_to_eliminate(directly)
    directly.validator.faults.fail(point, UnspeakableError(), hotkey=None if point == "price" else THIRD)
    directly.tick()
    assert list(directly.reasons) == TEN
    assert len(complete(directly)) >= 9
    assert len(directly.alerts) <= 1
    if point == "slash":
        assert state_of_slash(directly) == [IN_DOUBT]
        assert "UnspeakableError" in directly.alerts[0]


def test_an_error_of_a_ledger_that_cannot_be_said_stops_nobody_else(directly: Managed) -> None:
    ten_to_eliminate(directly)
    judge = directly.environment.drawdown

    def drawdown(ledger: Any) -> Any:
        if ledger is directly.validator.ledgers._ledgers[THIRD]:
            raise UnspeakableError
        return judge(ledger)

    directly.environment.drawdown = drawdown
    directly.tick()
    assert list(directly.reasons) == [hotkey for hotkey in TEN if hotkey != THIRD]


@pytest.mark.parametrize("spoilt", ["no order", "an order that closes nothing"])
def test_a_position_that_is_still_open_is_not_settled(directly: Managed, spoilt: str) -> None:
    ten_to_eliminate(directly)
    spoil = {
        "no order": ("generate_fake_flat_order", staticmethod(lambda *_: None)),
        "an order that closes nothing": ("add_order", lambda *_: None),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter.Position, *spoil[spoilt])
        directly.tick()
        assert {debt["kind"] for debt in directly.debts} == {"positions"}
        assert len(directly.alerts) == 10
        assert not any(directly.validator.is_flat(hotkey) for hotkey in TEN)
    directly.tick()
    assert complete(directly) == TEN


@pytest.mark.parametrize("call", ["cancel_all", "send_message"])
def test_a_coroutine_that_nobody_runs_is_no_answer(directly: Managed, call: str) -> None:
    async def answer(*_: Any, **__: Any) -> None:
        raise AssertionError("nobody runs it")

    ten_to_eliminate(directly)
    manager = directly.manager
    if call == "cancel_all":
        manager.limit_order_manager = SimpleNamespace(delete_all_limit_orders_for_hotkey=answer)
        directly.tick()
        assert {debt["kind"] for debt in directly.debts} == {"limit_orders"}
        assert "coroutine" in directly.debts[0]["error"]
    else:
        directly.validator.faults.fail("slash")
        manager.slack_notifier = SimpleNamespace(send_message=answer)
        directly.tick()
        alerts = manager._processor.context.alerts
        alerts.messages.report_undelivered(alerts)
        assert alerts.stands("alerts_undelivered")


@pytest.mark.parametrize("odd", [123, None, "lone \ud800"])
def test_a_miner_with_an_odd_name_silences_no_problem(managed: Managed, odd: Any) -> None:
    managed.validator.register("a")
    managed.validator.lose("a", 0.2)
    managed.manager.contract_manager = None
    for _ in range(2):
        managed.validator.probation.failed[odd] = ("PLAGIARISM", 0.1)
        managed.tick()
    health = managed.manager._server_proxy.health_check_rpc()
    found = {problem["name"] for problem in health["problems"] if problem.get("part") == "processing"}
    if managed.mode == "rpc":
        assert found >= {"challenge-period elimination", "no contract manager"}
        assert health["last_tick_ms"] is not None
    subjects = [problem.subject for problem in managed.manager._processor.context.alerts.standing()]
    assert all(subject.encode() for subject in subjects)


def test_a_percentage_of_the_environment_may_be_a_decimal(managed: Managed) -> None:
    managed.validator.register("a")
    managed.validator.open_position("a")
    managed.environment.drawdown = lambda _ledger: (True, Decimal("20.5"))
    managed.tick()
    assert managed.reasons == {"a": "MAX_TOTAL_DRAWDOWN"}
    assert managed.validator.is_flat("a")


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
    directly.manager.append_elimination_row(hotkey, None, "LIQUIDATED", validator.now_ms)
    directly.tick(10**9)
    assert hotkey not in directly.reasons
    assert all(victim.exists() for victim in victims)


def standing(managed: Managed) -> list[tuple[str, str]]:
    """The problems of the processing, by name and subject."""
    return [(problem.name, problem.subject) for problem in managed.manager._processor.context.alerts.standing()]


def test_a_slash_that_rests_is_no_failure_any_more(managed: Managed) -> None:
    """It is not tried again, and would stand in the health for as long as it rests."""
    managed.validator.register("a")
    managed.validator.probation.fail("a", "PLAGIARISM", None)
    managed.validator.faults.at("slash", refuse_to_slash)
    managed.tick()
    assert standing(managed) == [("slash not made", "a")]
    managed.manager.remove_elimination("a")
    managed.tick()
    assert [debt["due"] for debt in managed.debts if debt["kind"] == "slash"] == [False]
    assert standing(managed) == []


def refuse_to_slash() -> None:
    raise NothingMovedError("not now")


@pytest.mark.parametrize("kind", ["position", "limit order"])
def test_what_is_missing_for_a_moment_is_owed_from_its_first_elimination_on(managed: Managed, kind: str) -> None:
    """Who is eliminated while a manager is being replaced kept his position open for ever."""
    validator, manager = managed.validator, managed.manager
    validator.register("a")
    validator.open_position("a")
    validator.limit_orders.place("a")
    managed.tick()
    name = f"{kind.replace(' ', '_')}_manager"
    before = getattr(manager, name)
    setattr(manager, name, None)
    validator.probation.fail("a", "PLAGIARISM", None)
    managed.tick()
    assert managed.reasons == {"a": "PLAGIARISM"}
    assert standing(managed) == [(f"{kind.replace(' ', '_')}s", "a")]
    setattr(manager, name, before)
    managed.tick()
    assert (validator.is_flat("a"), validator.limit_orders.waiting, standing(managed)) == (True, {}, [])


def test_a_first_refresh_that_another_process_made_has_failed_for_nobody(managed: Managed) -> None:
    managed.validator.register("a")
    managed.validator.open_position("a")
    managed.manager.append_elimination_row("a", 0.2, "PLAGIARISM")
    managed.validator.faults.fail("store", hotkey="a")
    managed.tick()
    assert standing(managed) == [("first refresh", "a")]
    managed.manager.first_refresh_ran = True
    managed.tick()
    assert standing(managed) == []


def test_what_fails_is_in_the_health_of_a_server_that_was_started_anew(
    in_rpc_mode: Managed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the next tick is due, which alone would tell it."""
    managed = in_rpc_mode
    managed.validator.register("a")
    managed.validator.limit_orders.place("a")
    managed.validator.faults.fail("cancel", times=None)
    managed.validator.probation.fail("a", "PLAGIARISM", None)
    managed.tick()

    def named() -> list[str]:
        problems = managed.manager._server_proxy.health_check_rpc()["problems"]
        return [problem["name"] for problem in problems if problem.get("part") == "processing"]

    assert named() == ["limit_orders"]
    managed.manager.restart_server()
    assert named() == []
    managed.tick(1000)
    assert named() == [], "nothing has changed"
    monkeypatch.setattr(tick, "_BETWEEN_REMINDERS", 0.0)
    managed.tick(1000)
    assert named() == ["limit_orders"]
