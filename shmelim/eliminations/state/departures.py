"""Which hotkeys left the metagraph, and when a loss is too large to be believed."""

from __future__ import annotations

from typing import Final

ANOMALY_COUNT: Final = 10
"""A loss of more hotkeys than this can be an anomaly."""

ANOMALY_SHARE: Final = 0.25
"""A loss of at least this share of the hotkeys seen before can be an anomaly."""


def lost_hotkeys(before: set[str], now: set[str], size: int | None = None) -> tuple[list[str], bool]:
    """Return the hotkeys missing since the last look that was believed, sorted, and whether that is an anomaly.

    An anomaly (a metagraph that failed to load, say) is a loss of more than 10 and at least 25 % of `size`, the
    number of hotkeys at that look; by default that of `before`, which may hold newcomers: they make a loss no
    smaller.
    """
    lost = sorted(before - now)
    return lost, len(lost) > ANOMALY_COUNT and len(lost) >= ANOMALY_SHARE * (len(before) if size is None else size)
