"""Figures as people read them."""

from __future__ import annotations

__all__ = ["duration", "per_second", "times"]


def duration(seconds: float) -> str:
    """Three significant digits with the unit that fits."""
    # Rounded first, so that 999.9 ns becomes 1 µs and not 1000 ns.
    seconds = _three(seconds)
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{_three(seconds / size):g} {unit}"
    return f"{_three(seconds / 1e-9):g} ns"


def per_second(rate: float) -> str:
    """A rate with three significant digits: 12.3 M/s, 4.56 k/s, 78 /s."""
    rate = _three(rate)
    for unit, size in (("M/s", 1e6), ("k/s", 1e3)):
        if rate >= size:
            return f"{_three(rate / size):g} {unit}"
    return f"{rate:g} /s"


def times(ratio: float) -> str:
    """A ratio: 0.83 ×, 12.5 ×, 1,230 ×."""
    if ratio >= 100:
        return f"{_three(ratio):,.0f} ×"
    return f"{ratio:.2f} ×" if ratio < 10 else f"{ratio:.1f} ×"


def _three(value: float) -> float:
    return float(f"{value:.3g}")
