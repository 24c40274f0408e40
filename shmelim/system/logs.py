"""Logging that a hostile peer cannot use to fill a disk."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging


class LimitedLog:
    """A logger's front that lets a burst of lines through for each topic, and then one line an interval.

    Thread-safe. A call costs about a microsecond when the line is held back.

    Parameters
    ----------
    logger
        Where the lines go.
    burst
        Lines of one topic that pass at once.
    interval
        Seconds after which one more line of that topic may pass.

    """

    def __init__(self, logger: logging.Logger, *, burst: int = 10, interval: float = 10.0) -> None:
        self._logger = logger
        self._burst = burst
        self._interval = interval
        # Topic -> [lines that may pass, when that was counted, lines held back]; under the lock. Topics are
        # constants of this package, so that the dictionary stays small.
        self._topics: dict[str, list[float]] = {}
        self._lock = threading.RLock()  # re-entrant, since a signal handler may log while its thread does

    def __call__(self, level: int, topic: str, message: str, *args: object, exc_info: bool = False) -> None:
        """Log `message` unless too many lines of `topic` came before it; say how many were held back."""
        now = time.monotonic()
        with self._lock:
            state = self._topics.setdefault(topic, [float(self._burst), now, 0])
            state[0] = min(float(self._burst), state[0] + (now - state[1]) / self._interval)
            state[1] = now
            if state[0] < 1:
                state[2] += 1
                return
            state[0] -= 1
            held_back, state[2] = int(state[2]), 0
        if held_back:
            message += " (%d more of this kind were not logged)"
            args = (*args, held_back)
        self._logger.log(level, message, *args, exc_info=exc_info)

    def after_fork_in_child(self) -> None:
        """Re-make the lock, whose holder may not exist in the child."""
        self._lock = threading.RLock()
