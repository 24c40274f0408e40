"""What a publisher says of itself on its own host: a small file beside the server's key, renewed every second."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from shmelim.eliminations.runtime import RuntimeDirectory
from shmelim.errors import ShmelimError
from shmelim.system.clock import now_ms

_FILE: Final = "publisher.json"
_SILENT_MS: Final = 10_000
_MOST: Final = 64 << 10


class Publishing(msgspec.Struct, frozen=True):
    """A publisher as it was at ``at_ms``; ``behind`` is how many changes were not sent by then."""

    pid: int
    engine: str
    at_ms: int
    term: int = 0
    line: int = 0
    seq: int = 0
    behind: int = 0
    held: str | None = None
    error: str | None = None
    hint: str | None = None

    @property
    def is_silent(self) -> bool:
        """Whether it has said nothing for longer than it may."""
        return now_ms() - self.at_ms > _SILENT_MS

    def problem(self) -> tuple[str, str, ShmelimError] | None:
        """Return name, severity and text of what is wrong with it; None: nothing is."""
        if self.is_silent:
            found = ShmelimError(
                f"process {self.pid}, which published to {self.engine!r}, has said nothing for more than"
                f" {_SILENT_MS // 1000} s",
                hint="start `shmelim publish` again; followers keep what they have",
            )
            return "publisher_silent", "degraded", found
        if self.error is not None:
            return "publisher_error", "degraded", ShmelimError(self.error, hint=self.hint)
        if self.held is not None:
            found = ShmelimError(
                f"nothing is sent to followers: {self.held}", hint="`shmelim fleet release`, or `shmelim ack`"
            )
            return "publisher_held", "notice", found
        return None


class Note:
    """Keeps the file up to date; :meth:`remove` at an orderly end, after which nothing is missed."""

    def __init__(self, name: str, engine: str) -> None:
        self._path = _place(name)
        self._engine = engine
        self._written = 0

    def write(self, **about: Any) -> None:
        """Say how it is, once a second at most; where nothing can be written, nothing is said."""
        now = now_ms()
        if 0 <= now - self._written < 1000:  # noqa: PLR2004  # a second
            return
        self._written = now
        raw = msgspec.json.encode(Publishing(os.getpid(), self._engine, now, **about))
        making = self._path.with_name(f".{_FILE}.{os.getpid()}")
        with suppress(OSError):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(making, flags, 0o600), "wb") as file:
                file.write(raw)
            making.replace(self._path)

    def remove(self) -> None:
        """Take the file away, unless another publisher has written it since."""
        with suppress(OSError):
            if _read(self._path).pid == os.getpid():
                self._path.unlink()


def publishing(name: str) -> Publishing | None:
    """Return what the publisher of a name says, or said last; None where there is none, or it ended in order."""
    try:
        return _read(_place(name))
    except (OSError, msgspec.DecodeError):
        return None


def _place(name: str) -> Path:
    return RuntimeDirectory.of_server(name).path / _FILE


def _read(path: Path) -> Publishing:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        return msgspec.json.decode(file.read(_MOST), type=Publishing)
