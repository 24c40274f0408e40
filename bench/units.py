"""Figures as people read them."""

from __future__ import annotations

__all__ = ["duration", "per_second", "times"]

_STEADY, _ROUGH = 0.01, 0.1


def duration(seconds: float, spread: tuple[float, float] | None = None) -> str:
    """A time with the unit that fits, and no more digits than its spread (the least and the most found) leaves.

    Three digits up to 1 % to each side, two up to 10 %, else one, with a tilde.
    """
    return _shown(seconds, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)), spread)


def per_second(rate: float, spread: tuple[float, float] | None = None) -> str:
    """A rate, in the same way: 12.3 M/s, 4.6 k/s, ~80 /s."""
    return _shown(rate, (("M/s", 1e6), ("k/s", 1e3), ("/s", 1.0)), spread)


def times(ratio: float) -> str:
    """A ratio: 0.83 ×, 12.5 ×, 1,230 ×."""
    if ratio >= 100:
        return f"{_three(ratio):,.0f} ×"
    return f"{ratio:.2f} ×" if ratio < 10 else f"{ratio:.1f} ×"


def _shown(value: float, units: tuple[tuple[str, float], ...], spread: tuple[float, float] | None) -> str:
    low, high = spread or (value, value)
    error = (high - low) / 2 / value if value else 0.0
    digits = 3 if error <= _STEADY else 2 if error <= _ROUGH else 1
    # Rounded first, so that 999.9 ns becomes 1 µs and not 1000 ns.
    value = _rounded(value, digits)
    unit, size = next((each for each in units if value >= each[1]), units[-1])
    return f"{'~' if digits == 1 else ''}{_rounded(value / size, digits):g} {unit}"


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _three(value: float) -> float:
    return _rounded(value, 3)
