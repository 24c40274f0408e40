"""SPEC 8: the health of a service, who looks at it, what is done about it, and the end of a server."""

import gc
import multiprocessing
import socket

import pytest
from contract_services import Clock, FileAlerts, Notes, hang, is_alive, kill, run, title_of
from contract_validator import Notifier
from waiting import PATIENCE, until

from shmelim import HealthCheckDaemon, NotServingError

# ---------------------------------------------------------------------- health


@pytest.mark.parametrize("way", ["direct", "default"])
def test_without_health_checks_all_is_well(start, way, tmp_path):
    service = start(way)
    (tmp_path / "status").write_text("sick")
    assert service.health_check() is True
    assert service.health_check(0) is True


@pytest.mark.parametrize("way", ["direct", "default"])
def test_an_error_of_the_check_counts_and_its_traceback_is_logged(start, way, tmp_path, caplog):
    service, clock = start(way, enable_health_check=True, max_consecutive_failures=2), Clock()
    first = service.pid()
    (tmp_path / "status").write_text("raise")
    assert service.health_check(clock.now) is False
    assert any(record.exc_info or "Traceback" in record.getMessage() for record in caplog.records)
    assert service.health_check(clock.later(61)) is False
    assert (service.pid() == first) == (way == "direct")


@pytest.mark.parametrize("way", ["direct", "default"])
def test_degraded_is_not_a_failure(start, way, tmp_path):
    service = start(way, enable_health_check=True)
    (tmp_path / "status").write_text("degraded")
    assert service.health_check(1) is True


def test_an_alert_without_restart(start, tmp_path):
    alerts, clock = Notifier(), Clock()
    service = start(
        enable_health_check=True, enable_auto_restart=False, max_consecutive_failures=2, slack_notifier=alerts
    )
    first = service.pid()
    (tmp_path / "status").write_text("sick")
    for _ in range(4):
        assert service.health_check(clock.later(61)) is False
    assert service.pid() == first
    assert len(alerts.of("error")) == 2, "the failure, and that nobody restarts"
    (tmp_path / "status").unlink()
    assert service.health_check(clock.later(61)) is True
    assert len(alerts.of("success")) == 1


def test_with_auto_restart_off_a_server_that_died_stays_dead(start):
    clock = Clock()
    service = start(enable_health_check=True, enable_auto_restart=False, connect_wait=0.0)
    pid = service.server_pid
    kill(pid)
    for _ in range(5):
        assert service.health_check(clock.later(61)) is False
    with pytest.raises(NotServingError):
        service.pid()
    assert service.server_pid in (pid, None)


@pytest.mark.parametrize("way", ["fork", "forkserver", "spawn", "nested"])
def test_a_server_that_hangs_is_ended_and_replaced(start, way):
    clock = Clock()
    service = start(
        way, enable_health_check=True, health_check_timeout=0.2, max_consecutive_failures=2, stop_timeout=0.1
    )
    first = service.server_pid
    hang(first)
    assert service.health_check(clock.later(61)) is False
    assert service.health_check(clock.later(61)) is False
    until(lambda: service.health_check(clock.later(61)), "the recovery")
    assert service.pid() == service.server_pid != first
    assert not is_alive(first)


@pytest.mark.parametrize("kind", ["thread", "process", "own process"])
def test_a_daemon_checks_and_a_server_that_hangs_is_replaced_and_told_of_once(start, tmp_path, kind):
    alerts = FileAlerts(tmp_path)
    service = start(
        enable_health_check=True,
        health_check_interval_s=0,
        health_check_timeout=0.2,
        max_consecutive_failures=2,
        stop_timeout=0.1,
        slack_notifier=alerts,
    )
    daemon = HealthCheckDaemon(service, interval_s=0.02, slack_notifier=alerts)
    process = None
    if kind == "own process":
        process = multiprocessing.get_context("fork").Process(target=daemon.run, daemon=True)
        process.start()
    else:
        daemon.start(kind)
    first = service.server_pid
    hang(first)
    until(lambda: alerts.of("success"), "the recovery")
    assert service.pid() == service.server_pid != first
    assert len(alerts.of("error")) == len(alerts.of("success")) == 1
    if process is not None:
        assert title_of(process.pid) == "vali_NotesServer_HealthChecker"
    daemon.stop()
    if process is not None:
        process.join(PATIENCE)
        assert process.exitcode == 0


class Failing:
    service_name = "Failing"
    checks = 0

    def health_check(self, current_time_ms=None):
        self.checks += 1
        raise RuntimeError("on purpose")


def test_a_daemon_survives_every_exception_and_tells_its_notifier():
    service, alerts = Failing(), Notifier()
    with HealthCheckDaemon(service, 0.005, alerts).start():
        until(lambda: service.checks > 3)
    assert alerts.about("on purpose")


def test_a_daemon_as_the_requirement_writes_it():
    service, alerts = Failing(), Notifier()
    service.health_check_interval_s = 0.005
    daemon = HealthCheckDaemon(service, alerts)
    assert daemon.slack_notifier is alerts
    with daemon.start():
        until(lambda: alerts.about("on purpose"))


def test_the_interval_in_milliseconds(start, tmp_path):
    service, clock = start("direct", enable_health_check=True, health_check_interval_s=60), Clock()
    assert service.health_check_interval_ms == 60_000
    service.health_check_interval_ms = 1_000
    assert service.health_check(clock.now) is True
    (tmp_path / "status").write_text("sick")
    assert service.health_check(clock.later(0.5)) is True
    assert service.health_check(clock.later(0.6)) is False


# ---------------------------------------------------------------------- ending


def test_a_server_that_does_not_end_by_sigterm_is_killed(start):
    service = start(stop_timeout=0.1)
    pid = service.server_pid
    hang(pid)
    service.shutdown()
    assert not is_alive(pid)


def test_the_port_is_free_when_shutdown_returns(start):
    service = start()
    port = service.port
    service.shutdown()
    with socket.create_server(("127.0.0.1", port)):
        pass
    assert start(port=port).note("one") == 1


def test_a_forgotten_service_ends_its_server(tmp_path):
    service = Notes(tmp_path, enable_health_check=True)
    pid = service.server_pid
    service.health_check()
    del service
    gc.collect()
    until(lambda: not is_alive(pid), "the end of a server that nobody holds")


OWNER = """
import os, signal, sys
from contract_services import Notes
if __name__ == "__main__":
    service = Notes(sys.argv[1])
    print(service.pid(), flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[2] == "error":
        raise RuntimeError("on purpose")
"""


@pytest.mark.parametrize("how", ["exit", "error", "killed"])
def test_a_server_ends_with_its_owner(tmp_path, how):
    done = run(tmp_path, OWNER, how)
    pid = int(done.stdout)
    until(lambda: not is_alive(pid), "the end of the server")


@pytest.mark.parametrize("way", ["direct", "default"])
def test_what_stands_for_a_server_that_is_not_there_is_falsy(start, way):
    service = start(way)
    assert service._server_proxy
    service.shutdown()
    assert not service._server_proxy


@pytest.mark.parametrize("way", ["direct", "default"])
def test_a_server_that_is_there_is_truthy(start, way):
    assert start(way)._server_proxy
