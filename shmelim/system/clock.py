"""The clocks that the package counts by: milliseconds since 1970, and seconds that only ever go forward."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Final

# For every deadline, in place of `time.monotonic`: libraries that stop the time for tests (freezegun) replace that
# in each module that has it, and a deadline on a clock that stands still never comes.
monotonic: Final[Callable[[], float]] = partial(time.clock_gettime, time.CLOCK_MONOTONIC)

# As it, and it goes on while the machine sleeps: who sets the time moves neither.
boottime: Final[Callable[[], float]] = partial(time.clock_gettime, time.CLOCK_BOOTTIME)


_LATEST_MS: Final = 253_402_300_799_999


def now_ms() -> int:
    """Return the milliseconds since 1970, UTC."""
    return time.time_ns() // 1_000_000


def utc_text(ms: object) -> str | None:
    """Return milliseconds since 1970 as UTC text to the second; None where the time is not known."""
    if not isinstance(ms, int) or ms == 0:
        return None
    if not 0 < ms <= _LATEST_MS:
        return f"{ms} ms"
    return datetime.fromtimestamp(ms // 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
