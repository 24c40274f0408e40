"""What the rules share, and one pass: what it began with, and whether a sync has made that the past."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shmelim.eliminations.calls import ProcessingCalls
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.rows import Status
from shmelim.eliminations.rules.alerts import Alerts, OvertakenError
from shmelim.eliminations.validator.collaborators import Collaborators
from shmelim.eliminations.validator.environment import ValidatorEnvironment
from shmelim.system.logs import LimitedLog

_WAS_REGISTERED = Status.DEPARTED | Status.REGISTERED

_limited = LimitedLog(logging.getLogger("shmelim.processing"))


@dataclass(eq=False)
class Context:
    """What every rule works with. Any of the collaborators may be another one at each look."""

    collaborators: Collaborators
    environment: ValidatorEnvironment
    reader: EliminationReader
    state: ProcessingCalls
    is_backtesting: bool = False
    end_asked: bool = False  # written by a signal handler too

    def __post_init__(self) -> None:
        self.alerts = Alerts(self.collaborators)

    @property
    def contract(self) -> Any:
        """Who slashes: nobody in a backtest."""
        return None if self.is_backtesting else self.collaborators.contract_manager

    @property
    def ledgers(self) -> Any:
        """The miners' ledgers, or None."""
        positions = self.collaborators.position_manager
        return None if positions is None else positions.perf_ledger_manager

    def is_stopping(self) -> bool:
        """Whether the validator is ending."""
        shutdown = self.collaborators.shutdown_dict
        try:
            # An event is always true.
            is_set = getattr(shutdown, "is_set", None)
            return self.end_asked or bool(shutdown if is_set is None else is_set())
        except Exception:
            # It lives in a process that is gone, and the validator with it.
            text = "whether the validator is ending cannot be asked any more: taken as a yes"
            _limited(logging.ERROR, "end", text, exc_info=True)
            return True

    def can_be_a_miner(self, name: str) -> bool:
        """Whether a name may be a hotkey: it looks like one, or was registered here once."""
        return bool(self.environment.is_hotkey(name) or self.reader.status(name) & _WAS_REGISTERED)

    def epoch(self) -> Any:
        """Return what ``sync_epoch`` is now; None if there is none."""
        epoch = self.collaborators.sync_epoch
        return None if epoch is None else epoch.value

    def begin(self, position_locks: Any, epoch: Any) -> Iteration:
        """Begin a pass; None stands for the collaborators' locks, and for the epoch of this moment."""
        epoch = self.epoch() if epoch is None else epoch
        # After the epoch: a sync between the two is noticed by either.
        return Iteration(self, position_locks, epoch, self.state.get_replacements())


@dataclass(eq=False)
class Iteration:
    """What was true when a pass began."""

    context: Context
    given_locks: Any
    epoch: Any  # what sync_epoch was; None if there is none
    replacements: int  # how often the list of eliminations had been replaced
    price_sources: Mapping[Any, Any] | None = None  # by trade pair, where the caller has some
    superseded: bool = False  # whether the list of eliminations was found replaced

    @property
    def position_locks(self) -> Any:
        """The locks for this pass."""
        return self.context.collaborators.position_locks if self.given_locks is None else self.given_locks

    def check(self) -> None:
        """Raise OvertakenError if a sync came since the pass began."""
        if self.superseded:
            raise OvertakenError("the eliminations were replaced while they were processed")
        now = self.context.epoch()
        if self.epoch is not None and now is not None and now != self.epoch:
            raise OvertakenError(f"a sync came meanwhile (epoch {self.epoch} -> {now})")
