"""A progress bar on stderr, for what takes longer than a second, and only where somebody looks at it."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Final, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress

_DELAY: Final = 1.0


class DelayedProgress:
    """A progress bar that appears after a second; nothing is shown where stderr is not a terminal.

    :meth:`update` may be called from any thread; outside of the ``with`` block it does nothing. With a `file` the
    bar, and what is written above it, goes there instead of to ``sys.stderr``.
    """

    def __init__(self, delay: float = _DELAY, file: TextIO | None = None) -> None:
        # Guards everything below: the timer's thread and the caller's meet here.
        self._lock = threading.Lock()
        self._file = file
        self._timer = threading.Timer(delay, self._show)
        self._timer.daemon = True
        self._bar: Progress | None = None
        self._shown = False
        self._what: str | None = None

    def __enter__(self) -> Self:
        if sys.stderr is not None and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.SpinnerColumn(),
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                console=Console(file=self._file, stderr=True),
                transient=True,
            )
            self._timer.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away. Idempotent."""
        with self._lock:
            self._timer.cancel()
            if self._bar is not None and self._shown:
                self._bar.stop()
            self._bar = None

    def update(self, what: str, done: int, total: int | None) -> None:
        """Say what is being done and how far it is; a total of None: it is not known how far it will go."""
        with self._lock:
            if self._bar is None:
                return
            if what != self._what:
                for task in self._bar.task_ids:
                    self._bar.remove_task(task)
                self._bar.add_task(what, total=total, completed=done)
                self._what = what
            else:
                self._bar.update(self._bar.task_ids[0], completed=done, total=total)

    def write(self, text: str) -> None:
        """Write whole lines: above the bar while there is one, so that neither spoils the other."""
        with self._lock:
            if self._bar is not None and self._shown:
                self._bar.console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
            elif self._file is not None:
                self._file.write(text)

    def _show(self) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.start()
                self._shown = True
