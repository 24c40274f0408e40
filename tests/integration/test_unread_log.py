"""Nobody's call waits for a log: servers whose stderr is a pipe that nobody reads, while something is wrong."""

import contextlib
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from commanding import T, environment
from ledger import Ledger, LedgerServer, is_alive
from waiting import PATIENCE

from shmelim import EliminationClient
from shmelim.shm import SharedNamespace

CALLS = 1200  # once it hung in the 383rd: 64 KiB of "its file is behind"


@contextlib.contextmanager
def served_into(pipe, name, home, *arguments):
    """``shmelim serve`` with that end of a pipe as its stderr."""
    (home / "run").mkdir(mode=0o700)
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "shmelim", "serve", "--name", name, "--ready-fd", str(writing), *arguments],
        pass_fds=(writing,),
        env={**os.environ, **environment(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=pipe,
    )
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as ready:
            assert ready.read() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        SharedNamespace(name).remove()


def fill(pipe):
    """Leave no room in a pipe, as if the server had said much and nobody had read it."""
    flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"x")
    fcntl.fcntl(pipe, fcntl.F_SETFL, flags)


def spoil(directory):
    """Make the JSON file unwritable for everybody, root included: what is to be written beside it cannot be."""
    (directory / ".eliminations.json.next" / "in the way").mkdir(parents=True)


def in_time(work):
    """Run something under a watchdog; return what it returns."""
    found = []
    thread = threading.Thread(target=lambda: found.append(work()), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert found, "it hangs, or failed"
    return found[0]


@pytest.mark.parametrize(("full", "calls"), [(False, CALLS), (True, 50)], ids=["unread", "full"])
def test_saving_calls_go_on_while_the_files_cannot_be_written_and_nobody_reads_stderr(
    table_name, tmp_path_factory, full, calls
):
    home = tmp_path_factory.mktemp("s")
    reading, writing = os.pipe()
    state = home / "state"
    options = ("--state-dir", str(state), "--durability", "process", "--files", "current")
    with served_into(writing, table_name, home, *options) as process:
        client = EliminationClient(table_name, runtime_base=home / "run" / "shmelim")
        client.save_eliminations()  # so that nothing is written behind our back
        spoil(state)
        if full:
            fill(writing)

        def save():
            for number in range(calls):
                client.append_elimination_row(f"hotkey{number % 7}", 0.1, "ZOMBIE", t_ms=T + number)
            return client.health_check()

        health = in_time(save)
        assert health["status"] == "degraded"
        assert [problem["name"] for problem in health["problems"]] == ["files_behind"]
        client.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    if not full:
        assert said.count("files_behind: ") == 1
        assert said.startswith("serving ")


class Talker(LedgerServer):
    """Logs a line in each call, as any object may."""

    def talk_rpc(self, number):
        logging.getLogger("talker").warning("%d %s", number, "x" * 1000)
        return number


class Talking(Ledger):
    def _start_server_process(self, address, authkey, server_ready):
        return self._spawn_server(
            Talker, self.directory, address=address, authkey=authkey, server_ready=server_ready
        )


OWNER = """
import json, sys
from test_unread_log import Talking
if __name__ == "__main__":
    with Talking(sys.argv[1], start_method=sys.argv[2]) as service:
        said = [service._server_proxy.talk_rpc(number) for number in range(500)]
        print(json.dumps([len(said), service.server_pid]), flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_calls_of_a_service_go_on_while_nobody_reads_its_stderr(tmp_path, method):
    reading, writing = os.pipe()
    (tmp_path / "owner.py").write_text(OWNER)
    owner = subprocess.Popen(
        [sys.executable, str(tmp_path / "owner.py"), str(tmp_path), method],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=writing,
    )
    try:
        calls, server = in_time(lambda: json.loads(owner.stdout.readline()))
        assert calls == 500
        owner.stdin.close()
        assert owner.wait(PATIENCE) == 0
        assert not is_alive(server)
        assert (tmp_path / "closed").exists()  # it ended in order
    finally:
        owner.kill()
        owner.wait()
        os.close(reading)
        os.close(writing)
