"""One pass of the processing: what it began with, and whether a sync has made that the past."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from shmelim.errors import ShmelimError, StateUnavailableError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from shmelim.eliminations.validator.collaborators import Collaborators


class OvertakenError(ShmelimError):
    """A sync replaced what this pass began with: nothing more of it may be written."""


NOT_A_MINERS: Final = (OvertakenError, StateUnavailableError)
"""Errors that end a pass, since they are no one miner's."""


class Iteration:
    """What was true when a pass began.

    Attributes
    ----------
    epoch
        What ``sync_epoch`` was; None if there is none.
    replacements : int
        How often the list of eliminations had been replaced.

    """

    def __init__(self, collaborators: Collaborators, position_locks: Any, epoch: Any, replacements: int) -> None:
        self._collaborators = collaborators
        self._superseded = False
        self._given_locks = position_locks
        self.price_sources: Mapping[Any, Any] | None = None  # by trade pair, where the caller has some
        self.epoch = epoch
        self.replacements = replacements

    @property
    def position_locks(self) -> Any:
        """The locks for this pass: those it was given, else the collaborators'."""
        return self._collaborators.position_locks if self._given_locks is None else self._given_locks

    def supersede(self) -> None:
        """Take note that the list of eliminations was replaced meanwhile, and end the pass."""
        self._superseded = True
        self.check()

    def check(self) -> None:
        """Raise OvertakenError if a sync came since the pass began."""
        if self._superseded:
            raise OvertakenError("the eliminations were replaced while they were processed")
        now = current_epoch(self._collaborators)
        if self.epoch is not None and now is not None and now != self.epoch:
            raise OvertakenError(f"a sync came meanwhile (epoch {self.epoch} -> {now})")


def current_epoch(collaborators: Collaborators) -> Any:
    """Return what ``sync_epoch`` is now; None if there is none."""
    epoch = collaborators.sync_epoch
    return None if epoch is None else epoch.value
