"""The two JSON files that other tools read: written whole or not at all, read without trust in their content."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def unused_name(path: Path, what: str, suffix: str = "") -> Path:
    """Take a name of the form ``<name>.<what>-<UTC time><suffix>`` beside a file, by creating it empty (0600)."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    for attempt in count():
        again = f"-{attempt}" if attempt else ""
        taken = path.with_name(f"{path.name}.{what}-{stamp}{again}{suffix}")
        try:
            descriptor = os.open(taken, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            continue
        os.close(descriptor)
        return taken
    raise AssertionError("unreachable")


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
