"""The outbox: messages that wait in a directory until they are delivered, also while no process runs.

A file is a message, and its name its place in the order. Several processes may put messages there; whoever has
the turn, a lock that the kernel releases, sends the oldest. A message is put with one rename, so that a death
leaves it whole or not at all. It is not forced to the disk: after a power cut what still stands is told anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from shmelim.system.durable import make_private_directory

_ENDING: Final = ".msg"
_DIGITS: Final = 20
_MODE: Final = 0o600


class Kept(NamedTuple):
    """A message that waits."""

    path: Path
    text: str


class Outbox:
    """The messages of one directory, at most so many; thread-safe, and OSError where it cannot be used."""

    def __init__(self, directory: Path, most: int) -> None:
        self.directory = directory
        self._most = most
        make_private_directory(directory)

    def __len__(self) -> int:
        return len(self._names())

    def put(self, text: str) -> bool:
        """Have a message wait behind all others; False where too many do."""
        names = self._names()
        if len(names) >= self._most:
            return False
        # Not before those that are there, though the clock may have been set back.
        stamp = max(time.time_ns(), _stamp(names[-1]) + 1 if names else 0)
        name = f"{stamp:0{_DIGITS}d}-{os.urandom(4).hex()}"
        aside = self.directory / f".{name}"
        descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text.encode("utf-8", "backslashreplace"))
            aside.rename(self.directory / f"{name}{_ENDING}")
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        return True

    def first(self) -> Kept | None:
        """Return the message that has waited longest."""
        for name in self._names():
            path = self.directory / name
            with contextlib.suppress(FileNotFoundError):  # another process has sent it meanwhile
                return Kept(path, path.read_bytes().decode("utf-8", "backslashreplace"))
        return None

    def remove(self, kept: Kept) -> None:
        """Take a message out that was delivered, or never will be."""
        kept.path.unlink(missing_ok=True)

    def since_ms(self) -> int | None:
        """Return when the oldest was put there, in ms since 1970, UTC."""
        names = self._names()
        return _stamp(names[0]) // 1_000_000 if names else None

    @contextlib.contextmanager
    def turn(self) -> Iterator[bool]:
        """Have the turn to send for the length of a ``with`` block; False where somebody else has it."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.directory / ".lock", flags, _MODE)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                try:
                    yield True
                finally:
                    # A child that was forked meanwhile has a copy, which would keep it locked.
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)

    def _names(self) -> list[str]:
        names = (path.name for path in self.directory.iterdir())
        return sorted(name for name in names if name.endswith(_ENDING) and _stamp(name) >= 0)


def _stamp(name: str) -> int:
    digits = name[:_DIGITS]
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) == _DIGITS else -1
