"""A real Redis for tests: started on a socket of its own, killed, filled up, stopped, and never anybody else's."""

from __future__ import annotations

import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Self

import redis
from waiting import until

PROGRAM = shutil.which("redis-server") or shutil.which("valkey-server")


class RealEngine:
    """A server on a Unix socket in a directory of its own; it saves nothing by itself.

    ``within`` is what it is started by, such as ``ip netns exec NAME``.
    """

    def __init__(self, *options: str, within: tuple[str, ...] = ()) -> None:
        # A socket's path must be short.
        self.directory = Path(tempfile.mkdtemp(prefix="shmelim-"))
        self.socket = self.directory / "engine"
        self.url = f"unix://{self.socket}"
        self.options, self.within = options, within
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        command = [
            *self.within,
            str(PROGRAM),
            "--port",
            "0",
            "--unixsocket",
            str(self.socket),
            "--dir",
            str(self.directory),
        ]
        command += ["--save", "", "--appendonly", "no", *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(self._answers, "the engine")
        return self

    def _answers(self) -> bool:
        try:
            return self.client().ping()
        except redis.exceptions.AuthenticationError:
            return True
        except (redis.RedisError, OSError):
            return False

    def client(self, **options: Any) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), protocol=2, **options)

    def kill(self) -> None:
        """SIGKILL: what it held is gone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None
        self.socket.unlink(missing_ok=True)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
