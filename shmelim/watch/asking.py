"""The past and what is owed: asked of the server, or of the store where none answers.

Each answer comes with who gave it: "server" or "store". The store is that of the last server of the name, or else
the one that the name has by default; nothing is changed there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias, TypeVar

from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.runtime import state_directory_of
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import (
    CallTimeoutError,
    FollowerError,
    KeyFileError,
    MessageTooLargeError,
    NotServingError,
    OutcomeUnknownError,
    StoreError,
)

Rows: TypeAlias = list[dict[str, Any]]
T = TypeVar("T")

_PAGE: Final = 200
# The server is not there, this user may not ask it, or it hangs: all that it acknowledged is in the store.
_UNANSWERED: Final = (NotServingError, KeyFileError, CallTimeoutError, OutcomeUnknownError)


class _Stored:
    """Answers from a store as a client does from its server."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def get_history(self, hotkey: str | None, limit: int, before_id: int | None) -> Rows:
        return [event.as_dict() for event in self._store.events(hotkey, limit, before_id)]

    def get_debts(self, hotkey: str | None) -> Rows:
        return [debt.as_dict() for debt in self._store.debts(hotkey)]

    def get_slashes(self, hotkey: str | None) -> Rows:
        return [slash._asdict() for slash in self._store.slashes(hotkey)]


def _ask(name: str, question: Callable[[EliminationClient | _Stored], T]) -> tuple[T, str]:
    """Return what the server or the store has; where there is neither, raise what the server's absence raised."""
    try:
        with EliminationClient(name) as client:
            return question(client), "server"
    except FollowerError:
        raise  # a store that is here is of another time, or of another name's
    except _UNANSWERED as error:
        directory = state_directory_of(name)
        try:
            with Store.read_only(directory) as opened:
                return question(_Stored(opened)), "store"
        except StoreError as damaged:
            if (directory / FILE_NAME).exists():
                raise
            raise error from damaged


def events(name: str, hotkey: str | None, limit: int) -> tuple[Rows, str]:
    """Return the last events of a hotkey, or of all (None), newest first."""
    return _ask(name, lambda one: _pages(one, hotkey, limit))


def debts(name: str, hotkey: str | None) -> tuple[Rows, str]:
    """Return what a hotkey owes, or what all do (None), oldest first."""
    return _ask(name, lambda one: one.get_debts(hotkey))


def slashes(name: str, hotkey: str | None) -> tuple[Rows, str]:
    """Return the slashes of a hotkey, or of all (None), that were made or declined."""
    return _ask(name, lambda one: one.get_slashes(hotkey))


def all_of(name: str, hotkey: str, limit: int) -> tuple[tuple[Rows, Rows, Rows], str]:
    """Return a hotkey's last events, debts and slashes, all from one of the two."""
    return _ask(name, lambda one: (_pages(one, hotkey, limit), one.get_debts(hotkey), one.get_slashes(hotkey)))


def _pages(one: EliminationClient | _Stored, hotkey: str | None, limit: int) -> Rows:
    """Ask in pages, each of which fits into a message of a server."""
    events: Rows = []
    page = _PAGE
    while len(events) < limit:
        wanted = min(page, limit - len(events))
        try:
            found = one.get_history(hotkey, wanted, events[-1]["id"] if events else None)
        except MessageTooLargeError:
            if page == 1:
                raise
            page = max(1, page // 4)
            continue
        events += found
        if len(found) < wanted:
            break
    return events
