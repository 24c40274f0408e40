"""One pass of the processing: what it began with, and whether a sync has made that the past."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from shmelim.eliminations.validator.collaborators import Collaborators
from shmelim.errors import ShmelimError, StateUnavailableError


class OvertakenError(ShmelimError):
    """A sync replaced what this pass began with: nothing more of it may be written."""


NOT_A_MINERS: Final = (OvertakenError, StateUnavailableError)
"""Errors that end a pass, since they are not one miner's."""


@dataclass(eq=False)
class Iteration:
    """What was true when a pass began, and whether it should go on."""

    collaborators: Collaborators
    given_locks: Any
    epoch: Any  # what sync_epoch was; None if there is none
    replacements: int  # how often the list of eliminations had been replaced
    stopping: Callable[[], bool]
    price_sources: Mapping[Any, Any] | None = None  # by trade pair, where the caller has some
    superseded: bool = False

    @property
    def position_locks(self) -> Any:
        """The locks for this pass: those it was given, else the collaborators'."""
        return self.collaborators.position_locks if self.given_locks is None else self.given_locks

    def supersede(self) -> None:
        """Note that the list of eliminations was replaced meanwhile, and end the pass."""
        self.superseded = True
        self.check()

    def check(self) -> None:
        """Raise OvertakenError if a sync came since the pass began."""
        if self.superseded:
            raise OvertakenError("the eliminations were replaced while they were processed")
        now = current_epoch(self.collaborators)
        if self.epoch is not None and now is not None and now != self.epoch:
            raise OvertakenError(f"a sync came meanwhile (epoch {self.epoch} -> {now})")


def current_epoch(collaborators: Collaborators) -> Any:
    """Return what ``sync_epoch`` is now; None if there is none."""
    epoch = collaborators.sync_epoch
    return None if epoch is None else epoch.value
