"""The loop that ticks, in a thread or in a process of its own, until the validator ends.

In the main thread of a child process a SIGTERM ends it too: at once between two ticks, and within a tick as soon
as the miner at hand is done. What does not come back is left behind after a second; a slash that is under way has
its deadline. A terminal's Ctrl-C is left there to the process that made the manager, with which the loop ends.
Afterwards the signal handlers are as they were.

Nothing that a collaborator raises ends the loop, except ``KeyboardInterrupt``, and ``SystemExit`` in the main
thread; and then the loop says that it ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from shmelim.eliminations.rules.alerts import WISHES, named
from shmelim.eliminations.rules.processor import EliminationProcessor
from shmelim.eliminations.rules.tick import Context
from shmelim.system.clock import monotonic
from shmelim.system.processes import set_title, terminal_left_to_owner
from shmelim.system.text import get_logger

_TITLE: Final = "vali_EliminationProcessing"
_LOOK_AGAIN: Final = 0.25  # seconds between two looks at whether to end

_log = get_logger("shmelim.processing")


def run_loop(processor: EliminationProcessor) -> None:
    """Run a tick each second until ``shutdown_dict`` is truthy; survives every error, and tells of it."""
    context = processor.context
    with _ended_by_sigterm(context):
        _log.info("the processing of eliminations begins")
        try:
            while not context.is_stopping():
                _pause(_step(processor), context.is_stopping)
        finally:
            if context.is_stopping():
                _log.info("the processing of eliminations ends")
            else:
                error = sys.exc_info()[1] or SystemExit()
                text = f"the processing of eliminations has ended, though nobody asked it to: {named(error)}"
                _log.critical("%s", text)
                context.alerts.messages.send(text, "error")


def _step(processor: EliminationProcessor) -> float:
    """Tick, unless a sync is in progress; returns how long to pause after it."""
    context = processor.context
    syncing = context.collaborators.sync_in_progress
    try:
        if syncing is not None and context.ask("sync_in_progress", lambda: bool(syncing.value)):
            context.notice_sync()
            context.report_changes()
            return context.environment.tick_pause_s
        context.sync_since = None
        context.alerts.clear("loop", "sync")
        if processor.tick():
            return context.environment.tick_pause_s
    except BaseException as error:
        if _ends_the_loop(context, error):
            raise
        context.alerts.failed("loop", "tick", "the processing of eliminations failed", error)
        context.report_changes()
    return context.environment.error_pause_s


def _ends_the_loop(context: Context, error: BaseException) -> bool:
    if isinstance(error, SystemExit):
        # In the main thread a signal handler may have raised it; elsewhere a collaborator called sys.exit, which
        # would silently end this thread and nothing else.
        return context.end_asked or threading.current_thread() is threading.main_thread()
    return isinstance(error, WISHES)


def _pause(seconds: float, stopping: Callable[[], bool]) -> None:
    end = monotonic() + seconds
    while not stopping() and (left := end - monotonic()) > 0:
        time.sleep(min(left, _LOOK_AGAIN))


@contextlib.contextmanager
def _ended_by_sigterm(context: Context) -> Iterator[None]:
    """Have SIGTERM alone end the loop inside a ``with`` block, where this is the main thread of a child process.

    Elsewhere signals are for whoever runs the loop, and nothing is touched.
    """

    def ask(_number: int, _frame: FrameType | None) -> None:
        context.end_asked = True

    if threading.current_thread() is not threading.main_thread() or multiprocessing.parent_process() is None:
        yield
        return
    set_title(_TITLE)
    before = signal.signal(signal.SIGTERM, ask)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # the thread that started it may block it
    try:
        with terminal_left_to_owner():
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
        context.end_asked = False
