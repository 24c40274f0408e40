"""The time leaps, or only passes: what is deleted then."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from shmelim import EliminationManager, ValidatorEnvironment
from shmelim.system import clock

DAYS_S = 3 * 86_400.0


class Times:
    """The two clocks, which a test moves."""

    def __init__(self, monkeypatch):
        self.wall, self.boot = clock.now_ms() / 1000, clock.boottime()
        monkeypatch.setattr(clock, "now_ms", lambda: round(self.wall * 1000))
        monkeypatch.setattr(clock, "boottime", lambda: self.boot)

    def pass_by(self, seconds, *, leap=0.0):
        self.wall += seconds + leap
        self.boot += seconds


@pytest.fixture
def times(monkeypatch):
    return Times(monkeypatch)


@pytest.fixture
def make(times):
    made = []

    def make(**figures):
        told = []
        slack = SimpleNamespace(send_message=lambda text, level="info": told.append(text))
        metagraph = SimpleNamespace(hotkeys=["other"], has_hotkey=lambda hotkey: hotkey == "other")
        environment = ValidatorEnvironment(**figures)
        manager = EliminationManager(
            metagraph, None, None, running_unit_tests=True, environment=environment, slack_notifier=slack
        )
        made.append(manager)
        manager.append_elimination_row("gone", 0.1, "PLAGIARISM", round(times.wall * 1000))
        manager.process_eliminations()
        return manager, told

    yield make
    for manager in made:
        manager.shutdown()


@pytest.mark.parametrize("leap", [61.0, DAYS_S, -61.0])
def test_nothing_is_deleted_in_the_tick_after_a_leap(make, times, leap):
    manager, told = make()
    times.pass_by(DAYS_S, leap=leap)
    manager.process_eliminations()
    assert manager.is_hotkey_eliminated("gone")
    assert any(f"leapt by {leap:+.0f} s" in text for text in told)
    times.pass_by(1.0)
    manager.process_eliminations()
    assert not manager.is_hotkey_eliminated("gone")


@pytest.mark.parametrize("leap", [0.0, 59.0, -59.0])
def test_time_that_passes_deletes(make, times, leap):
    manager, told = make()
    times.pass_by(DAYS_S, leap=leap)
    manager.process_eliminations()
    assert not manager.is_hotkey_eliminated("gone")
    assert not any("leapt" in text for text in told)


def test_a_clock_of_ones_own_never_leaps(make, times):
    manager, told = make(clock=lambda: times.wall * 1000)
    times.pass_by(1.0, leap=DAYS_S)
    manager.process_eliminations()
    assert not manager.is_hotkey_eliminated("gone")
    assert not any("leapt" in text for text in told)
