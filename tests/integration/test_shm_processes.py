"""One writer and many readers in processes of their own: the lock, taking over, waiting, threads."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import crashing
import pytest
from waiting import until

from shmelim.errors import AlreadyServingError
from shmelim.shm import Namespace, SharedNamespace, TableReader, TableWriter, naming, native
from shmelim.shm import reader as shm_reader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def serve(name: str, flags: int = 1) -> TableWriter:
    writer = TableWriter(SharedNamespace(name), capacity=8, arena_size=4096)
    writer.load([(b"a", flags, b"record", None)])
    return writer


def refused(name: str) -> bool:
    """Tell whether the lock of a name is held by somebody."""
    try:
        TableWriter(SharedNamespace(name)).close()
    except AlreadyServingError:
        return True
    return False


def serve_and_wait(name: str, ready: Any, done: Any) -> None:
    writer = serve(name, 3)
    ready.set()
    done.wait()
    writer.close()


# ---------------------------------------------------------------------- the writer's lock


def test_second_writer_in_the_same_process(table_name: str) -> None:
    writer = serve(table_name)
    with pytest.raises(AlreadyServingError, match=table_name):
        TableWriter(SharedNamespace(table_name))
    with pytest.raises(AlreadyServingError):
        TableWriter(writer._namespace)
    assert refused(table_name)
    writer.close()
    assert not refused(table_name)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_second_writer_in_another_process(table_name: str, method: str) -> None:
    context = multiprocessing.get_context(method)
    ready, done = context.Event(), context.Event()
    process = context.Process(target=serve_and_wait, args=(table_name, ready, done))
    process.start()
    try:
        assert ready.wait(60)
        reader = TableReader(SharedNamespace(table_name))
        with pytest.raises(AlreadyServingError):
            TableWriter(SharedNamespace(table_name))
        assert reader.flags(b"a") == 3
        info = reader.writer()
        assert (info.pid, info.state, info.alive) == (process.pid, "serving", True)
        assert abs(info.started_ms / 1000 - time.time()) < 3600
    finally:
        done.set()
        process.join()
    assert reader.writer().state == "stopped"
    writer = serve(table_name, 4)
    assert reader.flags(b"a") == 4
    writer.close()


def test_killed_writer_frees_the_name_at_once(table_name: str) -> None:
    ready = crashing.Counter()

    def hold() -> None:
        writer = serve(table_name)
        ready.value = 1
        signal.pause()
        writer.close()

    with crashing.Child(hold) as child:
        child.until(lambda: ready.value)
        reader = TableReader(SharedNamespace(table_name))
        assert refused(table_name)
        child.kill()
    assert reader.flags(b"a") == 1
    assert reader.writer().pid == child.pid
    writer = serve(table_name, 2)
    assert reader.flags(b"a") == 2
    writer.close()


@pytest.mark.parametrize("how", ["fork", "dropped", "subprocess"])
def test_a_child_does_not_keep_the_lock_of_its_killed_parent(table_name: str, how: str) -> None:
    """Not a forked one, not an executed one; a writer object that was dropped without being closed has none."""
    pid = crashing.Counter()

    def hold() -> None:
        writer = serve(table_name)
        if how == "subprocess":
            pid.value = subprocess.Popen(["/bin/sleep", str(crashing.WATCHDOG)], close_fds=False).pid
        else:
            if how == "dropped":
                writer = None
                gc.collect()
            if os.fork() == 0:
                pid.value = os.getpid()
                signal.alarm(crashing.WATCHDOG)
        signal.pause()
        assert writer

    try:
        with crashing.Child(hold) as child:
            child.until(lambda: pid.value)
            assert refused(table_name) == (how != "dropped")
            child.kill()
        os.kill(pid.value, 0)
        assert not refused(table_name)
    finally:
        if pid.value:
            os.kill(pid.value, signal.SIGKILL)


def test_a_writer_in_a_forked_child_keeps_its_own_lock(table_name: str, new_name: Callable[[], str]) -> None:
    """The child drops what it inherited and can lock what is free."""
    other = new_name()
    writer = serve(table_name)

    def child() -> tuple[bool, bool]:
        mine = serve(other)
        answer = refused(table_name), refused(other)
        mine.close()
        return answer

    assert crashing.call(child) == (True, True)
    assert refused(table_name)
    assert not refused(other)
    writer.close()


def test_closing_in_a_forked_child_leaves_the_parent_its_lock(table_name: str) -> None:
    writer = serve(table_name)
    crashing.call(writer.close)
    assert refused(table_name)
    assert TableReader(SharedNamespace(table_name)).writer().state == "serving"
    writer.close()


def test_only_one_of_many_becomes_the_writer(table_name: str) -> None:
    """Processes that race for a name: exactly one gets it, also when the root is being made or replaced."""
    rounds = 12
    go, marks = crashing.Counter(), [crashing.Counter() for _ in range(4)]

    def contend(mine: crashing.Counter) -> int:
        won = 0
        for number in range(rounds):
            reach(go, 2 * number + 1)
            try:
                writer = serve(table_name)
            except AlreadyServingError:
                mine.value = 2 * number + 1
                reach(go, 2 * number + 2)
            else:
                won += 1
                mine.value = 2 * number + 1
                reach(go, 2 * number + 2)
                writer.close()
            mine.value = 2 * number + 2
        return won

    children = [crashing.Child(functools.partial(contend, mine)) for mine in marks]
    for step in range(1, 2 * rounds + 1):
        if step % 6 == 3:
            SharedNamespace(table_name).remove()
        elif step % 6 == 5:
            SharedNamespace(table_name).open_root(writable=True).memory[:8] = b"\xff" * 8
        go.value = step
        for child, mine in zip(children, marks, strict=True):
            child.until(functools.partial(reached, mine, step))
    assert sum(child.result() for child in children) == rounds
    assert TableReader(SharedNamespace(table_name)).flags(b"a") == 1


def reached(counter: crashing.Counter, value: int) -> bool:
    return counter.value >= value


def reach(counter: crashing.Counter, value: int) -> None:
    while counter.value < value:
        os.sched_yield()


# ---------------------------------------------------------------------- waiting


def test_wait_for_change_times_out(namespace: Namespace) -> None:
    writer = TableWriter(namespace)
    writer.load([])
    reader = TableReader(namespace)
    assert not reader.wait_for_change(0)
    assert not reader.wait_for_change(0.01)
    writer.close()


def test_wait_for_change_since(namespace: Namespace) -> None:
    writer = TableWriter(namespace)
    writer.load([])
    reader = TableReader(namespace)
    before = reader.version
    writer.load([])
    assert reader.wait_for_change(0, since=before)
    assert reader.wait_for_change(since=before)
    assert not reader.wait_for_change(0, since=reader.version)
    writer.close()


def test_wait_for_change_sees_another_threads_publish(namespace: Namespace) -> None:
    writer = TableWriter(namespace)
    writer.load([])
    reader = TableReader(namespace)
    before = reader.version
    answers = []
    thread = threading.Thread(target=lambda: answers.append(reader.wait_for_change(since=before)))
    thread.start()
    with writer.transaction() as transaction:
        transaction.put(b"a", 1)
    thread.join()
    assert answers == [True]
    writer.close()


def publish_while_one_waits(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[bool], list[bool]]:
    """Return what each sleep in the kernel was answered with, and what the waiter was."""
    monkeypatch.setattr(shm_reader, "_LOOK_AT_NAME", 1000.0)
    slept: list[bool] = []
    going = threading.Event()

    def sleep(*what: Any) -> bool:
        going.set()
        slept.append(answer := native.wait_word(*what))
        return answer

    monkeypatch.setattr(shm_reader, "wait_word", sleep)
    writer = TableWriter(namespace)
    writer.load([])
    reader = TableReader(namespace)
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(reader.wait_for_change()))
    thread.start()
    waits = native.WAKES and naming.WAKES
    until(lambda: going.is_set() or not waits)
    with writer.transaction() as transaction:
        transaction.put(b"a", 1)
    thread.join()
    writer.close()
    return slept, answers


@pytest.mark.skipif(not native.WAKES, reason="without the extension waiters look again and again")
def test_a_publish_wakes_who_sleeps_in_the_kernel(namespace: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert publish_while_one_waits(namespace, monkeypatch) == ([True], [True])


def test_a_writer_that_wakes_nobody_is_not_slept_for(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(naming, "WAKES", 0)
    assert publish_while_one_waits(namespace, monkeypatch) == ([], [True])


def test_where_sleeping_is_a_librarys_business_nobody_sleeps_in_the_kernel(
    namespace: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with gevent, whose other tasks go on while one sleeps."""
    writer = TableWriter(namespace)
    writer.load([])
    reader = TableReader(namespace)
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert not reader.wait_for_change(0.01)
    assert pauses
    writer.close()


def test_a_signal_ends_the_sleep(namespace: Namespace) -> None:
    class InterruptError(Exception):
        pass

    def interrupt(*_: object) -> None:
        raise InterruptError

    writer = TableWriter(namespace)
    writer.load([])
    reader = TableReader(namespace)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(InterruptError):
            reader.wait_for_change()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    writer.close()


def test_wait_for_change_sees_a_successor(table_name: str) -> None:
    serve(table_name).close()
    reader = TableReader(SharedNamespace(table_name))
    before = reader.version
    with crashing.Child(lambda: serve(table_name, 2).close()) as child:
        assert reader.wait_for_change(since=before)
        assert reader.flags(b"a") == 2
        child.result()


# ---------------------------------------------------------------------- writer's liveness


def test_heartbeat(namespace: Namespace) -> None:
    writer = TableWriter(namespace)
    writer.load([])
    reader = TableReader(namespace)
    assert reader.writer().alive
    writer._root.words[152 // 8] = 0
    assert not reader.writer().alive
    assert reader.writer().heartbeat_age > 3
    writer.beat()
    assert reader.writer().alive
    writer._root.words[144 // 8] = 99
    assert not reader.writer().alive
    assert reader.writer().state == "unknown (99)"
    writer.close()
    assert reader.writer().state == "stopped"


def test_starting(table_name: str) -> None:
    serve(table_name).close()
    reader = TableReader(SharedNamespace(table_name))
    writer = TableWriter(SharedNamespace(table_name))
    assert (reader.writer().state, reader.writer().alive) == ("starting", True)
    assert reader.flags(b"a") == 1
    writer.load([])
    assert reader.writer().state == "serving"
    writer.close()


# ---------------------------------------------------------------------- threads


@pytest.fixture
def _quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("_quick_switches")
def test_one_reader_under_many_threads(namespace: Namespace) -> None:
    """Publishes, compactions and new generations, while threads share one reader."""
    keys = [b"key-%d" % number for number in range(30)] + [b"k" * 60 + b"%d" % number for number in range(10)]
    writer = TableWriter(namespace, capacity=128, arena_size=1 << 14)
    writer.load((key, 0, b"0" * 50, None) for key in keys)
    reader = TableReader(namespace)
    stop = threading.Event()
    wrong: list[object] = []

    def look() -> None:
        last = 0
        try:
            while not stop.is_set():
                entries = reader.snapshot().entries
                stamps = {(entry.flags, entry.record) for entry in entries.values()}
                assert len(stamps) == 1, stamps
                assert len(set(reader.flags_of(keys).tolist())) == 1
                record = reader.get(keys[7])
                assert set(record.data) == {ord("0") + record.flags % 10}
                seen = int(reader.read(keys[31], lambda window: window[0]) is not None)
                assert seen == 1
                version = reader.version
                assert version & (1 << 48) - 1 >= last
                last = version & (1 << 48) - 1
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for stamp in range(1, 250):
        with writer.transaction(replace=stamp % 50 == 0) as transaction:
            for key in keys:
                transaction.put(key, stamp % 200, b"%d" % (stamp % 200 % 10) * 50)
            if stamp % 50 == 10:
                transaction.put(keys[0], stamp % 200, b"%d" % (stamp % 200 % 10) * 50)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    assert reader.version >= 250
    writer.close()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_namespace_goes_to_another_process(table_name: str, method: str) -> None:
    writer = serve(table_name, 5)
    context = multiprocessing.get_context(method)
    with context.Pool(1) as pool:
        assert pool.apply(look_up, (SharedNamespace(table_name),)) == 5
    writer.close()


def look_up(namespace: SharedNamespace) -> int:
    return TableReader(namespace).flags(b"a")


PATCHED = """
import gevent.monkey
gevent.monkey.patch_all()
import sys
from shmelim import EliminationManager, EliminationReader
from shmelim.table import Writer
name = sys.argv[1]
with Writer(name) as table:
    table.put("a", 1)
    print(table.reader()["a"])
with EliminationManager(None, None, None, name=name, port=None, is_backtesting=True) as manager:
    manager.append_elimination_row("a", 0.1, "ZOMBIE", t_ms=1_700_000_000_000)
    print(manager.is_hotkey_eliminated("a"), EliminationReader(name).is_hotkey_eliminated("a"))
"""


@pytest.mark.parametrize("pure", ["0", "1"], ids=["native", "pure"])
def test_tables_are_written_and_read_where_gevent_has_patched_the_standard_library(
    table_name: str, tmp_path: Path, pure: str
) -> None:
    pytest.importorskip("gevent")
    environment = os.environ | {"SHMELIM_PURE": pure, "SHMELIM_RUNTIME_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PATCHED, table_name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    SharedNamespace(table_name).remove()
    assert done.stdout.split() == ["1", "True", "True"], done.stderr


FROZEN = """
import sys, freezegun
freezegun.freeze_time("2030-01-01").start()
from shmelim import EliminationManager, EliminationReader
name = sys.argv[1]
with EliminationManager(None, None, None, name=name, port=None, is_backtesting=True) as manager:
    print(EliminationReader(name).writer.alive, manager.writer.alive)
with EliminationManager(None, None, None, running_unit_tests=True) as manager:
    print(manager.writer.alive)
"""


@pytest.mark.parametrize("pure", ["0", "1"], ids=["native", "pure"])
def test_a_server_lives_for_those_whose_clock_a_test_has_stopped(
    table_name: str, tmp_path: Path, pure: str
) -> None:
    pytest.importorskip("freezegun")
    environment = os.environ | {"SHMELIM_PURE": pure, "SHMELIM_RUNTIME_DIR": str(tmp_path)}
    command = [sys.executable, "-c", FROZEN, table_name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    SharedNamespace(table_name).remove()
    assert done.stdout.split() == ["True"] * 3, done.stderr
