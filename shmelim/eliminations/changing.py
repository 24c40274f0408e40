"""The calls that go to the server: all that change the state, and those that only it can answer."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from shmelim.eliminations.record import generate_row
from shmelim.eliminations.state.changes import check_hotkeys, check_listed
from shmelim.errors import MessageTooLargeError, ShmelimError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

_PART: Final = 2000
_ABANDON_TIMEOUT: Final = 2.0
_PART_TIMEOUT: Final = 60.0
_COMMIT_TIMEOUT: Final = 60.0
_COMMIT_TIMEOUT_PER_ROW: Final = 0.001


class Changing(ABC):
    """The methods that ask the server, by way of the one call that a subclass makes.

    Every method raises ``NotServingError``, ``CallTimeoutError`` or another ``ChannelError`` if the change was not
    carried out, and ``OutcomeUnknownError`` if that cannot be known. When one returns, the change is durable
    and every later read in every process sees it.
    """

    _timeout: float
    """Seconds that a call may take, if it is not one that takes longer by nature."""

    @abstractmethod
    def _call(self, method: str, *args: Any, idempotent: bool = False, timeout: float | None = None) -> Any:
        """Call a remote method; ``timeout`` in seconds, None for the usual one."""

    @abstractmethod
    def _size(self) -> int:
        """Return how many hotkeys are eliminated: with more of them, some calls may take longer."""

    def add_elimination(self, hotkey: str, data: Mapping[str, Any]) -> bool:
        """Add or replace a record; True for a hotkey that was not eliminated before, False for an update.

        Raises
        ------
        ValueError
            A required field is missing, the record is of another hotkey, or larger than 1 MiB.
        TypeError
            A value cannot be stored; the message names its path.

        """
        return bool(self._call("add_elimination_rpc", hotkey, data))

    def append_elimination_row(
        self,
        hotkey: str,
        current_dd: float | None,
        reason: str,
        t_ms: int | None = None,
        price_info: Mapping[str, Any] | None = None,
        return_info: Mapping[str, Any] | None = None,
    ) -> bool:
        """Build a record from its parts, add it, and have the JSON files written."""
        return bool(
            self._call("append_elimination_row_rpc", hotkey, current_dd, reason, t_ms, price_info, return_info)
        )

    @staticmethod
    def generate_elimination_row(
        hotkey: str,
        current_dd: float | None,
        reason: str,
        t_ms: int | None = None,
        price_info: Mapping[str, Any] | None = None,
        return_info: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Build a record from its parts; nothing is stored."""
        return generate_row(hotkey, current_dd, reason, t_ms, price_info, return_info)

    def remove_elimination(self, hotkey: str) -> bool:
        """Remove a record; True if there was one."""
        return bool(self._call("remove_elimination_rpc", hotkey))

    def delete_eliminations(self, hotkeys: Iterable[str]) -> list[str]:
        """Remove many records in one transaction; returns the hotkeys that had one."""
        return list(self._call("delete_eliminations_rpc", check_hotkeys(hotkeys), timeout=self._long()))

    def sync_eliminations(
        self,
        eliminations: Iterable[Mapping[str, Any]],
        *,
        on_progress: Callable[[int], Any] | None = None,
    ) -> list[str]:
        """Make exactly these records the eliminations, in one step, however many they are.

        Parameters
        ----------
        eliminations
            The records. A long list is sent in parts and applied as a whole.
        on_progress
            Called with the number of records sent so far; when all are sent, the commit is still to come.

        Returns
        -------
        list of str
            The hotkeys that are no longer eliminated.

        Raises
        ------
        ValueError, TypeError
            A record is not fit to be stored; nothing is applied.
        UploadLostError
            The server was started anew in the middle of a long list; nothing is applied.

        """
        check_listed(eliminations)
        rows = iter(eliminations)
        first = list(islice(rows, _PART))
        if len(first) < _PART:
            with contextlib.suppress(MessageTooLargeError):
                removed = self._call("sync_eliminations_rpc", first, timeout=self._long())
                if on_progress is not None:
                    on_progress(len(first))
                return list(removed)
        token = self._call("begin_upload_rpc")
        sent = 0
        try:
            for part in _parts(first, rows):
                self._upload(token, part)
                sent += len(part)
                if on_progress is not None:
                    on_progress(sent)
        except BaseException:
            with contextlib.suppress(ShmelimError):
                self._call("abandon_upload_rpc", token, timeout=_ABANDON_TIMEOUT)
            raise
        limit = _COMMIT_TIMEOUT + sent * _COMMIT_TIMEOUT_PER_ROW
        return list(self._call("sync_uploaded_rpc", token, timeout=limit))

    def _long(self) -> float:
        """Return how long a call may take that writes the files, or changes many records."""
        return max(self._timeout, _COMMIT_TIMEOUT + self._size() * _COMMIT_TIMEOUT_PER_ROW)

    def _upload(self, token: str, part: list[Mapping[str, Any]]) -> None:
        """Send records in one message, or in two where that is too large."""
        try:
            self._call("upload_rpc", token, part, timeout=_PART_TIMEOUT)
        except MessageTooLargeError:
            if len(part) == 1:
                raise
            middle = len(part) // 2
            self._upload(token, part[:middle])
            self._upload(token, part[middle:])

    def clear_eliminations(self) -> None:
        """Remove all records."""
        self._call("clear_eliminations_rpc", timeout=self._long())

    def save_eliminations(self) -> None:
        """Have the JSON files written now."""
        self._call("save_eliminations_rpc", idempotent=True, timeout=self._long())

    def write_eliminations_to_disk(self, eliminations: Iterable[Mapping[str, Any]]) -> None:
        """Make exactly these records the eliminations, on disk and everywhere else; a sync without an answer."""
        self.sync_eliminations(eliminations)

    def update_metagraph(self, hotkeys: Iterable[str]) -> list[str]:
        """Say which hotkeys are in the metagraph now; returns those whose departure was recorded."""
        return list(self._call("update_metagraph_rpc", check_hotkeys(hotkeys), timeout=self._long()))

    def get_missing_hotkeys(self) -> list[str]:
        """Return the hotkeys that the metagraph showed no more, so many at once that it was not believed."""
        return list(self._call("get_missing_hotkeys_rpc", idempotent=True))

    def accept_loss(self, hotkeys: Iterable[str]) -> list[str]:
        """Record the departure of hotkeys that really left, though so many at once that it was not believed.

        Parameters
        ----------
        hotkeys
            Whose; those that are not missing are left as they are.

        Returns
        -------
        list of str
            Those that were missing.

        """
        return list(self._call("accept_loss_rpc", check_hotkeys(hotkeys), timeout=self._long()))

    def get_eliminations_from_disk(self) -> list[dict[str, Any]]:
        """Return the rows of ``eliminations.json``."""
        return list(self._call("get_eliminations_from_disk_rpc", idempotent=True))

    def get_history(
        self, hotkey: str | None = None, limit: int | None = 100, before_id: int | None = None
    ) -> list[dict[str, Any]]:
        """Return events, newest first: who changed what, when, with the old and the new record."""
        return list(self._call("get_history_rpc", hotkey, limit, before_id, idempotent=True))

    def resolve_slash(self, hotkey: str, made: bool) -> bool:
        """Say whether a slash that was begun, and of which that is not known, was made.

        Parameters
        ----------
        hotkey
            Whose collateral.
        made
            True: it is settled. False: it is owed again, unless the elimination was taken back, and will be made.

        Returns
        -------
        bool
            False where there is no such slash, or where a running process may still be making it.

        """
        return bool(self._call("resolve_slash_rpc", hotkey, made))

    def get_debts(self, hotkey: str | None = None) -> list[dict[str, Any]]:
        """Return what eliminations still owe, one hotkey's or all: what, since when, and what went wrong."""
        return list(self._call("get_debts_rpc", hotkey, idempotent=True))

    def get_slashes(self, hotkey: str | None = None) -> list[dict[str, Any]]:
        """Return the last slash that was made of one hotkey or of each: when, for which elimination, says who."""
        return list(self._call("get_slashes_rpc", hotkey, idempotent=True))


def _parts(first: list[Any], rest: Iterator[Any]) -> Iterator[list[Any]]:
    part = first
    while part:
        yield part
        part = list(islice(rest, _PART))
