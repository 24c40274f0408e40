"""The guard: a change that takes back or doubles the eliminations is told, or refused unless it is meant.

What it notices is kept in the store until a day is over or somebody acknowledges it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

from shmelim.eliminations.record import DAY_MS
from shmelim.eliminations.state.changes import Step
from shmelim.eliminations.store.history import Change as EventOf
from shmelim.eliminations.store.store import Store
from shmelim.errors import GuardedChangeError
from shmelim.system import clock
from shmelim.system.problems import Problems

GuardMode: TypeAlias = Literal["tell", "refuse", "off"]

GUARDED: Final = "guarded_change"
_NOTICES: Final = "guarded_changes"
_REMEDY: Final = "if it was meant, `shmelim ack`; if not, `shmelim rollback --to {}` undoes it and what came after"


class Notice(NamedTuple):
    """A change that was carried out and that somebody should know of."""

    before: int  # the number of the last event before it
    event: int  # and of its own last one
    at_ms: int
    text: str


@dataclass(slots=True)
class Guard:
    """What it takes to be noticed: so many, and such a share of the eliminations, of a state that holds so many.

    ValueError: `mode` is not one of its three, or a figure is none.
    """

    mode: GuardMode = "tell"
    count: float = 10
    share: float = 0.25
    has_noticed: bool = False  # written by the state's thread; read and reset by who made the change

    def __post_init__(self) -> None:
        if self.mode not in get_args(GuardMode):
            raise ValueError(f"sync_guard must be one of {', '.join(get_args(GuardMode))}, not {self.mode!r}")
        if not (self.count >= 1 and 0 <= self.share <= 1):
            raise ValueError(f"the guard takes a count of 1 or more and a share of 0 to 1, not {self!r}")

    def judge_meant(self, step: Step, what: str, gone: int, new: int) -> None:
        """Look at a change of which somebody said that it is meant: it is told, and never refused."""
        self._look(step, what, gone, new, refuse=False)

    def judge(self, step: Step, what: str, gone: int, new: int) -> None:
        """Look at a change that took so many back and added so many; GuardedChangeError if it is refused."""
        self._look(step, what, gone, new, refuse=self.mode == "refuse")

    def _look(self, step: Step, what: str, gone: int, new: int, *, refuse: bool) -> None:
        if self.mode == "off" or max(gone, new) < self.count:
            return
        counts = step.store.counts()
        before = counts.eliminated - new + gone
        text = self._excess(before, gone, new)
        if text is None:
            return
        if refuse:
            raise GuardedChangeError(
                f"{what} would {text}; nothing was changed", hint="if it is meant, say force=True, or --force"
            )
        notice = Notice(counts.events - step.recorded, counts.events, clock.now_ms(), f"{what}: {text}")
        step.set_meta(_NOTICES, [*notices(step.store), notice])
        self.has_noticed = True

    def _excess(self, before: int, gone: int, new: int) -> str | None:
        if before < self.count:
            return None  # also a first filling
        if gone >= max(self.count, self.share * before):
            return f"take back {gone} of {before} eliminations"
        after = before - gone + new
        return f"make {after} eliminations of {before}" if after >= 2 * before else None


def notices(store: Store) -> list[Notice]:
    """Return what was noticed within a day and not acknowledged, the oldest first."""
    found = [Notice(*each) for each in store.meta(_NOTICES, [])]
    return [notice for notice in found if not _is_over(notice.at_ms)]


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
            f"{notice.text} (up to event {notice.event})",
            subject=f"event {notice.event}",
            severity="notice",
            remedy=_REMEDY.format(notice.before),
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
