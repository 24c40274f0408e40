"""The loops of a publisher and of a follower: turn after turn, pauses after errors, and what is said of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

from shmelim.errors import SegmentError, ShmelimError, StoreError
from shmelim.fleet.engine import EngineError
from shmelim.fleet.follower import Follower
from shmelim.fleet.local import LocalTable
from shmelim.fleet.publisher import Publisher
from shmelim.fleet.publishing import Note

Say = Callable[..., object]
"""``say(event, **about)``: told when something has become another, never for each change."""

_FIRST_PAUSE: Final = 0.05
_LONGEST_PAUSE: Final = 2.0
_WAITING: Final = 0.5


class _Telling:
    """Says what is another than it was; and pauses after errors, each time longer."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._last: dict[str, Any] = {}
        self._pause = _FIRST_PAUSE

    def pause_after(self, error: ShmelimError, stop: threading.Event) -> None:
        """Say an error that passes, and wait."""
        self.tell("error", _of(error))
        stop.wait(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def worked(self) -> None:
        """Say that the error is over, if there was one."""
        self._pause = _FIRST_PAUSE
        self.tell("error", None)

    def tell(self, event: str, about: dict[str, Any] | None) -> None:
        """Say that something is so now; None: that it is over, if it was said."""
        last = self._last.get(event)
        if about == last:
            return
        self._last[event] = about
        if about is not None:
            self._say(event, **about)
        elif last is not None:
            self._say(f"{event}_over")


def run_publisher(
    publisher: Publisher, changed: Callable[[float], object], stop: threading.Event, say: Say, note: Note
) -> None:
    """Publish until ``stop`` is set; ``changed`` waits so many seconds at most for the next change.

    ``note`` is kept up to date, and removed at an orderly end; after any other one, it says why.
    Errors that pass are said, and tried again with growing pauses: back-pressure never reaches the writer.
    FencedError, OtherStoreError and FleetDataError come out.
    """
    telling = _Telling(say)
    where: dict[str, int] = {}
    while not stop.is_set():
        try:
            publisher.turn()
        except (EngineError, StoreError) as error:
            note.write(**where, **_of(error), behind=publisher.behind)
            telling.pause_after(error, stop)
            continue
        except ShmelimError as error:
            note.end(error)
            raise
        telling.worked()
        head = publisher.head
        telling.tell("leading", None if head is None else {"term": head.term, "line": head.line})
        telling.tell("held", None if publisher.held is None else {"why": publisher.held})
        where = where if head is None else {"term": head.term, "line": head.line, "seq": head.seq}
        note.write(**where, behind=publisher.behind, held=publisher.held)
        changed(_WAITING)
    note.remove()


def run_follower(follower: Follower, table: LocalTable, stop: threading.Event, say: Say) -> None:
    """Follow until ``stop`` is set; errors are said, and tried again: the table serves on, and its age grows."""
    telling = _Telling(say)
    if table.applied is not None:  # it serves what an earlier follower left
        telling.tell("following", {"line": table.applied.line})
    while not stop.is_set():
        try:
            follower.turn(_WAITING)
            table.keep()
        except (EngineError, SegmentError) as error:
            telling.pause_after(error, stop)
            continue
        telling.worked()
        applied = table.applied
        telling.tell("following", None if applied is None else {"line": applied.line})
        waiting = {"why": "nothing that can be followed is published under that name"} if applied is None else None
        telling.tell("waiting", waiting)
        telling.tell("held", None if follower.held is None else {"why": follower.held})
        for problem in ("lost", "engine_data"):
            text = follower.problems.get(problem)
            telling.tell(problem, None if text is None else {"error": text})
        if applied is None:
            stop.wait(_FIRST_PAUSE)  # the log is not empty, and nothing of it counts before there is a snapshot


def _of(error: ShmelimError) -> dict[str, Any]:
    return {"error": error.message, "hint": error.hint}
