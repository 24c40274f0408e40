"""The calls by which the processing changes the state, whether the server is in this process or another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shmelim.errors import MessageTooLargeError, StateUnavailableError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable


class StateCalls:
    """The server's methods, under their own names without ``_rpc``; each call uses the server that there is then.

    A collaborator may fail with a channel's error too. So those of the server itself come out of here as
    :class:`StateUnavailableError`, and whoever handles a miner's failure can tell them apart.

    Parameters
    ----------
    server
        Returns the server object, or the channel's proxy for it.

    """

    def __init__(self, server: Callable[[], Any]) -> None:
        self._server = server

    def live_price_fetcher(self) -> Any:
        """Return the price fetcher that the server object carries, where it is in this process."""
        return getattr(self._server(), "live_price_fetcher", None)

    def eliminate(
        self,
        hotkey: str,
        record: dict[str, Any],
        owed: list[str],
        replacements: int | None,
        slash_once_within_ms: float | None,
    ) -> str:
        """Eliminate a miner who is not yet: ``added``, ``already`` or ``superseded``."""
        return str(self._call("eliminate_rpc", hotkey, record, owed, replacements, slash_once_within_ms))

    def get_replacements(self) -> int:
        """Return how often the whole list was replaced."""
        return int(self._call("get_replacements_rpc"))

    def get_debts(self, hotkey: str | None = None) -> list[dict[str, Any]]:
        """Return what is still owed, in order."""
        return list(self._call("get_debts_rpc", hotkey))

    def settle_debt(self, hotkey: str, kind: str, attempt: str | None = None) -> bool:
        """Say that an effect is made."""
        return bool(self._call("settle_debt_rpc", hotkey, kind, attempt))

    def fail_debt(
        self, hotkey: str, kind: str, error: str, attempt: str | None = None, *, in_doubt: bool = False
    ) -> bool:
        """Say that an attempt failed, or that its outcome is unknown."""
        return bool(self._call("fail_debt_rpc", hotkey, kind, error, attempt, in_doubt))

    def begin_slash(self, hotkey: str, attempt: str) -> bool:
        """Record that a slash is about to be made; True if it may be."""
        return bool(self._call("begin_slash_rpc", hotkey, attempt))

    def doubt_slash(self, hotkey: str, attempt: str, error: str) -> bool:
        """Say that nobody knows how somebody's attempt ended."""
        return bool(self._call("doubt_slash_rpc", hotkey, attempt, error))

    def update_metagraph(self, hotkeys: list[str]) -> list[str]:
        """Say which hotkeys are registered; returns those whose departure was recorded."""
        return list(self._call("update_metagraph_rpc", hotkeys))

    def delete_eliminations(self, times_ms: dict[str, int]) -> list[str]:
        """Remove records that were initiated when this says, in one transaction; returns whose were."""
        return list(self._call("delete_eliminations_rpc", list(times_ms), times_ms))

    def get_first_refresh_ran(self) -> bool:
        """Tell whether the first refresh was made."""
        return bool(self._call("get_first_refresh_ran_rpc"))

    def set_first_refresh_ran(self) -> None:
        """Say that the first refresh was made."""
        self._call("set_first_refresh_ran_rpc", True)  # noqa: FBT003 - the server's signature

    def _call(self, method: str, *args: Any) -> Any:
        server = self._server()
        if server is None:
            raise StateUnavailableError(f"{method} failed: the manager is shut down")
        try:
            return getattr(server, method)(*args)
        except MessageTooLargeError:
            raise  # a record's fault
        except (ConnectionError, TimeoutError, StoreError) as error:
            raise StateUnavailableError(f"{method} failed: {error}") from error
