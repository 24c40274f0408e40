"""Which messages are repetitions of what was said a moment ago."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

_MOST = 256  # messages that are remembered


class Repeats:
    """Lets a message through once in a while, and counts how often it is held back meanwhile. Not thread-safe.

    Parameters
    ----------
    after
        Seconds after which a message is let through again.
    clock
        Returns seconds.

    """

    def __init__(self, after: float, clock: Callable[[], float]) -> None:
        self._after = after
        self._clock = clock
        # Message -> [when it was let through, how often it was held back since], the oldest first.
        self._seen: OrderedDict[Hashable, list[float]] = OrderedDict()

    def admit(self, message: Hashable) -> int | None:
        """Return how often a message was held back since it was last let through; None if it must be held back."""
        now = self._clock()
        seen = self._seen.get(message)
        if seen is not None and 0 <= now - seen[0] < self._after:
            seen[1] += 1
            return None
        self._seen[message] = [now, 0]
        self._seen.move_to_end(message)
        if len(self._seen) > _MOST:
            self._seen.popitem(last=False)
        return 0 if seen is None else int(seen[1])

    def forget(self, message: Hashable) -> None:
        """Take back that a message was let through."""
        self._seen.pop(message, None)
