"""What ends a server process: a SIGTERM, or the end of the process that owns it."""

from __future__ import annotations

import os
import select
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

from shmelim.system.processes import ProcessIdentity

if TYPE_CHECKING:
    from types import FrameType, TracebackType

_HAS_PROC = Path("/proc/self/stat").exists()
_STARTED = 18  # index of the start time after the state, see proc(5)
_LOOK_AGAIN = 0.5  # seconds between two looks at the owner, where the kernel does not report its end


class Ending:
    """Waits for the end of this process' work, for the length of a ``with`` block.

    Up to :meth:`defer` a SIGTERM raises ``SystemExit``, so that a start can be broken off. From then on it only
    ends :meth:`wait`, so that neither serving nor closing is interrupted halfway. SIGINT does the same in
    a foreground process; in others it is ignored: a terminal sends it to every process of the group, and the owner
    decides what it means. The owner's death is watched by a descriptor of the process itself: a pipe would also be
    held open by each of its other children.

    Outside of the main thread, which alone may handle signals, only the owner's end counts.

    Parameters
    ----------
    owner
        The process with which this one ends; None: it outlives all others.
    in_foreground
        Whether a person started this process, who may end it by Ctrl-C.

    """

    def __init__(self, owner: ProcessIdentity | None, *, in_foreground: bool = False) -> None:
        self._owner = owner
        self._signals = {signal.SIGTERM, signal.SIGINT} if in_foreground else {signal.SIGTERM}
        self._deferred = False  # main thread only
        self._reading = self._writing = self._old_wakeup = -1
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        self._reading, self._writing = os.pipe()
        if threading.current_thread() is threading.main_thread():
            os.set_blocking(self._writing, False)
            # The interpreter writes each signal to the pipe, which needs no lock that the main thread could hold.
            # Whatever descriptor stood there before is the parent's, who must not be told of our signals.
            self._old_wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
            for number in (signal.SIGTERM, signal.SIGINT):
                handler = self._handle if number in self._signals else signal.SIG_IGN
                self._before[number] = signal.signal(number, handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._reading)
        os.close(self._writing)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if not self._deferred:
            raise SystemExit(128 + number)

    def defer(self) -> None:
        """Stop raising."""
        self._deferred = True

    def wait(self) -> str:
        """Wait for the end; return what it was."""
        poller = select.poll()
        poller.register(self._reading, select.POLLIN)
        watched = None if self._owner is None else self._owner.open()
        try:
            if watched is not None:
                poller.register(watched, select.POLLIN)
            # Looked at after opening, so that the descriptor is certainly not of a later process of that id.
            while self._owner is None or self._owner.is_running():
                ready = [number for number, _ in poller.poll(self._pause(watched))]
                # Signals that others handle are written there too.
                if self._reading in ready and self._signals.intersection(os.read(self._reading, 256)):
                    return "a signal"
        finally:
            if watched is not None:
                os.close(watched)
        return f"the end of its owner, process {self._owner.pid}"

    def _pause(self, watched: int | None) -> float | None:
        """Milliseconds to wait for a descriptor."""
        return None if self._owner is None or watched is not None else _LOOK_AGAIN * 1000
