"""What a process is known by: its id with its start, whether it lives, and the title that it carries."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from setproctitle import setproctitle

if TYPE_CHECKING:
    import psutil

_HAS_PROC = Path("/proc/self/stat").exists()
_STARTED = 18  # index of the start time after the state, see proc(5)

_logger = logging.getLogger("shmelim.system")


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that must not be mistaken for a later one of the same id.

    Attributes
    ----------
    pid : int
        Its id.
    started : float
        When it was started, in a form that only compares.

    """

    pid: int
    started: float

    @classmethod
    def this_process(cls) -> Self:
        """Return the process that calls this."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Self:
        """Return the process that has this id now, or an ended one."""
        return cls(pid, _start_of(pid) or 0.0)

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.started != 0.0 and _start_of(self.pid) == self.started

    def open(self) -> int | None:
        """Return a descriptor that becomes readable when it ends; None where there is no such thing."""
        opener = getattr(os, "pidfd_open", None)
        try:
            return None if opener is None else int(opener(self.pid))
        except OSError:  # it has ended, or the kernel is too old: is_running() tells
            return None


def _start_of(pid: int) -> float | None:
    """Return when a process was started; None if it has ended, waited for or not."""
    if _HAS_PROC:
        # Counted from the boot. What psutil makes of it moves when the clock is set, and so would differ between
        # two processes.
        try:
            state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="latin-1").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if state in "ZX" else float(fields[_STARTED])
    import psutil  # noqa: PLC0415  # Linux does without

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


def set_title(title: str) -> None:
    """Give this process a title; say so in the log if the system has no room for it."""
    import psutil  # noqa: PLC0415  # for servers alone

    setproctitle(title)
    if title_of(psutil.Process()) != title:
        # The title overwrites arguments and environment, and has no room where both are almost empty.
        _logger.warning("the process title %r could not be set; a later server will not replace this one", title)


def title_of(process: psutil.Process) -> str | None:
    """Return a process' whole title, or None if it is gone or may not be looked at."""
    import psutil  # noqa: PLC0415

    try:
        return " ".join(process.cmdline()).rstrip()  # what the old arguments leave over is filled with NULs
    except psutil.Error:
        return None
