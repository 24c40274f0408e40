"""The guard: a change that takes back or doubles the eliminations is told, or refused unless it is meant.

Many small changes that take back as much within a day count as one. What the guard notices is kept in the store
until a day is over or somebody acknowledges it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

from shmelim.eliminations.record import DAY_MS
from shmelim.eliminations.state.changes import Step
from shmelim.eliminations.store.history import Change as EventOf
from shmelim.eliminations.store.store import Counts, Store
from shmelim.errors import GuardedChangeError
from shmelim.system import clock
from shmelim.system.problems import Problems

GuardMode: TypeAlias = Literal["tell", "refuse", "off"]

GUARDED: Final = "guarded_change"
_NOTICES: Final = "guarded_changes"
_STEPS: Final = "guarded_steps"  # what was taken back within a day and not noticed yet, at most one for each hour
_MOST_NOTICES: Final = 20  # beyond that, those in the middle become one
_HOUR_MS: Final = 3_600_000
_REMEDY: Final = "if it was meant, `shmelim ack`; if not, `shmelim rollback --to {}` undoes it and what came after"
_FORGOTTEN: Final = "if it was meant, `shmelim ack`; if not, restore a backup: what undoes it was pruned"


class Notice(NamedTuple):
    """A change that was carried out and that somebody should know of."""

    before: int | None  # the number of the last event before it; None: that was pruned
    event: int  # that of its own last one
    at_ms: int
    text: str
    more: int = 0  # such changes after it that it stands for, too

    def __str__(self) -> str:
        also = f", and {self.more} more such changes after it" if self.more else ""
        return f"{self.text} (up to event {self.event}){also}"


class _Steps(NamedTuple):
    """Changes within an hour that took eliminations back."""

    before: int  # the number of the last event before the first of them
    at_ms: int  # of the first of them
    gone: int  # how many they took back


@dataclass(slots=True)
class Guard:
    """What it takes to be noticed: so many, and such a share of the eliminations, of a state that holds so many.

    ValueError: `mode` is not one of its three, or a figure is none.
    """

    mode: GuardMode = "tell"
    count: float = 10
    share: float = 0.25
    has_noticed: bool = False  # written by who takes a turn; read and reset by who made the change

    def __post_init__(self) -> None:
        if self.mode not in get_args(GuardMode):
            raise ValueError(f"sync_guard must be one of {', '.join(get_args(GuardMode))}, not {self.mode!r}")
        if not (self.count >= 1 and 0 <= self.share <= 1):
            raise ValueError(f"the guard takes a count of 1 or more and a share of 0 to 1, not {self!r}")

    def judge(self, step: Step, what: str, gone: int, new: int, *, is_meant: bool = False) -> None:
        """Look at a change that took so many back and added so many; GuardedChangeError if it is refused.

        One of which somebody said that it is meant is told, and never refused.
        """
        if self.mode == "off" or not (gone or new >= self.count):
            return
        steps = _steps_with(step, gone) if gone else []
        total = sum(each.gone for each in steps)
        if max(total, new) >= self.count:
            counts = step.store.counts()
            before, text = counts.events - step.recorded, self._excess(counts.eliminated - new + gone, gone, new)
            if text is None and total >= max(self.count, self.share * counts.eliminated):
                text = self._excess_since(step, steps[0].before, total, counts)
                before = max(steps[0].before, step.store.pruned.event)
            if text is not None:
                if self.mode == "refuse" and not is_meant:
                    raise GuardedChangeError(
                        f"{what} would {text}; nothing was changed",
                        hint="if it is meant, say force=True, or --force",
                    )
                self._notice(step, Notice(before, counts.events, clock.now_ms(), f"{what}: {text}"))
                steps = []
        if gone:
            step.set_meta(_STEPS, steps)

    def _notice(self, step: Step, notice: Notice) -> None:
        found = [*notices(step.store), notice]
        if len(found) > _MOST_NOTICES:
            one, other = found[_MOST_NOTICES // 2 : _MOST_NOTICES // 2 + 2]
            found.remove(other)
            # Under the number that it has in the health, so that nobody is told of it again.
            found[_MOST_NOTICES // 2] = one._replace(at_ms=other.at_ms, more=one.more + other.more + 1)
        step.set_meta(_NOTICES, found)
        self.has_noticed = True

    def _excess(self, before: int, gone: int, new: int) -> str | None:
        if before < self.count:
            return None  # also a first filling
        if gone >= max(self.count, self.share * before):
            return f"take back {gone} of {before} eliminations"
        after = before - gone + new
        return f"make {after} eliminations of {before}" if after >= 2 * before else None

    def _excess_since(self, step: Step, event: int, total: int, counts: Counts) -> str | None:
        """Say what is gone since an event, if it is too much; what was brought again is not.

        At most the ``total`` that was taken back: others are gone since, too, as the rules deleted them. All of
        it where the history is pruned, and nobody knows.
        """
        old = step.store.replaced_after(event)
        now = step.store.get_many(old)
        is_there = {hotkey: hotkey in now and now[hotkey].record is not None for hotkey in old}
        gone = sum(record is not None and not is_there[hotkey] for hotkey, record in old.items())
        if event < step.store.pruned.event:
            gone = total
        new = sum(record is None and is_there[hotkey] for hotkey, record in old.items())
        text = self._excess(counts.eliminated - new + gone, min(gone, total), 0)
        return None if text is None else f"{text}, with the small changes before it"


def _steps_with(step: Step, gone: int) -> list[_Steps]:
    """Return what was taken back within a day, with a change that took so many back."""
    now = clock.now_ms()
    found = [_Steps(*each) for each in step.store.meta(_STEPS, [])]
    # Not what is from another time, after the clock was set.
    found = [each for each in found if 0 <= now - each.at_ms < DAY_MS]
    if found and now - found[-1].at_ms < _HOUR_MS:
        found[-1] = found[-1]._replace(gone=found[-1].gone + gone)
    else:
        found.append(_Steps(step.store.last_event - step.recorded, now, gone))
    return found


def notices(store: Store) -> list[Notice]:
    """Return what was noticed within a day and not acknowledged, the oldest first."""
    known = store.pruned.event
    found = [Notice(*each) for each in store.meta(_NOTICES, [])]
    return [
        notice if (notice.before or 0) >= known else notice._replace(before=None)
        for notice in found
        if not _is_over(notice.at_ms)
    ]


def acknowledge(step: Step) -> list[str]:
    """Forget what was noticed, since somebody has looked; returns what it was."""
    found = [notice.text for notice in notices(step.store)]
    if found:
        step.set_meta(_NOTICES, [])
        step.record([EventOf("ack", note=text) for text in found])
    return found


def tell_noticed(problems: Problems, found: Collection[Notice]) -> None:
    """Have these notices, and no others, stand in the health."""
    for notice in found:
        problems.report(
            GUARDED,
            str(notice),
            subject=f"event {notice.event}",
            severity="notice",
            remedy=_FORGOTTEN if notice.before is None else _REMEDY.format(notice.before),
            since_ms=notice.at_ms,
        )
    problems.clear_others(GUARDED, [f"event {notice.event}" for notice in found])


def expire(problems: Problems) -> None:
    """Clear the notices that are more than a day old."""
    for problem in problems.standing():
        if problem.name == GUARDED and _is_over(problem.since_ms):
            problems.clear(GUARDED, problem.subject)


def _is_over(at_ms: int) -> bool:
    return clock.now_ms() - at_ms >= DAY_MS
