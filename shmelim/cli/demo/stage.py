"""Where a demo plays: a name, a directory and processes of its own, of which nothing is left."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from shmelim.eliminations.client import EliminationClient
from shmelim.errors import ShmelimError
from shmelim.shm import SharedNamespace

PATIENCE: Final = 60.0


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process without warning; returns once it is dead."""
    with process:  # which waits for it, and closes its pipes
        process.kill()


class Stage(contextlib.ExitStack):
    """Has what is to be undone on its stack; ``narrate`` hears what happens now."""

    def __init__(self) -> None:
        super().__init__()
        self.narrate: Callable[[str], object] = str
        self._busy = self._ending = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self.callback(signal.signal, number, signal.signal(number, self._end))
        self.name = f"demo-{secrets.token_hex(4)}"
        self.home = Path(tempfile.mkdtemp(prefix="shmelim-demo-"))
        self.callback(shutil.rmtree, self.home, ignore_errors=True)
        self.callback(SharedNamespace(self.name).remove)
        self._log = self.home / "log"

    def __exit__(self, *error: Any) -> bool | None:  # noqa: PYI036 - as it is passed on
        with self._signals_held():
            return super().__exit__(*error)

    def _end(self, number: int, _: Any) -> None:
        self._ending = 128 + number
        if not self._busy:
            sys.exit(self._ending)

    @contextlib.contextmanager
    def _signals_held(self) -> Iterator[None]:
        """Let an ending signal take effect at the end of the block, which starts a process or cleans up."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False
        if self._ending:
            sys.exit(self._ending)

    def start(self, *command: str, stdout: int | None = None) -> subprocess.Popen[bytes]:
        """Start a process in a group of its own: Ctrl-C reaches the demo alone."""
        of_the_demo = {"SHMELIM_RUNTIME_DIR": str(self.home), "SHMELIM_REGISTRY": str(self.home / "registry")}
        with self._signals_held(), self._log.open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - of this package, or the engine
                command, bufsize=0, stdin=subprocess.PIPE, stdout=log if stdout is None else stdout, stderr=log,
                env=os.environ | of_the_demo, process_group=0,
            )  # fmt: skip
            self.callback(end, process)
        return process

    def serve(self, *options: str) -> tuple[subprocess.Popen[bytes], EliminationClient]:
        """Start a server of the name; returns it and a client once it serves."""
        # On a port: the path of a socket below a long TMPDIR may be too long.
        given = ("--name", self.name, "--state-dir", f"{self.home}/state", "--port", "0", "--ready-fd", "1")
        server = self.start(sys.executable, "-m", "shmelim", "serve", *given, *options, stdout=subprocess.PIPE)
        self.hear(server)
        return server, EliminationClient(self.name, runtime_base=self.home)

    def hear(self, process: subprocess.Popen[bytes]) -> bytes:
        """Return the next line that a process says; ShmelimError where it ends, or is silent for a minute."""
        assert process.stdout is not None
        if select.select([process.stdout], [], [], PATIENCE)[0] and (line := process.stdout.readline()):
            return line
        said = self._log.read_text(errors="replace").splitlines() or ["it said nothing"]
        raise ShmelimError(f"process {process.pid} of the demo ended or hangs: {said[-1]}")
