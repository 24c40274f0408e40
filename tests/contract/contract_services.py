"""A service in each of the ways in which SPEC 8 lets one be written, and what its tests wait with."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from waiting import PATIENCE, until

from shmelim import RPCServiceBase


def is_alive(pid):
    """Whether a process runs; a zombie does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def hang(pid):
    """Stop a process, and wait until all its threads stand still: until then one may still answer."""
    os.kill(pid, signal.SIGSTOP)
    tasks = Path(f"/proc/{pid}/task")
    until(lambda: {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks.iterdir()} == {"T"})


def title_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()


def kill(pid):
    """SIGKILL, and wait until it is dead; whoever is its parent reaps it."""
    os.kill(pid, signal.SIGKILL)
    until(lambda: not is_alive(pid), f"the death of {pid}")


def run(tmp_path, text, *arguments, by_stdin=False):
    """Run a script in an interpreter of its own."""
    script = tmp_path / "script.py"
    script.write_text(text)
    here = str(Path(__file__).parent)
    return subprocess.run(
        [sys.executable, "-" if by_stdin else str(script), str(tmp_path), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([here, *sys.path])},
        input=text if by_stdin else "",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


class FileAlerts:
    """A notifier whose messages can be read in every process."""

    def __init__(self, directory):
        self.path = Path(directory) / "alerts"

    def send_message(self, text, level="info"):
        with self.path.open("a") as file:
            file.write(f"{level}: {text}\n")

    def lines(self):
        return self.path.read_text().splitlines() if self.path.exists() else []

    def levels(self):
        return [line.partition(":")[0] for line in self.lines()]

    def of(self, *levels):
        return [line for line in self.lines() if line.partition(":")[0] in levels]


class Clock:
    """Milliseconds that pass when they are told to."""

    def __init__(self):
        self.now = 1_750_000_000_000

    def __call__(self):
        return self.now

    def later(self, seconds):
        self.now += round(seconds * 1000)
        return self.now


class NotesServer:
    """Keeps notes in memory; the file `status` in its directory says how it does."""

    def __init__(self, directory):
        if not Path(directory).is_dir():
            raise FileNotFoundError(2, "No such directory", str(directory))
        self.directory = Path(directory)
        self.notes = []

    def health_check_rpc(self):
        with contextlib.suppress(FileNotFoundError):
            status = (self.directory / "status").read_text()
            if status == "raise":
                raise RuntimeError("the check itself fails")
            return {"status": status, "timestamp_ms": 1}
        return {"status": "ok", "timestamp_ms": 1}

    def note_rpc(self, text):
        if not isinstance(text, str):
            raise TypeError(f"a note is text, not {text!r}")
        self.notes.append(text)
        return len(self.notes)

    def notes_rpc(self):
        return self.notes

    def pid_rpc(self):
        return os.getpid()

    def divide_rpc(self):
        return 1 / 0

    def hang_rpc(self):
        threading.Event().wait(PATIENCE)

    def __hidden_rpc(self):
        return "hidden"

    _hidden_rpc = __hidden_rpc

    def local(self):
        return "not remote"

    def close(self):
        (self.directory / "closed").touch()


class Notes(RPCServiceBase):
    """The short way: `_spawn_server` with a factory that lives in a module."""

    def __init__(self, directory, port=0, *, running_unit_tests=False, **options):
        options.setdefault("ready_timeout", PATIENCE)
        if "address" in options:
            port = None
        super().__init__("NotesServer", port, running_unit_tests, **options)
        self.directory = directory
        self._initialize_service()

    def _create_direct_server(self):
        return NotesServer(self.directory)

    def _start_server_process(self, address, authkey, server_ready):
        return self._spawn_server(
            NotesServer, self.directory, address=address, authkey=authkey, server_ready=server_ready
        )

    def note(self, text):
        return self._server_proxy.note_rpc(text)

    def notes(self):
        return self._server_proxy.notes_rpc()

    def pid(self):
        return self._server_proxy.pid_rpc()


class NestedNotes(Notes):
    """As the requirement's example: a nested function as the target of a process of one's own."""

    def _start_server_process(self, address, authkey, server_ready):
        def server_main():
            self._serve_rpc(NotesServer(self.directory), address, authkey, server_ready)

        process = multiprocessing.get_context("fork").Process(target=server_main, daemon=True)
        process.start()
        return process


def start_notes_server(directory, address, authkey, server_ready):
    RPCServiceBase._serve_rpc(NotesServer(directory), address, authkey, server_ready)


class SpawnedNotes(Notes):
    """A function of a module as the target of a process of one's own, in a new interpreter."""

    def _start_server_process(self, address, authkey, server_ready):
        process = multiprocessing.get_context("spawn").Process(
            target=start_notes_server, args=(self.directory, address, authkey, server_ready), daemon=True
        )
        process.start()
        return process


WAYS = {
    "direct": (Notes, {"running_unit_tests": True}),
    "default": (Notes, {}),
    "fork": (Notes, {"start_method": "fork"}),
    "forkserver": (Notes, {"start_method": "forkserver"}),
    "spawn": (Notes, {"start_method": "spawn"}),
    "nested": (NestedNotes, {}),
    "process": (SpawnedNotes, {}),
}
IN_A_PROCESS = [way for way in WAYS if way != "direct"]
