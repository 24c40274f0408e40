"""Copies of a service in other processes: what they see of its end, and of a server that dies or hangs."""

import contextlib
import multiprocessing
import os
import signal
import threading

import pytest
from ledger import Alerts, FileAlerts, Ledger, core_of, hang, is_alive, kill, pid_after
from waiting import PATIENCE, until

from shmelim.service import HealthCheckDaemon, owner

fork = multiprocessing.get_context("fork")


def check_until_it_ends(service, pipe):
    service.health_check(0)
    pipe.send("ready")
    now, outcomes = 0.0, []
    while not service.has_ended:
        now += 60_000
        outcomes.append(service.health_check(now))
    pipe.send((outcomes[-1] if outcomes else None, service.health_check(now + 60_000)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_copies_see_an_orderly_end_as_an_end(make_ledger, tmp_path, method):
    alerts = FileAlerts(tmp_path)
    service = make_ledger(
        enable_health_check=True, max_consecutive_failures=1, slack_notifier=alerts, ready_timeout=4 * PATIENCE
    )
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    copies = [context.Process(target=check_until_it_ends, args=(service, there)) for _ in range(2)]
    for copy in copies:
        copy.start()
    assert [here.recv() for _ in copies] == ["ready"] * 2
    service.shutdown()
    for copy in copies:
        copy.join(PATIENCE)
    assert [copy.exitcode for copy in copies] == [0, 0]
    assert [here.recv()[1] for _ in copies] == [False, False]
    assert alerts.lines() == []


@pytest.mark.parametrize("kind", ["thread", "process"])
def test_the_daemon_stops_with_the_service(make_ledger, tmp_path, kind):
    alerts = FileAlerts(tmp_path)
    service = make_ledger(
        enable_health_check=True, health_check_interval_s=0, max_consecutive_failures=1, slack_notifier=alerts
    )
    daemon = HealthCheckDaemon(service, 0.01, alerts).start(kind)
    service.shutdown()
    # Not by joining it: the daemon does, too, and who comes second learns a moment later that it has ended.
    until(lambda: not daemon._runner.is_alive())
    assert alerts.levels() in ([], ["flushed"] * 2)
    assert getattr(daemon._runner, "exitcode", 0) == 0


def check_round_after_round(service, stop):
    while not stop.is_set():
        service.health_check()


@pytest.fixture
def watched(tmp_path):
    """A service that is checked without pause by other processes, and by a thread of this one."""
    with contextlib.ExitStack() as stack:

        def start(copies, *, owner, **options):
            alerts, stop = FileAlerts(tmp_path), fork.Event()
            service = stack.enter_context(
                Ledger(
                    tmp_path,
                    enable_health_check=True,
                    health_check_interval_s=0,
                    slack_notifier=alerts,
                    restart_pause=0.0,
                    **options,
                )
            )
            watchers = [fork.Process(target=check_round_after_round, args=(service, stop)) for _ in range(copies)]
            if owner:
                watchers.append(threading.Thread(target=check_round_after_round, args=(service, stop)))
            for watcher in watchers:
                watcher.start()

            def end():
                stop.set()
                for watcher in watchers:
                    watcher.join(PATIENCE)
                assert [getattr(watcher, "exitcode", 0) for watcher in watchers] == [0] * len(watchers)

            stack.callback(end)
            return service, alerts

        yield start


def count_starts(service):
    starts, start = [], service._start_server_process
    service._start_server_process = lambda *arguments: starts.append(1) or start(*arguments)
    return starts


@pytest.mark.parametrize("owner", [False, True])
def test_a_dead_server_is_one_restart_and_two_alerts_however_many_watch(watched, owner):
    service, alerts = watched(10, owner=owner, max_consecutive_failures=1)
    starts = count_starts(service)
    for round_number in range(1, 4):
        dead = kill(service)
        until(lambda: len(alerts.lines()) == 2 * round_number)  # noqa: B023
        assert service.pid() == pid_after(service, dead)
        assert len(starts) == round_number
    assert alerts.levels() == ["error", "success"] * 3
    assert len(set(alerts.lines())) == 6


@pytest.mark.parametrize("owner", [False, True])
def test_a_server_that_hangs_is_replaced_once_and_told_of_once_however_many_watch(watched, owner):
    service, alerts = watched(
        3, owner=owner, max_consecutive_failures=2, health_check_timeout=1.0, stop_timeout=0.1
    )
    starts = count_starts(service)
    for round_number in range(1, 3):
        hung = service.server_pid
        hang(hung)
        until(lambda: alerts.levels().count("success") == round_number)  # noqa: B023
        assert service.pid() == pid_after(service, hung)
        assert len(starts) == round_number
    assert alerts.levels() == ["error", "warning", "success"] * 2
    assert len(set(alerts.lines())) == 6


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_copy_ends_a_server_that_hangs_and_the_owner_restarts_it(make_ledger, method):
    """The copy alone checks."""
    alerts = Alerts()
    service = make_ledger(
        enable_health_check=True,
        max_consecutive_failures=2,
        health_check_timeout=1.0,
        stop_timeout=0.1,
        slack_notifier=alerts,
    )
    hung = service.server_pid
    hang(hung)
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    copy = context.Process(target=check_three_times, args=(service, there))
    copy.start()
    assert here.poll(PATIENCE)
    outcomes, told, pid = here.recv()
    copy.join(PATIENCE)
    assert outcomes == [False, False, True]
    assert pid == pid_after(service, hung)
    assert told[0] == "error"  # by who found it
    until(lambda: sorted(told + [level for level, _ in alerts.messages]) == ["error", "success", "warning"])
    assert f"process {copy.pid} found that it hung" in alerts.messages[0][1]


def check_three_times(service, pipe):
    service.slack_notifier = alerts = Alerts()
    outcomes = [service.health_check(60_000.0 * number) for number in (1, 2)]
    until(lambda: is_alive(service._server_proxy and core_of(service).page.server.pid))
    until(lambda: not core_of(service).page.state.ended_by)  # the owner has another, and has told
    outcomes.append(service.health_check(60_000.0 * 3))
    pipe.send((outcomes, [level for level, _ in alerts.messages], service.pid()))


def test_a_copy_leaves_a_process_alone_that_does_not_look_like_the_server(make_ledger, monkeypatch):
    service = make_ledger(enable_health_check=True, max_consecutive_failures=1, health_check_timeout=0.5)
    hang(service.server_pid)
    here, there = fork.Pipe()

    def check():
        monkeypatch.setattr(owner, "is_server_of", lambda _pid, _name: False)
        service.slack_notifier = alerts = Alerts()
        service.health_check()
        there.send(alerts.of("error"))

    copy = fork.Process(target=check)
    copy.start()
    assert here.poll(PATIENCE)
    _, last = here.recv()
    copy.join(PATIENCE)
    assert "does not look like the server of LedgerServer, and is left alone" in last
    assert is_alive(service.server_pid)
    os.kill(service.server_pid, signal.SIGCONT)


def own_and_vanish(directory, alerts, pids, go_on):
    service = Ledger(
        directory, enable_health_check=True, max_consecutive_failures=1, connect_wait=0.0, slack_notifier=alerts
    )

    def check_alone():
        go_on.recv()
        for number in range(1, 4):
            service.health_check(60_000.0 * number)
        pids.send("checked")

    copy = fork.Process(target=check_alone)
    copy.start()
    pids.send((copy.pid, service.server_pid))
    threading.Event().wait(PATIENCE)


def test_where_the_owner_is_gone_whoever_checks_says_so_once(tmp_path):
    alerts = FileAlerts(tmp_path)
    here, there = fork.Pipe()
    go_on, waiting = fork.Pipe()
    owner = fork.Process(target=own_and_vanish, args=(tmp_path, alerts, there, waiting))
    owner.start()
    _, server = here.recv()
    owner.kill()
    owner.join()
    until(lambda: not is_alive(server))
    go_on.send("now")
    assert here.poll(PATIENCE)
    assert here.recv() == "checked"
    assert alerts.levels() == ["error", "error"]
    assert f"nobody restarts it: process {owner.pid}, which made the service, is gone" in alerts.lines()[1]


def check_and_tell(service, alerts):
    service.slack_notifier = alerts
    while alerts.levels()[-1:] != ["success"]:
        service.health_check()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_copy_tells_by_itself_if_the_owner_has_no_notifier(make_ledger, tmp_path, method):
    alerts = FileAlerts(tmp_path)
    service = make_ledger(enable_health_check=True, health_check_interval_s=0, max_consecutive_failures=1)
    copy = multiprocessing.get_context(method).Process(target=check_and_tell, args=(service, alerts))
    copy.start()
    until(lambda: service.entries is not None)
    while not alerts.lines():
        dead = service.server_pid
        with contextlib.suppress(ProcessLookupError):
            os.kill(dead, signal.SIGKILL)
        pid_after(service, dead)
    copy.join(PATIENCE)
    assert copy.exitcode == 0
    assert alerts.levels() == ["error", "success"]


def test_without_restart_on_exit_a_copy_counts_and_tells_and_the_owner_restarts(make_ledger, tmp_path):
    alerts = FileAlerts(tmp_path)
    service = make_ledger(
        enable_health_check=True, max_consecutive_failures=2, restart_on_exit=False, slack_notifier=alerts
    )
    dead = kill(service)
    copy = fork.Process(target=lambda: [service.health_check(60_000.0 * number) for number in range(1, 5)])
    copy.start()
    copy.join(PATIENCE)
    assert service.server_pid == dead
    assert alerts.levels() == ["error", "error"]
    assert "2 failed health checks in a row, only process" in alerts.lines()[1]
    assert [service.health_check(60_000.0 * number) for number in range(1, 4)] == [False, False, True]
    assert service.pid() == service.server_pid != dead
    assert alerts.levels() == ["error", "error", "warning", "success"]
