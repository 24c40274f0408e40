"""What a server knows of the processing, run by another process: its last tick, and what is wrong with it."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from shmelim.system.clock import monotonic
from shmelim.system.problems import Problems, Severity

_MISSED: Final = 3  # intervals without a whole tick that are worth telling
_SHORTEST: Final = 60.0  # seconds that are never too long
_MOST: Final = 200  # problems that are kept
_LONGEST: Final = 1000  # characters of a text

_OVERDUE: Final = "tick_overdue"


class _Reported(msgspec.Struct, forbid_unknown_fields=True):
    """A problem of the processing, as it tells of it."""

    name: str
    subject: str
    text: str
    severity: Severity
    remedy: str | None
    since_ms: int


class Ticks:
    """The last report of the processing; ``problems`` are the server's. Thread-safe."""

    def __init__(self, problems: Problems) -> None:
        self._problems = problems
        self._standing: list[dict[str, Any]] = []
        self._whole_ms: int | None = None  # when the last whole tick was made, by the clock of the processing
        self._interval = 0.0
        # Of a whole tick, or of the first report, by this process' monotonic clock; None where nobody is to tick.
        self._heard_at: float | None = None

    def expect(self, interval_ms: float) -> None:
        """Count from now on: under this state somebody ticks, who may be gone since before the server started."""
        self._heard_at, self._interval = monotonic(), float(interval_ms) / 1000

    def report(self, whole_ms: int | None, interval_ms: float, problems: list[dict[str, Any]]) -> None:
        """Take a report; TypeError or ValueError for one that cannot be."""
        taken = msgspec.convert(problems[:_MOST], list[_Reported])
        if self._heard_at is None or (whole_ms is not None and whole_ms != self._whole_ms):
            self._heard_at = monotonic()
        self._whole_ms = whole_ms
        self._interval = float(interval_ms) / 1000
        # Marked, as the process that has these problems tells people of them itself.
        self._standing = [
            msgspec.to_builtins(problem) | {"text": problem.text[:_LONGEST], "part": "processing"}
            for problem in taken
        ]

    def health(self) -> dict[str, Any]:
        """Return what a health check says of the processing; raise or clear the problem that ticks have ceased."""
        if self._heard_at is None:
            return {"last_tick_ms": None, "tick_age_s": None, "problems": []}
        age = monotonic() - self._heard_at
        if age > max(_MISSED * self._interval, _SHORTEST):
            self._problems.report(
                _OVERDUE,
                f"there was no whole tick for {age:.0f} s: the rules eliminate nobody meanwhile",
                remedy="see whether the process lives that runs run_update_loop or calls process_eliminations",
            )
        else:
            self._problems.clear(_OVERDUE)
        return {"last_tick_ms": self._whole_ms, "tick_age_s": round(age, 3), "problems": self._standing}
