"""What a publisher leaves on its host about itself, so that status, health, metrics and page there know of it.

A file beside ``server.json``, replaced about once a second::

    there, and young                    it runs
    there, old, and its process gone    it was killed, and nobody has started it again
    there, ``ended``                    it ended by itself, because of an error that needs a person
    not there                           it ended as it was asked to, or there never was one
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from shmelim.eliminations.runtime import RuntimeDirectory
from shmelim.errors import ShmelimError, StoreError
from shmelim.fleet.publisher import Publisher
from shmelim.system.clock import boottime, now_ms
from shmelim.system.processes import ProcessIdentity
from shmelim.system.text import printable

_EVERY: Final = 1.0
_PATIENCE: Final = 10.0
"""Seconds that an error, or a death, may last before it is a problem: a supervisor takes less."""


class Standing(msgspec.Struct, frozen=True):
    """What a publisher said of itself last; moments are this machine's CLOCK_BOOTTIME, in seconds."""

    engine: str
    pid: int
    started: float
    said: float
    term: int = 0  # 0, as the next two: it does not lead
    line: int = 0
    seq: int = 0
    behind: int = 0
    held: str | None = None
    error: str | None = None
    hint: str | None = None
    failing_since: float | None = None
    ended: bool = False

    @property
    def age(self) -> float:
        """Seconds since it was said; infinite where that was before the machine was started."""
        age = boottime() - self.said
        return age if age >= 0 else float("inf")

    @property
    def is_running(self) -> bool:
        """Whether it lives; one in another container is known by what it says."""
        return not self.ended and (self.age < _PATIENCE or ProcessIdentity(self.pid, self.started).is_running())

    def problems(self) -> list[dict[str, Any]]:
        """Return what is wrong with it, as a health check has it."""
        again = "start `shmelim publish` again; if the name is not to be published any more, remove publisher.json"
        failing = 0.0 if self.failing_since is None else boottime() - self.failing_since
        if self.ended:
            return [self._problem("publisher_ended", "degraded", f"has ended: {self.error}", self.hint or again)]
        if not self.is_running:
            return [self._problem("publisher_down", "degraded", f"(process {self.pid}) is dead", again)]
        if self.error is not None and failing >= _PATIENCE:
            text = f"has sent nothing for {failing:.0f} s: {self.error}"
            return [self._problem("publisher_failing", "degraded", text, self.hint)]
        if self.held is not None:
            remedy = "`shmelim fleet release`, or `shmelim ack`"
            return [self._problem("publisher_held", "notice", f"holds: {self.held}", remedy)]
        return []

    def _problem(self, name: str, severity: str, text: str, remedy: str | None) -> dict[str, Any]:
        begun = self.said if self.failing_since is None else self.failing_since
        since = now_ms() - round((boottime() - begun) * 1000) if 0 <= begun <= boottime() else None
        text = printable(f"the publisher to {self.engine} {text}")
        remedy = None if remedy is None else printable(remedy)
        return {
            "name": name, "subject": "", "severity": severity, "text": text, "remedy": remedy, "since_ms": since,
        }  # fmt: skip


class StandingFile:
    """Keeps what a publisher says of itself up to date, as a context manager around its run.

    Whatever cannot be written is left out: who publishes must not suffer from who looks.
    """

    def __init__(self, runtime: RuntimeDirectory, publisher: Publisher, engine: str) -> None:
        self._path, self._publisher = _path_of(runtime), publisher
        me = ProcessIdentity.this_process()
        self._last = Standing(engine, me.pid, me.started, said=-1.0)
        with contextlib.suppress(StoreError):
            runtime.create()

    def note(self, error: ShmelimError | None = None) -> None:
        """Say how it stands after a turn; ``error`` is what the turn failed with. A write a second at most."""
        last, now, head = self._last, boottime(), self._publisher.head
        since = None if error is None else now if last.failing_since is None else last.failing_since
        found = msgspec.structs.replace(
            last,
            said=now,
            term=0 if head is None else head.last.term,
            line=0 if head is None else head.line,
            seq=0 if head is None else head.seq,
            behind=self._publisher.behind,
            held=self._publisher.held,
            error=None if error is None else error.message,
            hint=None if error is None else error.hint,
            failing_since=since,
        )
        if now - last.said >= _EVERY or _kind(found) != _kind(last):
            self._write(found)

    def _write(self, standing: Standing) -> None:
        # No fsync: what a crash of the machine leaves here is of before its start, and so is known to be old.
        self._last = standing
        aside = self._path.with_name(f".{self._path.name}.{standing.pid}.tmp")
        with contextlib.suppress(OSError):
            descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with open(descriptor, "wb") as file:  # noqa: PTH123 - it opens a descriptor
                file.write(msgspec.json.encode(standing))
            aside.replace(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        found = _read(self._path)
        if found is not None and (found.pid, found.started) != (self._last.pid, self._last.started):
            return  # another publisher of this host has taken over, and speaks for itself
        if isinstance(error, ShmelimError):
            about = {"error": error.message, "hint": error.hint, "said": boottime(), "ended": True}
            self._write(msgspec.structs.replace(self._last, failing_since=None, **about))
        else:
            with contextlib.suppress(OSError):
                self._path.unlink()


def standing_of(name: str) -> Standing | None:
    """Return what the publisher of a name said last on this host; None where there is none, or none to be seen."""
    return _read(_path_of(RuntimeDirectory.of_server(name)))


def _kind(standing: Standing) -> tuple[object, ...]:
    return standing.term, standing.line, standing.held, standing.error


def _path_of(runtime: RuntimeDirectory) -> Path:
    return runtime.path / "publisher.json"


def _read(path: Path) -> Standing | None:
    with contextlib.suppress(OSError, msgspec.DecodeError, msgspec.ValidationError):
        return msgspec.json.decode(path.read_bytes(), type=Standing)
    return None
