"""Named problems: raised once, told once, cleared once."""

import pytest

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
