"""What runs in the processes of a benchmark: a host, or a reader, that does what it is told through a pipe.

Each process makes itself the leader of a group, so that whoever started it can end it with all that it started.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import traceback
from typing import TYPE_CHECKING, Any

from bench import duels, measure, operations
from bench.pacing import Writing
from bench.peers import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

    from bench.peers.base import Place

__all__ = ["duellist", "host", "obey", "reader"]


def _end(_number: int, _frame: object) -> None:
    raise SystemExit(1)


def obey(pipe: Connection, start: Callable[[contextlib.ExitStack], tuple[Any, dict[str, Callable]]]) -> None:
    """Start, say so, then do what is asked until the pipe is closed; answer with a result or a traceback."""
    os.setpgid(0, 0)
    # Ctrl-C is for the process that started this one, which will close the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end)
    with contextlib.ExitStack() as closing:
        try:
            facts, commands = start(closing)
            # What is there now is there to stay: the collector need not look at it again while it is measured.
            gc.collect()
            gc.freeze()
        except Exception:
            pipe.send(("failed", traceback.format_exc(limit=-4)))
            return
        # A pipe that is closed means the end.
        with contextlib.suppress(EOFError, ConnectionError):
            pipe.send(("done", facts))
            while True:
                name, arguments = pipe.recv()
                try:
                    result = ("done", commands[name](*arguments))
                except Exception:
                    result = ("failed", traceback.format_exc(limit=-4))
                pipe.send(result)


class _Switch:
    """A writer that can be started and stopped."""

    def __init__(self, put: Callable[[dict], None] | None, place: Place) -> None:
        self._put, self._place = put, place
        self._writing: Writing | None = None

    def begin(self) -> None:
        if self._put is not None:
            self._writing = Writing(self._put, self._place)

    def end(self) -> float | None:
        """Return how many changes a second were made, or None if this process makes none."""
        writing, self._writing = self._writing, None
        return None if writing is None else writing.stop()


def host(pipe: Connection, name: str, place: Place) -> None:
    """Own a contender's state."""

    def start(closing: contextlib.ExitStack) -> tuple[Any, dict[str, Callable]]:
        peer = load(name)
        running = peer.host(place)
        closing.callback(running.close)
        # The first change after a large fill may cost more than any other.
        for stamp in (1, 2):
            running.put(place.make(0, stamp))
        # Where each reader has data of its own, the writer must be in its process.
        switch = _Switch(running.put if peer.reader.put is None else None, place)

        def sync(seconds: float) -> dict:
            lists = [
                [place.make(number, stamp) for number in range(operations.SYNCED)] for stamp in range(1, 1 + 64)
            ]
            return measure.sample(running.sync, lists, seconds).as_dict()

        return running.facts, {"begin": switch.begin, "end": switch.end, "sync": sync}

    obey(pipe, start)


def reader(pipe: Connection, name: str, place: Place, facts: Any) -> None:
    """Read a contender's state and measure it."""

    def start(closing: contextlib.ExitStack) -> tuple[Any, dict[str, Callable]]:
        running = load(name).reader(place, facts)
        closing.callback(running.close)
        operations.prove(running, place)
        switch = _Switch(running.put, place)

        def sample(operation: str, seconds: float, begin_at: float) -> dict:
            return measure.sample(*operations.calls_of(running, place, operation), seconds, begin_at).as_dict()

        def rate(operation: str, seconds: float, begin_at: float) -> float:
            return measure.rate(*operations.calls_of(running, place, operation), seconds, begin_at)

        return None, {"begin": switch.begin, "end": switch.end, "sample": sample, "rate": rate}

    obey(pipe, start)


def duellist(pipe: Connection, place: Place, others: dict[str, tuple[Place, Any]]) -> None:
    """Compare shmelim with others in one process."""

    def start(closing: contextlib.ExitStack) -> tuple[Any, dict[str, Callable]]:
        arena = duels.Arena(place, others, closing)
        return None, {
            "duels": arena.fight,
            "brief duels": arena.fight_briefly,
            "manager": arena.fight_manager,
            "lists": arena.fight_lists,
        }

    obey(pipe, start)
