"""Who is told of problems: once each, of their ends, and again of what was not taken."""

import asyncio

import pytest

from shmelim.notify.problems import ProblemMessages, take_over
from shmelim.system.problems import Problem, Problems


class Notifier:
    """Keeps what it takes; refuses by an answer of False or an error."""

    def __init__(self):
        self.taken = []
        self.refusal = None

    def send_message(self, text, level="info"):
        if isinstance(self.refusal, BaseException):
            raise self.refusal
        if self.refusal is False:
            return False
        self.taken.append((level, text))
        return None


@pytest.fixture
def notifier():
    return Notifier()


@pytest.fixture
def problems():
    return Problems()


@pytest.fixture
def messages(problems, notifier):
    return ProblemMessages(problems, lambda: notifier)


def test_a_problem_is_told_with_its_remedy_and_its_end(problems, messages, notifier, monkeypatch):
    monkeypatch.setattr("shmelim.system.problems.now_ms", lambda: 1000)
    for _ in range(3):
        problems.report("full", "no room", remedy="make some")
    monkeypatch.setattr("shmelim.system.problems.now_ms", lambda: 3500)
    problems.clear("full")
    assert notifier.taken == [("error", "no room; make some"), ("success", "over after 2.5 s: no room")]


def test_a_notice_is_a_warning_and_what_gets_worse_is_told_again(problems, messages, notifier):
    problems.report("full", "little room", severity="notice")
    problems.report("full", "no room", severity="failing")
    assert notifier.taken == [("warning", "little room"), ("error", "no room")]


def test_ends_are_not_told_to_whoever_does_not_want_them(problems, notifier):
    ProblemMessages(problems, lambda: notifier, ends=False)
    problems.report("full", "no room")
    problems.clear("full")
    assert notifier.taken == [("error", "no room")]


@pytest.mark.parametrize("refusal", [False, OSError("no"), asyncio.CancelledError()])
def test_what_was_refused_is_sent_again_while_it_stands(problems, messages, notifier, refusal):
    notifier.refusal = refusal
    problems.report("full", "no room")
    problems.report("slow", "it waits")
    messages.send_again()
    assert notifier.taken == []
    notifier.refusal = None
    messages.send_again()
    messages.send_again()
    assert sorted(notifier.taken) == [("error", "it waits"), ("error", "no room")]


def test_what_comes_after_a_message_that_was_refused_waits_behind_it(problems, messages, notifier):
    notifier.refusal = False
    problems.report("full", "no room")
    messages.send("slashes are held", "warning")
    notifier.refusal = None
    problems.report("slow", "it waits")
    assert [text for _, text in notifier.taken] == ["no room", "slashes are held", "it waits"]


def test_that_people_cannot_be_told_is_a_problem_of_which_they_are_not_told(
    problems, messages, notifier, monkeypatch
):
    monkeypatch.setattr("shmelim.notify.problems.now_ms", lambda: 1000)
    notifier.refusal = OSError("no")
    problems.report("full", "no room")
    messages.report_undelivered(problems)
    [_, problem] = problems.standing()
    assert (problem.name, problem.since_ms) == ("alerts_undelivered", 1000)
    assert problem.remedy
    notifier.refusal = None
    messages.send_again()
    messages.report_undelivered(problems)
    assert not problems.stands("alerts_undelivered")
    assert [text for _, text in notifier.taken] == ["no room"]


def test_of_a_problem_that_nobody_heard_of_the_end_is_not_told_either(problems, messages, notifier):
    notifier.refusal = False
    problems.report("full", "no room")
    problems.report("full", "no room at all", severity="failing")
    notifier.refusal = None
    problems.clear("full")
    messages.send_again()
    assert notifier.taken == []


def test_the_end_of_a_problem_is_told_though_its_getting_worse_was_refused(problems, messages, notifier):
    problems.report("full", "no room")
    notifier.refusal = False
    problems.report("full", "no room at all", severity="failing")
    notifier.refusal = None
    problems.clear("full")
    assert [level for level, _ in notifier.taken] == ["error", "success"]


def test_an_end_that_was_refused_is_sent_again(problems, messages, notifier):
    problems.report("full", "no room")
    notifier.refusal = False
    problems.clear("full")
    notifier.refusal = None
    messages.send_again()
    assert [level for level, _ in notifier.taken] == ["error", "success"]


@pytest.mark.parametrize("wish", [KeyboardInterrupt, SystemExit])
def test_the_wish_to_end_the_process_passes(problems, messages, notifier, wish):
    notifier.refusal = wish()
    with pytest.raises(wish):
        problems.report("full", "no room")


def test_nobody_to_tell_is_no_reason_to_try_again(problems):
    messages = ProblemMessages(problems, lambda: None)
    problems.report("full", "no room")
    assert messages._unsent == {}


def test_what_waits_is_bounded(problems, messages, notifier, monkeypatch):
    monkeypatch.setattr("shmelim.notify.problems._MOST", 3)
    notifier.refusal = False
    for number in range(5):
        problems.report("bad", "bad", subject=str(number))
    assert [subject for _, subject in messages._unsent] == ["2", "3", "4"]


def test_what_a_health_check_lists_is_told_once_and_its_end_too(problems, messages, notifier, monkeypatch):
    monkeypatch.setattr("shmelim.system.problems.now_ms", lambda: 4000)
    server = Problems()
    server.report("full", "no room", remedy="make some", since_ms=1000)
    server.report("slash", "in doubt", subject="a")
    for _ in range(2):
        take_over(problems, [problem._asdict() for problem in server.standing()])
    server.clear("full")
    server.report("slash", "in doubt", subject="b", severity="notice")
    take_over(problems, [problem._asdict() for problem in server.standing()])
    assert notifier.taken == [
        ("error", "no room; make some"),
        ("error", "in doubt"),
        ("success", "over after 3.0 s: no room"),
        ("warning", "in doubt"),
    ]


@pytest.mark.parametrize(
    "wrong",
    [
        *({"name": value} for value in ([], None)),
        *({"subject": value} for value in ({}, 1)),
        {"text": 5},
        {"severity": "critical"},
        {"remedy": 7},
        {"since_ms": "yesterday"},
    ],
)
def test_what_a_health_check_lists_and_is_no_problem_is_passed_over(problems, messages, notifier, wrong):
    """It came out of the health check as a bare TypeError."""
    right = Problem("full", "", "no room", "degraded", None, 1000)
    take_over(problems, [right._asdict() | wrong, right._asdict(), "text", {}])
    assert problems.standing() == [right]
    assert notifier.taken == [("error", "no room")]
