"""What hangs, or has no thread, in a tick: it stops nobody else, is told, and ends well once it goes on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections import UserDict
from typing import TYPE_CHECKING, Any

import pytest
from crashing import call
from reference_validator import Managed
from reference_validator.scoring import NothingMovedError
from reference_validator.trading import PAIRS
from ten_miners import TEN, THIRD, complete, state_of_slash, ten_to_eliminate
from waiting import PATIENCE, until

from shmelim.eliminations.calls import ProcessingCalls
from shmelim.eliminations.debts.states import ATTEMPTING, OWED
from shmelim.eliminations.rules import alerts, closing, deadlines, tick
from shmelim.eliminations.rules.deadlines import StuckError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path


def test_hanging_position_lock_keeps_others_from_nothing_but_their_turn(directly: Managed) -> None:
    ten_to_eliminate(directly)
    held = directly.validator.locks.get_lock(THIRD, "BTC/USD")
    held.acquire()
    ticking = threading.Thread(target=directly.tick)
    ticking.start()
    try:
        while directly.validator.faults.count("lock", THIRD) < 2:
            pass
        assert list(directly.reasons) == TEN
        assert [hotkey for hotkey in TEN if directly.validator.is_flat(hotkey)] == TEN[:2]
    finally:
        held.release()
        ticking.join()
    assert complete(directly) == TEN


def closed(managed: Managed, hotkey: str) -> list[bool]:
    return [holding.closed for holding in managed.validator.book.on_disk(hotkey)]


@pytest.mark.parametrize("call", ["tick", "handle_eliminated_miner", "first refresh"])
@pytest.mark.parametrize("held", [PAIRS[:1], PAIRS[:2]])
def test_a_position_whose_lock_is_never_released_keeps_no_other_of_that_miner_open(
    new_name: Callable[[], str], tmp_path: Path, call: str, held: Sequence[str]
) -> None:
    with Managed("rpc", new_name(), tmp_path, call_deadline_s=4.0) as managed:
        validator = managed.validator
        validator.register("a")
        for pair in PAIRS:
            validator.open_position("a", pair)
        # What comes after two that hang has a sixteenth of the deadline.
        locks = [validator.locks.get_lock("a", pair) for pair in held]
        for lock in locks:
            lock.acquire()
        try:
            if call == "tick":
                validator.lose("a", 0.2)
                managed.tick()
            else:
                managed.manager.append_elimination_row("a", 0.1, "MAX_TOTAL_DRAWDOWN")
                with contextlib.suppress(StuckError):
                    if call == "first refresh":
                        managed.manager.handle_first_refresh()
                    else:
                        managed.manager.handle_eliminated_miner("a", {})
            assert closed(managed, "a") == [pair not in held for pair in PAIRS]
            assert len(deadlines.left_behind()) == len(held)
        finally:
            for lock in locks:
                lock.release()
        until(lambda: deadlines.left_behind() == [])
        if call == "handle_eliminated_miner":
            managed.manager.handle_eliminated_miner("a", {})
        else:
            managed.tick()
        assert closed(managed, "a") == [True] * len(PAIRS)
        assert [len(holding.trades) for holding in validator.book.on_disk("a")] == [2] * len(PAIRS), "once each"


def test_of_a_miners_positions_only_so_many_hang_at_once(
    new_name: Callable[[], str], tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closing, "_MOST_HANGING", 2)
    with Managed("rpc", new_name(), tmp_path, call_deadline_s=0.3) as managed:
        validator = managed.validator
        validator.register("a", "b")
        for pair in PAIRS:
            validator.open_position("a", pair)
        validator.open_position("b")
        validator.faults.at("holding", gate.wait, hotkey="a", times=None)
        validator.lose("a", 0.2)
        validator.lose("b", 0.2)
        for _ in range(3):
            managed.tick()
            assert len(deadlines.left_behind()) == 2
        assert validator.is_flat("b")
        gate.set()
        until(lambda: deadlines.left_behind() == [])
        managed.tick()
        assert closed(managed, "a") == [True] * len(PAIRS)


def test_what_hangs_in_a_tick_that_a_sync_ends_is_in_the_health(
    new_name: Callable[[], str], tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its report would be too soon after the one before it."""
    monkeypatch.setattr(tick, "_BETWEEN_REPORTS", PATIENCE)
    with Managed("rpc", new_name(), tmp_path, call_deadline_s=0.5) as managed:
        validator = managed.validator
        validator.register("a")
        validator.limit_orders.place("a")
        managed.tick()
        validator.lose("a", 0.2)

        def sync_and_hang() -> None:
            rows = managed.manager.get_eliminations_from_memory()
            validator.sync(lambda: managed.manager.sync_eliminations(rows))
            gate.wait()

        validator.faults.at("cancel", sync_and_hang)
        managed.tick()
        assert [what for what, _, _ in deadlines.left_behind()] == ["limit_orders"]
        problems = managed.manager._server_proxy.health_check_rpc()["problems"]
        assert "limit_orders" in {problem["name"] for problem in problems}


def all_but(stuck: str) -> list[str]:
    return [hotkey for hotkey in TEN if hotkey != stuck]


@pytest.fixture
def hurried(new_name: Callable[[], str], tmp_path: Path) -> Iterator[Managed]:
    """In RPC mode, with so little time for each call that a busy machine still has enough."""
    with Managed("rpc", new_name(), tmp_path, call_deadline_s=2.0, slash_deadline_s=2.0) as made:
        yield made


@pytest.mark.parametrize("point", ["holding", "store", "cancel"])
def test_what_hangs_for_one_miner_stops_no_other(hurried: Managed, gate: threading.Event, point: str) -> None:
    ten_to_eliminate(hurried)
    hurried.validator.faults.at(point, gate.wait, hotkey=THIRD)
    hurried.tick()
    assert list(hurried.reasons) == TEN
    assert [hotkey for hotkey in TEN if hurried.validator.is_flat(hotkey)] == all_but(THIRD)
    assert sorted(hurried.validator.collateral.slashes()) == TEN
    assert ["did not come back within" in alert for alert in hurried.alerts] == [True]
    hurried.tick()
    assert [debt["hotkey"] for debt in hurried.debts] == [THIRD], "nothing begins anew while it is under way"
    gate.set()
    until(lambda: deadlines.left_behind() == [])
    hurried.tick()
    assert complete(hurried) == TEN
    for holding in hurried.validator.book.on_disk(THIRD):
        assert len(holding.trades) == 2, "closed once"


@pytest.mark.parametrize("point", ["liquidated", "all failed", "in stage", "ledgers", "registry"])
def test_what_hangs_for_one_rule_stops_no_other(hurried: Managed, gate: threading.Event, point: str) -> None:
    validator = hurried.validator
    validator.register("liquid", "failed", "down")
    hurried.tick()
    validator.lose("liquid", 0.7)
    validator.probation.fail("failed", "PLAGIARISM", None)
    validator.lose("down", 0.2)
    validator.faults.at(point, gate.wait)
    hurried.tick()
    left_out = {"liquidated": {"liquid"}, "all failed": {"failed"}}.get(point, {"down"})
    left_out = set() if point == "registry" else left_out
    assert set(hurried.reasons) >= {"liquid", "failed", "down"} - left_out
    assert any("did not come back within" in alert for alert in hurried.alerts)
    gate.set()
    until(lambda: deadlines.left_behind() == [])
    hurried.tick()
    assert set(hurried.reasons) == {"liquid", "failed", "down"}


def test_contract_that_hangs_stops_no_other_slash_and_its_answer_counts(
    hurried: Managed, gate: threading.Event
) -> None:
    ten_to_eliminate(hurried)
    hurried.validator.faults.at("slash", gate.wait, hotkey=THIRD)
    for _ in range(2):
        hurried.tick()
    assert sorted(hurried.validator.collateral.slashes()) == all_but(THIRD)
    assert state_of_slash(hurried) == [ATTEMPTING]
    assert ["is under way" in alert for alert in hurried.alerts] == [True]
    gate.set()
    until(lambda: state_of_slash(hurried) == [])
    assert sorted(hurried.validator.collateral.slashes()) == TEN
    # The thread that brought the answer clears the problem after it has recorded the answer.
    until(lambda: hurried.manager._processor.context.alerts.standing() == [])


def test_contract_under_way_is_renewed_and_doubted_by_nobody(
    new_name: Callable[[], str], tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lease is shorter than the call: only its renewals keep it."""
    renewed: list[bool] = []
    renew = ProcessingCalls.renew_slash
    monkeypatch.setattr(ProcessingCalls, "renew_slash", lambda *of: renewed.append(answer := renew(*of)) or answer)
    with Managed("rpc", new_name(), tmp_path, slash_deadline_s=0.5, slash_lease_s=3.0) as made:
        made.validator.register("a")
        made.validator.lose("a", 0.2)
        made.validator.faults.at("slash", gate.wait)
        made.tick()
        [debt] = made.debts
        until(lambda: len(renewed) >= 5)
        assert all(renewed)
        state = made.manager._processor.context.state
        doubt = functools.partial(state.doubt_slash, "a", debt["attempt"], "not heard of")
        assert call(doubt) is False, "asked by another process"
        assert state_of_slash(made) == [ATTEMPTING]
        gate.set()
        until(lambda: state_of_slash(made) == [])
        assert made.validator.collateral.slashes() == ["a"]


@pytest.mark.parametrize(
    ("said", "moved", "told"),
    [("made", True, 0), ("made", False, 1), ("not made", False, 0), ("not made", True, 0)],
)
def test_answer_that_comes_after_a_persons_word_is_compared_with_it(
    new_name: Callable[[], str], tmp_path: Path, gate: threading.Event, said: str, moved: bool, told: int
) -> None:
    """He had to wait until the attempt was not heard of any more; what it knows is so all the same."""
    with Managed("rpc", new_name(), tmp_path, slash_deadline_s=0.3, slash_lease_s=2) as made:
        validator, server = made.validator, made.manager._server_proxy
        validator.register("a")
        validator.lose("a", 0.2)

        def hang() -> None:
            gate.wait()
            if not moved:
                raise NothingMovedError("refused")

        validator.faults.at("slash", hang)
        state = made.manager._processor.context.state
        made.tick()
        [debt] = made.debts
        assert server.resolve_slash_rpc("a", made=said == "made") is False, "it lives"
        renew, state.renew_slash = state.renew_slash, lambda *of: False
        until(lambda: state.doubt_slash("a", debt["attempt"], "not heard of"))
        assert server.resolve_slash_rpc("a", made=said == "made") is True
        state.renew_slash = renew
        before = len(made.alerts)
        gate.set()
        until(lambda: deadlines.left_behind() == [])
        made.tick()
        on_record = [(slash["by"], slash["outcome"]) for slash in server.get_slashes_rpc("a")]
        assert on_record == [("hand" if said == "made" else "contract", "made")]
        assert made.debts == []
        assert validator.collateral.slashes() == (["a"] if moved or said == "not made" else [])
        assert sum("another outcome is on record" in alert for alert in made.alerts[before:]) == told


def test_slash_that_waits_for_another_that_hangs_is_certainly_not_made(
    hurried: Managed, gate: threading.Event
) -> None:
    """Of the same miner, for another cause: its attempt never called the contract."""
    validator, server = hurried.validator, hurried.manager._server_proxy
    validator.register("a")
    validator.lose("a", 0.2)
    validator.faults.at("slash", gate.wait)
    hurried.tick()
    record = hurried.manager.get_elimination("a")
    hurried.manager.remove_elimination("a")
    server.eliminate_rpc("a", record, ["slash"], None, "perf_ledger")
    hurried.tick()
    assert sorted(state_of_slash(hurried)) == [ATTEMPTING, OWED]
    gate.set()
    until(lambda: state_of_slash(hurried) == [OWED])
    hurried.tick()
    assert state_of_slash(hurried) == []
    assert validator.collateral.slashes() == ["a", "a"]


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let no thread be started any more for what is asked, until the patch is undone."""

    def refuse(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    def set_in() -> None:
        monkeypatch.setattr(deadlines, "_idle", [])
        monkeypatch.setattr(deadlines._Worker, "start", refuse)

    return set_in


def test_slash_for_which_there_is_no_thread_is_certainly_not_made(
    managed: Managed, no_threads: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    validator, state = managed.validator, managed.manager._processor.context.state
    validator.register("a")
    validator.lose("a", 0.2)
    begin = state.begin_slash

    def begin_and_no_more(*arguments: Any) -> bool:
        begun = bool(begin(*arguments))
        no_threads()
        return begun

    monkeypatch.setattr(state, "begin_slash", begin_and_no_more)
    with contextlib.suppress(StuckError):
        managed.tick()
    monkeypatch.undo()
    managed.tick()
    assert validator.collateral.slashes() == ["a"]
    assert managed.debts == []


def test_a_loop_for_which_there_is_no_thread_has_not_been_asked_to_end(
    new_name: Callable[[], str], tmp_path: Path, no_threads: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Managed("rpc", new_name(), tmp_path) as managed:
        managed.manager.shutdown_dict = UserDict()
        context = managed.manager._processor.context
        no_threads()
        assert not context.is_stopping()
        assert context.alerts.stands("shutdown", "shutdown_dict")
        monkeypatch.undo()
        managed.manager.shutdown_dict["ending"] = True
        assert context.is_stopping()


def test_full_queue_and_a_hanging_slack_stop_nobody(
    hurried: Managed, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "_PATIENCE", 0.1)
    ten_to_eliminate(hurried)
    hurried.validator.faults.at("websockets", gate.wait)
    hurried.validator.faults.at("slack", gate.wait)
    hurried.validator.faults.fail("store", hotkey=THIRD)
    hurried.tick()
    assert [hotkey for hotkey in TEN if hurried.validator.is_flat(hotkey)] == all_but(THIRD)
    assert sorted(hurried.validator.collateral.slashes()) == TEN
    gate.set()
    until(lambda: deadlines.left_behind() == [])
    hurried.tick()
    assert any(THIRD in alert for alert in hurried.alerts), "told once Slack can be"


@pytest.fixture
def impatient(new_name: Callable[[], str], tmp_path: Path) -> Iterator[Callable[..., Managed]]:
    """In RPC mode, with hardly any time for a call: what does not hang must be quick."""
    with contextlib.ExitStack() as stack:
        figures = {"call_deadline_s": 1.0, "slash_deadline_s": 1.0}
        yield lambda **more: stack.enter_context(Managed("rpc", new_name(), tmp_path, **figures | more))


def problems_of(managed: Managed) -> list[tuple[str, str]]:
    """What the health lists, by name and subject."""
    health = managed.manager._server_proxy.health_check_rpc()
    return [(problem["name"], problem["subject"]) for problem in health["problems"]]


def test_ledger_that_hangs_for_one_miner_keeps_no_other_from_being_judged(
    impatient: Callable[..., Managed], gate: threading.Event
) -> None:
    managed = impatient()
    ten_to_eliminate(managed)
    managed.validator.register("later")
    ledger = managed.validator.ledgers._ledgers[THIRD]
    ledger.drawdown = lambda: 0.2 * gate.wait()  # type: ignore[method-assign]
    managed.tick()
    assert list(managed.reasons) == all_but(THIRD)
    assert ("drawdown elimination", THIRD) in problems_of(managed)
    managed.validator.lose("later", 0.2)
    managed.tick()
    assert list(managed.reasons) == [*all_but(THIRD), "later"], "the next tick leaves out nobody else either"
    assert [whom for _, whom, _ in deadlines.left_behind()] == ["all but nobody"], "and begins it no second time"
    gate.set()
    until(lambda: deadlines.left_behind() == [])
    managed.tick()
    assert THIRD in managed.reasons
    assert ("drawdown elimination", THIRD) not in problems_of(managed)


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()])
def test_ledger_that_raises_what_is_no_exception_is_that_miners_failure(
    impatient: Callable[..., Managed], error: BaseException
) -> None:
    def fail() -> float:
        raise error

    managed = impatient()
    ten_to_eliminate(managed)
    managed.validator.ledgers._ledgers[THIRD].drawdown = fail  # type: ignore[method-assign]
    managed.tick()
    assert list(managed.reasons) == all_but(THIRD)
    assert problems_of(managed) == [("drawdown elimination", THIRD)]


def test_price_source_that_hangs_for_everybody_keeps_nobody_from_being_eliminated(
    impatient: Callable[..., Managed], gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "MOST_LEFT_BEHIND", 3)
    managed = impatient()
    ten_to_eliminate(managed)
    managed.validator.register("later")
    managed.validator.faults.at("price", gate.wait, times=None)
    managed.tick()
    assert sorted(managed.validator.collateral.slashes()) == TEN
    managed.validator.probation.fail("later", "PLAGIARISM", None)
    managed.tick()
    assert managed.reasons.keys() == {*TEN, "later"}
    assert [what for what, _, _ in deadlines.left_behind()] == ["positions"] * 3
    assert {("positions", hotkey) for hotkey in TEN} <= set(problems_of(managed))


def test_full_queue_keeps_no_second_position_of_a_miner_open(
    impatient: Callable[..., Managed], gate: threading.Event
) -> None:
    managed = impatient()
    managed.validator.register("a")
    for pair in ("BTC/USD", "ETH/USD", "EUR/USD"):
        managed.validator.open_position("a", pair)
    managed.validator.lose("a", 0.2)
    managed.validator.faults.at("websockets", gate.wait, times=None)
    managed.tick()
    assert managed.validator.is_flat("a")
    assert problems_of(managed) == [("websockets", "the queue")]


def test_share_that_does_not_come_keeps_nobody_from_being_eliminated(
    impatient: Callable[..., Managed], gate: threading.Event
) -> None:
    managed = impatient()
    managed.environment.slash_proportion = lambda _reason: 0.5 * gate.wait()
    ten_to_eliminate(managed)
    managed.tick()
    assert list(managed.reasons) == TEN
    assert [hotkey for hotkey in TEN if managed.validator.is_flat(hotkey)] == TEN
    assert {("slash not made", hotkey) for hotkey in TEN} <= set(problems_of(managed))
    gate.set()
    until(lambda: deadlines.left_behind() == [])
    managed.tick()
    assert complete(managed) == TEN


def test_what_hangs_is_in_the_health_before_its_tick_is_over(
    impatient: Callable[..., Managed], gate: threading.Event
) -> None:
    managed = impatient(slash_deadline_s=PATIENCE)
    ten_to_eliminate(managed)
    managed.validator.faults.at("cancel", gate.wait, hotkey=THIRD)
    managed.validator.faults.at("slash", gate.wait)
    ticking = threading.Thread(target=managed.tick)
    ticking.start()
    until(lambda: ("limit_orders", THIRD) in problems_of(managed), "the problem in the health")
    assert ticking.is_alive()
    gate.set()
    ticking.join()


def test_an_answer_that_comes_just_as_it_is_given_up_is_not_under_way_for_ever(
    hurried: Managed, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurried.validator.register("a")
    hurried.validator.lose("a", 0.2)
    hurried.validator.faults.at("slash", gate.wait)
    alerts_of = hurried.manager._processor.context.alerts
    failed = alerts_of.failed

    def after_its_answer(kind: str, *of: Any, **more: Any) -> None:
        if kind == "slash under way":
            gate.set()
            until(lambda: state_of_slash(hurried) == [] and deadlines.left_behind() == [])
        failed(kind, *of, **more)

    monkeypatch.setattr(alerts_of, "failed", after_its_answer)
    hurried.tick()
    assert gate.is_set()
    hurried.tick()
    assert alerts_of.standing() == []
