"""A reader that can also change the state: reads from shared memory, changes over the command channel."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

from shmelim.channel import ChannelClient, load_key
from shmelim.eliminations.changing import Changing
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.runtime import RuntimeDirectory
from shmelim.errors import CallTimeoutError, NotServingError

if TYPE_CHECKING:
    from pathlib import Path

_WAIT_PAUSE: Final = 0.01


class EliminationClient(Changing, EliminationReader):
    """An :class:`EliminationReader` plus the calls that change the state.

    Parameters
    ----------
    name
        The name that is served.
    wait
        Seconds to wait for a server to appear; None fails at once.
    timeout
        Seconds that a call may take.
    connect_wait
        Seconds within which a call tries to reach a server that is not there (one that restarts, say).
    runtime_base
        Where runtime directories are; None: the user's.

    Raises
    ------
    NotServingError
        Nothing is served under that name.
    KeyFileError
        This user may not read the key.

    Notes
    -----
    Every call that changes something raises ``NotServingError``, ``CallTimeoutError`` or another ``ChannelError``
    if it was not carried out, and ``OutcomeUnknownError`` if that cannot be known. When one returns, the change
    is durable and every later read in every process sees it.

    Thread-safe and fork-safe; a child opens connections of its own. Pickles as its name.

    """

    def __init__(
        self,
        name: str,
        *,
        wait: float | None = None,
        timeout: float = 10.0,
        connect_wait: float = 0.0,
        runtime_base: Path | None = None,
    ) -> None:
        deadline = time.monotonic() + (wait or 0.0)
        super().__init__(name, wait=wait)
        self._arguments = {"timeout": timeout, "connect_wait": connect_wait, "runtime_base": runtime_base}
        self._runtime = RuntimeDirectory(name, runtime_base)
        self._timeout = timeout
        self._connect_wait = connect_wait
        while True:
            try:
                # One reference, replaced when the server is found elsewhere; any thread may do that.
                self._channel = self._open_channel()
                if wait is not None:
                    self._channel.connect(timeout=max(0.0, deadline - time.monotonic()))
            except (NotServingError, CallTimeoutError):
                if time.monotonic() >= deadline:
                    raise
                time.sleep(_WAIT_PAUSE)
            else:
                return

    def __reduce__(self) -> tuple[Any, ...]:
        return _connect_again, (type(self), self.name, self._arguments)

    def close(self) -> None:
        """Close the connections; reads go on working."""
        self._channel.close()

    def _open_channel(self) -> ChannelClient:
        return ChannelClient(
            self._runtime.server().address,
            lambda: load_key(self._runtime.key),
            timeout=self._timeout,
            connect_wait=self._connect_wait,
        )

    def _call(self, method: str, *args: Any, idempotent: bool = False, timeout: float | None = None) -> Any:
        channel = self._channel
        try:
            return channel.call(method, args, timeout=timeout, idempotent=idempotent)
        except NotServingError:
            # Nothing was carried out. The next server may listen at another address.
            elsewhere = self._open_channel()
            if elsewhere.address == channel.address:
                raise
            self._channel = elsewhere
            channel.close()
            return elsewhere.call(method, args, timeout=timeout, idempotent=idempotent)

    def _size(self) -> int:
        return len(self)

    # ------------------------------------------------------------------ asking the server

    def health_check(self) -> dict[str, Any]:
        """Return what the server says of itself; a manager's method of this name tells whether it is well."""
        return dict(self._call("health_check_rpc", idempotent=True))


def _connect_again(cls: type[EliminationClient], name: str, arguments: dict[str, Any]) -> EliminationClient:
    return cls(name, **arguments)
