"""Who is in the metagraph and who is eliminated: told to the server when it changed, and asked by the rules."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Final, NamedTuple

from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.record import EliminationReason, check_hotkey, refuse_hotkey
from shmelim.eliminations.rules.alerts import spelled
from shmelim.eliminations.rules.deadlines import check_turn
from shmelim.eliminations.rules.tick import Context
from shmelim.system.text import get_logger

_ENTRIES: Final = "metagraph", "entries"
_SHOWN: Final = 60  # characters of what is not a hotkey

_log = get_logger("shmelim.processing")


class _Listed(NamedTuple):
    """What the table says, as of one version; not to be changed."""

    version: int
    eliminated: Mapping[str, int]  # when each hotkey was, in milliseconds since 1970, UTC
    registered: AbstractSet[str]  # also those whose loss the server did not believe
    zombies: AbstractSet[str] = frozenset()  # those eliminated as such


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
            zombies = {hotkey for hotkey, row in eliminations.items() if row["reason"] == EliminationReason.ZOMBIE}
            self._listed = listed = _Listed(version, times, registered, zombies)
        return listed


class _Seen(NamedTuple):
    """What a look at the metagraph saw."""

    hotkeys: list[str]
    is_whole: bool  # else who is missing has not left for that: something in it is not a hotkey


class Membership:
    """The metagraph as the processing sees it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.roster = Roster(context.reader)
        self._told: list[str] | None = None  # what the server was told last
        # What the metagraph listed last, and what that was taken for; replaced as one reference.
        self._last: tuple[list[Any], _Seen] | None = None

    def look(self) -> list[str]:
        """Tell the server who is registered, unless it knows; returns those whose departure was recorded."""
        seen = self._look()
        if seen is None:
            return []
        registered = self.roster.now().registered
        # Who is not seen in a look that is not to be believed has not left for that.
        hotkeys = seen.hotkeys if seen.is_whole else [*seen.hotkeys, *sorted(registered - set(seen.hotkeys))]
        # Others may have told the server something else since.
        if hotkeys == self._told and registered == set(hotkeys):
            return []
        check_turn()
        environment = self._context.environment
        departed = self._context.state.update_metagraph(
            hotkeys, environment.now_ms(), environment.believe_empty_metagraph
        )
        self._told = hotkeys
        if departed:
            _log.info("%d hotkeys left the metagraph: %s", len(departed), ", ".join(departed[:10]))
        return departed

    def missing(self, hotkeys: Iterable[str]) -> list[str]:
        """Return those of these hotkeys that are certainly not in the metagraph.

        Nobody is while the look at it is not to be believed, or while so many are missing that their loss is not:
        then it is not believed of the others either, whom the server perhaps never saw.
        """
        seen = self._look()
        if seen is None or not seen.is_whole:
            return []
        if not (seen.hotkeys or self._context.environment.believe_empty_metagraph):
            return []
        members = set(seen.hotkeys)
        absent = [hotkey for hotkey in hotkeys if hotkey not in members]
        if not absent:
            return []
        self.look()
        # The server keeps those registered whose loss it did not believe.
        return absent if self.roster.now().registered <= members else []

    def unbelieved(self) -> int:
        """Return of how many the server did not believe the loss, because so many are missing at once."""
        seen = self._look()
        if seen is None or not seen.is_whole:
            return 0
        return len(self.roster.now().registered - set(seen.hotkeys))

    def _look(self) -> _Seen | None:
        """Look at the metagraph; None where there is none, or nobody knows yet what it lists."""
        metagraph, alerts = self._context.collaborators.metagraph, self._context.alerts
        shown = None if metagraph is None else metagraph.hotkeys
        if shown is None:
            return None
        listed = listed_by(shown)
        last = self._last
        if last is None or listed != last[0]:
            hotkeys, refused = valid_hotkeys(listed)
            self._last = last = listed, _Seen(hotkeys, not refused)
            if refused:
                text = (
                    f"{len(refused)} entries of the metagraph are not hotkeys: {', '.join(refused[:10])}."
                    " Nobody is taken for departed while they stand there"
                )
                alerts.failed(*_ENTRIES, text)
            else:
                alerts.clear(*_ENTRIES)
        return last[1]


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


def valid_hotkeys(listed: Iterable[Any]) -> tuple[list[str], list[str]]:
    """Return the hotkeys among what a metagraph lists, and the rest as text; TypeError for a text."""
    if isinstance(listed, (str, bytes)):
        raise TypeError(f"hotkeys must be a list, not {type(listed).__name__} {listed[:_SHOWN]!r}")
    hotkeys, refused = [], []
    for one in listed:
        try:
            check_hotkey(one)
        except Exception:  # a stranger's object may raise anything where it is looked at
            refused.append(spelled(one)[:_SHOWN])
        else:
            hotkeys.append(str(one))
    return hotkeys, refused
