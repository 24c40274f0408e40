"""Telling an answer from a coroutine, which does nothing until somebody runs it, and here nobody does."""

from __future__ import annotations

import inspect
from typing import TypeVar

T = TypeVar("T")


def is_unrun(answer: object) -> bool:
    """Whether an answer is a coroutine that never ran; it is closed then, and never will."""
    if not inspect.iscoroutine(answer) or inspect.getcoroutinestate(answer) != inspect.CORO_CREATED:
        return False
    answer.close()
    return True


def truth(answer: object, what: str) -> bool:
    """Return a yes or no; TypeError for what is to be called or awaited first: it is true, and no answer."""
    if inspect.isawaitable(carried_out(answer, what)) or inspect.isroutine(answer):
        raise TypeError(f"{what} must be a yes or no, not {type(answer).__name__}, to be called or awaited first")
    return bool(answer)


def carried_out(answer: T, what: str) -> T:
    """Return the answer of what was called; TypeError where it did nothing yet, as it is a coroutine."""
    if is_unrun(answer):
        raise TypeError(f"{what} answered with a coroutine, which nobody runs; it must wait itself")
    return answer
