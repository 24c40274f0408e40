"""One round of alerts for each outage, whoever finds what, and in whatever order it comes in."""

import pytest
from shmelim.service.outages import Finding, Outages

from shmelim.service import outages


@pytest.fixture
def told(monkeypatch):
    monkeypatch.setattr(outages, "_numbers", {})
    return []


@pytest.fixture
def svc(told):
    return Outages("Svc", lambda text, level: told.append((level, text)))


def failed(since, detail="down"):
    return Finding("failed", since, since + 0.5, 1, detail)


def restarted(since):
    return Finding("restarted", since, since + 0.5, 3)


def recovered(since):
    return Finding("recovered", since, since + 0.5, 3)


def test_three_processes_that_see_one_death(svc, told):
    for since in (1.0, 1.1, 1.2):
        svc.report(failed(since, f"down since {since}"), float("-inf"))
    for since in (1.0, 1.1, 1.2):
        svc.report(restarted(since), 1.9)
        svc.report(recovered(since + 2.0), 1.9)
    assert told == [
        ("error", "Svc: outage 1: health check failed: down since 1.0"),
        ("warning", "Svc: outage 1: server restarted after 3 failed health checks"),
        ("success", "Svc: outage 1: recovered after 2.5 s, 3 failed health checks and 1 restart"),
    ]


def test_one_that_learns_of_it_late(svc, told):
    """Its check began before the recovery, and hung."""
    for finding in (failed(1.0), restarted(1.0), recovered(2.0), failed(2.4), restarted(2.4), recovered(5.0)):
        svc.report(finding, 1.9)
    assert [level for level, _ in told] == ["error", "warning", "success"]


def test_one_that_fails_on_is_heard_again(svc, told):
    for finding in (failed(1.0), recovered(2.0), failed(2.4), failed(2.6), recovered(5.0)):
        svc.report(finding)
    assert [text.split(": ")[1] for _, text in told] == ["outage 1"] * 2 + ["outage 2"] * 2
    assert told[-1][1].endswith("1 failed health check and 0 restarts")


def test_each_restart_is_told_once(svc, told):
    svc.report(failed(1.0))
    for restarted_at in (2.0, 2.0, 3.0, 3.0, 3.0):
        svc.report(restarted(1.0), restarted_at)
    svc.report(recovered(9.0), 3.0)
    assert [level for level, _ in told] == ["error", "warning", "warning", "success"]
    assert told[-1][1].endswith("and 2 restarts")


@pytest.mark.parametrize("kind", ["not restarted", "restart failed"])
def test_what_cannot_be_done_is_told_once_an_outage(svc, told, kind):
    for start in (1.0, 11.0):
        svc.report(failed(start))
        for _ in range(3):
            svc.report(Finding(kind, start, start, 3, "because"))
        svc.report(recovered(start + 5.0))
        svc.report(Finding(kind, start, start, 3, "late"))
    assert [level for level, _ in told] == ["error", "error", "success"] * 2


def test_what_cannot_be_checked_is_told_once(svc, told):
    for _ in range(3):
        svc.report(Finding("unchecked", 1.0, 1.0, 0, "no such method"))
    assert told == [("warning", "Svc: health cannot be checked: no such method")]


def test_no_two_outages_of_a_name_look_alike(svc, told):
    """Also those of one object and of the next, which have one notifier."""
    later = Outages("Svc", lambda text, level: told.append((level, text)))
    for outage in (svc, svc, later):
        for finding in (failed(len(told)), restarted(len(told)), recovered(len(told))):
            outage.report(finding)
    assert len({text for _, text in told}) == len(told) == 9


def test_a_recovery_that_is_noticed_before_the_restart_is_told(svc, told):
    """By a process that was faster than the one which had it restarted."""
    for finding, restarted_at in (
        (failed(1.0), 0.5),
        (failed(1.1), 0.5),
        (recovered(2.0), 1.9),
        (restarted(1.1), 1.9),
        (recovered(2.1), 1.9),
    ):
        svc.report(finding, restarted_at)
    assert [level for level, _ in told] == ["error", "warning", "success"]
    assert told[-1][1].endswith("2 failed health checks and 1 restart")


def test_a_restart_before_the_outage_is_none_of_its_own(svc, told):
    svc.report(failed(1.0), 0.5)
    svc.report(recovered(2.0), 0.5)
    assert [level for level, _ in told] == ["error", "success"]


def test_a_late_recovery_does_not_end_the_next_outage(svc, told):
    for finding in (failed(1.0), recovered(2.0), failed(9.0), recovered(2.1), recovered(10.0)):
        svc.report(finding)
    assert [level for level, _ in told] == ["error", "success"] * 2
