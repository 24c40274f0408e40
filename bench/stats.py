"""The few figures that stand for many measured ones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["enough_for", "percentile"]


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that is at least as large as a share of them all (the nearest-rank method).

    It is always one that was measured; nothing is interpolated.
    """
    if not ordered:
        raise ValueError("no values")
    if not 0 < share <= 1:
        raise ValueError(f"{share} is no share of the values")
    # Rounded first: 0.07 * 100 is a little more than 7 in floating point, and must not become 8.
    return ordered[math.ceil(round(share * len(ordered), 9)) - 1]


def enough_for(share: float, count: int) -> bool:
    """Tell whether so many values say anything about that percentile: at least one lies beyond it."""
    return count * (1 - share) >= 1 - 1e-9
