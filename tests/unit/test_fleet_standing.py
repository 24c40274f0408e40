"""What a publisher says of itself on its host: when it is written, and what is made of it."""

import os
from types import SimpleNamespace

import pytest

from shmelim.eliminations.runtime import RuntimeDirectory
from shmelim.errors import FencedError, ShmelimError
from shmelim.fleet import standing
from shmelim.fleet.standing import Standing, StandingFile, standing_of

REFUSED = ShmelimError("refused", hint="let it in")


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(at=1000.0)
    monkeypatch.setattr(standing, "boottime", lambda: now.at)
    return now


@pytest.fixture
def publisher():
    head = SimpleNamespace(last=SimpleNamespace(term=3), line=5, seq=7)
    return SimpleNamespace(head=head, behind=0, held=None)


@pytest.fixture
def runtime(monkeypatch, tmp_path):
    monkeypatch.setenv("SHMELIM_RUNTIME_DIR", str(tmp_path))
    return RuntimeDirectory("any")


@pytest.fixture
def file(runtime, publisher, clock):
    return StandingFile(runtime, publisher, "redis://engine")


def problems():
    return [(each["name"], each["severity"]) for each in standing_of("any").problems()]


def end_fenced(file):
    with pytest.raises(FencedError), file:
        raise FencedError("another one has taken over", hint="stop one")


def test_nothing_is_known_of_what_was_never_published(runtime):
    assert standing_of("any") is None


def test_one_that_runs_says_how_far_it_is(file, runtime):
    file.note()
    found = standing_of("any")
    assert (found.term, found.line, found.seq, found.is_running, found.problems()) == (3, 5, 7, True, [])
    assert (runtime.path / "publisher.json").stat().st_mode & 0o777 == 0o600


def test_one_that_does_not_lead_yet_says_so(file, publisher):
    publisher.head = None
    file.note(REFUSED)
    assert (standing_of("any").line, standing_of("any").error) == (0, "refused")


def test_it_is_written_once_a_second_and_at_once_when_it_is_another(file, publisher, clock):
    file.note()
    publisher.head.seq = 8
    clock.at += 0.5
    file.note()
    assert standing_of("any").seq == 7
    publisher.held = "wait"
    file.note()
    assert (standing_of("any").seq, standing_of("any").held) == (8, "wait")
    publisher.head.seq = 9
    clock.at += 1
    file.note()
    assert standing_of("any").seq == 9


def test_an_error_is_a_problem_once_it_lasts(file, clock):
    file.note(REFUSED)
    assert problems() == []
    clock.at += 11
    file.note(REFUSED)
    assert problems() == [("publisher_failing", "degraded")]
    [found] = standing_of("any").problems()
    assert "redis://engine" in found["text"]
    assert "11 s: refused" in found["text"]
    assert found["remedy"] == "let it in"
    file.note()
    assert problems() == []
    file.note(REFUSED)
    assert problems() == [], "it counts from the first failure of these"


def test_holding_is_worth_knowing(file, publisher):
    publisher.held = "the sync of 14:00\n\x1b[2J"
    file.note()
    assert problems() == [("publisher_held", "notice")]
    assert "\x1b" not in standing_of("any").problems()[0]["text"]


def test_one_that_was_killed_is_missed_when_nobody_starts_it_again(runtime, clock, publisher):
    file = StandingFile(runtime, publisher, "redis://engine")
    child = os.fork()
    if child == 0:
        os._exit(0)
    file._last = Standing("redis://engine", child, 12345.0, -1.0)
    os.waitpid(child, 0)
    file.note()
    assert problems() == [], "one in another container has a process id that says nothing here"
    clock.at += 11
    assert problems() == [("publisher_down", "degraded")]


def test_one_that_is_busy_for_long_is_not_dead(file, clock):
    file.note()
    clock.at += 3600
    assert problems() == []


def test_what_was_said_before_the_machine_started_is_old(file, clock):
    file.note()
    clock.at = 5.0
    assert standing_of("any").age == float("inf")
    assert standing_of("any").problems() == [], "its process lives"


def test_an_end_that_was_asked_for_leaves_nothing(file):
    with file:
        file.note()
    assert standing_of("any") is None


def test_an_end_by_an_error_stays_until_it_is_started_again(file, runtime, publisher):
    end_fenced(file)
    assert problems() == [("publisher_ended", "degraded")]
    assert not standing_of("any").is_running
    StandingFile(runtime, publisher, "redis://engine").note()
    assert problems() == []


def test_who_was_superseded_on_the_same_host_says_nothing_over_the_other(file, runtime, publisher):
    other = StandingFile(runtime, publisher, "redis://other")
    other._last = Standing("redis://other", 1, 1.0, -1.0)
    other.note()
    end_fenced(file)
    assert standing_of("any").engine == "redis://other"


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b'{"engine": 1}', b"\xff" * 100])
def test_what_cannot_be_read_is_nothing(file, runtime, raw):
    (runtime.path / "publisher.json").write_bytes(raw)
    assert standing_of("any") is None


def test_publishing_does_not_suffer_where_it_cannot_be_written(file, runtime):
    runtime.path.rmdir()
    with file:
        file.note()
    assert standing_of("any") is None
