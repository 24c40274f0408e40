"""Calls under deadlines, in threads that can be left behind."""

from __future__ import annotations

import multiprocessing
import threading
from typing import TYPE_CHECKING, Any

import pytest
from waiting import PATIENCE, until

from shmelim.eliminations.rules import deadlines
from shmelim.eliminations.rules.deadlines import LeftBehindError, NotAskedError, StuckError, call

if TYPE_CHECKING:
    from collections.abc import Callable


SCOPE = object()


def ask(whom: str, work: Callable[[], Any], seconds: float, **options: Any) -> Any:
    return call(SCOPE, "asked", whom, work, seconds, **options)


def test_a_call_returns_and_raises_as_its_work_does() -> None:
    assert ask("a", lambda: 5, PATIENCE) == 5
    with pytest.raises(ZeroDivisionError):
        ask("a", lambda: 1 // 0, PATIENCE)
    with pytest.raises(RuntimeError, match="asked wanted to end the process: SystemExit"):
        ask("a", lambda: (_ for _ in ()).throw(SystemExit), PATIENCE)


def test_threads_are_used_again() -> None:
    used = {ask("a", threading.get_ident, PATIENCE) for _ in range(100)}
    assert len(used) <= 2


def test_what_does_not_come_back_is_left_behind_and_nothing_of_its_kind_begins(gate: threading.Event) -> None:
    with pytest.raises(StuckError, match="asked did not come back within"):
        ask("a", gate.wait, 0.01)
    with pytest.raises(StuckError, match="asked has not come back for"):
        ask("a", lambda: 5, PATIENCE)
    assert ask("b", lambda: 5, PATIENCE) == 5
    assert call(SCOPE, "other", "a", lambda: 5, PATIENCE) == 5
    assert [(what, whom) for what, whom, _ in deadlines.left_behind()] == [("asked", "a")]
    gate.set()
    until(lambda: deadlines.left_behind() == [])
    assert ask("a", lambda: 5, PATIENCE) == 5


def test_the_same_waits_for_its_turn(gate: threading.Event) -> None:
    order: list[int] = []
    begun = threading.Event()

    def first() -> None:
        begun.set()
        gate.wait()
        order.append(1)

    others = [threading.Thread(target=ask, args=("a", first, PATIENCE))]
    others[0].start()
    assert begun.wait(PATIENCE)
    others.append(threading.Thread(target=ask, args=("a", lambda: order.append(2), PATIENCE)))
    others[1].start()
    with pytest.raises(StuckError, match="under way in another thread"):
        ask("a", lambda: order.append(3), 0.01)
    gate.set()
    for thread in others:
        thread.join()
    assert order == [1, 2]


def test_what_is_left_behind_in_one_scope_is_nothing_to_another(gate: threading.Event) -> None:
    with pytest.raises(StuckError):
        ask("a", gate.wait, 0.01)
    assert call(object(), "asked", "a", lambda: 5, PATIENCE) == 5


def test_what_was_left_behind_notices_before_its_next_effect(gate: threading.Event) -> None:
    effects: list[Any] = []

    def work() -> None:
        deadlines.check_turn()
        effects.append("first")
        gate.wait()
        try:
            deadlines.check_turn()
        except LeftBehindError:
            effects.append("left behind")
            raise
        effects.append("second")

    with pytest.raises(StuckError):
        ask("a", work, 0.5)
    gate.set()
    until(lambda: deadlines.left_behind() == [])
    assert effects == ["first", "left behind"]
    deadlines.check_turn()  # this thread was not left behind


def test_as_many_are_left_behind_as_are_allowed_and_no_more(
    gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "MOST_LEFT_BEHIND", 3)
    for number in range(3):
        with pytest.raises(StuckError):
            ask(str(number), gate.wait, 0.01)
    with pytest.raises(NotAskedError, match="3 other calls do not come back"):
        ask("4", lambda: pytest.fail("it was asked"), PATIENCE)
    gate.set()
    until(lambda: deadlines.left_behind() == [])
    assert ask("4", lambda: 5, PATIENCE) == 5


def test_the_end_of_the_validator_is_waited_for_no_longer_than_the_grace(
    gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "_LOOK_AGAIN", 0.01)
    monkeypatch.setattr(deadlines, "_GRACE", 0.01)
    with pytest.raises(StuckError):
        ask("a", gate.wait, 10 * PATIENCE, stopping=lambda: True)


def test_a_forked_child_has_a_pool_of_its_own(gate: threading.Event) -> None:
    with pytest.raises(StuckError):
        ask("a", gate.wait, 0.01)
    answers = multiprocessing.get_context("fork").SimpleQueue()
    child = multiprocessing.get_context("fork").Process(
        target=lambda: answers.put((deadlines.left_behind(), ask("a", lambda: 5, PATIENCE)))
    )
    child.start()
    child.join(PATIENCE)
    assert child.exitcode == 0
    assert answers.get() == ([], 5)
