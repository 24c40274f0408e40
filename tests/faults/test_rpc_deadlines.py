"""Deadlines hold whatever interrupts the wait: signals, gevent's sockets, a clock that a test library stopped."""

import ast
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from shmelim.channel import ChannelClient, ChannelServer
from shmelim.errors import CallTimeoutError, OutcomeUnknownError

KEY = b"0123456789abcdef0123456789abcdef"
PATIENCE = 60.0
# Seconds after which a stopped server goes on, so that a call that lasts so long ends, and its test fails.
WAKES = 15.0


class Target:
    def echo_rpc(self, value=None):
        return value


class StoppedServer:
    """A server in a process of its own, which was stopped after it had answered once."""

    def __init__(self, address):
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                server = ChannelServer(Target(), address, KEY).start()
                os.write(writing, repr(server.address).encode())
                while True:
                    signal.pause()
            os._exit(1)
        os.close(writing)
        self.address = ast.literal_eval(os.read(reading, 1000).decode())
        os.close(reading)
        self.woke = False
        self._waker = threading.Timer(WAKES, self._wake)

    def _wake(self):
        self.woke = True
        os.kill(self.pid, signal.SIGCONT)

    def stop(self):
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)
        self._waker.start()

    def end(self):
        self._waker.cancel()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture(params=["unix", "tcp"])
def address(request, tmp_path):
    return str(tmp_path / "s") if request.param == "unix" else ("127.0.0.1", 0)


@pytest.fixture
def server(address):
    server = StoppedServer(address)
    yield server
    server.end()
    assert not server.woke, "the deadline was not kept"


@pytest.fixture
def alarms():
    """A signal every twentieth of a second, whose handler does nothing."""
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)


@pytest.mark.usefixtures("alarms")
class TestSignalsDoNotStretch:
    def test_the_wait_for_a_reply(self, server):
        with ChannelClient(server.address, KEY) as client:
            assert client.call("echo_rpc", (1,)) == 1
            server.stop()
            with pytest.raises(OutcomeUnknownError, match="no reply came in time"):
                client.call("echo_rpc", timeout=0.5)

    def test_the_sending_of_a_request(self, server):
        with ChannelClient(server.address, KEY) as client:
            assert client.call("echo_rpc", (1,)) == 1
            server.stop()
            with pytest.raises(CallTimeoutError, match="did not take it in time"):
                client.call("echo_rpc", ("x" * 30_000_000,), timeout=0.5)

    def test_a_handshake(self, server):
        server.stop()
        with ChannelClient(server.address, KEY) as client, pytest.raises(CallTimeoutError, match="handshake"):
            client.call("echo_rpc", timeout=0.5)


@pytest.mark.parametrize(("usual", "own"), [(0.5, 4 * WAKES), (4 * WAKES, 0.5)], ids=["longer", "shorter"])
def test_a_stopped_server_is_waited_for_no_longer_than_a_connection_may_take_nor_than_the_call(server, usual, own):
    server.stop()
    with (
        ChannelClient(server.address, KEY, timeout=usual) as client,
        pytest.raises(CallTimeoutError, match="handshake"),
    ):
        client.call("echo_rpc", timeout=own)


def test_a_call_of_its_own_timeout_may_take_longer_than_its_connection(address):
    class Slow:
        def slow_rpc(self):
            time.sleep(0.6)
            return "done"

    with ChannelServer(Slow(), address, KEY) as server, ChannelClient(server.address, KEY, timeout=0.5) as client:
        client.connect(timeout=PATIENCE)
        assert client.call("slow_rpc", timeout=PATIENCE) == "done"


def test_signals_to_the_thread_of_a_silent_peer_do_not_stretch_its_handshake(address):
    """A signal may reach any thread of a process, and there interrupts what waits."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with ChannelServer(Target(), address, KEY, service_name="svc", handshake_timeout=0.3) as server:
            family = socket.AF_UNIX if isinstance(server.address, str) else socket.AF_INET
            with socket.socket(family) as silent:
                silent.connect(server.address)
                deadline = time.monotonic() + WAKES
                while server.stats()["overdue"] == 0:
                    assert time.monotonic() < deadline, "the handshake is never overdue"
                    for thread in threading.enumerate():
                        if thread.name == "svc-peer" and thread.ident is not None:
                            with contextlib.suppress(ProcessLookupError):
                                signal.pthread_kill(thread.ident, signal.SIGUSR1)
                    time.sleep(0.02)
    finally:
        signal.signal(signal.SIGUSR1, before)


def run(script, *arguments):
    """Run a script in an interpreter of its own; return its output."""
    code = "import sys\nfrom shmelim.channel import ChannelClient, ChannelServer\n" + script
    done = subprocess.run(
        [sys.executable, "-c", code if not script.startswith("# first") else script, *map(repr, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        timeout=PATIENCE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return done.stdout.decode().split("\n")[:-1]


ONE_CALL = """
address, key = map(eval, sys.argv[1:])
client = ChannelClient(address, key)
try:
    client.call("echo_rpc", timeout=0.5)
except Exception as error:
    print(type(error).__name__)
"""


def test_gevents_sockets_keep_deadlines(server):
    server.stop()
    script = "# first\nfrom gevent import monkey; monkey.patch_all()\nimport sys\n"
    assert run(f"{script}from shmelim.channel import ChannelClient\n{ONE_CALL}", server.address, KEY) == [
        "CallTimeoutError"
    ]


def test_greenlets_call_a_server_of_their_own_process_and_wait_for_it_at_once(address):
    script = """# first
from gevent import monkey; monkey.patch_all()
import sys, threading
from shmelim.channel import ChannelClient, ChannelServer
address, key = map(eval, sys.argv[1:])

class Meeting:
    barrier = threading.Barrier(5)
    def meet_rpc(self, number):
        self.barrier.wait(30)
        return number
    def hang_rpc(self):
        threading.Event().wait(30)

with ChannelServer(Meeting(), address, key) as server, ChannelClient(server.address, key) as client:
    numbers = []
    meet = lambda number: numbers.append(client.call("meet_rpc", (number,)))
    threads = [threading.Thread(target=meet, args=(number,)) for number in range(5)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    print(sorted(numbers))
    try:
        client.call("hang_rpc", timeout=0.3)
    except Exception as error:
        print(type(error).__name__)
    server.close(0)
"""
    assert run(script, address, KEY) == ["[0, 1, 2, 3, 4]", "OutcomeUnknownError"]


def test_a_stopped_clock_stops_no_deadline(server):
    server.stop()
    script = f"import freezegun\nfreezegun.freeze_time('2030-01-01').start()\n{ONE_CALL}"
    assert run(script, server.address, KEY) == ["CallTimeoutError"]
