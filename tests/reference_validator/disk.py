"""Where the reference validator keeps things: in files that are replaced as a whole, or in memory."""

from __future__ import annotations

import json
import os
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from pathlib import Path


class Disk:
    """Named JSON values and logs. What was written is there after a SIGKILL; a power cut is not its business."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self._writing = threading.Lock()
        self._memory: dict[str, str] = {}
        self._logs: dict[str, list[str]] = {}
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)

    def read(self, name: str, default: Any) -> Any:
        if self.directory is None:
            text = self._memory.get(name)
        else:
            path = self._path(name)
            text = path.read_text() if path.exists() else None
        return default if text is None else json.loads(text)

    def write(self, name: str, value: Any) -> None:
        # What is written last is what there was last, also if two threads write the same.
        with self._writing:
            text = json.dumps(value, default=str)
            if self.directory is None:
                self._memory[name] = text
                return
            new = self._path(name + ".new")
            new.write_text(text)
            new.replace(self._path(name))

    def remove(self, name: str) -> None:
        if self.directory is None:
            self._memory.pop(name, None)
        else:
            self._path(name).unlink(missing_ok=True)

    def append(self, name: str, value: Any) -> None:
        """Add a line to a log, in one write: it is there, or it is not."""
        line = json.dumps(value) + "\n"
        if self.directory is None:
            self._logs.setdefault(name, []).append(line)
            return
        log = os.open(self._path(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(log, line.encode())
        finally:
            os.close(log)

    def lines(self, name: str) -> list[Any]:
        if self.directory is None:
            listed = self._logs.get(name, [])
        else:
            path = self._path(name)
            listed = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in listed]

    def _path(self, name: str) -> Path:
        return self.directory / quote(name, safe="")
