"""Judging candidates under a deadline: one whose judging does not come back keeps no other from it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from shmelim.eliminations.rules.alerts import ENDS_A_TICK, WISHES
from shmelim.eliminations.rules.deadlines import NotAskedError, StuckError, check_turn, is_left_to_a_thread
from shmelim.eliminations.rules.tick import Context, Found

Candidate: TypeAlias = tuple[str, Callable[[], Found | None]]
Outcome: TypeAlias = Found | BaseException


@dataclass(eq=False)
class Judging:
    """Judges candidates in their order, and remembers whose judging hangs."""

    context: Context
    _hanging: dict[tuple[str, str], _Run] = field(default_factory=dict)  # by kind and hotkey

    def outcomes(self, kind: str, candidates: Sequence[Candidate]) -> list[tuple[str, Outcome]]:
        """Return what was found of whom, or why nobody can tell."""
        self._hanging = {whose: run for whose, run in self._hanging.items() if run.is_under_way}
        hanging = {hotkey for what, hotkey in self._hanging if what == kind}
        outcomes: list[tuple[str, Outcome]] = [
            (hotkey, StuckError(f"judging miner {hotkey} has not come back")) for hotkey in sorted(hanging)
        ]
        left = [candidate for candidate in candidates if candidate[0] not in hanging]
        while left:
            run = _Run(left)
            try:
                self.context.ask(kind, run.judge_all, f"all but {', '.join(sorted(hanging)) or 'nobody'}")
            except NotAskedError as error:
                return outcomes + [(hotkey, error) for hotkey, _ in left]
            except StuckError as error:
                judged = len(run.outcomes)
                outcomes += run.found(judged)
                if judged < len(left):  # else it came back just now
                    hotkey = left[judged][0]
                    self._hanging[kind, hotkey] = run
                    hanging.add(hotkey)
                    outcomes.append((hotkey, error))
                left = left[judged + 1 :]
            else:
                return outcomes + run.found(len(left))
        return outcomes


@dataclass(eq=False)
class _Run:
    """One thread's way through candidates; what it writes is its own, also once it is left behind."""

    candidates: Sequence[Candidate]
    outcomes: list[Outcome | None] = field(default_factory=list)
    is_over: bool = False
    pid: int = field(default_factory=os.getpid)

    @property
    def is_under_way(self) -> bool:
        """Whether its thread still works on it, which a forked child does not have."""
        return not self.is_over and self.pid == os.getpid()

    def judge_all(self) -> None:
        try:
            for _, judge in self.candidates:
                outcome = _judged(judge)
                check_turn()
                self.outcomes.append(outcome)
        finally:
            self.is_over = True

    def found(self, judged: int) -> list[tuple[str, Outcome]]:
        """Return those of the first so many of whom there is something to say."""
        pairs = zip(self.candidates, self.outcomes[:judged], strict=False)
        return [(hotkey, outcome) for (hotkey, _), outcome in pairs if outcome is not None]


def _judged(judge: Callable[[], Found | None]) -> Outcome | None:
    try:
        return judge()
    except WISHES as error:
        if not is_left_to_a_thread():
            raise
        # A ledger that calls sys.exit() is one miner's failure.
        failure = RuntimeError(f"it wanted to end the process: {type(error).__name__}")
        failure.__cause__ = error
        return failure
    except ENDS_A_TICK:
        raise
    except BaseException as error:
        return error
