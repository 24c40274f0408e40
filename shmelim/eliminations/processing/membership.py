"""Who is in the metagraph: told to the server when it changed, and asked by the rules."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from shmelim.eliminations.collaborators import Collaborators
    from shmelim.eliminations.processing.roster import Roster
    from shmelim.eliminations.processing.statecalls import StateCalls

__all__ = ["Membership"]

_log = logging.getLogger("shmelim.processing")


class Membership:
    """The metagraph as the processing sees it.

    Parameters
    ----------
    collaborators, state, roster
        As of the processor.

    """

    def __init__(self, collaborators: Collaborators, state: StateCalls, roster: Roster) -> None:
        self._collaborators = collaborators
        self._state = state
        self._roster = roster
        self._told: list[str] | None = None  # what the server was told last

    def look(self) -> list[str]:
        """Tell the server who is registered, unless it knows; returns those whose departure was recorded."""
        hotkeys = self._hotkeys()
        if hotkeys is None or self._is_known(hotkeys):
            return []
        departed = self._state.update_metagraph(hotkeys)
        self._told = hotkeys
        if departed:
            _log.info("%d hotkeys left the metagraph: %s", len(departed), ", ".join(departed[:10]))
        return departed

    def missing(self, hotkeys: Iterable[str]) -> list[str]:
        """Return those of these hotkeys that are certainly not in the metagraph.

        Nobody is while the metagraph has no hotkey at all, nor while so many are missing that their loss was not
        believed: what it shows of the others, whom the server perhaps never saw, is not believed either.
        """
        members = set(self._hotkeys() or ())
        absent = [hotkey for hotkey in hotkeys if hotkey not in members] if members else []
        if not absent:
            return []
        self.look()
        # The server keeps those registered whose loss it did not believe.
        return absent if self._roster.now().registered <= members else []

    def _hotkeys(self) -> list[str] | None:
        metagraph = self._collaborators.metagraph
        return None if metagraph is None else list(metagraph.hotkeys)

    def _is_known(self, hotkeys: list[str]) -> bool:
        # Others may have told the server something else since.
        return hotkeys == self._told and self._roster.now().registered >= set(hotkeys)
