"""Servers for tests, in processes of their own that can be killed and started again, and whole states of them."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from crashing import WATCHDOG, Child, kill_self

from shmelim import EliminationClient, EliminationManagerServer, EliminationReader
from shmelim.eliminations.files import mirror
from shmelim.eliminations.record import decode, generate_row
from shmelim.eliminations.serve import ServeOptions, run
from shmelim.eliminations.store.store import Store
from shmelim.shm import SharedNamespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_TESTS = str(Path(__file__).parent)
_SPAWNED = """
import pickle, sys, serving
serving.serve_and_exit(pickle.load(sys.stdin.buffer), int(sys.argv[1]))
"""

# A server that is forked while another is being started would keep that one's pipe open.
_starting = threading.Lock()


# ---------------------------------------------------------------------- records


def row(hotkey: str, stamp: int = 0, *, pad: int = 0, reason: str = "ZOMBIE") -> dict[str, Any]:
    """A record that carries a stamp and its own checksum."""
    info = {"stamp": stamp, "pad": "x" * pad, "sum": _sum(hotkey, stamp, pad)}
    return generate_row(hotkey, stamp / 2, reason, 1_700_000_000_000 + stamp, {"BTC/USD": 1.5}, info)


def stamp_of(hotkey: str, record: Mapping[str, Any]) -> int:
    """The stamp of a record, which must be whole and of that hotkey."""
    info = record["return_info"]
    stamp = info["stamp"]
    assert record == row(hotkey, stamp, pad=len(info["pad"])), f"torn record of {hotkey}: {record}"
    assert info["sum"] == _sum(hotkey, stamp, len(info["pad"]))
    return stamp


def _sum(hotkey: str, stamp: int, pad: int) -> int:
    return zlib.crc32(f"{hotkey}/{stamp}/{pad}".encode())


# ---------------------------------------------------------------------- states


@dataclass(frozen=True)
class State:
    """All that is known of hotkeys, in order; what two states are compared by."""

    eliminations: tuple[tuple[str, str], ...]
    departed: tuple[str, ...]
    registered: frozenset[str]

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]], departed: Iterable[str], registered: Iterable[str]) -> State:
        listed = tuple((record["hotkey"], json.dumps(record, sort_keys=True)) for record in rows)
        return cls(listed, tuple(departed), frozenset(registered))

    def without_registered(self) -> State:
        """What the files hold."""
        return replace(self, registered=frozenset())


def state_in_table(reader: EliminationReader) -> State:
    """What readers see; every checksum is looked at."""
    reader.verify()
    found = reader.snapshot()
    return State.of(found.eliminations.values(), found.departed, found.registered)


def state_in_store(directory: Path) -> State:
    """What stands in a closed store."""
    with Store.open(directory) as store:
        store.check()
        rows = [decode(record) for _, record in store.eliminated()]
        return State.of(rows, [hotkey for hotkey, _ in store.departed()], store.registered())


def state_in_files(directory: Path) -> State:
    """What the two JSON files say."""
    rows = json.loads((directory / "eliminations.json").read_text())["eliminations"]
    departed = json.loads((directory / "departed_hotkeys.json").read_text())["departed_hotkeys"]
    return State.of(rows, departed, ())


def listing(directory: Path) -> dict[str, bytes]:
    """Every file below a directory with its content, but for the lock, which names who tried last to start."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


# ---------------------------------------------------------------------- processes


class Served:
    """A name that is served by a child process.

    Parameters
    ----------
    name
        An unused name.
    state_dir
        The state directory.
    method
        ``"fork"``, or ``"spawn"`` for a new interpreter.
    options
        Further fields of :class:`ServeOptions`.

    """

    def __init__(self, name: str, state_dir: Path, *, method: str = "fork", **options: Any) -> None:
        self.name = name
        self.state_dir = state_dir
        self.method = method
        # A socket's path must be short, which tmp_path is not.
        self.runtime = Path(options.pop("runtime_base", None) or tempfile.mkdtemp(prefix="shmelim-"))
        self.options = ServeOptions(name, state_dir, runtime_base=self.runtime, **options)
        self.pid: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start, and return when readers and clients are served; raises what the start raised."""
        assert self.pid is None
        with _starting:
            reading = self._launch()
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read()
        if answer != b"ready":
            self._wait()
            raise pickle.loads(answer) if answer else AssertionError("the server died before it was ready")
        return self

    def _launch(self) -> int:
        """Start the process; return the end of the pipe on which it will tell."""
        reading, writing = os.pipe()
        if self.method == "fork":
            self.pid = os.fork()
            if self.pid == 0:
                os.close(reading)
                serve_and_exit(self.options, writing)
        else:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join([_TESTS, *sys.path])}
            command = [sys.executable, "-c", _SPAWNED, str(writing)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, pass_fds=[writing])
            self.pid = self._process.pid
            self._process.stdin.write(pickle.dumps(self.options))
            self._process.stdin.close()
        os.close(writing)
        return reading

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        assert self._wait() == -signal.SIGKILL

    def stop(self) -> None:
        """SIGTERM, and wait for the clean end."""
        os.kill(self.pid, signal.SIGTERM)
        assert self._wait() == 0

    def reader(self) -> EliminationReader:
        return EliminationReader(self.name)

    def client(self, **options: Any) -> EliminationClient:
        return EliminationClient(self.name, runtime_base=self.runtime, **options)

    def _wait(self) -> int:
        if self._process is not None:
            status = self._process.wait()
            self._process = None
        else:
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = None
        return status

    def __enter__(self) -> Self:
        if self.pid is None:
            self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            self._wait()
        shutil.rmtree(self.runtime, ignore_errors=True)


def serve_and_exit(options: ServeOptions, writing: int) -> NoReturn:
    """Serve in this process until it is told to stop; say so on a pipe once ready, or what went wrong."""

    def ready(_service: object) -> None:
        os.write(writing, b"ready")
        os.close(writing)

    status = 1
    try:
        sys.settrace(None)
        faulthandler.dump_traceback_later(4 * WATCHDOG, exit=True, file=sys.__stderr__)
        run(options, ready)
        status = 0
    except Exception as error:
        with contextlib.suppress(OSError):
            os.write(writing, pickle.dumps(error))
            status = 0
        if status:
            traceback.print_exc()
    finally:
        os._exit(status)


def die_after(
    name: str, state_dir: Path, work: Callable[[EliminationManagerServer], object], **options: Any
) -> None:
    """In a child: run a server until `work` ends, which SIGKILL follows; its files are written on demand alone."""

    def run() -> None:
        mirror._COALESCE = 1e6
        options.setdefault("files", "lagged")
        server = EliminationManagerServer(SharedNamespace(name), state_dir, durability="process", **options)
        work(server)
        kill_self()

    with Child(run) as child:
        assert child.wait() == -signal.SIGKILL
