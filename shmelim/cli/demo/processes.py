"""The demo's processes: the server that can be killed, and the crowd of readers."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.resource_tracker
import os
import select
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Final

from shmelim.cli.demo.watcher import Tally, watch
from shmelim.errors import ShmelimError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess
    from pathlib import Path
    from types import FrameType

    from shmelim.cli.demo.records import Cast

_PATIENCE: Final = 60.0
_STOPPING: Final = 10.0
_LONGEST_SOCKET: Final = 100  # bytes; the kernel takes 107, macOS 103
_KEPT_BACK: Final = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


class ServerProcess:
    """One ``shmelim serve`` with everything it keeps below a directory of the demo's own.

    Parameters
    ----------
    name
        What it serves.
    home
        The directory.
    departed
        The default departed file.

    """

    def __init__(self, name: str, home: Path, departed: Path) -> None:
        self._log = home / "serve.log"
        runtime = home / "run"
        runtime.mkdir(mode=0o700, exist_ok=True)
        command = [sys.executable, "-m", "shmelim", "serve", "--name", name, "--state-dir", str(home / "state")]
        if len(os.fsencode(runtime / "shmelim" / name / "socket")) > _LONGEST_SOCKET:
            command += ["--port", "0"]
        reading, writing = os.pipe()
        self._ready = reading
        try:
            with self._log.open("wb") as log:
                self.started_ns = time.monotonic_ns()
                # A group of its own: Ctrl-C reaches the demo alone, which then ends this one.
                self._process = subprocess.Popen(  # noqa: S603 - this very program, with arguments made here
                    [*command, "--default-departed", str(departed), "--ready-fd", str(writing)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    pass_fds=(writing,),
                    process_group=0,
                    env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)},
                )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Return when readers and clients are served.

        Raises
        ------
        ShmelimError
            It ended instead, or did not get ready.

        """
        readable, _, _ = select.select([self._ready], [], [], _PATIENCE)
        if readable and os.read(self._ready, 16):
            return
        lines = self._log.read_text(errors="replace").splitlines()
        raise ShmelimError("the server did not start: " + (lines[-1] if lines else "it said nothing"))

    def kill(self) -> int:
        """Kill it without warning; returns the time of that, by the monotonic clock, when it is dead."""
        at_ns = time.monotonic_ns()
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return at_ns

    def close(self) -> None:
        """End it, if it still runs. Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_STOPPING)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._ready >= 0:
            os.close(self._ready)
            self._ready = -1


class Crowd:
    """The reader processes, spoken to over one line each.

    Parameters
    ----------
    name
        What they read.
    cast
        Which hotkey plays which part.
    count
        How many they are.

    """

    def __init__(self, name: str, cast: Cast, count: int) -> None:
        self._members: list[tuple[SpawnProcess, Connection]] = []
        spawning = multiprocessing.get_context("spawn")
        try:
            with _signals_kept_back():
                for number in range(count):
                    mine, theirs = spawning.Pipe()
                    member = spawning.Process(
                        target=watch, args=(theirs, name, cast), name=f"shmelim-demo-reader-{number}", daemon=True
                    )
                    self._members.append((member, mine))
                    member.start()
                    theirs.close()
        except BaseException:
            self.close()
            raise

    def gather(self, what: str) -> list[Any]:
        """Return every reader's next message, which must be of this kind.

        Raises
        ------
        ShmelimError
            A reader died or did not answer.

        """
        found = []
        for member, line in self._members:
            try:
                if not line.poll(_PATIENCE):
                    raise ShmelimError(f"reader {member.pid} did not answer within {_PATIENCE:.0f} s")
                kind, content = line.recv()
            except (EOFError, OSError) as error:
                member.join(_STOPPING)
                raise ShmelimError(f"reader {member.pid} died with exit code {member.exitcode}") from error
            if kind != what:
                raise ShmelimError(f"reader {member.pid} said {kind!r}, not {what!r}")
            found.append(content)
        return found

    def enter(self, phase: str) -> None:
        """Have every reader count for a phase; returns when each has made a whole round in it."""
        self._send("phase", phase)
        self.gather("entered")

    def look_out_for(self, hotkey: str) -> None:
        """Have every reader say when it first sees a hotkey eliminated; :meth:`gather` "seen" for the times."""
        self._send("await", hotkey)

    def report(self) -> list[Tally]:
        """End all reading and return what the readers saw."""
        self._send("report", None)
        return self.gather("report")

    def _send(self, what: str, about: str | None) -> None:
        for _, line in self._members:
            # One that died shows when its answer is gathered.
            with contextlib.suppress(OSError):
                line.send((what, about))

    def close(self) -> None:
        """End every reader that still runs. Idempotent."""
        for _, line in self._members:
            line.close()
        for member, _ in self._members:
            if member.pid is not None:
                member.join(_STOPPING)
                if member.is_alive():
                    member.kill()
                    member.join()
        self._members = []


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Let a signal take effect at the end of the block, so that no process is started that nobody knows of."""
    came: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, remember) for number in _KEPT_BACK}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


@contextlib.contextmanager
def _signals_kept_back() -> Iterator[None]:
    """Keep signals from processes started here (which inherit that for good), and from this one meanwhile."""
    # Its own start lets signals through again, so it must come first.
    multiprocessing.resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _KEPT_BACK)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
