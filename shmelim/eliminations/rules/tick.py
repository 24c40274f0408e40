"""What the rules share, and one tick: what it began with, and whether a sync has made that the past."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, TypeVar

from shmelim.eliminations.calls import ProcessingCalls
from shmelim.eliminations.debts.states import LIMIT_ORDERS, POSITIONS
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.record import generate_row
from shmelim.eliminations.rows import Status
from shmelim.eliminations.rules import deadlines
from shmelim.eliminations.rules.alerts import Alerts, OvertakenError
from shmelim.eliminations.salvage import salvage
from shmelim.eliminations.validator.collaborators import Collaborators
from shmelim.eliminations.validator.environment import ValidatorEnvironment
from shmelim.system.clock import monotonic
from shmelim.system.coroutines import truth
from shmelim.system.logs import LimitedLog
from shmelim.system.text import get_logger

T = TypeVar("T")

_WAS_REGISTERED: Final = Status.DEPARTED | Status.REGISTERED

WHO: Final = {LIMIT_ORDERS: "limit_order_manager", POSITIONS: "position_manager"}
"""Which collaborator settles a debt that may be repeated."""

_BETWEEN_REPORTS: Final = 1.0  # seconds
_BETWEEN_REMINDERS: Final = 10.0
_SHUTDOWN: Final = "shutdown", "shutdown_dict"
_SHUTDOWN_S: Final = 1.0

_limited = LimitedLog(get_logger("shmelim.processing"))


@dataclass(eq=False)
class Context:
    """What every rule works with. Any of the collaborators may be another one at each look."""

    collaborators: Collaborators
    environment: ValidatorEnvironment
    reader: EliminationReader
    state: ProcessingCalls
    is_backtesting: bool = False
    end_asked: bool = False  # written by a signal handler too
    sync_since: float | None = None  # since when the loop pauses for a sync, by the monotonic clock
    whole_ms: int | None = None  # when the last tick was made that failed in no step
    has_changed: bool = False  # whether there are problems, or ends of them, that the server was not told of
    reported_at: float = -math.inf  # by the monotonic clock

    def __post_init__(self) -> None:
        self._ending = False  # what shutdown_dict said last
        self._had: set[str] = set()  # the kinds of debts for which there ever was a collaborator
        self.alerts = Alerts(self.collaborators, self.ask)
        self.alerts.subscribe(self._note_change)

    def _note_change(self, *_: object) -> None:
        self.has_changed = True

    def report(self) -> None:
        """Tell the server, whose health lists them, of the problems that stand, and of the last whole tick."""
        self.has_changed, self.reported_at = False, monotonic()
        standing = [problem._asdict() for problem in self.alerts.standing()]
        try:
            self.state.report_processing(self.whole_ms, self.environment.check_interval_ms, standing)
        except BaseException:
            self.has_changed = True
            raise

    def report_changes(self, *, at_once: bool = False) -> None:
        """Report what has changed, at most once a second: a tick in which much hangs may take minutes.

        Also what still stands, now and then: a server that was started meanwhile knows nothing of it.
        """
        passed = monotonic() - self.reported_at
        is_told = self.has_changed and (at_once or passed > _BETWEEN_REPORTS)
        if is_told or (passed > _BETWEEN_REMINDERS and self.alerts.standing()):
            # A server that is away is found out by what needs it; its health is asked for once it is back.
            with contextlib.suppress(Exception):
                self.report()

    @property
    def contract(self) -> Any:
        """Who slashes: nobody in a backtest."""
        return None if self.is_backtesting else self.collaborators.contract_manager

    @property
    def ledgers(self) -> Any:
        """The miners' ledgers, or None."""
        positions = self.collaborators.position_manager
        return None if positions is None else positions.perf_ledger_manager

    def owed(self) -> list[str]:
        """Return the kinds of debts for which there is, or ever was, a collaborator; asked by each tick."""
        self._had.update(kind for kind, who in WHO.items() if getattr(self.collaborators, who) is not None)
        return [kind for kind in WHO if kind in self._had]

    @property
    def is_direct(self) -> bool:
        """Whether everything runs in the caller's thread."""
        return bool(getattr(self.collaborators, "running_unit_tests", False))

    def is_stopping(self) -> bool:
        """Whether the validator is ending, or has ended and left this process behind."""
        if self.end_asked or self._is_orphaned():
            return True
        shutdown = self.collaborators.shutdown_dict

        def ask() -> bool:
            # An event is always true.
            is_set = getattr(shutdown, "is_set", None)
            return bool(shutdown if is_set is None else is_set())

        try:
            if self.is_direct or shutdown is None or isinstance(shutdown, (dict, threading.Event)):
                return ask()
            # It may live in a process that hangs, or have a lock that nobody will release.
            self._ending = deadlines.call(self, *_SHUTDOWN, ask, _SHUTDOWN_S)
        except deadlines.StuckError as error:
            if not self.alerts.stands(*_SHUTDOWN):
                text = f"whether the validator is ending cannot be asked, and is taken for what it was: {error}"
                self.alerts.failed(*_SHUTDOWN, text)
        except Exception:
            # It lives in a process that is gone, and the validator with it.
            text = "whether the validator is ending cannot be asked any more: taken as a yes"
            _limited(logging.ERROR, "end", text, exc_info=True)
            return True
        else:
            self.alerts.clear(*_SHUTDOWN)
        return self._ending

    def _is_orphaned(self) -> bool:
        """Whether the process that made the manager is gone, also by SIGKILL, or has shut it down."""
        manager: Any = self.collaborators
        if getattr(manager, "has_ended", False) is not True and getattr(manager, "owner_lives", True) is not False:
            return False
        _limited(logging.WARNING, "orphan", "the manager has ended, or the process that made it: so does this")
        return True

    def ask(
        self,
        what: str,
        work: Callable[[], T],
        whom: str = "",
        seconds: float | None = None,
        *,
        patient: bool = False,
    ) -> T:
        """Have the validator's own objects do something under a deadline, in direct mode in this thread.

        By default the environment's ``call_deadline_s``. A `patient` one has it whole even if the validator is
        ending. StuckError: see :mod:`~shmelim.eliminations.rules.deadlines`.
        """
        if self.is_direct:
            return work()
        if not deadlines.is_left_to_a_thread():
            self.report_changes()
        limit = self.environment.call_deadline_s if seconds is None else seconds
        stopping = (lambda: False) if patient else self.is_stopping
        return deadlines.call(self, what, whom, work, limit, stopping=stopping)

    def can_be_a_miner(self, name: str) -> bool:
        """Whether a name may be a hotkey: it looks like one, or was registered here once."""
        return truth(self.environment.is_hotkey(name), "is_hotkey") or bool(
            self.reader.status(name) & _WAS_REGISTERED
        )

    def notice_sync(self) -> None:
        """Report a sync that has been in progress for so long that it will perhaps never end."""
        now = monotonic()
        if self.sync_since is None:
            self.sync_since = now
        if now - self.sync_since > self.environment.longest_sync_s:
            longest = self.environment.longest_sync_s
            text = f"sync_in_progress has been true for more than {longest:.0f} s: nothing is processed meanwhile"
            self.alerts.failed("loop", "sync", text)

    def epoch(self) -> Any:
        """Return what ``sync_epoch`` is now; None if there is none."""
        epoch = self.collaborators.sync_epoch
        if epoch is None:
            return None
        if deadlines.is_left_to_a_thread():
            return epoch.value  # under the deadline of what that thread does
        # A process that was killed while it set the value holds its lock for ever.
        return self.ask("sync_epoch", lambda: epoch.value)

    def begin(self, position_locks: Any, epoch: Any) -> Tick:
        """Begin a tick; None stands for the collaborators' locks, and for the epoch of this moment."""
        self.owed()  # who is there now may be replaced when somebody is eliminated
        epoch = self.epoch() if epoch is None else epoch
        # After the epoch: a sync between the two is noticed by either.
        return Tick(self, position_locks, epoch, self.state.get_replacements())


@dataclass(eq=False)
class Tick:
    """One pass of the rules: what was true when it began."""

    context: Context
    given_locks: Any
    epoch: Any  # what sync_epoch was; None if there is none
    replacements: int  # how often the list of eliminations had been replaced
    price_sources: Mapping[Any, Any] | None = None  # by trade pair, where the caller has some
    superseded: bool = False  # whether the list of eliminations was found replaced
    debts: list[dict[str, Any]] | None = None  # what is owed, once somebody asked
    # Why miners failed the challenge period, as this tick saw it: another one at once may see more.
    reasons: Mapping[str, Any] = field(default_factory=dict)

    def look_at_debts(self) -> list[dict[str, Any]]:
        """Return what is owed, as it was when it was asked first in this tick."""
        if self.debts is None:
            self.debts = self.context.state.get_debts()
        return self.debts

    @property
    def position_locks(self) -> Any:
        """The locks for this tick; where there are none, this process' own."""
        locks = self.context.collaborators.position_locks if self.given_locks is None else self.given_locks
        return _own_locks if locks is None else locks

    def check(self) -> None:
        """Raise OvertakenError if a sync came since the tick began, LeftBehindError if nobody waits for this."""
        deadlines.check_turn()
        if self.superseded:
            raise OvertakenError("the eliminations were replaced while they were processed")
        now = self.context.epoch()
        if self.epoch is not None and now is not None and now != self.epoch:
            raise OvertakenError(f"a sync came meanwhile (epoch {self.epoch} -> {now})")

    def found(self, hotkey: str, reason: str, dd: float | None, *, slash: bool = True) -> Found:
        """Return a finding of this moment."""
        now_ms = self.context.environment.now_ms()
        return Found(salvage(generate_row(hotkey, dd, reason, now_ms), now_ms)[0], slash)


class Found(NamedTuple):
    """What a rule found: an elimination to be recorded, and whether it is slashed for."""

    record: dict[str, Any]
    slash: bool = True


@dataclass(eq=False)
class _OwnLocks:
    """Locks for a validator that has none: two ticks at once must not close a position twice."""

    locks: dict[tuple[str, str], Any] = field(default_factory=dict)

    def get_lock(self, hotkey: str, trade_pair_id: str) -> Any:
        # Re-entrant: what saves a position may call back.
        return self.locks.setdefault((hotkey, trade_pair_id), threading.RLock())


_own_locks = _OwnLocks()
# Whoever holds one in the parent would never release it in a child.
os.register_at_fork(after_in_child=_own_locks.locks.clear)
