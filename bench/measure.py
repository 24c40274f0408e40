"""Timing one operation: its median, its tail, its rate; and two operations in turn.

A check takes about as long as looking at the clock. So the *median* of anything quick is that of batches: the time
of some dozens of calls, divided by their number. The *percentiles* can only be of single calls, each
between two looks at the clock, whose own cost is measured the same way and stated with them, not subtracted.
What takes longer than `QUICK` is measured by single calls alone.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bench.stats import enough_for, percentile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["QUICK", "Duel", "Sample", "duel", "duel_with_slow", "rate", "sample", "timer_cost"]

QUICK = 2e-6
# Few, so that a rare stall spoils few of them: their median then is that of the calls that were not stalled.
BATCH = 64
LEAST_ROUNDS = 3
LONG = 0.5
WAKING = 8
_clock = time.perf_counter_ns


@dataclass(frozen=True)
class Sample:
    """What was measured of an operation, in seconds.

    Attributes
    ----------
    p50, p99, p999
        Percentiles; the last two are None where too few single calls were timed to know them.
    calls
        How many single calls were timed.
    rate
        Calls a second in the passes without a clock between calls (in the single calls, if slow).
    batched
        The median is that of batches.

    """

    p50: float
    p99: float | None
    p999: float | None
    calls: int
    rate: float
    batched: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def timer_cost() -> float:
    """Return what a single call's timing adds to it: the median distance of two looks at the clock, in seconds."""
    found = []
    for _ in range(20_000):
        began = _clock()
        found.append(_clock() - began)
    return statistics.median(found) / 1e9


def sample(call: Callable[[Any], Any], arguments: Sequence[Any], seconds: float, begin_at: float = 0.0) -> Sample:
    """Measure ``call(argument)`` over all arguments in turn, for about so many seconds.

    Parameters
    ----------
    call, arguments
        What is called, and with what.
    seconds
        How long; one pass is made at least where calls are quick, one call where not.
    begin_at
        When to begin, as `time.perf_counter` has it, so that several processes begin together.

    """
    began = time.perf_counter()
    call(arguments[0])
    first = time.perf_counter() - began
    warming = arguments[:8] if first < LONG else ()
    quick = bool(warming) and min(first, _pass(call, warming) / len(warming)) < QUICK
    if quick:
        _pass(call, arguments)
    _wait_until(begin_at)
    if not quick:
        singles, speed = _singles(call, arguments, seconds)
        ordered = sorted(singles)
        return Sample(percentile(ordered, 0.5), *_tail(ordered), len(ordered), speed, batched=False)
    batches, speed = _batches(call, arguments, seconds / 2)
    ordered = sorted(_singles(call, arguments, seconds / 2)[0])
    return Sample(statistics.median(batches), *_tail(ordered), len(ordered), speed, batched=True)


def rate(call: Callable[[Any], Any], arguments: Sequence[Any], seconds: float, begin_at: float = 0.0) -> float:
    """Return calls a second, without a clock between calls."""
    _pass(call, arguments)
    _wait_until(begin_at)
    return _batches(call, arguments, seconds)[1]


def _tail(ordered: Sequence[float]) -> tuple[float | None, float | None]:
    p99, p999 = (
        percentile(ordered, share) if enough_for(share, len(ordered)) else None for share in (0.99, 0.999)
    )
    return p99, p999


def _wait_until(moment: float) -> None:
    pause = moment - time.perf_counter()
    if pause > 0:
        time.sleep(pause)


def _pass(call: Callable[[Any], Any], arguments: Sequence[Any]) -> float:
    began = time.perf_counter()
    for argument in arguments:
        call(argument)
    return time.perf_counter() - began


def _batches(call: Callable[[Any], Any], arguments: Sequence[Any], seconds: float) -> tuple[list[float], float]:
    """Return seconds per call of each batch, and calls a second of all."""
    batches = [arguments[first : first + BATCH] for first in range(0, len(arguments), BATCH)]
    found: list[float] = []
    passes = 0
    began = time.perf_counter()
    while not found or time.perf_counter() - began < seconds:
        found += [_pass(call, batch) / len(batch) for batch in batches]
        passes += 1
    return found, passes * len(arguments) / (time.perf_counter() - began)


def _singles(call: Callable[[Any], Any], arguments: Sequence[Any], seconds: float) -> tuple[list[float], float]:
    """Return seconds of each call, and calls a second."""
    found: list[int] = []
    note, clock = found.append, _clock
    began = clock()
    ends = began + int(seconds * 1e9)
    ended = began
    while ended < ends:
        for argument in arguments:
            started = clock()
            call(argument)
            ended = clock()
            note(ended - started)
            if ended >= ends:
                break
    return [nanoseconds / 1e9 for nanoseconds in found], len(found) * 1e9 / (ended - began)


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Duel:
    """Two operations measured in turn.

    Attributes
    ----------
    ours, theirs
        Medians in seconds per call.
    ratio
        Of these medians.
    low, high
        The quartiles of the ratios of the single rounds.
    rounds
        How many rounds were made.

    """

    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    rounds: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def duel(
    ours: Callable[[], Any],
    theirs: Callable[[], Any],
    calls: int | tuple[int, int],
    seconds: float,
    before: Callable[[], Any] | None = None,
) -> Duel:
    """Run two passes in turn for so many seconds, and compare them.

    The machine's own speed wanders: what is measured within the same millisecond saw the same machine. Who goes
    first alternates, and the first rounds do not count.

    Parameters
    ----------
    ours, theirs
        One pass each.
    calls
        How many calls a pass makes; two numbers where ours makes others than theirs.
    seconds
        How long in all; at least three rounds are made.
    before
        Called before each pass, and not timed.

    """
    prepare = before or _nothing
    for run in (ours, theirs) * 2:
        prepare()
        run()
    mine: list[float] = []
    other: list[float] = []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or len(mine) < LEAST_ROUNDS:
        pairs = ((ours, mine), (theirs, other))
        for run, found in pairs if len(mine) % 2 else pairs[::-1]:
            prepare()
            began = _clock()
            run()
            found.append(_clock() - began)
    our_calls, their_calls = calls if isinstance(calls, tuple) else (calls, calls)
    return _judge([each / our_calls for each in mine], [each / their_calls for each in other])


def duel_with_slow(
    ours: Callable[[], Any], calls: int, theirs: Callable[[Any], Any], arguments: Sequence[Any], seconds: float
) -> Duel:
    """As `duel`, with an operation that waits for another process: its calls are timed one by one.

    A round makes a pass of ours and a call of theirs with each argument. The first few of these do not count: the
    process that answers may have gone to sleep meanwhile. Of the others the median does, so that a call which had
    to wait for a processor spoils no round.

    Parameters
    ----------
    ours, calls
        A pass, and how many calls it makes.
    theirs, arguments
        What is called, and with what; more than `WAKING` of them.
    seconds
        How long in all; at least three rounds are made.

    """
    mine: list[float] = []
    other: list[float] = []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or len(mine) < LEAST_ROUNDS:
        singles = []
        for argument in arguments:
            began = _clock()
            theirs(argument)
            singles.append(_clock() - began)
        other.append(statistics.median(singles[WAKING:]))
        # Once untimed: after system calls the first pass finds cold caches.
        ours()
        began = _clock()
        ours()
        mine.append((_clock() - began) / calls)
    return _judge(mine, other)


def _judge(mine: Sequence[float], other: Sequence[float]) -> Duel:
    """Compare nanoseconds per call of each round."""
    ratios = sorted(a / b for a, b in zip(mine, other, strict=True))
    a, b = statistics.median(mine) / 1e9, statistics.median(other) / 1e9
    return Duel(a, b, a / b, percentile(ratios, 0.25), percentile(ratios, 0.75), len(ratios))
