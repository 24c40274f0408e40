"""What a process is known by: its id with its start, whether it lives, its title; and how one is ended.

All of it is read from /proc, where a start is counted from the boot. psutil adds the time of the boot, which moves
when the clock is set, and so would differ between two processes.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import select
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from shmelim.system.clock import monotonic

_STARTED: Final = 18  # index of the start time after the state, see proc(5)
_ARGUMENTS: Final = slice(44, 46)  # indexes of the first and the last address of the arguments
_pidfd_open: Callable[[int], int] | None = getattr(os, "pidfd_open", None)
_LOOK_AGAIN: Final = 0.05  # seconds between two looks, where the kernel does not report a process' end
_LONGEST: Final = 3600.0  # seconds of one wait
_KILLED: Final = 5.0  # seconds that a process may take to vanish after SIGKILL


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process that must not be mistaken for a later one of the same id."""

    pid: int
    started: float  # in a form that only compares; 0: it had ended

    @classmethod
    def this_process(cls) -> Self:
        """Return the process that calls this."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Self:
        """Return the process that has this id now, or an ended one."""
        return cls(pid, _start_of(pid) or 0.0)

    def is_running(self) -> bool:
        """Whether it has not ended; a zombie has, if this process has a descriptor left to look at it."""
        try:
            return self.started != 0.0 and _start_of(self.pid) == self.started
        except OSError:
            return _exists(self.pid)

    def wait(self, timeout: float | None, *others: int) -> bool:
        """Wait up to `timeout` seconds for its end, or until a descriptor of `others` is readable.

        Returns whether it has ended. Where the kernel reports no ends, it is looked at now and then.
        """
        with self._opened() as descriptor:
            poller = select.poll()
            for number in others if descriptor is None else (*others, descriptor):
                poller.register(number, select.POLLIN)
            deadline = math.inf if timeout is None else monotonic() + timeout
            longest = _LOOK_AGAIN if descriptor is None else _LONGEST
            # Looked at after the descriptor was opened, which so is certainly not of a later process of that id.
            while self.is_running():
                left = max(0.0, deadline - monotonic())
                ready = {number for number, _ in poller.poll(min(left, longest) * 1000)}
                if descriptor in ready:  # it may still be on its way to being a zombie
                    return True
                if ready or left == 0.0:
                    return not self.is_running()
            return True

    def end(self, patience: float, check: Callable[[int], object] = lambda _signal: None) -> bool:
        """End it: SIGTERM, and after `patience` seconds SIGKILL; return whether it is gone.

        `check` is called with each signal before that is sent, and may raise: the process that it looks at is
        certainly the one that gets the signal.
        """
        with self._opened() as descriptor:
            for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, _KILLED)):
                if not self.is_running():
                    return True
                check(number)
                with contextlib.suppress(ProcessLookupError):
                    if descriptor is None:
                        os.kill(self.pid, number)
                    else:
                        signal.pidfd_send_signal(descriptor, number)
                if self.wait(seconds):
                    return True
        return False

    @contextlib.contextmanager
    def _opened(self) -> Iterator[int | None]:
        """Hold a descriptor that becomes readable when it ends; None where there is no such thing."""
        try:
            descriptor = None if _pidfd_open is None else _pidfd_open(self.pid)
        except OSError:  # it has ended, or the kernel is too old: is_running() tells
            descriptor = None
        try:
            yield descriptor
        finally:
            if descriptor is not None:
                os.close(descriptor)


def _start_of(pid: int) -> float | None:
    """Return when a process was started; None if it has ended, waited for or not."""
    try:
        with open(f"/proc/{pid}/stat", "rb", 0) as file:  # noqa: PTH123  # asked often
            state, *fields = file.read(4096).rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in b"ZX" else float(fields[_STARTED])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def has_lock(pid: int, inode: int) -> bool:
    """Tell whether the process of this id is seen to hold an ``flock`` on the file of this inode.

    The kernel lists them with the ids of the asker's pid namespace, and ends them with their process.
    """
    wanted = [b"FLOCK", b"%d" % pid, b"%d" % inode]
    try:
        lines = Path("/proc/locks").read_bytes().splitlines()
    except OSError:
        return False
    # As in "1: FLOCK  ADVISORY  WRITE 4711 00:1b:345011 0 EOF"; who waits for one has "->" before its kind.
    found = (line.replace(b":", b" ").split() for line in lines)
    return any([fields[1], *fields[4:8:3]] == wanted for fields in found)


def family() -> set[int]:
    """Return the ids of this process and of those above it, as far as they are seen."""
    found, pid = set[int](), os.getpid()
    with contextlib.suppress(OSError):
        while pid:
            found.add(pid)
            pid = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    return found


def set_title(title: str) -> bool:
    """Give this process a title; return whether it has it now."""
    from setproctitle import setproctitle  # noqa: PLC0415  # few processes have a title of ours

    setproctitle(title)
    # It looks for the arguments from the first variable of the environment on. In a process where that one was
    # changed or removed, and in its forked children, it does nothing, without a word.
    return title_of(os.getpid()) == title or _overwrite_arguments(title)


def _overwrite_arguments(title: str) -> bool:
    """Write a title over this process' arguments, where the kernel says that they are, if they are long enough."""
    import ctypes  # noqa: PLC0415

    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[1:]
        begin, end = map(int, fields[_ARGUMENTS])
        text = title.encode()
        if not 0 < begin < end or len(text) >= end - begin:
            return False
        ctypes.memmove(begin, text.ljust(end - begin, b"\0"), end - begin)
        Path("/proc/self/comm").write_bytes(text[:15])
    except (OSError, ValueError):
        return False
    return title_of(os.getpid()) == title


@contextlib.contextmanager
def terminal_left_to_owner() -> Iterator[None]:
    """Have a terminal's Ctrl-C not interrupt a ``with`` block, in a process that works for another one.

    It goes to each process of a group, and the one that they work for decides what it means. A handler of the
    caller's own stays, and outside of the main thread nothing is done.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    # A function, and not SIG_IGN, which programs that are run in there would inherit.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def title_of(pid: int) -> str | None:
    """Return a process' whole title, or None if it is gone or may not be looked at."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    return words.replace(b"\0", b" ").decode(errors="replace").rstrip() or None


def is_of_this_user(pid: int) -> bool:
    """Whether a process runs as this user, by its real and its effective id."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="latin-1")
    except OSError:
        return False
    real, effective = map(int, status.partition("\nUid:")[2].split()[:2])
    return (real, effective) == (os.getuid(), os.geteuid())
