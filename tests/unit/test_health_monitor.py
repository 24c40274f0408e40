"""When a service is checked, what counts as a failure, when it is restarted, and what is told of it."""

import logging
import threading

import pytest
from ledger import PATIENCE
from shmelim.service.monitor import HealthMonitor, HealthPolicy, tell
from shmelim.service.outages import Outages

from shmelim.errors import NotServingError, UnknownMethodError
from shmelim.service import outages

OK = {"status": "ok"}


class Subject:
    """A monitor over a server that is as the test says, and a record of what happened to it."""

    def __init__(self):
        self.answer = OK
        self.probes = 0
        self.restarts = []
        self.restart_error = None
        self.healed_by_restart = True
        self.told = []
        self.now = 0.0
        self.ended = False
        report = Outages("Svc", self.notify).report
        self.monitor = HealthMonitor("Svc", self.probe, self.restart, report, lambda: self.ended)

    def probe(self):
        self.probes += 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def restart(self, failed_at):
        self.restarts.append(failed_at)
        if self.restart_error is not None:
            raise self.restart_error
        if self.healed_by_restart:
            self.answer = OK

    def notify(self, text, level):
        self.told.append((level, text))

    def check(self, seconds=60.0, *, limit=3, restarts=True, interval=60.0):
        self.now += seconds * 1000
        return self.monitor.check(self.now, HealthPolicy(interval * 1000, limit, restarts))

    def levels(self):
        return [level for level, _ in self.told]


@pytest.fixture
def subject(monkeypatch):
    monkeypatch.setattr(outages, "_numbers", {})
    return Subject()


def test_checks_at_most_once_an_interval(subject):
    assert subject.check(0)
    assert subject.check(59.999)
    assert subject.probes == 1
    assert subject.check(0.001)
    assert subject.probes == 2


def test_the_first_check_is_made_whatever_the_time(subject):
    subject.check(-5)
    assert subject.probes == 1


def test_a_clock_that_goes_back_stops_no_checks(subject):
    subject.check()
    subject.check(-3600)
    assert subject.probes == 2
    subject.check(1)
    assert subject.probes == 2


def test_between_checks_the_last_result_holds(subject):
    subject.answer = {"status": "sick"}
    assert not subject.check()
    subject.answer = OK
    assert not subject.check(1)
    assert subject.check(60)
    assert subject.check(1)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (ConnectionError("gone"), "RPC error: ConnectionError: gone"),
        (TimeoutError("late"), "RPC error: TimeoutError: late"),
        ({"status": "degraded"}, "status error: the status is 'degraded', not 'ok'"),
        ({}, "status error: the status is None, not 'ok'"),
        ({"status": "OK"}, "status error: the status is 'OK', not 'ok'"),
        ("ok", "status error: the answer is 'ok', not a dict with a status"),
        (None, "status error: the answer is None, not a dict with a status"),
    ],
)
def test_rpc_errors_and_status_errors_are_told_apart(subject, answer, expected):
    subject.answer = answer
    assert not subject.check()
    assert subject.told == [("error", f"Svc: outage 1: health check failed: {expected}")]


def test_both_kinds_count_and_restart_at_the_threshold(subject):
    for answer in (OSError("x"), {"status": "sick"}):
        subject.answer = answer
        assert not subject.check()
        assert not subject.restarts
    assert subject.monitor.consecutive_failures == 2
    subject.answer = OSError("y")
    assert not subject.check()
    assert len(subject.restarts) == 1
    assert subject.monitor.consecutive_failures == 0


def test_a_good_check_ends_the_count(subject):
    for answer in (OSError(), OSError(), OK, OSError(), OSError()):
        subject.answer = answer
        subject.check()
    assert not subject.restarts
    subject.check()
    assert len(subject.restarts) == 1


def test_a_streak_is_told_once_each_restart_once_and_the_recovery_once(subject):
    subject.answer = OSError("x")
    for _ in range(3):
        assert not subject.check()
    for _ in range(5):
        assert subject.check()
    assert subject.levels() == ["error", "warning", "success"]
    assert "restarted after 3 failed health checks" in subject.told[1][1]
    assert "recovered" in subject.told[2][1]
    assert "3 failed health checks and 1 restart" in subject.told[2][1]


def test_recovery_without_a_restart(subject):
    subject.answer = OSError("x")
    subject.check()
    subject.answer = OK
    assert subject.check()
    assert subject.levels() == ["error", "success"]
    assert "1 failed health check and 0 restarts" in subject.told[1][1]


def test_the_next_streak_is_told_again(subject):
    for answer in (OSError(), OK, OSError(), OK):
        subject.answer = answer
        subject.check()
    assert subject.levels() == ["error", "success"] * 2


def test_a_failed_restart_is_told_once_and_tried_again_at_every_check(subject):
    subject.answer = OSError("x")
    subject.restart_error = TimeoutError("not ready")
    for _ in range(5):
        assert not subject.check()
    assert len(subject.restarts) == 3
    assert subject.levels() == ["error", "error"]
    assert "restart failed, will be tried again: TimeoutError: not ready" in subject.told[1][1]
    subject.restart_error = None
    assert not subject.check()
    assert len(subject.restarts) == 4
    assert subject.levels() == ["error", "error", "warning", "success"]
    assert subject.check()


def test_after_a_restart_that_did_not_help_the_count_begins_anew(subject):
    subject.answer = {"status": "warming up"}
    subject.healed_by_restart = False
    for _ in range(3):
        subject.check(limit=3)
    assert len(subject.restarts) == 1
    for _ in range(2):
        assert not subject.check(limit=3)
    assert len(subject.restarts) == 1
    subject.check(limit=3)
    assert len(subject.restarts) == 2
    assert subject.levels() == ["error", "warning", "warning"]


def test_without_automatic_restart_it_is_told_once_that_somebody_must_act(subject):
    subject.answer = OSError("x")
    for _ in range(6):
        assert not subject.check(restarts=False)
    assert not subject.restarts
    assert subject.levels() == ["error", "error"]
    assert "3 failed health checks in a row, no automatic restart" in subject.told[1][1]
    subject.answer = OK
    assert subject.check(restarts=False)
    assert subject.levels() == ["error", "error", "success"]


def test_restarting_can_be_allowed_while_it_fails(subject):
    subject.answer = OSError("x")
    for _ in range(4):
        subject.check(restarts=False)
    subject.check(restarts=True)
    assert len(subject.restarts) == 1


def test_the_restart_learns_when_the_failed_check_began(subject):
    subject.answer = OSError("x")
    subject.check(limit=1)
    first = subject.restarts[0]
    subject.answer = OSError("x")
    subject.check(limit=1)
    assert subject.restarts[1] > first


def test_two_checks_at_once_restart_once_and_neither_waits(subject):
    entered, go_on = threading.Event(), threading.Event()
    subject.answer = OSError("x")
    original = subject.restart

    def slow_restart(failed_at):
        entered.set()
        assert go_on.wait(PATIENCE)
        original(failed_at)

    subject.monitor._restart = slow_restart
    results = []
    first = threading.Thread(target=lambda: results.append(subject.check(limit=1)))
    first.start()
    assert entered.wait(PATIENCE)
    assert subject.check(limit=1) is False  # what is known meanwhile; and it returned while the other one restarts
    assert len(subject.restarts) == 0
    go_on.set()
    first.join(PATIENCE)
    assert results == [False]
    assert len(subject.restarts) == 1
    assert subject.levels() == ["error", "warning", "success"]


def test_many_threads_at_once_check_once(subject):
    barrier = threading.Barrier(8)

    def check():
        barrier.wait(PATIENCE)
        subject.monitor.check(1000.0, HealthPolicy(60_000, 3, restarts=True))

    threads = [threading.Thread(target=check) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert subject.probes == 1


def test_alerts_go_out_after_the_restart_and_without_a_lock(subject):
    """A notifier that is slow, or checks itself, keeps nobody from restarting or checking."""
    order = []

    def notify(text, level):
        order.append(level)
        assert subject.restarts
        assert subject.monitor._turn.acquire(blocking=False)
        subject.monitor._turn.release()

    subject.monitor._report = Outages("Svc", notify).report
    subject.answer = OSError("x")
    subject.check(limit=1)
    assert order == ["error", "warning", "success"]


def test_an_interrupt_leaves_the_monitor_usable(subject):
    subject.answer = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        subject.check()
    subject.answer = OK
    assert subject.check()


def test_the_traceback_is_logged_once_a_streak(subject, caplog):
    subject.answer = OSError("the cause")
    with caplog.at_level(logging.WARNING, logger="shmelim.service"):
        subject.check()
        subject.check()
    traces = [record.exc_info for record in caplog.records]
    assert traces[0][1] is subject.answer
    assert traces[1] is None


def test_a_failing_notifier_is_logged_and_nothing_else(caplog):
    class Broken:
        def send_message(self, text, level="info"):
            raise RuntimeError("no channel")

    tell(Broken(), "the alert", "error")
    assert "the alert" in caplog.text
    tell(None, "nobody listens", "error")


def test_an_error_of_ours_is_logged_without_its_traceback(subject, caplog):
    subject.answer = subject.restart_error = NotServingError("nobody serves")
    with caplog.at_level(logging.WARNING, logger="shmelim.service"):
        subject.check(limit=1)
    assert [record.exc_info for record in caplog.records] == [None, None]
    assert "restart failed, the next check tries again: nobody serves" in caplog.text


def test_a_server_that_cannot_be_checked_is_told_of_once_and_left_alone(subject):
    subject.answer = UnknownMethodError("Svc has no remote method 'health_check_rpc'")
    for _ in range(5):
        assert subject.check(limit=1)
    assert subject.told == [
        ("warning", "Svc: health cannot be checked: Svc has no remote method 'health_check_rpc'")
    ]
    assert not subject.restarts
    subject.answer = OSError("x")  # that it cannot be reached is another matter
    assert not subject.check(limit=1)
    assert len(subject.restarts) == 1


def test_what_fails_after_the_end_is_no_failure(subject):
    subject.ended = True
    subject.answer = OSError("x")
    for _ in range(5):
        assert not subject.check(limit=1)
    assert subject.told == []
    assert subject.restarts == []


def test_an_end_while_it_restarts_is_no_failure_either(subject):
    def restart(_failed_at):
        subject.ended = True
        raise NotServingError("too late")

    subject.answer = OSError("x")
    subject.monitor._restart = restart
    assert not subject.check(limit=1)
    assert [level for level, _ in subject.told] == ["error"]  # which the service keeps to itself by now
