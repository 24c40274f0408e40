"""Child processes that run a function, report what it returned, die where they are told to, and never hang."""

from __future__ import annotations

import faulthandler
import mmap
import os
import pickle
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

import pytest

import shmelim.shm

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

WATCHDOG = 60
"""Seconds after which a child that still runs shows where it is and exits; no test waits for it to pass."""

_PACKAGE = Path(shmelim.__file__).parent
_CODE = str(_PACKAGE / "shm") + os.sep


class Child:
    """A forked child that runs a function; its exit status is 0 if the function returned.

    What the function returns is available from :meth:`result`.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        self._reading: int | None
        self._reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._reading)
            _run(function, writing)
        os.close(writing)
        self._status: int | None = None

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def wait(self) -> int:
        """Return the exit status, negative for a signal."""
        if self._status is None:
            self._status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._status

    def until(self, condition: Callable[[], object]) -> None:
        """Let the child run until something is true; fail with its report if it ends before."""
        while not condition():
            if self._status is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._status = os.waitstatus_to_exitcode(status) if pid else None
            if self._status is not None and not condition():
                pytest.fail(f"child ended with status {self._status}: {self.result()}")
            os.sched_yield()

    def result(self) -> Any:
        """Return what the function returned, or fail with what it raised."""
        reading, self._reading = self._reading, None
        with os.fdopen(reading, "rb") as pipe:
            data = pipe.read()
        status = self.wait()
        assert data, f"child died with status {status}"
        returned, value = pickle.loads(data)
        assert returned, value
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # Once only: the number may be another thread's descriptor by now.
        if self._reading is not None:
            os.close(self._reading)
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()


def call(function: Callable[[], Any]) -> Any:
    """Run a function in a forked child and return what it returns."""
    with Child(function) as child:
        return child.result()


def _run(function: Callable[[], Any], writing: int) -> NoReturn:
    sys.settrace(None)
    faulthandler.dump_traceback_later(WATCHDOG, exit=True, file=sys.__stderr__)
    signal.alarm(WATCHDOG + 10)
    try:
        answer = pickle.dumps((True, function()))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    with os.fdopen(writing, "wb") as pipe:
        pipe.write(answer)
    os._exit(0 if pickle.loads(answer)[0] else 1)


class Counter:
    """A number that parent and child share."""

    def __init__(self) -> None:
        self._words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    @property
    def value(self) -> int:
        return self._words[0]

    @value.setter
    def value(self, value: int) -> None:
        self._words[0] = value


def at_line(
    stop: int,
    act: Callable[[], None],
    functions: tuple[str, ...] = (),
    files: tuple[str, ...] = (_CODE,),
    lines: Counter | None = None,
) -> None:
    """From now on count the lines that this thread runs in ``files`` (``shmelim.shm``); at number ``stop``, act.

    With ``functions`` given, only lines of functions of these names count; ``lines`` tells how many there were.
    """
    count = 0

    def inside(_frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if lines is not None:
                lines.value = count
            if count == stop:
                act()
        return inside

    def outside(frame: FrameType, _event: str, _arg: object) -> Any:
        code = frame.f_code
        wanted = code.co_filename.startswith(files) and (not functions or code.co_name in functions)
        return inside if wanted else None

    sys.settrace(outside)


def package_files(*names: str) -> tuple[str, ...]:
    """Return the paths of files of the package, each of which is there."""
    paths = tuple(str(_PACKAGE / name) for name in names)
    assert all(Path(path).is_file() for path in paths)
    return paths


def kill_self() -> None:
    """Die as by ``kill -9``."""
    os.kill(os.getpid(), signal.SIGKILL)
