"""Commands against a real server: `serve` in a process of its own, and every other command in this one."""

import contextlib
import json
import os
import signal
import subprocess
import sys

from invoking import CliRunner
from waiting import PATIENCE

from shmelim import EliminationClient
from shmelim.cli.main import cli
from shmelim.shm import SharedNamespace

A = "5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs"
B = "5C5GANtAKokcPvJBGyLcFgY5fYuQaXC3MpVt75codZbLLZrZ"
T = 1_746_396_435_687


def environment(home):
    return {"XDG_RUNTIME_DIR": str(home / "run"), "XDG_STATE_HOME": str(home / "state")}


class Server:
    """A real ``python -m shmelim serve``, ready when it is made."""

    def __init__(self, name, home, *arguments):
        (home / "run").mkdir(mode=0o700, exist_ok=True)
        self.name, self.home, self.log = name, home, home / "stderr"
        reading, writing = os.pipe()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "shmelim", "serve", "--name", name, "--ready-fd", str(writing), *arguments],
                pass_fds=(writing,),
                env={**os.environ, **environment(home)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        os.close(writing)
        with os.fdopen(reading, "rb") as ready:
            assert ready.read() == b"ready\n", self.said()

    def said(self):
        return self.log.read_text()

    def end(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=PATIENCE)
        assert output == b""
        return self.process.returncode

    def client(self):
        return EliminationClient(self.name, runtime_base=self.home / "run" / "shmelim")


def runner(name, home):
    def run(*arguments, stdin=None):
        env = {**environment(home), "SHMELIM_NAME": name, "COLUMNS": "200"}
        return CliRunner().invoke(cli, arguments, prog_name="shmelim", input=stdin, env=env)

    return run


@contextlib.contextmanager
def serving(name, home, *arguments):
    server = Server(name, home, *arguments)
    try:
        yield server
    finally:
        server.end(signal.SIGKILL)
        SharedNamespace(name).remove()


def document(result, code=0):
    assert result.exit_code == code, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def row(hotkey, **more):
    return {"hotkey": hotkey, "reason": "ZOMBIE", "elimination_initiated_time_ms": T, **more}


def write(path, rows):
    path.write_text(json.dumps({"eliminations": rows}))
    return str(path)
