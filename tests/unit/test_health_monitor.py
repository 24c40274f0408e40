"""When a service is checked, what counts as a failure, when it is restarted, and what is told of it."""

import contextlib
import logging
import signal
import threading

import pytest
from ledger import Alerts
from waiting import PATIENCE

from shmelim.channel.key import SharedKey
from shmelim.errors import CallerFaultError, KeyFileError, NotServingError, UnknownMethodError
from shmelim.service import health
from shmelim.service.owner import Core
from shmelim.service.settings import ServiceSettings
from shmelim.system.processes import ProcessIdentity

OK = {"status": "ok"}


class Subject:
    """A service whose server is as the test says, and a record of what happened to it."""

    enable_health_check = True
    enable_auto_restart = True
    max_consecutive_failures = 3

    def __init__(self):
        self.answer = OK
        self.probes = 0
        self.restarts = []
        self.restart_error = None
        self.healed_by_restart = True
        self.slack_notifier = Alerts()
        self.now = 0.0
        self.core = Core("Svc", "/nowhere", SharedKey(), ServiceSettings(restart_on_exit=False), ())
        self.core.facade = lambda: self
        self.core.page.server = self.identity = ProcessIdentity.this_process()
        self.core._checking = self.core.server = self.mark = self
        self.core.restart = lambda failing: self.restart(failing)  # noqa: PLW0108  # tests replace it

    def call(self, method, *, idempotent):
        self.probes += 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def retire(self, *_why):
        pass

    close = stop = retire

    def restart(self, failing):
        self.restarts.append(failing)
        if self.restart_error is not None:
            raise self.restart_error
        if self.healed_by_restart:
            self.answer = OK
        return True

    def check(self, seconds=60.0, *, limit=3, restarts=True, interval=60.0):
        self.now += seconds * 1000
        self.max_consecutive_failures, self.enable_auto_restart = limit, restarts
        return self.core.check(self.now, interval * 1000)

    @property
    def told(self):
        return self.slack_notifier.messages

    def levels(self):
        return [level for level, _ in self.told]


@pytest.fixture
def subject(monkeypatch):
    monkeypatch.setattr(health, "_numbers", {})
    return Subject()


def test_checks_at_most_once_an_interval(subject):
    assert subject.check(0)
    assert subject.check(59.999)
    assert subject.probes == 1
    assert subject.check(0.001)
    assert subject.probes == 2


def test_what_a_signal_handler_raises_in_a_check_stops_no_later_one(subject):
    class LateError(Exception):
        pass

    def late(*_):
        raise LateError

    before = signal.signal(signal.SIGALRM, late)
    try:
        for number in range(5000):
            with contextlib.suppress(LateError):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + number % 60))
                    for _ in range(20):
                        subject.check()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    probes = subject.probes
    assert subject.check()
    assert subject.probes == probes + 1


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
        ({"status": "failing"}, "status error: the status is 'failing'"),
        ({}, "status error: the status is None"),
        ({"status": "OK"}, "status error: the status is 'OK'"),
        ({"status": ["ok"]}, "status error: the status is ['ok']"),
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
    assert subject.core._failures == 2
    subject.answer = OSError("y")
    assert not subject.check()
    assert len(subject.restarts) == 1
    assert subject.core._failures == 0


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
    assert "recovered after" in subject.told[2][1]


def test_recovery_without_a_restart(subject):
    subject.answer = OSError("x")
    subject.check()
    subject.answer = OK
    assert subject.check()
    assert subject.levels() == ["error", "success"]
    assert "outage 1: recovered after 0.0 s and 0 restarts" in subject.told[1][1]


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
    assert "3 failed health checks in a row, no automatic restart: RPC error: OSError: x" in subject.told[1][1]
    subject.answer = OK
    assert subject.check(restarts=False)
    assert subject.levels() == ["error", "error", "success"]


def test_restarting_can_be_allowed_while_it_fails(subject):
    subject.answer = OSError("x")
    for _ in range(4):
        subject.check(restarts=False)
    subject.check(restarts=True)
    assert len(subject.restarts) == 1


def test_the_restart_learns_which_server_failed(subject):
    subject.answer = OSError("x")
    subject.check(limit=1)
    assert subject.restarts == [ProcessIdentity.this_process()]


def test_two_checks_at_once_restart_once_and_neither_waits(subject):
    entered, go_on = threading.Event(), threading.Event()
    subject.answer = OSError("x")
    original = subject.restart

    def slow_restart(failing):
        entered.set()
        assert go_on.wait(PATIENCE)
        return original(failing)

    subject.restart = slow_restart
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
        subject.core.check(1000.0, 60_000)

    threads = [threading.Thread(target=check) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert subject.probes == 1


def test_a_notifier_may_check_the_service_itself(subject):
    """No lock is held then that another check waits for."""
    found = []

    class Checking:
        def send_message(self, text, level="info"):
            found.append((level, subject.check(0)))

    subject.slack_notifier = Checking()
    subject.answer = OSError("x")
    subject.check(limit=1)
    assert found == [("error", False), ("warning", False), ("success", False)]


@pytest.mark.parametrize(
    "error",
    [
        KeyFileError("there is no key file"),
        CallerFaultError("too many open files"),
        MemoryError(),
    ],
)
def test_what_is_the_askers_own_fault_is_not_counted_and_told_once(subject, error):
    subject.answer = error
    for _ in range(5):
        assert subject.check(limit=1) is False
    assert subject.restarts == []
    assert subject.core._failures == 0
    ((level, text),) = subject.told
    assert level == "warning"
    assert "cannot check the server, which may be well: RPC error: " in text
    subject.answer = OK
    assert subject.check()
    assert len(subject.told) == 1


def test_failures_of_an_earlier_server_do_not_count(subject):
    subject.answer = OSError("x")
    assert [subject.check(limit=3) for _ in range(2)] == [False] * 2
    subject.core.page.server = ProcessIdentity(1, 1.0)
    assert [subject.check(limit=3) for _ in range(2)] == [False] * 2
    assert not subject.restarts
    subject.check(limit=3)
    assert len(subject.restarts) == 1


def test_a_dead_server_is_not_asked_by_its_owner_and_may_be_by_a_copy(subject):
    """To which another owner's may answer, at the same address and with the same key."""
    subject.core.page.server = ProcessIdentity(1, 1.0)
    assert not subject.check()
    assert subject.probes == 0
    assert "nobody serves at /nowhere: process 1 has ended" in subject.told[0][1]
    subject.core.is_makers = False
    assert subject.check()
    assert subject.probes == 1


def test_an_outage_whose_end_another_process_told_is_told_of_when_it_begins_anew(subject):
    subject.answer = OSError("x")
    subject.check()
    subject.core.page.fall()  # by another process
    subject.check()
    assert [text.split(": ")[1] for _, text in subject.told] == ["outage 1", "outage 2"]


def test_an_outage_of_which_a_process_told_that_is_gone_is_ended_by_another(subject):
    subject.core.page.rise(1)
    assert subject.check()
    assert subject.levels() == ["success"]


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
    traces = [record.exc_info for record in caplog.records if "in a row" in record.getMessage()]
    assert traces[0][1] is subject.answer
    assert traces[1] is None


def test_a_failing_notifier_is_logged_and_nothing_else(subject, caplog):
    class Broken:
        def send_message(self, text, level="info"):
            raise RuntimeError("no channel")

    subject.slack_notifier = Broken()
    subject.answer = OSError("the alert")
    assert not subject.check()
    assert "a message could not be sent: Svc: outage 1: health check failed" in caplog.text
    subject.slack_notifier = None
    assert not subject.check()


def test_an_error_of_ours_is_logged_without_its_traceback(subject, caplog):
    subject.answer = subject.restart_error = NotServingError("nobody serves")
    with caplog.at_level(logging.WARNING, logger="shmelim.service"):
        subject.check(limit=1)
    assert not any(record.exc_info for record in caplog.records)
    assert "restart failed: nobody serves" in caplog.text


def test_a_server_that_cannot_be_checked_is_told_of_once_and_left_alone(subject):
    subject.answer = UnknownMethodError("Svc has no remote method 'health_check_rpc'")
    for _ in range(5):
        assert subject.check(limit=1)
    text = "Svc: health cannot be checked, and counts as good: Svc has no remote method 'health_check_rpc'"
    assert subject.told == [("warning", text)]
    assert not subject.restarts
    subject.answer = OSError("x")  # that it cannot be reached is another matter
    assert not subject.check(limit=1)
    assert len(subject.restarts) == 1


def test_what_fails_after_the_end_is_no_failure(subject):
    subject.core.refusal = "Svc was shut down"
    subject.answer = OSError("x")
    for _ in range(5):
        assert not subject.check(limit=1)
    assert subject.told == []
    assert subject.restarts == []


def test_an_end_while_it_restarts_is_no_failure_either(subject):
    def restart(_failing):
        subject.core.refusal = "Svc was shut down"
        raise NotServingError("too late")

    subject.answer = OSError("x")
    subject.restart = restart
    assert not subject.check(limit=1)
    assert subject.levels() == ["error"]
