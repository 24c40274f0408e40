"""Whoever holds a service's address: a stale server of ours is replaced, and nobody else is ever touched."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import psutil
import pytest
from ledger import Ledger, is_alive, kill
from waiting import PATIENCE, until

from shmelim.channel.address import is_free, wait_until_free
from shmelim.errors import ChannelError
from shmelim.service import lease
from shmelim.service.lease import clear_stale
from shmelim.service.process import ServerReady
from shmelim.system import processes

NAME = "LedgerServer"
TITLE = "vali_LedgerServer"

HOLDER = """
import json, os, signal, socket, sys
from setproctitle import setproctitle
address, title, uid, ways = json.loads(sys.argv[1])
sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET, socket.SOCK_STREAM)
sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if uid is not None:
    os.setgid(uid)
    os.setuid(uid)
sock.bind(address if isinstance(address, str) else tuple(address))
if "bound only" not in ways:
    sock.listen(1)
if "deaf" in ways:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "child" in ways:
    if os.fork() == 0:
        signal.pause()
if title is not None:
    setproctitle(title)
print(json.dumps(sock.getsockname()), flush=True)
while True:
    signal.pause()
"""


class Holder:
    """A process that holds an address."""

    def __init__(self, address=("127.0.0.1", 0), title=TITLE, uid=None, ways=()):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, json.dumps([address, title, uid, list(ways)])],
            stdout=subprocess.PIPE,
            text=True,
        )
        found = json.loads(self.process.stdout.readline())
        self.address = found if isinstance(found, str) else tuple(found)
        self.pid = self.process.pid

    def close(self):
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self.pid).children():
                child.kill()
        self.process.kill()
        self.process.wait()


@pytest.fixture
def hold():
    with contextlib.ExitStack() as stack:

        def hold(*arguments, **options):
            return stack.enter_context(contextlib.closing(Holder(*arguments, **options)))

        yield hold


@pytest.fixture
def make(tmp_path):
    with contextlib.ExitStack() as stack:

        def make(address, **options):
            where = {"address": address} if isinstance(address, str) else {"port": address[1]}
            return stack.enter_context(Ledger(tmp_path, **where, **options))

        yield make


@pytest.fixture(params=["tcp", "unix"])
def address(request, tmp_path):
    return ("127.0.0.1", 0) if request.param == "tcp" else str(tmp_path / "s")


# ------------------------------------------------------------------ ours


@pytest.mark.parametrize("ways", [(), ("deaf",)])
def test_a_stale_server_of_ours_is_replaced(hold, make, address, ways):
    holder = hold(address, ways=ways)
    began = time.monotonic()
    service = make(holder.address)
    seconds = time.monotonic() - began
    assert holder.process.wait(PATIENCE) == -(signal.SIGKILL if ways else signal.SIGTERM)
    assert service.pid() == service.server_pid
    assert seconds < PATIENCE / 2
    print(f"replaced in {seconds:.2f} s")


def test_a_stopped_one_too(hold, make, address):
    """Its queue of connections is full, so that the kernel does not even say who it is."""
    holder = hold(address)
    os.kill(holder.pid, signal.SIGSTOP)
    connections = []
    with contextlib.suppress(BlockingIOError, TimeoutError):
        for _ in range(10):
            family = socket.AF_UNIX if isinstance(holder.address, str) else socket.AF_INET
            connections.append(socket.socket(family, socket.SOCK_STREAM))
            connections[-1].settimeout(0.01)
            connections[-1].connect(holder.address)
    service = make(holder.address)
    assert holder.process.wait(PATIENCE) == -signal.SIGKILL
    assert service.pid() == service.server_pid
    for connection in connections:
        connection.close()


def test_where_one_of_several_holders_is_foreign_none_is_touched(hold):
    """A child that was forked before the title was set holds the socket, too."""
    holder = hold(ways=["child"])
    child = psutil.Process(holder.pid).children()[0]
    with pytest.raises(ChannelError, match=f"process {child.pid} "):
        clear_stale(holder.address, NAME)
    assert child.is_running()
    assert holder.process.poll() is None


def test_at_a_free_address_nobody_is_looked_for(make, hold, address, monkeypatch):
    holder = hold(address)
    holder.close()
    monkeypatch.setattr(lease, "_pids_at", None)
    service = make(holder.address)
    assert service.pid() == service.server_pid


def test_it_says_whom_it_ended(hold, address):
    holder = hold(address)
    assert clear_stale(holder.address, NAME) == [holder.pid]
    assert is_free(holder.address)
    assert clear_stale(holder.address, NAME) == []


def test_without_the_kernels_help(hold, address, monkeypatch):
    """As on systems that have no descriptors of processes."""
    monkeypatch.setattr(processes, "_pidfd_open", None)
    first, second = hold(address), None
    assert clear_stale(first.address, NAME) == [first.pid]
    second = hold(first.address if isinstance(address, str) is False else address + "2", ways=["deaf"])
    assert clear_stale(second.address, NAME, grace=0.05) == [second.pid]


# ------------------------------------------------------------------ not ours


FOREIGN = {
    "another title": {"title": "vali_OtherServer"},
    "python without a title": {"title": None},
    "a longer title": {"title": f"{TITLE}_HealthChecker"},
    "a title within": {"title": f"my {TITLE}"},
    "more words": {"title": f"{TITLE} more"},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_process_is_never_touched(hold, make, address, kind):
    holder = hold(address, **FOREIGN[kind])
    name = psutil.Process(holder.pid).name()
    with pytest.raises(ChannelError) as caught:
        make(holder.address)
    where = holder.address if isinstance(holder.address, str) else f"127.0.0.1:{holder.address[1]}"
    message = f"LedgerServer cannot be served: {where} is in use by process {holder.pid} ({name})"
    assert caught.value.message == message
    assert TITLE in caught.value.hint
    assert holder.process.poll() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_our_title_in_another_users_process(hold, make, tmp_path):
    holder = hold(uid=65534)
    with pytest.raises(ChannelError, match=f"in use by process {holder.pid} "):
        make(holder.address)
    assert holder.process.poll() is None


def test_a_process_that_cannot_be_seen(hold, make, monkeypatch):
    holder = hold()
    monkeypatch.setattr(psutil, "net_connections", lambda _kind: [])
    with pytest.raises(ChannelError, match="in use by a process that this user may not see"):
        make(holder.address)

    def denied(_kind):
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil, "net_connections", denied)
    with pytest.raises(ChannelError, match="in use by a process that this user may not see"):
        make(holder.address)
    assert holder.process.poll() is None


def test_this_very_process(make, monkeypatch, address):
    """Even one that carries the title."""
    monkeypatch.setattr(lease, "title_of", lambda _pid: TITLE)
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.bind(address)
        sock.listen()
        with pytest.raises(ChannelError, match=f"in use by process {os.getpid()} "):
            make(sock.getsockname())


def test_a_port_that_only_an_outgoing_connection_holds_is_waited_for_and_named(make):
    """The system gave it to somebody as the source of a connection, as it may any port of its range."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())
        with pytest.raises(ChannelError) as caught:
            make(client.getsockname(), release_timeout=0.1)
        assert f"an outgoing connection of process {os.getpid()} (" in caught.value.message
        assert f"ip_local_reserved_ports={client.getsockname()[1]}" in caught.value.hint
        peer, _ = server.accept()
        threading.Timer(0.2, lambda: (peer.close(), client.close())).start()  # the side that closes first waits
        service = make(client.getsockname(), release_timeout=PATIENCE)
        assert service.pid() == service.server_pid


def test_a_port_on_all_addresses_is_taken_too(hold, make):
    holder = hold(("0.0.0.0", 0), title=None)
    with pytest.raises(ChannelError, match=f"in use by process {holder.pid} "):
        make(("127.0.0.1", holder.address[1]))


def test_replacing_can_be_off(hold, make):
    holder = hold()
    with pytest.raises(ChannelError, match="cannot serve at"):
        make(holder.address, replace_stale=False)
    assert holder.process.poll() is None


def test_a_file_that_is_no_socket_stays(make, tmp_path):
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(ChannelError, match="a file that is not a socket is there"):
        make(str(path))
    assert path.read_text() == "precious"


# ------------------------------------------------------------------ between looking and acting


def test_it_is_looked_at_again_right_before_each_signal(hold, monkeypatch):
    """Here the process changes its face between two looks, as one that was replaced by another would."""
    holder = hold(ways=["deaf"])
    looks = []

    def title_of(_pid):
        looks.append(time.monotonic())
        return TITLE if len(looks) <= honest else "sshd"

    monkeypatch.setattr(lease, "title_of", title_of)
    for honest in (0, 1, 2):
        looks.clear()
        with pytest.raises(ChannelError, match=f"in use by process {holder.pid} "):
            clear_stale(holder.address, NAME, grace=0.05)
        assert len(looks) == honest + 2  # the first look; before SIGTERM; before SIGKILL; for its name
        assert holder.process.poll() is None


def test_a_reused_process_id_is_not_hit(hold):
    """The process that was looked at died, and its id went to another one, which has our title, too."""
    innocent = hold()
    dead = processes.ProcessIdentity(innocent.pid, 1.0)
    assert dead.end(0.1)
    assert innocent.process.poll() is None


def test_one_that_goes_by_itself(hold, monkeypatch):
    holder = hold()
    pids_at = lease._pids_at

    def gone(location):
        found = pids_at(location)
        holder.close()
        return found

    monkeypatch.setattr(lease, "_pids_at", gone)
    clear_stale(holder.address, NAME)
    assert is_free(holder.address)


def test_one_that_goes_before_it_is_looked_for(hold, monkeypatch):
    holder = hold()
    monkeypatch.setattr(lease, "_pids_at", lambda _location: holder.close() or ([], []))
    assert clear_stale(holder.address, NAME) == []


def test_waiting_has_an_end(hold):
    holder = hold()
    assert not wait_until_free(holder.address, 0.02)
    threading.Timer(0.01, holder.close).start()
    assert wait_until_free(holder.address, PATIENCE)


# ------------------------------------------------------------------ at a restart


def test_a_stranger_who_took_the_port_meanwhile_is_not_touched(make, hold):
    service = make(("127.0.0.1", 0), release_timeout=0.0, connect_wait=0.0, restart_on_exit=False)
    kill(service)
    stranger = hold(service.address, title=None)
    with pytest.raises(ChannelError, match=f"in use by process {stranger.pid} "):
        service.restart_server()
    assert stranger.process.poll() is None
    stranger.close()
    service.restart_server()
    assert service.pid() == service.server_pid


def sockets():
    """Return the names of this process' Unix sockets."""
    return {connection.laddr for connection in psutil.Process().net_connections("unix")}


def serve_until_told(directory, pipe):
    with Ledger(directory, port=0) as service:
        pipe.send((service.address, service.server_pid))
        pipe.recv()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has names that end with their process")
def test_a_server_whose_owner_lives_is_not_stale(make, tmp_path):
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    owner = context.Process(target=serve_until_told, args=(tmp_path, there))
    owner.start()
    address, pid = here.recv()
    with pytest.raises(ChannelError, match=f"process {pid}, the server of a process that lives"):
        make(address)
    assert is_alive(pid)
    os.kill(pid, signal.SIGSTOP)  # so that it does not end with its owner
    owner.kill()
    owner.join()
    service = make(address)
    assert not is_alive(pid)
    assert service.pid() == service.server_pid


def test_a_child_that_is_forked_during_a_start_does_not_pass_for_the_owner(make, monkeypatch):
    """It holds no mark of the server that another thread is starting, nor of one that served before."""
    service = make(("127.0.0.1", 0))
    starting, go_on = threading.Event(), threading.Event()

    def outcome(self, server, timeout, outcome=ServerReady.outcome):
        starting.set()
        go_on.wait(PATIENCE)
        return outcome(self, server, timeout)

    monkeypatch.setattr(ServerReady, "outcome", outcome)
    restart = threading.Thread(target=service.restart_server)
    restart.start()
    assert starting.wait(PATIENCE)
    marks = {name for name in sockets() if name.startswith("@shmelim.owner.")}
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=lambda: there.send(sorted(name for name in sockets() if name in marks)))
    child.start()
    go_on.set()
    assert marks
    assert here.recv() == []
    child.join()
    restart.join()
    assert service.pid() == service.server_pid


def test_two_services_at_one_address_are_told_apart(make, tmp_path):
    """The later one takes the port of the earlier one, which knows that and says so."""
    first = make(("127.0.0.1", 0), connect_wait=0.0)
    first_pid = first.server_pid
    second = make(first.address)
    until(lambda: not is_alive(first_pid))
    assert second.pid() == second.server_pid
    with pytest.raises(ChannelError, match="a later LedgerServer of this process has taken"):
        first.pid()


HARDENED = """
import contextlib, os, socket, sys
from pathlib import Path
from ledger import Ledger
from shmelim.channel import ChannelServer
from shmelim.errors import ChannelError
from shmelim.table import Writer
directory, table = Path(sys.argv[1]), sys.argv[2]

def main():
    Writer(table).close(unlink=True)
    if os.fork() == 0:
        Ledger(directory, address=directory / "socket", outlive_owner=True)
        os._exit(0)
    os.wait()
    with Ledger(directory, address=directory / "socket") as service:
        print(service.pid() == service.server_pid)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = taken.getsockname()
        for serve in lambda: Ledger(directory, address[1]), ChannelServer(0, address, b"k" * 32).start:
            try:
                serve()
            except ChannelError as error:
                print(error.message)

main()
"""


def test_where_proc_shows_nothing_but_processes_a_service_starts_and_names_what_is_wrong(tmp_path, table_name):
    """As systemd's ProcSubset=pid has it: each part of it was a bare FileNotFoundError."""
    mount = "mount --make-rprivate / && mount -t proc -o subset=pid proc /proc"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount, and a kernel that can hide so")
    command = ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", sys.executable, "-c", HARDENED]
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [*command, str(tmp_path), table_name],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    starts, *refusals = done.stdout.splitlines()
    assert starts == "True", done.stderr
    assert re.fullmatch(r"LedgerServer cannot be served: 127\.0\.0\.1:\d+ is in use by a process .*", refusals[0])
    assert re.fullmatch(r"cannot serve at 127\.0\.0\.1:\d+: Address already in use", refusals[1])
