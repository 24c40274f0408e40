"""Arguments as callers give them: an error names the argument and its value. NaN, text and True are no numbers."""

from __future__ import annotations

from math import inf
from threading import TIMEOUT_MAX
from typing import Any


def number(what: str, given: Any, *, least: float = 0, most: float = inf, unit: str = "") -> Any:
    """Return a number as an int or float; ``TypeError`` or ``ValueError`` names the argument `what` and its value.

    It lies from `least` to `most`. `unit` is for the message, as "of seconds".
    """
    if type(given) not in (int, float):
        given = _own(what, given, unit)
    if not least <= given <= most:  # NaN is neither
        limit = f"{least:g} or more" if least > -inf else "a number"
        if most < TIMEOUT_MAX or most < given < inf:
            limit = f"{least:g} to {most:,.10g}"
        elif most < inf:
            limit += " and finite"
        raise ValueError(f"{what} must be {limit}, not {given!r:.100}")
    return given


def whole(what: str, given: Any, *, least: float = 1, most: float = inf) -> int:
    """Return a whole number, with the same errors."""
    if isinstance(given, bool) or not hasattr(given, "__index__"):
        raise TypeError(f"{what} must be a whole number, not {given!r:.100}")
    return int(number(what, given, least=least, most=most))


def seconds(what: str, given: Any, *, most: float = inf) -> Any:
    """Return a number of seconds, 0 or more; infinity is one, unless there is a limit."""
    return number(what, given, most=most, unit="of seconds")


def flags(**given: Any) -> None:
    """Raise ``TypeError`` unless all are True or False: the "no" of a configuration would be taken for a yes."""
    for what, value in given.items():
        if not isinstance(value, bool):
            raise TypeError(f"{what} must be True or False, not {value!r:.100}")


def functions(**given: Any) -> None:
    """Raise ``TypeError`` unless all can be called, or are None."""
    for what, value in given.items():
        if value is not None and not callable(value):
            raise TypeError(f"{what} must be a function or None, not {value!r:.100}")


def _own(what: str, given: Any, unit: str) -> float:
    """Return a number of another type, as numpy's or a fraction, as it can be sent and stored."""
    from numbers import Integral, Real  # noqa: PLC0415  # seldom

    if isinstance(given, bool) or not isinstance(given, Real):
        raise TypeError(f"{what} must be a number{unit and ' '}{unit}, not {given!r:.100}")
    return int(given) if isinstance(given, Integral) else float(given)
