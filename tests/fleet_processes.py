"""A fleet of real processes with a real engine between."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from engines import PROGRAM, RealEngine
from serving import Served, row
from waiting import until

from shmelim import EliminationReader
from shmelim.errors import NotServingError

if TYPE_CHECKING:
    pass


needs_engine = pytest.mark.skipif(
    PROGRAM is None, reason="redis-server is not installed (apt-get install redis-server)"
)
stamps = itertools.count(1)


class Process:
    """A command that runs, and what it says."""

    def __init__(self, *arguments: str, within: tuple[str, ...] = (), **environment: str) -> None:
        command = [*within, sys.executable, "-m", "shmelim", *arguments, "--json"]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )
        self.lines: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        for line in self._process.stdout:
            self.lines.append(json.loads(line))

    @property
    def events(self) -> list[dict[str, Any]]:
        return [each for each in self.lines if "event" in each]

    def said(self, event: str) -> list[dict[str, Any]]:
        return [each for each in self.events if each["event"] == event]

    def has_said(self, event: str, times: int = 1) -> None:
        def enough() -> bool:
            assert self._process.poll() is None or len(self.said(event)) >= times, self._process.stderr.read()
            return len(self.said(event)) >= times

        until(enough, f"{event}, said {times} times")

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        return self._end(signal.SIGTERM)

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def wait(self) -> tuple[int, str]:
        code = self._process.wait(60)
        self._thread.join()
        return code, self._process.stderr.read()

    def _end(self, number: int) -> int:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)
        code = self._process.wait(60)
        self._thread.join()
        self._process.stdout.close()
        self._process.stderr.close()
        return code


class Fleet:
    """A server, an engine, a publisher, and followers into tables of other names."""

    def __init__(self, served: Served, engine: RealEngine, stack: contextlib.ExitStack) -> None:
        self.served, self.engine = served, engine
        self._stack = stack

    def publish(self, *options: str, url: str = "", within: tuple[str, ...] = ()) -> Process:
        directory = str(self.served.state_dir)
        arguments = [
            "--to",
            url or self.engine.url,
            "--name",
            self.served.name,
            "--state-dir",
            directory,
            "--beat",
            "0.1",
        ]
        return self._started("publish", *arguments, *options, within=within)

    def follow(self, name: str, *options: str, url: str = "", within: tuple[str, ...] = ()) -> Process:
        where = ["--from", url or self.engine.url, "--name", self.served.name, "--as", name]
        return self._started("follow", *where, *options, within=within)

    def _started(self, *arguments: str, within: tuple[str, ...]) -> Process:
        process = Process(*arguments, within=within, SHMELIM_RUNTIME_DIR=str(self.served.runtime))
        self._stack.callback(process.kill)
        return process

    def is_equal(self, name: str) -> bool:
        try:
            theirs = EliminationReader(name).snapshot()
        except NotServingError:
            return False
        return theirs[1:] == self.served.reader().snapshot()[1:]

    def becomes_equal(self, name: str, after: str = "") -> None:
        began = time.perf_counter()
        until(lambda: self.is_equal(name), f"{name} equal")
        if after:
            print(f"{after}: equal after {time.perf_counter() - began:.2f} s")

    def line(self, name: str) -> int:
        return until(lambda: EliminationReader(name).position, "a position").line


def change(fleet: Fleet) -> None:
    hotkey = f"new{next(stamps)}"
    fleet.served.client().add_elimination(hotkey, row(hotkey))


def shown(fleet: Fleet, *arguments: str) -> tuple[int, dict[str, Any]]:
    """What a command says, as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "shmelim", *arguments, "--json"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"SHMELIM_RUNTIME_DIR": str(fleet.served.runtime)},
    )
    return done.returncode, json.loads(done.stdout or done.stderr)
