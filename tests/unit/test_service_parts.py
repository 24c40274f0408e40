"""The small parts of the service base, each by itself."""

import collections
import io
import itertools
import logging
import multiprocessing
import os
import signal
import threading
import time

import psutil
import pytest
from ledger import PATIENCE, until
from shmelim.service.ending import Ending
from shmelim.service.launch import ServerOptions, ServerProcess
from shmelim.service.outages import Finding
from shmelim.service.restarts import RestartDesk

from shmelim.channel import MSGPACK, PickleCodec
from shmelim.channel.codec import UncarriedValueError
from shmelim.errors import CallTimeoutError, ChannelError, NotServingError, ProtocolError
from shmelim.service import ServerReady, ServiceSettings, log_streams
from shmelim.system import processes
from shmelim.system.processes import ProcessIdentity

fork = multiprocessing.get_context("fork")


# ------------------------------------------------------------------ log streams


@pytest.fixture
def handler():
    handler = logging.StreamHandler(io.StringIO())
    logger = logging.getLogger("shmelim.test.streams")
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(PATIENCE)
    return results[0]


def test_no_handler_is_at_work_during_a_fork(handler):
    with log_streams.at_rest():
        assert not in_thread(lambda: handler.lock.acquire(blocking=False))
        logging.getLogger("shmelim.test.streams").error("this thread may still log")
    assert in_thread(lambda: handler.lock.acquire(blocking=False) and not handler.lock.release())


def test_a_handler_that_hangs_does_not_hold_up_a_fork(handler, monkeypatch):
    monkeypatch.setattr(log_streams, "_PATIENCE", 0.001)
    held, go_on, in_time = threading.Event(), threading.Event(), []

    def hang():
        with handler.lock:
            held.set()
            in_time.append(go_on.wait(PATIENCE))

    thread = threading.Thread(target=hang)
    thread.start()
    assert held.wait(PATIENCE)
    with log_streams.at_rest():
        pass
    go_on.set()
    thread.join(PATIENCE)
    assert in_time == [True]


def test_whoever_forks_waits_for_the_logging_module_first(handler, monkeypatch):
    """A fork waits for that lock, whose holder may wait for a handler's: then no handler may be held."""
    monkeypatch.setattr(log_streams, "_PATIENCE", 0.001)
    held, go_on = threading.Event(), threading.Event()

    def configure():
        with logging._lock:
            held.set()
            go_on.wait(PATIENCE)

    thread = threading.Thread(target=configure)
    thread.start()
    assert held.wait(PATIENCE)
    with log_streams.at_rest():
        assert in_thread(lambda: handler.lock.acquire(blocking=False) and not handler.lock.release())
    go_on.set()
    thread.join(PATIENCE)
    with log_streams.at_rest():
        assert not in_thread(lambda: logging._lock.acquire(blocking=False))


# ------------------------------------------------------------------ titles


def test_a_title_without_room_is_told(monkeypatch, caplog):
    monkeypatch.setattr(processes, "setproctitle", lambda _title: None)
    processes.set_title("vali_X")
    assert "'vali_X' could not be set" in caplog.text


def test_a_process_that_is_gone_has_no_title():
    process = fork.Process(target=int)
    process.start()
    seen = psutil.Process(process.pid)
    process.join()
    assert processes.title_of(seen) is None


# ------------------------------------------------------------------ readiness


def ready():
    return ServerReady(ServerOptions("Svc"))


def run(function, *arguments):
    process = fork.Process(target=function, args=arguments)
    process.start()
    return process


def test_ready_is_used_like_an_event():
    report = ready()
    assert not report.is_set()
    assert not report.wait(0)
    process = run(report.set)
    assert report.wait(PATIENCE)
    assert report.is_set()
    assert report.outcome(process, PATIENCE) is None
    process.join()
    report.close()
    report.close()
    assert not report.is_set()
    assert repr(report) == "<ServerReady of Svc>"


@pytest.mark.parametrize("address", ["/tmp/s", ("127.0.0.1", 5)])
def test_ready_says_where(address):
    report = ready()
    process = run(report.set, address)
    assert report.outcome(process, PATIENCE) == address
    process.join()


def test_ready_says_what_went_wrong():
    report = ready()
    process = run(report.fail, PermissionError(13, "Permission denied", "/root/x"))
    with pytest.raises(PermissionError, match="/root/x"):
        report.outcome(process, PATIENCE)
    process.join()


def test_a_report_of_another_kind_is_refused():
    report = ready()
    process = run(report._report, ["what"])
    with pytest.raises(ProtocolError):
        report.outcome(process, PATIENCE)
    process.join()


def test_a_dead_process_is_noticed_although_others_hold_its_pipe():
    """A child that was forked meanwhile has a copy of the pipe's other end."""
    report = ready()
    go_on = fork.Event()
    bystander = run(go_on.wait, PATIENCE)
    process = run(os._exit, 7)
    with pytest.raises(NotServingError, match="exit code 7"):
        report.outcome(process, PATIENCE)
    go_on.set()
    bystander.join()


def test_a_process_that_closes_the_pipe_and_lives_is_waited_for():
    report = ready()

    def close_and_wait():
        report.close()
        time.sleep(PATIENCE)

    process = run(close_and_wait)
    with pytest.raises(CallTimeoutError):
        report.outcome(process, 0.1)
    server = ServerProcess(process, "Svc")
    server.stop(PATIENCE)
    server.stop(PATIENCE)
    assert not process.is_alive()


def test_a_process_that_is_not_wanted_any_more_is_not_waited_for():
    report = ServerReady(ServerOptions("Svc"), lambda: "Svc was shut down")
    process = run(time.sleep, PATIENCE)
    with pytest.raises(ChannelError, match="Svc was shut down"):
        report.outcome(process, PATIENCE)
    process.kill()
    process.join()


# ------------------------------------------------------------------ endings


def test_an_owner_is_not_taken_for_a_later_process_of_its_id():
    this = ProcessIdentity.this_process()
    assert this.is_running()
    assert not ProcessIdentity(this.pid, this.started - 1).is_running()
    assert not ProcessIdentity.of(2**22 + 1).is_running()
    assert ProcessIdentity.of(2**22 + 1).open() is None


def test_an_owner_is_known_by_what_no_clock_changes(monkeypatch):
    """psutil adds the time of the boot, which moves when the clock is set."""
    child = run(time.sleep, PATIENCE)
    owner = ProcessIdentity.of(child.pid)
    monkeypatch.setattr(psutil.Process, "create_time", lambda _self: 12345.0)
    assert owner.is_running()
    assert ProcessIdentity.of(child.pid) == owner
    assert owner != ProcessIdentity.this_process()
    child.kill()
    child.join()
    assert not owner.is_running()


def test_a_zombie_does_not_run():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    owner = ProcessIdentity.of(pid)
    until(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    assert not owner.is_running()
    with Ending(owner) as ending:
        assert str(pid) in ending.wait()
    os.waitpid(pid, 0)


def test_signal_handlers_are_as_before():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Ending(None) as ending:
        with pytest.raises(SystemExit) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert caught.value.code == 143
        signal.raise_signal(signal.SIGINT)
        ending.defer()
        signal.raise_signal(signal.SIGTERM)
        assert ending.wait() == "a signal"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_of_the_main_thread_signals_are_left_alone():
    def use():
        with Ending(ProcessIdentity(1, -1.0)) as ending:
            return ending.wait()

    assert in_thread(use) == "the end of its owner, process 1"


# ------------------------------------------------------------------ asking for restarts


def test_a_full_pipe_holds_up_nobody():
    desk = RestartDesk()
    with pytest.raises(ChannelError, match="cannot be asked"):
        collections.deque(map(desk.ask, itertools.repeat(0.0)), maxlen=0)


def test_an_owner_that_is_gone_cannot_be_asked():
    desk = RestartDesk()
    desk.after_fork_in_child()  # the only reader
    with pytest.raises(ChannelError, match="cannot be asked"):
        desk.ask(0.0)


def test_requests_are_served_in_turn_and_survive_failures(caplog):
    served, found = [], []

    def restart(failed_at):
        served.append(failed_at)
        raise RuntimeError("not this time")

    desk = RestartDesk()
    desk.open("Svc", restart, found.append)
    process = run(desk.ask, 1.5)
    process.join()
    desk.ask(2.5)
    finding = Finding("failed", 1.0, 2.0, 3, "\ud800" + "x" * 5000)
    desk.report(finding)
    until(lambda: served == [1.5, 2.5] and found)
    assert found[0][:4] == finding[:4]
    assert set(found[0].detail) == {"?", "x"}
    desk.close()
    desk.close()
    desk.join(PATIENCE)
    assert "a request of another process failed: not this time" in caplog.text
    assert not any(thread.name == "Svc-restarts" for thread in threading.enumerate())


def test_waiting_for_a_restart_has_an_end():
    desk = RestartDesk()
    with pytest.raises(CallTimeoutError, match="did not in"):
        desk.ask_and_wait(0.0, lambda: False, 0.01)
    desk.ask_and_wait(0.0, lambda: True, 0.0)


def can_ask(desk):
    try:
        desk.ask(0.0)
    except ChannelError:
        return False
    return True


def test_a_copy_knows_how_the_owner_is():
    """Whether it has ended; that it is gone shows when it is asked."""
    for end, states in (("close", (True, False)), ("after_fork_in_child", (False, False))):
        desk = RestartDesk()
        here, there = fork.Pipe()

        def copy(desk=desk, here=here, there=there):
            desk.after_fork_in_child()
            there.send((desk.has_ended(), can_ask(desk)))
            there.recv()
            there.send((desk.has_ended(), can_ask(desk)))

        process = run(copy)
        assert here.recv() == (False, True)
        if end == "close":
            desk.open("Svc", int, int)
        getattr(desk, end)()
        desk.join(PATIENCE)
        here.send("look")
        assert here.recv() == states
        process.join()


def test_waiting_for_a_restart_ends_with_the_owner():
    desk = RestartDesk()
    looks = []

    def is_well():
        looks.append(1)
        desk.close()
        return False

    with pytest.raises(ChannelError, match="has ended"):
        desk.ask_and_wait(0.0, is_well, PATIENCE)
    assert looks == [1]


def test_a_desk_with_a_full_pipe_can_be_closed():
    desk = RestartDesk()
    with pytest.raises(ChannelError):
        collections.deque(map(desk.ask, itertools.repeat(0.0)), maxlen=0)
    desk.close()
    desk.open("Svc", int, int)
    desk.join(PATIENCE)
    assert not any(thread.name == "Svc-restarts" for thread in threading.enumerate())


# ------------------------------------------------------------------ settings and pickle


def test_settings_keep_msgpack_out_of_pickles():
    assert ServiceSettings(codec=MSGPACK).codec is None
    assert ServiceSettings().codec_in_use is MSGPACK
    codec = PickleCodec()
    assert ServiceSettings(codec=codec).codec_in_use is codec


class Rude:
    def __reduce__(self):
        return os._exit, ("no number",)


def test_what_cannot_be_pickled_or_unpickled():
    codec = PickleCodec()
    assert codec.loads(codec.dumps({(1, 2): {3}})) == {(1, 2): {3}}
    with pytest.raises(UncarriedValueError, match="pickle"):
        codec.dumps(lambda: None)
    for data in (b"", b"garbage", codec.dumps(Rude())):
        with pytest.raises(ProtocolError, match="cannot be unpickled"):
            codec.loads(data)


def test_a_signal_that_others_handle_ends_nothing(monkeypatch):
    seen = []

    def read(descriptor, size, read=os.read):
        found = read(descriptor, size)
        seen.append(set(found))
        if seen == [{signal.SIGUSR1}]:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(os, "read", read)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with Ending(None) as ending:
            ending.defer()
            os.kill(os.getpid(), signal.SIGUSR1)
            assert ending.wait() == "a signal"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [{signal.SIGUSR1}, {signal.SIGTERM}]
