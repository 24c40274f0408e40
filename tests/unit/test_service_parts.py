"""The small parts of the service base, each by itself."""

import asyncio
import contextlib
import errno
import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from waiting import PATIENCE, until

from shmelim.channel import MSGPACK, PickleCodec
from shmelim.channel.codec import UncarriedValueError
from shmelim.errors import CallTimeoutError, NotServingError, ProtocolError
from shmelim.service import ServerReady, ServiceSettings, health, report_progress
from shmelim.service.health import SharedPage
from shmelim.service.process import Ending, ServerOptions, ServerProcess
from shmelim.system import forks, processes
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


@contextlib.contextmanager
def forking():
    """What a fork holds while it is made."""
    with forks.logs_at_rest():
        forks._before()
        try:
            yield
        finally:
            forks._in_parent()


def test_no_handler_is_at_work_during_a_fork(handler):
    with forking():
        assert not in_thread(lambda: handler.lock.acquire(blocking=False))
        logging.getLogger("shmelim.test.streams").error("this thread may still log")
    assert in_thread(lambda: handler.lock.acquire(blocking=False) and not handler.lock.release())


def test_a_handler_that_hangs_does_not_hold_up_a_fork(handler, monkeypatch):
    monkeypatch.setattr(forks, "_PATIENCE", 0.001)
    held, go_on, in_time = threading.Event(), threading.Event(), []

    def hang():
        with handler.lock:
            held.set()
            in_time.append(go_on.wait(PATIENCE))

    thread = threading.Thread(target=hang)
    thread.start()
    assert held.wait(PATIENCE)
    with forking():
        pass
    go_on.set()
    thread.join(PATIENCE)
    assert in_time == [True]


def test_whoever_forks_waits_for_the_logging_module_first(handler, monkeypatch):
    """A fork waits for that lock, whose holder may wait for a handler's: then no handler may be held."""
    monkeypatch.setattr(forks, "_PATIENCE", 0.001)
    held, go_on = threading.Event(), threading.Event()

    def configure():
        with logging._lock:
            held.set()
            go_on.wait(PATIENCE)

    thread = threading.Thread(target=configure)
    thread.start()
    assert held.wait(PATIENCE)
    with forking():
        assert in_thread(lambda: handler.lock.acquire(blocking=False) and not handler.lock.release())
    go_on.set()
    thread.join(PATIENCE)
    with forking():
        assert not in_thread(lambda: logging._lock.acquire(blocking=False))


# ------------------------------------------------------------------ titles


ENVIRONMENT_CHANGED = """
import os, sys
first = open("/proc/self/environ").read().partition("=")[0]
if sys.argv[1] == "changed":
    os.environ[first] = "another value, which stands elsewhere in memory"
elif sys.argv[1] == "removed":
    del os.environ[first]
from shmelim.system.processes import set_title, title_of
if os.fork() == 0:
    print(set_title("vali_X"), title_of(os.getpid()), open("/proc/self/comm").read().strip(), flush=True)
    os._exit(0)
os.wait()
print(title_of(os.getpid()) != "vali_X")
"""


@pytest.mark.parametrize("how", ["as it was", "changed", "removed"])
def test_a_title_is_set_whatever_became_of_the_environment(how):
    """setproctitle looks for the arguments from the first variable on, and gives up if that is elsewhere."""
    done = subprocess.run(
        [sys.executable, "-c", ENVIRONMENT_CHANGED, how], capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["True vali_X vali_X", "True"], done.stderr


def test_a_title_without_room_is_told(monkeypatch):
    monkeypatch.setattr("setproctitle.setproctitle", lambda _title: None)
    assert not processes.set_title("vali_" + "X" * 100_000)


def test_a_process_that_is_gone_has_no_title():
    process = fork.Process(target=int)
    process.start()
    process.join()
    assert processes.title_of(process.pid) is None


# ------------------------------------------------------------------ readiness


def ready():
    return ServerReady(ServerOptions("Svc"))


def outcome(report, process, timeout=PATIENCE):
    server = ServerProcess(process, "Svc")
    try:
        return report.outcome(server, timeout)
    finally:
        server.mark.close()


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
    assert outcome(report, process, PATIENCE) is None
    process.join()
    report.close()
    report.close()
    assert not report.is_set()
    assert repr(report) == "<ServerReady of Svc>"


@pytest.mark.parametrize("address", ["/tmp/s", ("127.0.0.1", 5)])
def test_ready_says_where(address):
    report = ready()
    process = run(report.set, address)
    assert outcome(report, process, PATIENCE) == address
    process.join()


def test_ready_says_what_went_wrong():
    report = ready()
    process = run(report.fail, PermissionError(13, "Permission denied", "/root/x"))
    with pytest.raises(PermissionError, match="/root/x"):
        outcome(report, process, PATIENCE)
    process.join()


def test_a_report_of_another_kind_is_refused():
    report = ready()
    process = run(report._report, ["what"])
    with pytest.raises(ProtocolError):
        outcome(report, process, PATIENCE)
    process.join()


def test_a_dead_process_is_noticed_although_others_hold_its_pipe():
    """A child that was forked meanwhile has a copy of the pipe's other end."""
    report = ready()
    go_on = fork.Event()
    bystander = run(go_on.wait, PATIENCE)
    process = run(os._exit, 7)
    with pytest.raises(NotServingError, match="exit code 7"):
        outcome(report, process, PATIENCE)
    go_on.set()
    bystander.join()


def test_a_process_that_closes_the_pipe_and_lives_is_waited_for():
    report = ready()

    def close_and_wait():
        report.close()
        time.sleep(PATIENCE)

    process = run(close_and_wait)
    with pytest.raises(CallTimeoutError):
        outcome(report, process, 0.1)
    server = ServerProcess(process, "Svc")
    server.stop(PATIENCE)
    server.stop(PATIENCE)
    assert not process.is_alive()


def test_one_that_reports_progress_is_given_more_time(monkeypatch):
    """Each report begins the time anew; afterwards, and in other processes, it does nothing."""
    report, patience = ready(), 0.5

    def get_on():
        monkeypatch.setattr("shmelim.service.process._starting", report)
        for _ in range(8):
            time.sleep(patience / 4)  # so that the whole takes longer than the time for one step
            report_progress("recovering", 1, 2)
        report.set("/tmp/s")

    process = run(get_on)
    assert outcome(report, process, 4 * patience) == "/tmp/s"
    report_progress()
    process.join()


# ------------------------------------------------------------------ endings


def test_an_owner_is_not_taken_for_a_later_process_of_its_id():
    this = ProcessIdentity.this_process()
    assert this.is_running()
    assert not ProcessIdentity(this.pid, this.started - 1).is_running()
    assert not ProcessIdentity.of(2**22 + 1).is_running()
    assert ProcessIdentity.of(2**22 + 1).wait(None)


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

    def use():  # not in the main thread, whose start it would break off
        with Ending(owner) as ending:
            return ending.wait()

    assert str(pid) in in_thread(use)
    os.waitpid(pid, 0)


def test_the_end_of_an_owner_ends_no_process_whose_start_failed_before():
    owner = run(time.sleep, PATIENCE).pid

    def go_on():
        with pytest.raises(ValueError, match="no start"), Ending(ProcessIdentity.of(owner)):
            raise ValueError("no start")
        os.kill(owner, signal.SIGKILL)
        for thread in set(threading.enumerate()) - {threading.current_thread()}:
            thread.join(PATIENCE)

    process = run(go_on)
    process.join(PATIENCE)
    assert process.exitcode == 0


def test_without_descriptors_left_a_living_owner_is_not_dead_nor_an_error(monkeypatch):
    """A server that cannot look ended itself, and the thread that watches one of those was gone for good."""
    child = run(time.sleep, PATIENCE)
    owner, gone = ProcessIdentity.of(child.pid), ProcessIdentity(2**22 + 1, 1.0)

    def none_left(*_args, **_kwargs):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as at_the_limit:
        at_the_limit.setattr(processes, "open", none_left, raising=False)
        at_the_limit.setattr(processes, "_pidfd_open", none_left)
        assert owner.is_running()
        assert not owner.wait(0.1)
        assert not gone.is_running()
        child.kill()
        child.join()
        assert owner.wait(None)


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


def test_a_start_that_is_broken_off_is_undone_whatever_comes_then():
    """As where a supervisor ends server and owner at once."""
    undone = []

    def start():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            undone.append(True)

    with pytest.raises(SystemExit), Ending(None):
        start()
    assert undone


def test_a_signal_to_a_forked_child_ends_the_child_and_not_the_server():
    """A server whose helper process was terminated ended by itself, and the helper did not."""
    with Ending(None) as ending:
        ending.defer()
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM
        own_end = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGUSR1])
        told = []
        before = signal.signal(signal.SIGUSR1, lambda *_: (told.append(True), signal.raise_signal(signal.SIGTERM)))
        try:
            own_end.start()
            assert ending.wait() == "a signal"
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert told


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_an_event_loop_that_handled_signals_during_the_start_takes_no_end_from_the_server(number):
    """The server was killed after its stop_timeout, with its object not closed."""

    async def handle_a_signal():
        asyncio.get_running_loop().add_signal_handler(number, lambda: None)

    with Ending(None) as ending:
        asyncio.run(handle_a_signal())
        ending.defer()
        os.kill(os.getpid(), signal.SIGTERM)
        assert ending.wait() == "a signal"


def test_an_event_loop_that_handled_an_interrupt_during_the_start_leaves_it_to_the_owner():
    """What a terminal sends to each of its group broke the server off with a KeyboardInterrupt."""

    async def handle_a_signal():
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, lambda: None)

    with Ending(None) as ending:
        asyncio.run(handle_a_signal())
        ending.defer()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ending.wait() == "a signal"


def test_outside_of_the_main_thread_signals_are_left_alone():
    def use():
        with Ending(ProcessIdentity(1, -1.0)) as ending:
            return ending.wait()

    assert in_thread(use) == "the end of its owner, process 1"


# ------------------------------------------------------------------ what owner and copies share


def in_copy(function):
    """Return what a function returns in a forked process."""
    here, there = fork.Pipe(duplex=False)
    process = run(lambda: there.send(function()))
    assert here.poll(PATIENCE)
    process.join()
    return here.recv()


def test_what_one_process_writes_the_others_see():
    page = SharedPage("Svc")
    server = ProcessIdentity.this_process()
    assert not page.state.ended
    page.server, page.state.ended_by, page.state.owner_tells = server, 7, True
    assert in_copy(lambda: (page.server, page.state.ended_by, page.state.owner_tells)) == (server, 7, 1)
    in_copy(lambda: setattr(page.state, "ended", 1))
    assert page.state.ended


def test_an_outage_is_entered_once_for_each_level_and_ended_once_by_whoever_comes_first():
    page = SharedPage("Once")
    number = page.rise(1)
    assert number > 0
    assert in_copy(lambda: page.rise(1)) == 0
    assert in_copy(lambda: page.rise(2)) == number
    assert page.rise(1) == page.rise(2) == 0
    page.state.restarts += 1
    assert in_copy(page.fall)[::2] == (number, 1)
    assert page.fall() is None
    assert in_copy(lambda: page.rise(1)) == number + 1


def test_of_many_processes_that_enter_an_outage_one_is_the_first():
    page, barrier = SharedPage("Many"), fork.Barrier(8)
    here, there = fork.Pipe(duplex=False)

    def rise():
        barrier.wait(PATIENCE)
        there.send(page.rise(1))

    processes = [run(rise) for _ in range(8)]
    assert sum(number > 0 for number in (here.recv() for _ in processes)) == 1
    for process in processes:
        process.join()


def test_a_process_that_was_stopped_with_the_lock_stops_nobody(monkeypatch):
    monkeypatch.setattr("shmelim.service.health._STOPPED", 0.05)
    page, held = SharedPage("Held"), fork.Event()

    def hold():
        with page._alone():
            held.set()
            time.sleep(PATIENCE)

    process = run(hold)
    assert held.wait(PATIENCE)
    assert page.rise(1)
    process.kill()
    process.join()


def test_what_has_the_number_of_a_closed_page_is_left_alone(tmp_path):
    page = SharedPage("Daemon")
    number = page._descriptor
    with (tmp_path / "other").open("w") as other:
        os.dup2(other.fileno(), number)  # as where a program closes all it finds, and then opens its own
        began = time.monotonic()
        assert page.rise(1)
        assert page.fall()
        assert time.monotonic() - began < health._STOPPED
        del page
        os.write(number, b"x")
        os.close(number)


def test_no_two_outages_of_a_name_have_one_number():
    """Also those of one object and of the next, which have one notifier."""
    numbers = []
    for page in (SharedPage("Alike"), SharedPage("Alike", shared=False)):
        for _ in range(2):
            numbers.append(page.rise(1))
            page.fall()
    assert len(set(numbers)) == 4


# ------------------------------------------------------------------ settings and pickle


def test_settings_keep_msgpack_out_of_pickles():
    assert ServiceSettings(codec=MSGPACK).codec is None
    codec = PickleCodec()
    assert ServiceSettings(codec=codec).codec is codec


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
