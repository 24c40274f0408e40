"""Waiting for what must come true, under a watchdog: how long it takes is nobody's business."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds after which a test fails that waits for something; no test waits for them to pass."""


def until(condition: Callable[[], T], what: str = "the condition", within: float = PATIENCE) -> T:
    """Wait until something is true, and return it; fail loudly if it never is."""
    deadline = time.monotonic() + within
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} never came true within {within:g} s"
        time.sleep(0.001)
    return found
