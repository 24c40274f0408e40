"""What a publisher says of itself on its own host: a small file beside the server's key, renewed every second.

::

    there, and young                    it runs
    there, old, and its process gone    it was killed, and nobody has started it again
    there, ``ended``                    it ended by itself, because of an error that needs a person
    not there                           it ended as it was asked to, or there never was one
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from shmelim.eliminations.runtime import RuntimeDirectory
from shmelim.errors import ShmelimError
from shmelim.system.clock import boottime, now_ms
from shmelim.system.processes import ProcessIdentity

_FILE: Final = "publisher.json"
_SILENT: Final = 10.0
_HANGING: Final = 60.0
"""Seconds of silence of a process that lives: a turn that sends a large snapshot is long."""
_MOST: Final = 64 << 10


class Publishing(msgspec.Struct, frozen=True):
    """A publisher as it was at ``said``, of this machine's CLOCK_BOOTTIME in seconds.

    ``started`` tells its process from a later one, and ``since_ms`` is when error, hold and line became what they
    are; ``behind`` is how many changes were not sent by then.
    """

    pid: int
    started: float
    engine: str
    said: float
    since_ms: int
    term: int = 0
    line: int = 0
    seq: int = 0
    behind: int = 0
    held: str | None = None
    error: str | None = None
    hint: str | None = None
    ended: bool = False

    @property
    def is_silent(self) -> bool:
        """Whether it has said nothing for longer than it may; one in another container is known by that alone."""
        silence = boottime() - self.said
        if 0 <= silence <= _SILENT:
            return False
        is_dead = not ProcessIdentity(self.pid, self.started).is_running()
        return is_dead or not 0 <= silence <= _HANGING  # below 0: it spoke before the machine was started

    @property
    def is_up(self) -> bool:
        """Whether it lives, as far as can be known here."""
        return not (self.ended or self.is_silent)

    def problem(self) -> tuple[str, str, ShmelimError] | None:
        """Return name, severity and text of what is wrong with it; None: nothing is."""
        again = "start `shmelim publish` again; if the name is not published any more, remove publisher.json"
        if self.ended:
            text = f"what published to {self.engine!r} has ended: {self.error}"
            found = ShmelimError(text, hint=self.hint or again)
            return "publisher_ended", "degraded", found
        if self.is_silent:
            found = ShmelimError(
                f"process {self.pid}, which published to {self.engine!r}, has said nothing for more than"
                f" {_SILENT:.0f} s",
                hint=f"{again}; followers keep what they have",
            )
            return "publisher_silent", "degraded", found
        if self.error is not None:
            return "publisher_error", "degraded", ShmelimError(self.error, hint=self.hint)
        if self.held is not None:
            found = ShmelimError(
                f"nothing is sent to followers: {self.held!r}", hint="`shmelim fleet release`, or `shmelim ack`"
            )
            return "publisher_held", "notice", found
        return None


class Note:
    """Keeps the file up to date; :meth:`remove` at an orderly end, after which nothing is missed.

    Where nothing can be written, nothing is said: who publishes must not suffer from who looks.
    """

    def __init__(self, name: str, engine: str) -> None:
        self._path = _place(name)
        me = ProcessIdentity.this_process()
        self._last = Publishing(me.pid, me.started, engine, -1.0, 0)

    def write(self, **about: Any) -> None:
        """Say how it is: at once where that is another than it was, else once a second."""
        last, now = self._last, boottime()
        found = Publishing(last.pid, last.started, last.engine, now, last.since_ms, **about)
        is_new = _kind(found) != _kind(last) or last.said < 0
        if is_new or now - last.said >= 1:
            self._replace(msgspec.structs.replace(found, since_ms=now_ms()) if is_new else found)

    def end(self, error: ShmelimError) -> None:
        """Say that it ends because of an error which does not pass, unless another publisher speaks by now."""
        if self._is_ours():
            about = {"said": boottime(), "since_ms": now_ms(), "error": error.message, "hint": error.hint}
            self._replace(msgspec.structs.replace(self._last, **about, ended=True))

    def remove(self) -> None:
        """Take the file away, unless another publisher has written it since."""
        if self._is_ours():
            with suppress(OSError):
                self._path.unlink()

    def _is_ours(self) -> bool:
        try:
            found = _read(self._path)
        except FileNotFoundError:
            return self._path.parent.is_dir()
        except (OSError, ValueError):
            return False
        return (found.pid, found.started) == (self._last.pid, self._last.started)

    def _replace(self, said: Publishing) -> None:
        self._last = said
        making = self._path.with_name(f".{_FILE}.{said.pid}")
        # Not synced: what a crash of the machine leaves was said before its start, and counts as silence.
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(making, flags, 0o600), "wb") as file:
                file.write(msgspec.json.encode(said))
            making.replace(self._path)
        except OSError:
            with suppress(OSError):
                making.unlink()


def publishing(name: str) -> Publishing | None:
    """Return what the publisher of a name says, or said last; None where there is none, or it ended in order."""
    try:
        return _read(_place(name))
    except (OSError, ValueError):
        return None


def _kind(said: Publishing) -> tuple[object, ...]:
    return said.line, said.held, said.error


def _place(name: str) -> Path:
    return RuntimeDirectory.of_server(name).path / _FILE


def _read(path: Path) -> Publishing:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        return msgspec.json.decode(file.read(_MOST), type=Publishing)
