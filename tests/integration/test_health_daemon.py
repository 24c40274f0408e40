"""The health check daemon, as a thread and as processes: it checks, has the owner restart, survives, and ends."""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from ledger import Alerts, FileAlerts, Ledger, LedgerServer, hang, is_alive, kill, pid_after
from waiting import PATIENCE, until

from shmelim.service import HealthCheckDaemon
from shmelim.system import forks

TESTS = str(Path(__file__).parents[1])
KINDS = {
    "thread": ("thread", None),
    "forked process": ("process", "fork"),
    "spawned process": ("process", "spawn"),
}


@pytest.fixture
def alerts(tmp_path):
    return FileAlerts(tmp_path)


@pytest.fixture
def service(tmp_path, alerts):
    with Ledger(
        tmp_path,
        enable_health_check=True,
        health_check_interval_s=0,
        max_consecutive_failures=2,
        health_check_timeout=1.0,
        stop_timeout=0.1,
        slack_notifier=alerts,
    ) as service:
        yield service


@pytest.fixture
def begin(service):
    with contextlib.ExitStack() as stack:

        def begin(kind, **options):
            how, method = KINDS[kind]
            daemon = HealthCheckDaemon(service, 0.01, start_method=method, **options)
            return stack.enter_context(daemon.start(how))

        yield begin


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_hangs_is_replaced_and_told_of_once(begin, service, alerts, kind):
    """In the owner by the check itself; elsewhere the check ends it, and the owner starts another."""
    begin(kind)
    for round_number in range(1, 3):
        before = service.server_pid
        hang(before)
        until(lambda: alerts.levels().count("success") == round_number, "the recovery")  # noqa: B023
        assert service.pid() == pid_after(service, before)
    assert [level for level in alerts.levels() if level != "flushed"] == ["error", "warning", "success"] * 2


def test_no_log_handler_is_at_work_when_the_process_is_forked(service, monkeypatch):
    resting = []

    @contextlib.contextmanager
    def at_rest():
        resting.append("begun")
        yield
        resting.append("ended")

    monkeypatch.setattr(forks, "logs_at_rest", at_rest)
    with HealthCheckDaemon(service, 3600).start("thread"):
        assert resting == []
    with HealthCheckDaemon(service, 3600, start_method="fork").start("process"):
        assert resting == ["begun", "ended"]


def titles():
    return [" ".join(child.cmdline()).rstrip() for child in psutil.Process().children()]


@pytest.mark.parametrize("kind", ["thread", "forked process"])
def test_only_a_process_has_a_title(begin, service, kind):
    own = " ".join(psutil.Process().cmdline())
    begin(kind)
    if kind != "thread":
        until(lambda: "vali_LedgerServer_HealthChecker" in titles())
    else:
        assert "vali_LedgerServer_HealthChecker" not in titles()
    assert " ".join(psutil.Process().cmdline()) == own


@pytest.mark.parametrize("kind", ["thread", "forked process"])
def test_it_is_stopped_within_a_second(begin, service, kind, caplog):
    daemon = begin(kind)
    runner = daemon._runner
    began = time.monotonic()
    daemon.stop()
    seconds = time.monotonic() - began
    assert not runner.is_alive()
    assert seconds < PATIENCE / 2
    daemon.stop()
    with pytest.raises(RuntimeError):
        daemon.start()
    assert service.pid() == service.server_pid  # and the server is left alone


def test_stopping_does_not_wait_for_a_check_that_hangs():
    entered, go_on = threading.Event(), threading.Event()

    class Hanging:
        service_name = "Hanging"

        def health_check(self, current_time_ms=None):
            entered.set()
            go_on.wait(PATIENCE)
            return True

    daemon = HealthCheckDaemon(Hanging(), 0.001).start()
    assert entered.wait(PATIENCE)
    began = time.monotonic()
    daemon.stop()
    assert time.monotonic() - began < PATIENCE / 2
    go_on.set()
    daemon._runner.join(PATIENCE)
    assert not daemon._runner.is_alive()


def test_a_checking_process_that_hangs_is_killed(begin, service):
    daemon = begin("forked process")
    hang(daemon._runner.pid)
    daemon.stop()
    assert daemon._runner.exitcode == -signal.SIGKILL


class Counted:
    service_name = "Counted"

    def __init__(self, outcomes):
        self.outcomes = list(outcomes)
        self.times = []

    def health_check(self, current_time_ms=None):
        self.times.append(current_time_ms)
        outcome = self.outcomes.pop(0) if self.outcomes else True
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def test_a_checking_process_that_dies_is_told_of_and_replaced(begin, service, alerts):
    daemon = begin("forked process", slack_notifier=alerts)
    before = daemon._runner.pid
    os.kill(before, signal.SIGKILL)
    until(lambda: daemon._runner.pid != before, "another one")
    assert any(f"checking process {before} ended" in line for line in alerts.lines())
    until(lambda: "vali_LedgerServer_HealthChecker" in titles(), "its title")
    before = service.server_pid
    hang(before)
    until(lambda: service.server_pid != before, "another server")


def test_a_checking_process_that_ended_with_the_service_is_no_zombie(begin, service):
    daemon = begin("forked process")
    pid = daemon._runner.pid
    service.shutdown()
    until(lambda: not psutil.pid_exists(pid), "its end")


def test_it_survives_every_exception_and_says_so(caplog):
    caplog.set_level(logging.DEBUG, "shmelim.service")
    service, alerts = Counted([RuntimeError("broken"), False, OSError("too"), True]), Alerts()
    with HealthCheckDaemon(service, 0.001, alerts).start():
        until(lambda: len(service.times) > 5)
    assert alerts.messages == [
        ("error", "Counted: health check daemon error: RuntimeError: broken"),
        ("error", "Counted: health check daemon error: OSError: too"),
    ]
    assert "Counted: not healthy" in caplog.text


def test_the_checks_are_an_interval_apart_by_the_time_they_are_given():
    """So that a service with the same interval is not asked a moment too early each second time."""
    service = Counted([])
    with HealthCheckDaemon(service, 0.005).start():
        until(lambda: len(service.times) > 20)
    apart = [after - before for before, after in zip(service.times, service.times[1:], strict=False)]
    assert min(apart) >= 5
    assert abs(service.times[0] / 1000 - time.time()) < PATIENCE


def test_the_interval_is_the_services_if_none_is_said(service):
    service.health_check_interval_s = 17
    assert HealthCheckDaemon(service).interval_s == 17
    assert "LedgerServer, every 17 s" in repr(HealthCheckDaemon(service))


def test_the_notifier_may_stand_in_the_second_place_as_the_requirement_writes_it(service):
    alerts = Alerts()
    service.health_check_interval_s = 60
    daemon = HealthCheckDaemon(service, alerts)
    assert (daemon.slack_notifier, daemon.interval_s) == (alerts, 60)
    daemon = HealthCheckDaemon(service, 5, alerts)
    assert (daemon.slack_notifier, daemon.interval_s) == (alerts, 5)


def test_impossible_arguments(service):
    with pytest.raises(TypeError, match="interval_s must be a number"):
        HealthCheckDaemon(service, "often")
    with pytest.raises(ValueError, match="more than 0"):
        HealthCheckDaemon(service, 0)
    with pytest.raises(ValueError, match="'thread' or 'process'"):
        HealthCheckDaemon(service, 1).start("fiber")
    service.enable_health_check = False
    with pytest.raises(ValueError, match="enable_health_check=True"):
        HealthCheckDaemon(service, 1)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_in_a_process_of_ones_own(service, alerts, method):
    daemon = HealthCheckDaemon(service, 0.01, alerts)
    process = multiprocessing.get_context(method).Process(target=daemon.run, daemon=True)
    process.start()
    hang(service.server_pid)
    until(lambda: "success" in alerts.levels())
    assert " ".join(psutil.Process(process.pid).cmdline()).rstrip() == "vali_LedgerServer_HealthChecker"
    daemon.stop()
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert alerts.levels() == ["error", "warning", "success", "flushed", "flushed"]


@pytest.mark.parametrize("kind", ["forked process", pytest.param("spawned process", marks=pytest.mark.long)])
def test_a_ctrl_c_of_the_terminal_is_left_to_the_owner(begin, service, alerts, capfd, kind):
    process = begin(kind)._runner
    until(lambda: "vali_LedgerServer_HealthChecker" in titles(), "its title")
    hang(service.server_pid)
    for _ in range(3):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.05)
    until(lambda: "success" in alerts.levels(), "the recovery")
    assert process.is_alive()
    assert "Traceback" not in capfd.readouterr().err


def test_it_is_pickled_to_a_starting_process_only(service):
    with pytest.raises(RuntimeError, match="inheritance"):
        pickle.dumps(HealthCheckDaemon(service, 1))


def test_a_copy_stops_nothing(begin, service):
    daemon = begin("forked process")
    runner = daemon._runner
    pid = os.fork()
    if pid == 0:
        daemon.stop()
        os._exit(0)
    os.waitpid(pid, 0)
    assert runner.is_alive()


def test_a_restart_by_hand_of_a_server_that_a_copy_is_ending_leaves_the_next_death_to_be_told(tmp_path, alerts):
    options = {"enable_health_check": True, "health_check_interval_s": 0, "health_check_timeout": 0.3}
    with Ledger(
        tmp_path, stop_timeout=1.0, max_consecutive_failures=1, slack_notifier=alerts, **options
    ) as service:
        state = service._RPCServiceBase__core.page.state
        hang(service.server_pid)
        child = multiprocessing.get_context("fork").Process(target=service.health_check)
        child.start()
        until(lambda: state.ended_by == child.pid, "the end of the server by the copy")
        service.restart_server()
        child.join()
        assert alerts.levels() == ["error", "success"]
        kill(service)
        until(lambda: len(alerts.levels()) == 4, "what is told of the next death")
        assert alerts.levels() == ["error", "success"] * 2


class SlowlyEnding(LedgerServer):
    def close(self):
        time.sleep(0.5)  # nobody listens any more, and the process lives
        super().close()


class SlowLedger(Ledger):
    def _start_server_process(self, address, authkey, server_ready):
        return self._spawn_server(
            SlowlyEnding, self.directory, address=address, authkey=authkey, server_ready=server_ready
        )


def test_a_restart_that_somebody_wants_is_no_outage_to_those_who_watch(tmp_path, alerts):
    options = {"enable_health_check": True, "health_check_interval_s": 0, "max_consecutive_failures": 1}
    ends = multiprocessing.Event()

    def watch():
        while not ends.is_set():
            service.health_check()

    with SlowLedger(tmp_path, slack_notifier=alerts, **options) as service:
        watching = [multiprocessing.get_context("fork").Process(target=watch, daemon=True) for _ in range(2)]
        for process in watching:
            process.start()
        for _ in range(2):
            service.restart_server()
        ends.set()
        for process in watching:
            process.join(PATIENCE)
        assert alerts.lines() == []
        pid = kill(service)
        until(lambda: alerts.levels() == ["error", "success"], "the next outage is told")
        assert service.pid() == pid_after(service, pid)


def test_a_copy_is_not_started(service, tmp_path):
    daemon = HealthCheckDaemon(service, 0.01)
    pid = os.fork()
    if pid == 0:
        try:
            daemon.start()
        except RuntimeError as error:
            (tmp_path / "error").write_text(str(error))
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert "make one in this process" in (tmp_path / "error").read_text()
    with daemon.start():
        assert daemon._runner.is_alive()


def test_it_checks_a_direct_server(tmp_path):
    alerts = Alerts()
    with Ledger(
        tmp_path,
        running_unit_tests=True,
        enable_health_check=True,
        health_check_interval_s=0,
        slack_notifier=alerts,
    ) as service:
        (tmp_path / "status").write_text("sick")
        with HealthCheckDaemon(service, 0.001).start():
            until(lambda: len(alerts.of("error")) == 2)
            (tmp_path / "status").unlink()
            until(lambda: alerts.of("success"))


ABANDONED = """
import sys, threading
from ledger import Ledger
from waiting import PATIENCE
from shmelim.service import HealthCheckDaemon

if __name__ == "__main__":
    service = Ledger(sys.argv[1], enable_health_check=True)
    daemon = HealthCheckDaemon(service, 3600, start_method=sys.argv[2]).start("process")
    print(daemon._runner.pid, service.server_pid, flush=True)
    threading.Event().wait(PATIENCE)
"""


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.long)])
def test_it_ends_with_the_process_that_made_it(tmp_path, method):
    program = tmp_path / "program.py"
    program.write_text(ABANDONED)
    process = subprocess.Popen(
        [sys.executable, str(program), str(tmp_path), method],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([TESTS, *sys.path])},
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = [int(word) for word in process.stdout.readline().split()]
    assert all(is_alive(pid) for pid in pids)
    process.kill()
    process.wait()
    until(lambda: not any(is_alive(pid) for pid in pids))
