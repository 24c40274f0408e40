"""Calls to the validator's own objects under deadlines, in threads that can be left behind when one of them hangs.

A thread cannot be ended from outside. So what does not come back in time is *left behind*: nobody waits for it any
more, nothing of its kind begins for the same miner until it has ended, and before each effect it asks whether its
turn is still its own (:func:`check_turn`). How many of a kind may be left behind is bounded, and each halves the
time of the next, down to an eighth: what hangs for everybody costs a tick a few deadlines and not one for
each miner, and the other kinds keep their turns.

One pool serves the whole process. ``_lock`` guards all of it; a forked child, which has none of the threads,
begins with an empty one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, TypeVar

from shmelim.errors import ShmelimError
from shmelim.system.clock import monotonic

T = TypeVar("T")

MOST_LEFT_BEHIND: Final = 64  # of a kind
_MOST_HALVED: Final = 3
_IDLE: Final = 2  # threads that are kept for what comes next
_LOOK_AGAIN: Final = 0.25  # seconds between two looks whether the validator is ending
_GRACE: Final = 1.0  # seconds for what is under way then


class StuckError(ShmelimError):
    """One of the validator's own objects does not come back."""


class NotAskedError(StuckError):
    """Nothing was begun, as what comes before it does not come back."""


class LeftBehindError(ShmelimError):
    """Nobody waits for this thread any more, and it must change nothing."""


class _Job:
    """A piece of work, and what became of it."""

    def __init__(self, key: tuple[int, str, str], work: Callable[[], Any]) -> None:
        self.key = key
        self.work = work
        self.began = monotonic()
        self.done = threading.Event()
        self.is_left_behind = False
        self.result: Any = None
        self.error: BaseException | None = None

    def carry_out(self) -> None:
        _current.job = self
        try:
            self.result = self.work()
        except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
            # It would end this thread, and nobody would notice.
            self.error = RuntimeError(f"{self.key[1]} wanted to end the process: {type(error).__name__}")
            self.error.__cause__ = error
        except BaseException as error:
            self.error = error
        finally:
            _current.job = None


class _Worker(threading.Thread):
    def __init__(self) -> None:
        super().__init__(name="shmelim-collaborator", daemon=True)
        self.inbox: SimpleQueue[_Job] = SimpleQueue()

    def run(self) -> None:
        kept = True
        while kept:
            job = self.inbox.get()
            job.carry_out()
            with _lock:
                _under_way.pop(job.key, None)
                kept = len(_idle) < _IDLE
                if kept:
                    _idle.append(self)
                job.done.set()
            del job


_current = threading.local()


def _begin_anew() -> None:
    global _lock, _under_way, _idle  # noqa: PLW0603 - a forked child's pool
    _lock = threading.Lock()
    _under_way, _idle = {}, []


_lock: threading.Lock
_under_way: dict[tuple[int, str, str], _Job]
_idle: list[_Worker]
_begin_anew()
os.register_at_fork(after_in_child=_begin_anew)


def call(
    scope: object,
    what: str,
    whom: str,
    work: Callable[[], T],
    seconds: float,
    *,
    stopping: Callable[[], bool] = lambda: False,
) -> T:
    """Return what ``work()`` does, or raise as it does; StuckError if it is not done within so many seconds.

    `what` is asked for `whom`, in the name of `scope`. While the same is under way it waits for its turn;
    NotAskedError if that does not come, at once if it was left behind. Once the validator is `stopping`, a second
    more is waited.
    """
    job = _Job((id(scope), what, whom), work)
    deadline = job.began + seconds / 2 ** min(_count_behind(what), _MOST_HALVED)
    while (worker := _begin(job)) is None:
        earlier = _under_way.get(job.key)
        if earlier is not None:
            if earlier.is_left_behind:
                raise NotAskedError(f"{what} has not come back for {monotonic() - earlier.began:.0f} s")
            if monotonic() > deadline:
                raise NotAskedError(f"{what} is under way in another thread, for too long")
            earlier.done.wait(_LOOK_AGAIN)
    try:
        worker.inbox.put(job)
        _wait(job, deadline, stopping)
    except BaseException:
        job.is_left_behind = True
        raise
    if not job.done.is_set():
        job.is_left_behind = True
        raise StuckError(f"{what} did not come back within {monotonic() - job.began:.1f} s")
    if job.error is not None:
        raise job.error
    return job.result  # type: ignore[no-any-return]


def _count_behind(what: str) -> int:
    """Return how many of a kind are left behind."""
    # A copy: another thread may begin or end something meanwhile.
    return sum(each.is_left_behind and each.key[1] == what for each in list(_under_way.values()))


def _begin(job: _Job) -> _Worker | None:
    """Return a thread for a job, whose turn it is from now on; None while the same is under way."""
    with _lock:
        if job.key in _under_way:
            return None
        if _count_behind(job.key[1]) >= MOST_LEFT_BEHIND:
            raise NotAskedError(f"{job.key[1]} is not asked: {MOST_LEFT_BEHIND} other calls do not come back")
        if not _idle:
            worker = _Worker()
            try:
                worker.start()
            except (RuntimeError, MemoryError) as error:  # at the limit of tasks, or of memory
                raise NotAskedError(f"{job.key[1]} is not asked: {error}") from error
            _idle.append(worker)
        _under_way[job.key] = job
        return _idle.pop()


def _wait(job: _Job, deadline: float, stopping: Callable[[], bool]) -> None:
    asked = False
    while (left := deadline - monotonic()) > 0 and not job.done.wait(min(left, _LOOK_AGAIN)):
        if not asked and stopping():
            asked, deadline = True, min(deadline, monotonic() + _GRACE)


def check_turn() -> None:
    """Raise LeftBehindError in a thread whose work nobody waits for any more; before each effect."""
    job = getattr(_current, "job", None)
    if job is not None and job.is_left_behind:
        raise LeftBehindError(f"{job.key[1]}: it took too long, and its turn is over")


def is_left_to_a_thread() -> bool:
    """Whether this is one of the threads of this module."""
    return getattr(_current, "job", None) is not None


def is_within(scope: object) -> bool:
    """Whether this thread does something in the name of `scope`."""
    job = getattr(_current, "job", None)
    return job is not None and job.key[0] == id(scope)


def left_behind() -> list[tuple[str, str, float]]:
    """Return what does not come back: what, whose, and for how many seconds."""
    now = monotonic()
    with _lock:
        return [(*job.key[1:], now - job.began) for job in _under_way.values() if job.is_left_behind]
