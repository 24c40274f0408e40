"""Who is in the metagraph and who is eliminated: told to the server when it changed, and asked by the rules."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Final, NamedTuple

from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.record import check_hotkey, refuse_hotkey
from shmelim.eliminations.rules.iteration import Context

_SHOWN: Final = 60  # characters of what is not a hotkey

_log = logging.getLogger("shmelim.processing")


class _Listed(NamedTuple):
    """What the table says, as of one version; not to be changed."""

    version: int
    eliminated: Mapping[str, int]  # when each hotkey was, in milliseconds since 1970, UTC
    registered: AbstractSet[str]  # also those whose loss the server did not believe


class Roster:
    """The table in few words, read anew when anything changed in it, since reading costs most. Thread-safe."""

    def __init__(self, reader: EliminationReader) -> None:
        self._reader = reader
        self._listed = _Listed(-1, {}, frozenset())  # replaced as one reference

    def now(self) -> _Listed:
        """Return what the table says."""
        listed = self._listed
        if listed.version != self._reader.version:
            version, eliminations, _, registered = self._reader.snapshot()
            times = {hotkey: row["elimination_initiated_time_ms"] for hotkey, row in eliminations.items()}
            self._listed = listed = _Listed(version, times, registered)
        return listed


class Membership:
    """The metagraph as the processing sees it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.roster = Roster(context.reader)
        self._told: list[str] | None = None  # what the server was told last
        # What the metagraph listed last, the hotkeys in it, and what else was in it.
        self._listed: list[Any] | None = None
        self._hotkeys_listed: list[str] | None = None
        self._refused: list[str] = []

    def look(self) -> list[str]:
        """Tell the server who is registered, unless it knows; returns those whose departure was recorded."""
        hotkeys = self._hotkeys()
        # Others may have told the server something else since.
        if hotkeys is None or (hotkeys == self._told and self.roster.now().registered >= set(hotkeys)):
            return []
        departed = self._context.state.update_metagraph(hotkeys)
        self._told = hotkeys
        if departed:
            _log.info("%d hotkeys left the metagraph: %s", len(departed), ", ".join(departed[:10]))
        return departed

    def missing(self, hotkeys: Iterable[str]) -> list[str]:
        """Return those of these hotkeys that are certainly not in the metagraph.

        Nobody is while the metagraph has no hotkey at all, or while so many are missing that their loss is not
        believed: then it is not believed of the others either, whom the server perhaps never saw.
        """
        members = set(self._hotkeys() or ())
        absent = [hotkey for hotkey in hotkeys if hotkey not in members] if members else []
        if not absent:
            return []
        self.look()
        # The server keeps those registered whose loss it did not believe.
        return absent if self.roster.now().registered <= members else []

    def unbelieved(self) -> int:
        """Return of how many the server did not believe the loss, because so many are missing at once."""
        hotkeys = self._hotkeys()
        return 0 if hotkeys is None else len(self.roster.now().registered - set(hotkeys))

    def _hotkeys(self) -> list[str] | None:
        metagraph = self._context.collaborators.metagraph
        shown = None if metagraph is None else metagraph.hotkeys
        if shown is None:
            return None
        listed = listed_by(shown)
        if listed != self._listed:
            self._hotkeys_listed, refused = valid_hotkeys(listed)
            self._listed = listed
            if refused and refused != self._refused:
                text = "%d entries of the metagraph are not hotkeys and are left out: %s"
                _log.warning(text, len(refused), ", ".join(refused[:10]))
            self._refused = refused
        return self._hotkeys_listed


def is_zombie(hotkey: str | None, hotkeys: Container[str], development: str) -> bool:
    """Tell whether a hotkey is missing among all of the metagraph; None and the development one never are."""
    if hotkey is None:
        return False
    if not isinstance(hotkey, str):
        refuse_hotkey(hotkey)
    return hotkey != development and hotkey not in hotkeys


def listed_by(hotkeys: Any) -> list[Any]:
    """Return what a metagraph lists; TypeError where that is not a list, or is text."""
    if isinstance(hotkeys, (str, bytes)):
        raise TypeError(f"hotkeys must be a list or set of hotkeys, not {type(hotkeys).__name__}")
    return list(hotkeys)  # a manager's list, for one, is not an Iterable by name


def valid_hotkeys(listed: Iterable[Any]) -> tuple[list[str] | None, list[str]]:
    """Return the hotkeys among what a metagraph lists, and the rest as text.

    The hotkeys are None where something is listed and nothing of it is a hotkey: then they are not known yet.
    """
    hotkeys, refused = [], []
    for one in listed:
        try:
            check_hotkey(one)
        except (TypeError, ValueError):
            refused.append(repr(one)[:_SHOWN])
        else:
            hotkeys.append(str(one))
    return (None if refused and not hotkeys else hotkeys), refused
