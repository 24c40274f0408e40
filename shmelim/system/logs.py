"""Logging that fills no disk and holds up nobody: limited lines, problems as lines, handlers that do not block."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Final

from shmelim.system import forks
from shmelim.system.background import BackgroundHandler
from shmelim.system.clock import monotonic
from shmelim.system.problems import Change, Problem, Problems, over

_LEVELS: Final = {"notice": logging.WARNING, "degraded": logging.ERROR, "failing": logging.CRITICAL}
_AT_THE_END: Final = 1.0  # seconds for lines that are not written yet


class LimitedLog:
    """A logger's front for lines that can repeat: of each topic a burst passes, then one an interval (seconds).

    The next line that passes says how many were held back. Thread-safe, usable from a signal handler, and after a
    fork. A line that is held back costs about a microsecond.

    Examples
    --------
    >>> log = LimitedLog(logging.getLogger("shmelim.example"), burst=1)
    >>> for attempt in range(1000):
    ...     log(logging.INFO, "retries", "attempt %d failed", attempt)  # one line

    """

    def __init__(self, logger: logging.Logger, *, burst: int = 10, interval: float = 10.0) -> None:
        self._logger = logger
        self._burst = burst
        self._interval = interval
        # Topic -> (when a whole burst may pass again, lines held back); under the lock. Topics are constants of
        # this package, so that the dictionary stays small.
        self._topics: dict[str, tuple[float, int]] = {}
        self.after_fork_in_child()
        forks.register(self)

    def __call__(
        self, level: int, topic: str, message: str, *args: object, exc_info: BaseException | bool = False
    ) -> None:
        """Log `message`, formatted with `args`, unless too many lines of `topic` came before it."""
        now = monotonic()
        with self._lock:
            full_at, held_back = self._topics.get(topic, (now, 0))
            if full_at - now > (self._burst - 1) * self._interval:
                self._topics[topic] = full_at, held_back + 1
                return
            self._topics[topic] = max(full_at, now) + self._interval, 0
        if held_back:
            message += " (%d more of this kind were not logged)"
            args = (*args, held_back)
        self._logger.log(level, message, *args, exc_info=exc_info)

    def after_fork_in_child(self) -> None:
        """Re-make the lock, whose holder may not exist in the child."""
        self._lock = threading.RLock()  # re-entrant, since a signal handler may log while its thread does


def log_problems(problems: Problems, logger: logging.Logger) -> None:
    """Log each problem once when it is raised, when it gets worse and when it ends.

    An end is a warning: whoever saw the beginning must see it. One that comes and goes is limited as every line.
    """
    limited = LimitedLog(logger)

    def log(change: Change, problem: Problem) -> None:
        whose = f"{problem.name} ({problem.subject})" if problem.subject else problem.name
        if change == "cleared":
            limited(logging.WARNING, problem.name, "%s: %s", whose, over(problem))
        else:
            limited(_LEVELS[problem.severity], problem.name, "%s: %s", whose, problem)

    problems.subscribe(log)


@contextlib.contextmanager
def log_without_waiting() -> Iterator[None]:
    """Have no call of this process wait for a log, for the length of a ``with`` block.

    Every handler works in a thread of its own behind a bounded queue, so that a pipe that nobody reads, or a disk
    that hangs, blocks that thread only. At the end the handlers are put back, once they have written what waits or
    a second has passed. May be nested, to take in handlers that were added since. For processes that only serve:
    the logging of anybody else's process, a forked child's included, is theirs.
    """
    made: dict[logging.Handler, BackgroundHandler] = {}  # a handler may serve several loggers

    def behind(handler: logging.Handler) -> logging.Handler:
        if isinstance(handler, BackgroundHandler) and handler.pid == os.getpid():
            return handler
        if handler not in made:
            made[handler] = BackgroundHandler(handler)
        return made[handler]

    def before(handler: logging.Handler) -> logging.Handler:
        return handler.replaced if isinstance(handler, BackgroundHandler) and handler in mine else handler

    _replace(behind)
    try:
        yield
    finally:
        deadline, mine = monotonic() + _AT_THE_END, set(made.values())
        for handler in mine:
            handler.drain(max(0.0, deadline - monotonic()))
        _replace(before)


def _replace(other: Callable[[logging.Handler], logging.Handler]) -> None:
    """Put other handlers in the place of those of all loggers."""
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):
            logger.handlers = [other(handler) for handler in logger.handlers]
    if logging.lastResort is not None:
        logging.lastResort = other(logging.lastResort)
