"""The loop that ticks, in a thread or in a process of its own, until the validator ends.

In the main thread of a child process a SIGTERM ends it too: at once between two ticks, and within a tick as soon
as the miner at hand is done. Where that takes longer than a second, because a collaborator is waiting for
something that does not come, ``SystemExit`` is raised inside the tick, and again until the loop has ended; a slash
that is broken off this way is in doubt. Afterwards the signal handlers are as they were.

Nothing that a collaborator raises ends the loop, except ``KeyboardInterrupt``, and ``SystemExit`` in the main
thread; and then the loop says that it ends.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Final, Self

from shmelim.eliminations.rules.alerts import is_failure
from shmelim.eliminations.rules.processor import EliminationProcessor
from shmelim.system.processes import set_title

_TITLE: Final = "vali_EliminationProcessing"
_LOOK_AGAIN: Final = 0.25  # seconds between two looks at whether to end
_GRACE: Final = 1.0  # seconds from a SIGTERM until a tick is broken off
_AGAIN: Final = 0.3  # seconds until it is broken off again

_log = logging.getLogger("shmelim.processing")


def run_loop(processor: EliminationProcessor) -> None:
    """Run a tick each second until ``shutdown_dict`` is truthy; survives every error, and tells of it."""
    with _Termination(processor):
        _log.info("the processing of eliminations begins")
        try:
            while not processor.is_stopping():
                _pause(_step(processor), processor.is_stopping)
        finally:
            if processor.is_stopping():
                _log.info("the processing of eliminations ends")
            else:
                _tell_of_the_end(processor)


def _step(processor: EliminationProcessor) -> float:
    """Tick, unless a sync is in progress; returns how long to pause after it."""
    environment, alerts = processor.environment, processor.alerts
    try:
        if _sync_in_progress(processor) or processor.tick():
            return environment.tick_pause_s
    except BaseException as error:
        if _ends_the_loop(processor, error):
            raise
        text = f"the processing of eliminations failed: {type(error).__name__}: {error}"
        alerts.failed("loop", "tick", text, error)
    return environment.error_pause_s


def _ends_the_loop(processor: EliminationProcessor, error: BaseException) -> bool:
    if isinstance(error, SystemExit):
        # In the main thread a signal handler may have raised it; elsewhere a collaborator called sys.exit, which
        # would silently end this thread and nothing else.
        return processor.end_asked or threading.current_thread() is threading.main_thread()
    return not is_failure(error)


def _tell_of_the_end(processor: EliminationProcessor) -> None:
    """Say that the loop ends though the validator does not."""
    error = sys.exc_info()[1]
    text = f"the processing of eliminations has ended, though nobody asked it to: {type(error).__name__}: {error}"
    _log.critical("%s", text)
    processor.alerts.tell(text, "error")


def _sync_in_progress(processor: EliminationProcessor) -> bool:
    flag = processor.collaborators.sync_in_progress
    return flag is not None and bool(flag.value)


def _pause(seconds: float, stopping: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not stopping():
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, _LOOK_AGAIN))


class _Termination:
    """Has SIGTERM end the loop inside a ``with`` block, where this is the main thread of a child process.

    Elsewhere signals are for whoever runs the loop, and nothing is touched.
    """

    def __init__(self, processor: EliminationProcessor) -> None:
        self._processor = processor
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and multiprocessing.parent_process() is not None:
            set_title(_TITLE)
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._ask)
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._break_off)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._processor.end_asked = False

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self._processor.end_asked = True
        # A timer of the kernel: a handler that started a thread could wait for a lock that its own thread holds.
        signal.setitimer(signal.ITIMER_REAL, _GRACE, _AGAIN)

    def _break_off(self, _number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)
