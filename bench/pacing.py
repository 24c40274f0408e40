"""The writer of the benchmark: one change at a time, so many a second, in a thread."""

from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.peers.base import Place

__all__ = ["PER_SECOND", "Writing"]

PER_SECOND = 1000
_TOUCHED = 128
# Further behind than this, it gives up the changes that it owes, and says how many a second it made.
_PATIENCE = 0.05


class Writing:
    """Replaces one record after the other, until it is stopped.

    Parameters
    ----------
    put
        Makes one change.
    place
        Whose records.

    """

    def __init__(self, put: Callable[[dict], None], place: Place) -> None:
        self._put = put
        self._place = place
        self._ended = threading.Event()
        self._error: Exception | None = None
        self.made = 0
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        touched = min(_TOUCHED, self._place.size)
        due = time.monotonic()
        try:
            for number in itertools.count():
                if self._ended.is_set():
                    return
                self._put(self._place.make(number % touched, number))
                self.made += 1
                due += 1 / PER_SECOND
                pause = due - time.monotonic()
                if pause > 0:
                    time.sleep(pause)
                elif pause < -_PATIENCE:
                    due -= pause
        except Exception as error:
            self._error = error

    def stop(self) -> float:
        """Stop, and return how many changes a second were made."""
        self._ended.set()
        self._thread.join(30)
        if self._error is not None:
            raise RuntimeError(f"the writer failed after {self.made} changes") from self._error
        return self.made / (time.monotonic() - self._began)
