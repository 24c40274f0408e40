"""Named problems: raised once, told once, cleared once."""

import os
import signal

import pytest
from ledger import held_elsewhere
from waiting import PATIENCE

from shmelim.system.problems import Problems


@pytest.fixture
def told():
    return []


@pytest.fixture
def problems(told):
    problems = Problems()
    problems.subscribe(lambda change, problem: told.append((change, problem.name, problem.text)))
    return problems


def test_a_problem_that_stands_is_told_once_and_keeps_its_beginning(problems, told, monkeypatch):
    monkeypatch.setattr("shmelim.system.problems.now_ms", lambda: 5)
    assert problems.report("full", "no room")
    monkeypatch.setattr("shmelim.system.problems.now_ms", lambda: 9)
    assert not problems.report("full", "still no room")
    (standing,) = problems.standing()
    assert (standing.since_ms, standing.text) == (5, "still no room")
    assert told == [("raised", "full", "no room")]


def test_a_problem_that_gets_worse_is_told_again(problems, told):
    problems.report("full", "little room", severity="notice")
    assert problems.status() == "ok"
    problems.report("full", "no room", severity="failing")
    problems.report("full", "little room", severity="notice")
    assert [change for change, _, _ in told] == ["raised", "worse"]


def test_the_same_problem_of_two_subjects_is_two_problems(problems, told):
    problems.report("slash", "in doubt", subject="a")
    problems.report("slash", "in doubt", subject="b")
    problems.clear("slash", "a")
    assert not problems.stands("slash", "a")
    assert problems.stands("slash", "b")
    assert [change for change, _, _ in told] == ["raised", "raised", "cleared"]


def test_what_did_not_stand_is_cleared_without_a_word(problems, told):
    assert problems.clear("full") is None
    assert told == []


def test_a_subscriber_that_fails_keeps_nobody_from_hearing(told, caplog):
    problems = Problems()
    problems.subscribe(lambda change, problem: 1 / 0)
    problems.subscribe(lambda change, problem: told.append(change))
    problems.report("full", "no room")
    assert told == ["raised"]
    assert "no room" in caplog.text
    assert problems.stands("full")


def test_a_subscriber_may_raise_and_clear_problems_itself(problems):
    problems.subscribe(lambda change, problem: problem.name == "full" and problems.report("told", "so"))
    problems.report("full", "no room")
    assert problems.stands("told")


def test_the_status_is_that_of_the_worst(problems):
    assert problems.status() == "ok"
    problems.report("a", "a", severity="degraded")
    problems.report("b", "b", severity="failing")
    assert problems.status() == "failing"
    problems.clear("b")
    assert problems.status() == "degraded"


def test_a_flood_of_subjects_forgets_the_oldest(problems, monkeypatch):
    monkeypatch.setattr("shmelim.system.problems._MOST", 3)
    for number in range(5):
        problems.report("bad", "bad", subject=str(number))
    assert [problem.subject for problem in problems.standing()] == ["2", "3", "4"]


def test_others_of_a_name_are_cleared(problems, told):
    for subject in "abc":
        problems.report("slash", subject, subject=subject)
    problems.report("other", "other")
    problems.clear_others("slash", {"b"})
    assert [problem.subject for problem in problems.standing()] == ["b", ""]
    assert [text for change, _, text in told if change == "cleared"] == ["a", "c"]


def test_a_health_check_says_all_of_a_problem(problems, monkeypatch):
    monkeypatch.setattr("shmelim.system.problems.now_ms", lambda: 5)
    problems.report("full", "no room", severity="failing", remedy="make some")
    (problem,) = problems.standing()
    assert problem._asdict() == {
        "name": "full",
        "subject": "",
        "text": "no room",
        "severity": "failing",
        "remedy": "make some",
        "since_ms": 5,
    }
    assert str(problem) == "no room; make some"


def test_a_forked_child_has_what_stood_and_a_lock_of_its_own(problems):
    problems.report("full", "no room")
    with held_elsewhere(problems._lock):
        pid = os.fork()
        if pid == 0:
            signal.alarm(int(PATIENCE))  # ends a child that waits for ever
            stood = problems.stands("full")
            problems.clear("full")
            os._exit(0 if stood and problems.status() == "ok" else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert problems.stands("full")
