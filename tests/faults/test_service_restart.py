"""A server that is killed again and again under load: nothing acknowledged is lost, nothing is done twice."""

import asyncio
import contextlib
import importlib
import itertools
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from ledger import Alerts, Ledger, kill, pid_after
from waiting import PATIENCE, until

from shmelim import EliminationReader
from shmelim.channel import ChannelClient
from shmelim.errors import CallTimeoutError, NotServingError, OutcomeUnknownError
from shmelim.service import HealthCheckDaemon

EXAMPLES = Path(__file__).parents[2] / "examples"


def enter_without_pause(service, prefix, stop, results):
    """Enter numbered entries; return those acknowledged, those in doubt, and those that were refused."""
    done, doubtful, refused = [], [], []
    for number in itertools.count():
        if stop.is_set():
            break
        entry = f"{prefix}-{number}"
        try:
            service.enter(entry)
            done.append(entry)
        except OutcomeUnknownError:
            doubtful.append(entry)
        except (NotServingError, CallTimeoutError):
            refused.append(entry)
    results.put((done, doubtful, refused))


@pytest.mark.parametrize(
    ("method", "kills"),
    [
        ("fork", 5),
        ("spawn", 1),
        pytest.param("fork", 50, marks=pytest.mark.long),
        pytest.param("spawn", 50, marks=pytest.mark.long),
    ],
)
def test_killed_under_load(tmp_path, method, kills):
    alerts = Alerts()
    context = multiprocessing.get_context(method)
    with Ledger(
        tmp_path,
        start_method=method,
        enable_health_check=True,
        health_check_interval_s=0,
        max_consecutive_failures=1,
        connect_wait=PATIENCE,
        restart_pause=0.0,
        slack_notifier=alerts,
    ) as service:
        stop, results = context.Event(), context.Queue()
        clients = [
            threading.Thread(target=enter_without_pause, args=(service, f"thread{number}", stop, results))
            for number in range(2)
        ]
        clients += [
            context.Process(target=enter_without_pause, args=(service, f"process{number}", stop, results))
            for number in range(2)
        ]
        for client in clients:
            client.start()
        with HealthCheckDaemon(service, 0.01).start():
            for round_number in range(1, kills + 1):
                # Everybody has got through to the server that is killed next.
                seen = Counter(entry.split("-")[0] for entry in service.entries())
                until(
                    lambda: all(
                        count > seen[who]  # noqa: B023
                        for who, count in Counter(e.split("-")[0] for e in service.entries()).items()
                    )
                )
                os.kill(service.server_pid, signal.SIGKILL)
                until(lambda: len(alerts.of("success")) == round_number)  # noqa: B023
        stop.set()
        outcomes = [results.get(timeout=PATIENCE) for _ in clients]
        for client in clients:
            client.join(PATIENCE)
        written = Counter(service.entries())
    done, doubtful, refused = (set(itertools.chain(*part)) for part in zip(*outcomes, strict=True))
    assert set(written.values()) == {1}  # nothing twice
    assert done <= set(written)  # nothing lost
    assert set(written) <= done | doubtful  # nothing that was refused
    assert not refused  # every call waited for the next server
    assert [level for level, _ in alerts.messages] == ["error", "success"] * kills
    print(f"{len(done)} acknowledged, {len(doubtful)} in doubt, {len(doubtful & set(written))} of them done")


def read_without_pause(name, stop, ready, results):
    """Read one hotkey whose record counts up; it must never be missing, torn, or older than before."""
    reader = EliminationReader(name)
    last, reads = -1, 0
    while True:
        ending = stop.is_set()
        record = reader.get_elimination("5Counted")
        assert record is not None
        assert reader.is_hotkey_eliminated("5Counted")
        assert record["dd"] >= last
        last = record["dd"]
        reads += 1
        ready.set()
        if ending:
            results.put((last, reads))
            return


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.long)])
def test_readers_of_shared_memory_see_nothing_of_it(tmp_path, table_name, monkeypatch, kills):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    alerts = Alerts()
    context = multiprocessing.get_context("fork")
    acknowledged = 0
    with importlib.import_module("eliminations").Eliminations(
        table_name,
        str(tmp_path / "state"),
        0,
        enable_health_check=True,
        health_check_interval_s=0,
        max_consecutive_failures=1,
        connect_wait=PATIENCE,
        call_timeout=PATIENCE,
        restart_pause=0.0,
        slack_notifier=alerts,
    ) as service:
        service.append_elimination_row("5Counted", 0, "ZOMBIE")
        stop, results = context.Event(), context.Queue()
        readers = []
        for _ in range(3):
            ready = context.Event()
            reader = context.Process(target=read_without_pause, args=(table_name, stop, ready, results))
            reader.start()
            readers.append(reader)
            assert ready.wait(PATIENCE)
        with HealthCheckDaemon(service, 0.01).start():
            for round_number in range(1, kills + 1):
                for _ in range(20):
                    acknowledged += 1
                    service.append_elimination_row("5Counted", acknowledged, "ZOMBIE")
                os.kill(service.server_pid, signal.SIGKILL)
                until(lambda: len(alerts.of("success")) == round_number)  # noqa: B023
                assert EliminationReader(table_name).get_elimination("5Counted")["dd"] == acknowledged
        stop.set()
        outcomes = [results.get(timeout=PATIENCE) for _ in readers]
        for reader in readers:
            reader.join(PATIENCE)
            assert reader.exitcode == 0
    assert [last for last, _ in outcomes] == [acknowledged] * 3
    assert [level for level, _ in alerts.messages] == ["error", "success"] * kills


def test_a_server_that_dies_as_soon_as_it_is_ready(tmp_path):
    """Connecting finds nobody; that is an error and no hang, and the next start works."""
    with Ledger(tmp_path, connect_wait=0.0, connect_tries=2, connect_delay=0.0, restart_on_exit=False) as service:
        start = service._start_server_process

        def start_and_kill(address, authkey, server_ready):
            process = start(address, authkey, server_ready)
            until(server_ready.is_set)
            process.kill()
            process.join()
            return process

        service._start_server_process = start_and_kill
        with pytest.raises(NotServingError):
            service.restart_server()
        del service._start_server_process
        service.restart_server()
        assert service.pid() == service.server_pid


def test_one_that_dies_again_and_again_is_started_with_growing_pauses(tmp_path):
    """Two deaths cost no pause; from then on each doubles it."""
    starts = []
    with Ledger(tmp_path, restart_pause=0.1, restart_pause_most=0.4, connect_wait=PATIENCE) as service:
        start = service._start_server_process

        def start_noted(*arguments):
            starts.append(time.monotonic())
            return start(*arguments)

        service._start_server_process = start_noted
        deaths = []
        for _ in range(6):
            deaths.append(time.monotonic())
            pid_after(service, kill(service))
        assert service.pid() == service.server_pid
    pauses = [started - died for died, started in zip(deaths, starts, strict=True)]
    for pause, least in zip(pauses, (0.0, 0.0, 0.1, 0.2, 0.4, 0.4), strict=True):
        assert pause >= least, pauses


def test_one_that_lived_long_enough_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr("shmelim.service.owner._STABLE", 0.0)
    with Ledger(tmp_path, restart_pause=PATIENCE) as service:
        for _ in range(4):
            pid_after(service, kill(service))


@pytest.mark.parametrize("error", [ValueError, SystemExit, asyncio.CancelledError])
def test_whatever_a_subclass_raises_for_a_restart_it_is_tried_again(tmp_path, error):
    """What is no Exception ended the thread that watches, and nobody ever restarted the server."""

    class Refusing(Ledger):
        starts = 0

        def _start_server_process(self, *args):
            self.starts += 1
            if self.starts == 2:
                raise error("not now")
            return super()._start_server_process(*args)

    with Refusing(tmp_path, restart_pause=0.0) as service:
        pid_after(service, kill(service))
        assert service.starts == 3


def test_strangers_at_the_port_disturb_nobody(tmp_path):
    with (
        Ledger(tmp_path, enable_health_check=True, health_check_interval_s=0) as service,
        contextlib.ExitStack() as stack,
    ):
        for _ in range(50):
            silent = stack.enter_context(socket.create_connection(service.address))
        silent.sendall(b"\0\0\0\7garbage" * 100)
        stack.enter_context(socket.create_connection(service.address)).sendall(b"\x40\0\0\0")  # 1 GiB announced
        for key in (b"x" * 32, b"y" * 16):
            with ChannelClient(service.address, key) as client, pytest.raises(ConnectionError):
                client.call("enter_rpc", ("never",))
        for number in range(20):
            service.enter(str(number))
        assert service.health_check()
        assert service.entries() == [str(number) for number in range(20)]


def test_an_interrupted_start_leaves_no_process(tmp_path, monkeypatch):
    """As by Ctrl-C while the server is starting."""
    started = []

    class Interrupted(Ledger):
        def _start_server_process(self, address, authkey, server_ready):
            started.append(super()._start_server_process(address, authkey, server_ready))
            server_ready.outcome = interrupt
            return started[0]

    def interrupt(*_arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Interrupted(tmp_path)
    assert not started[0].is_alive()


def test_shutdown_while_it_restarts(tmp_path):
    """Whichever comes first, no process is left, and nobody waits for ever."""
    for delay in (0.0, 0.001, 0.003, 0.01):
        service = Ledger(tmp_path, enable_health_check=True)
        pids = [service.server_pid]
        errors = []

        def restart(service=service, errors=errors):
            try:
                service.restart_server()
            except ConnectionError as error:
                errors.append(error)

        thread = threading.Thread(target=restart)
        thread.start()
        time.sleep(delay)  # not waited for: each moment must do
        service.shutdown()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        pids.append(service.server_pid)
        assert not service._server_process.is_alive()
