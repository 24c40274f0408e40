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


def _ask(name: str, server: Callable[[EliminationClient], T], store: Callable[[Store], T]) -> tuple[T, str]:
    """Return what the server or the store has; where there is neither, raise what the server's absence raised."""
    try:
        with EliminationClient(name) as client:
            return server(client), "server"
    except FollowerError:
        raise  # a store that is here is of another time, or of another name's
    except _UNANSWERED as error:
        directory = state_directory_of(name)
        try:
            with Store.read_only(directory) as opened:
                return store(opened), "store"
        except StoreError as damaged:
            if (directory / FILE_NAME).exists():
                raise
            raise error from damaged


def events(name: str, hotkey: str | None, limit: int) -> tuple[Rows, str]:
    """Return the last events of a hotkey, or of all (None), newest first."""
    return _ask(name, lambda client: _pages(client, hotkey, limit), lambda store: _events_in(store, hotkey, limit))


def debts(name: str, hotkey: str | None) -> tuple[Rows, str]:
    """Return what a hotkey owes, or what all do (None), oldest first."""
    return _ask(name, lambda client: client.get_debts(hotkey), lambda store: _debts_in(store, hotkey))


def slashes(name: str, hotkey: str | None) -> tuple[Rows, str]:
    """Return the slashes of a hotkey, or of all (None), that were made or declined."""
    return _ask(name, lambda client: client.get_slashes(hotkey), lambda store: _slashes_in(store, hotkey))


def all_of(name: str, hotkey: str, limit: int) -> tuple[tuple[Rows, Rows, Rows], str]:
    """Return a hotkey's last events, debts and slashes, all from one of the two."""
    return _ask(
        name,
        lambda client: (_pages(client, hotkey, limit), client.get_debts(hotkey), client.get_slashes(hotkey)),
        lambda store: (_events_in(store, hotkey, limit), _debts_in(store, hotkey), _slashes_in(store, hotkey)),
    )


def _events_in(store: Store, hotkey: str | None, limit: int) -> Rows:
    return [event.as_dict() for event in store.events(hotkey, limit)]


def _debts_in(store: Store, hotkey: str | None) -> Rows:
    return [debt.as_dict() for debt in store.debts(hotkey)]


def _slashes_in(store: Store, hotkey: str | None) -> Rows:
    return [slash._asdict() for slash in store.slashes(hotkey)]


def _pages(client: EliminationClient, hotkey: str | None, limit: int) -> Rows:
    """Ask the server in pages, each of which fits into a message."""
    events: Rows = []
    page = _PAGE
    while len(events) < limit:
        wanted = min(page, limit - len(events))
        try:
            found = client.get_history(hotkey, wanted, events[-1]["id"] if events else None)
        except MessageTooLargeError:
            if page == 1:
                raise
            page = max(1, page // 4)
            continue
        events += found
        if len(found) < wanted:
            break
    return events
