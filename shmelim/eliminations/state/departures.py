"""Which hotkeys left the metagraph, and when a loss is too large to be believed."""

from __future__ import annotations

from typing import Final

ANOMALY_COUNT: Final = 10
"""A loss of more hotkeys than this can be an anomaly."""

ANOMALY_SHARE: Final = 0.25
"""A loss of at least this share of the hotkeys seen before can be an anomaly."""


def lost_hotkeys(before: set[str], now: set[str], size: int | None = None) -> tuple[list[str], bool]:
    """Return the hotkeys that are missing now, sorted, and whether so many at once are an anomaly.

    An anomaly, such as a metagraph that failed to load, is more than 10 and at least 25 % of ``size``: how many
    were seen at the last look that was believed. Who came while a loss is not believed makes it no smaller.
    """
    lost = sorted(before - now)
    return lost, len(lost) > ANOMALY_COUNT and len(lost) >= ANOMALY_SHARE * (len(before) if size is None else size)
