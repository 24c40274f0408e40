"""A manager's server is killed again and again: no reader sees an error or what is stale, no change is lost."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from ledger import Alerts, FileAlerts, kill, pid_after
from serving import row, stamp_of, state_in_store, state_in_table
from waiting import PATIENCE, until

from shmelim import EliminationReader
from shmelim.errors import CallTimeoutError, NotServingError, OutcomeUnknownError
from shmelim.service import HealthCheckDaemon
from shmelim.system.locks import Lease
from shmelim.system.processes import ProcessIdentity

# Each changer has hotkeys of its own, and for each a place in shared memory for the last acknowledged stamp.
PER_CHANGER = 50


def hotkeys_of(changer):
    return [f"{changer}-{n}" for n in range(PER_CHANGER)]


def change_without_pause(manager, changer, acknowledged, stop, results):
    """Give this changer's hotkeys ever larger stamps; say how many changes were in doubt or refused."""
    doubtful = refused = 0
    first = changer * PER_CHANGER
    for stamp in itertools.count(1):
        if stop.is_set():
            break
        place = stamp % PER_CHANGER
        hotkey = hotkeys_of(changer)[place]
        try:
            manager.add_elimination(hotkey, row(hotkey, stamp))
            acknowledged[first + place] = stamp
        except OutcomeUnknownError:
            doubtful += 1
        except (NotServingError, CallTimeoutError):
            refused += 1
    results.put((doubtful, refused))


def read_without_pause(manager, changers, acknowledged, stop, ready, results):
    """Read what was acknowledged: it must be there, whole, and no older."""
    reads = 0
    names = [hotkey for changer in range(changers) for hotkey in hotkeys_of(changer)]
    last = [0] * len(names)
    while not stop.is_set():
        for place, hotkey in enumerate(names):
            floor = max(last[place], acknowledged[place])  # before the read
            if not floor:
                continue
            assert manager.is_hotkey_eliminated(hotkey)
            last[place] = stamp_of(hotkey, manager.get_elimination(hotkey))
            assert last[place] >= floor, f"{hotkey}: {last[place]} is older than {floor}"
            reads += 1
        everything = manager.get_eliminations_dict()
        for hotkey, record in everything.items():
            stamp_of(hotkey, record)
        ready.set()
    results.put(reads)


@pytest.mark.parametrize(
    ("method", "kills"),
    [
        ("fork", 5),
        pytest.param("fork", 50, marks=pytest.mark.long),
        pytest.param("spawn", 50, marks=pytest.mark.long),
    ],
)
def test_killed_while_one_process_changes_and_three_read(managers, tmp_path, method, kills):
    alerts = Alerts()
    context = multiprocessing.get_context(method)
    manager = managers(
        state_dir=tmp_path / "state",
        start_method=method,
        health_check_interval_s=0,
        max_consecutive_failures=1,
        connect_wait=PATIENCE,
        call_timeout=PATIENCE,
        restart_pause=0.0,
        slack_notifier=None,
    )
    stop, results, readings = context.Event(), context.Queue(), context.Queue()
    # Two changers in one other process, two threads of it, and one thread here.
    acknowledged = context.RawArray("Q", 3 * PER_CHANGER)
    processes = [context.Process(target=_two_threads, args=(manager, acknowledged, stop, results))]
    readers = []
    for _ in range(3):
        ready = context.Event()
        readers.append(ready)
        arguments = (manager, 3, acknowledged, stop, ready, readings)
        processes.append(context.Process(target=read_without_pause, args=arguments))
    for process in processes:
        process.start()
    here = threading.Thread(target=change_without_pause, args=(manager, 2, acknowledged, stop, results))
    here.start()
    try:
        for ready in readers:
            assert ready.wait(PATIENCE)
        manager.slack_notifier = alerts
        with HealthCheckDaemon(manager, 0.01).start():
            for round_number in range(1, kills + 1):
                # Every changer has got through to the server that is killed next.
                before = [max(acknowledged[c * PER_CHANGER : (c + 1) * PER_CHANGER]) for c in range(3)]
                until(lambda before=before: _all_went_on(acknowledged, before))
                os.kill(manager.server_pid, signal.SIGKILL)
                until(lambda number=round_number: len(alerts.of("success")) == number)
    finally:
        stop.set()
    outcomes = [results.get(timeout=PATIENCE) for _ in range(3)]
    reads = [readings.get(timeout=PATIENCE) for _ in range(3)]
    here.join(PATIENCE)
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    assert [level for level, _ in alerts.messages] == ["error", "success"] * kills
    assert sum(refused for _, refused in outcomes) == 0  # every call waited for the next server
    assert min(reads) > 0
    for changer in range(3):
        for place, hotkey in enumerate(hotkeys_of(changer)):
            stamp = acknowledged[changer * PER_CHANGER + place]
            if stamp:
                assert stamp_of(hotkey, manager.get_elimination(hotkey)) >= stamp
    manager.shutdown()
    assert state_in_table(EliminationReader(manager.name)) == state_in_store(tmp_path / "state")
    changes = sum(stamp > 0 for stamp in acknowledged)
    print(f"{kills} kills: {changes} hotkeys, {sum(reads)} rounds of reads, {outcomes} (in doubt, refused)")


def check_without_pause(manager, stop):
    clock = itertools.count(1, 61_000)
    while not stop.is_set():
        manager.health_check(next(clock))


def test_four_kills_while_three_copies_check(managers, tmp_path):
    """Each costs one restart, one alert when it went, one when it is back; the log of the test shows the gaps."""
    alerts = FileAlerts(tmp_path)
    fork = multiprocessing.get_context("fork")
    manager = managers(
        health_check_interval_s=0, max_consecutive_failures=1, slack_notifier=alerts, state_dir=tmp_path / "state"
    )
    stop = fork.Event()
    copies = [fork.Process(target=check_without_pause, args=(manager, stop)) for _ in range(3)]
    for copy in copies:
        copy.start()
    pids, gaps = [manager.server_pid], []
    try:
        for round_number in range(1, 5):
            began = time.monotonic()
            pids.append(pid_after(manager, kill(manager)))
            manager.add_elimination("a", row("a", round_number))
            gaps.append(time.monotonic() - began)
            until(lambda: len(alerts.lines()) == 2 * round_number)  # noqa: B023
    finally:
        stop.set()
    for copy in copies:
        copy.join(PATIENCE)
        assert copy.exitcode == 0
    print("seconds until a change is taken again:", *(f"{gap:.2f}" for gap in gaps))
    print(*alerts.lines(), sep="\n")
    assert alerts.levels() == ["error", "success"] * 4
    assert len(set(alerts.lines())) == 8
    assert len(set(pids)) == 5
    assert stamp_of("a", manager.get_elimination("a")) == 4


MANAGER = """
import sys
from shmelim import EliminationManager
name, state, *imports = sys.argv[1:]
manager = EliminationManager(None, None, None, name=name, port=None, state_dir=state, imports=imports)
sys.stdin.read()
"""


@pytest.mark.parametrize("later", ["a manager", "a server of another name"])
def test_who_comes_while_the_server_of_a_killed_manager_is_at_work_waits_for_its_end(tmp_path, new_name, later):
    """That server is stopped in its start, which a pipe holds up; one that is closing its store is the same."""
    state, pipe, log = tmp_path / "state", tmp_path / "pipe", tmp_path / "log"
    os.mkfifo(pipe)
    environment = os.environ | {"SHMELIM_RUNTIME_DIR": str(tmp_path / "run"), "HOME": str(tmp_path)}
    name = new_name()
    command = [sys.executable, "-c", MANAGER, name, str(state)]
    with subprocess.Popen([*command, str(pipe)], env=environment, stdin=subprocess.PIPE) as first:
        lease = Lease(state / "lock")
        server = ProcessIdentity.of(until(lease.holder))
        os.kill(server.pid, signal.SIGSTOP)
        first.kill()
    if later == "a server of another name":
        name = new_name()
        command = [sys.executable, "-m", "shmelim", "serve", "--name", name, "--state-dir", str(state)]
    with (
        log.open("wb") as stderr,
        subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=stderr) as second,
    ):
        try:
            until(lambda: b"waiting for the end of process" in log.read_bytes() or second.poll() is not None)
            assert second.poll() is None, log.read_text()
            os.kill(server.pid, signal.SIGCONT)
            assert server.wait(PATIENCE)
            until(lambda: lease.holder() != server.pid and pid_of_writer(name) == lease.holder())
        finally:
            second.stdin.close()
            if later != "a manager":
                second.terminate()


def test_a_server_whose_owner_is_killed_ends_also_in_a_start_that_hangs(tmp_path, new_name):
    state, pipe = tmp_path / "state", tmp_path / "pipe"
    os.mkfifo(pipe)  # which nobody ever writes to
    environment = os.environ | {"SHMELIM_RUNTIME_DIR": str(tmp_path / "run"), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", MANAGER, new_name(), str(state), str(pipe)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as manager:
        server = ProcessIdentity.of(until(Lease(state / "lock").holder))
        manager.kill()
    try:
        assert server.wait(PATIENCE)
    finally:
        server.end(0)


def pid_of_writer(name):
    with contextlib.suppress(NotServingError):
        return EliminationReader(name).writer.pid


def _two_threads(manager, acknowledged, stop, results):
    threads = [
        threading.Thread(target=change_without_pause, args=(manager, changer, acknowledged, stop, results))
        for changer in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _all_went_on(acknowledged, before):
    return all(
        max(acknowledged[changer * PER_CHANGER : (changer + 1) * PER_CHANGER]) > before[changer]
        for changer in range(3)
    )
