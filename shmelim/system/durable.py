"""Files that survive a crash: durable names and contents, and names for what is set aside."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path


def unused_name(path: Path, what: str, suffix: str = "") -> Path:
    """Take the name ``<name>.<what>-<UTC time><suffix>`` beside a file, by creating it empty (0600)."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    names = (f"{path.name}.{what}-{stamp}{f'-{n}' if n else ''}{suffix}" for n in count())
    while True:
        taken = path.with_name(next(names))
        with suppress(FileExistsError):
            os.close(os.open(taken, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            return taken


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    _sync(directory, os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Make a file that somebody else holds open durable, its name included."""
    _sync(path, 0)
    sync_directory(path.parent)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
