"""What a server knows of the processing, which runs in another process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from shmelim import EliminationManagerServer
from shmelim.eliminations import ticks
from shmelim.eliminations.ticks import Ticks
from shmelim.system.problems import Problems

PROBLEM = {
    "name": "positions",
    "subject": "a",
    "text": "no price",
    "severity": "degraded",
    "remedy": None,
    "since_ms": 1_700_000_000_000,
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(ticks, "monotonic", lambda: now[0])
    return now


def test_without_a_processing_nothing_is_overdue(clock: list[float]) -> None:
    problems = Problems()
    reports = Ticks(problems)
    clock[0] += 1e9
    assert reports.health() == {"last_tick_ms": None, "tick_age_s": None, "problems": []}
    assert problems.standing() == []


def test_a_processing_without_an_interval_is_heard_too(clock: list[float]) -> None:
    reports = Ticks(Problems())
    reports.report(5, 0, [PROBLEM])
    assert (reports.health()["last_tick_ms"], len(reports.health()["problems"])) == (5, 1)


def test_problems_are_marked_as_those_of_the_processing() -> None:
    reports = Ticks(Problems())
    reports.report(5, 300_000, [PROBLEM])
    assert reports.health()["problems"] == [PROBLEM | {"part": "processing"}]
    reports.report(6, 300_000, [])
    assert reports.health()["problems"] == []


def test_ticks_that_cease_are_a_problem_until_there_is_another(clock: list[float]) -> None:
    problems = Problems()
    reports = Ticks(problems)
    reports.report(5, 300_000, [])
    clock[0] += 899
    assert reports.health()["tick_age_s"] == 899.0
    assert problems.standing() == []
    clock[0] += 2
    reports.health()
    assert [problem.name for problem in problems.standing()] == ["tick_overdue"]
    reports.report(6, 300_000, [])
    assert reports.health() == {"last_tick_ms": 6, "tick_age_s": 0.0, "problems": []}
    assert problems.standing() == []


def test_a_tick_that_fails_in_a_step_is_not_a_whole_one(clock: list[float]) -> None:
    problems = Problems()
    reports = Ticks(problems)
    for _ in range(10):
        reports.report(None, 300_000, [PROBLEM])
        clock[0] += 300
    assert reports.health()["last_tick_ms"] is None
    assert [problem.name for problem in problems.standing()] == ["tick_overdue"]


@pytest.mark.parametrize(
    "problem", [{}, PROBLEM | {"severity": "bad"}, PROBLEM | {"text": 5}, PROBLEM | {"more": 1}, 5]
)
def test_what_is_not_a_problem_is_refused_whole(problem: Any) -> None:
    reports = Ticks(Problems())
    reports.report(5, 300_000, [PROBLEM])
    with pytest.raises(msgspec.ValidationError):
        reports.report(6, 300_000, [PROBLEM, problem])
    assert reports.health()["last_tick_ms"] == 5


def test_problems_are_bounded_in_number_and_length() -> None:
    reports = Ticks(Problems())
    reports.report(5, 300_000, [PROBLEM | {"text": "x" * 100_000}] * 5000)
    found = reports.health()["problems"]
    assert len(found) == 200
    assert all(len(problem["text"]) == 1000 for problem in found)


def test_a_server_expects_the_ticks_that_its_predecessor_knew_of(clock: list[float], tmp_path: Path) -> None:
    """Or the health would be well for ever, if the loop died before the server."""
    for restarted in (False, True):
        with EliminationManagerServer(None, tmp_path, durability="process") as server:
            if not restarted:
                server.report_processing_rpc(5, 300_000, [])
                commits = server.health_check_rpc()["commits"]
                server.report_processing_rpc(6, 300_000, [])
                assert server.health_check_rpc()["commits"] == commits, "once is enough"
                continue
            assert server.health_check_rpc()["problems"] == []
            clock[0] += 901
            assert [problem["name"] for problem in server.health_check_rpc()["problems"]] == ["tick_overdue"]
