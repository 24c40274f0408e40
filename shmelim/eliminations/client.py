"""A reader that can also change the state: reads from shared memory, changes over the command channel."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from threading import TIMEOUT_MAX
from typing import Any, Final, Self

from shmelim.channel import ChannelClient, load_key
from shmelim.eliminations.calls import Calls, remote
from shmelim.eliminations.reader import EliminationReader, WhenStale, plain
from shmelim.eliminations.runtime import RuntimeDirectory
from shmelim.errors import CallTimeoutError, NotServingError
from shmelim.shm.facts import end_of, monotonic

_WAIT_PAUSE: Final = 0.01


class EliminationClient(Calls, EliminationReader):  # type: ignore[misc]  # as_of, see below
    """An :class:`EliminationReader` with the calls that change the state, for any process that may read the key.

    A call that changes something costs a commit and about 0.1 ms for the channel. Its errors are those of
    :class:`~shmelim.eliminations.calls.Calls`; of the constructor, those of the reader, ``NotServingError``, and
    ``KeyFileError`` if this user may not read the key. Thread-safe and fork-safe: a child opens connections of its
    own. Pickles as its name. A context manager, which closes the connections and the reader.

    Parameters
    ----------
    name
        The name that is served.
    wait
        Seconds to wait for a server to appear; None fails at once.
    timeout
        Seconds that a call may take. Those that write files or change many records have a minute and more.
    connect_wait
        Seconds within which a call tries to reach a server that is not there (one that restarts, say).
    runtime_base
        Where runtime directories are; None: where the server says, in its table, or else the user's.
    max_staleness, when_stale
        As of the reader. They hold for its reads; a change is the server's answer whatever the age of the table.
        (``as_of`` is a client's way back in time; what a reader's property of that name says is
        ``client.position.as_of``.)

    Examples
    --------
    The server may be any; here a manager starts one, whose things are in a directory of their own:

    >>> import tempfile
    >>> from shmelim import EliminationManager
    >>> place = tempfile.mkdtemp(prefix="shmelim-")
    >>> apart = {"port": None, "state_dir": f"{place}/state", "runtime_base": place}
    >>> with EliminationManager(None, None, None, name="doc-example", **apart):
    ...     with EliminationClient("doc-example", runtime_base=place) as client:
    ...         client.append_elimination_row("5C4…", 0.11, "MAX_TOTAL_DRAWDOWN")
    ...         client.is_hotkey_eliminated("5C4…"), len(client)
    ...         client.remove_elimination("5C4…")
    True
    (True, 1)
    True
    >>> from shmelim.shm import SharedNamespace
    >>> SharedNamespace("doc-example").remove()  # else what was published can still be read

    """

    def __init__(
        self,
        name: str,
        *,
        wait: float | None = None,
        timeout: float = 10.0,
        connect_wait: float = 0.0,
        runtime_base: Path | str | None = None,
        max_staleness: float | None = None,
        when_stale: WhenStale = "serve",
    ) -> None:
        deadline = end_of(wait)
        super().__init__(name, wait=wait, max_staleness=max_staleness, when_stale=when_stale)
        self._arguments: dict[str, Any] = {
            "timeout": timeout,
            "connect_wait": connect_wait,
            "runtime_base": runtime_base,
            "max_staleness": max_staleness,
            "when_stale": when_stale,
        }

        def runtime() -> RuntimeDirectory:
            return RuntimeDirectory.of_server(name, runtime_base)

        self._timeout = timeout
        while True:
            try:
                self._client = ChannelClient(
                    lambda: runtime().server().address,
                    lambda: load_key(runtime().key),
                    timeout=timeout,
                    connect_wait=connect_wait,
                )
                if wait is not None:
                    self._client.connect(timeout=min(max(0.0, deadline - monotonic()), TIMEOUT_MAX))
            except (NotServingError, CallTimeoutError):
                if monotonic() >= deadline:
                    raise
                time.sleep(_WAIT_PAUSE)
            else:
                return

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(plain(type(self)), **self._arguments), (self.name,)

    def close(self) -> None:
        """Close connections and reader: every later call raises, a read ``ReaderClosedError``. Idempotent."""
        super().close()
        self._client.close()

    def _size(self) -> int:
        return self.table.flag_counts[0]

    def _published(self) -> Self | None:
        return self if self.when_stale == "serve" else None

    @remote(idempotent=True)
    def health_check(self) -> dict[str, Any]:  # type: ignore[empty-body]  # the server has it
        """Return what the server says of itself; a manager's method of this name tells whether it is well.

        ``status`` ("ok", "degraded" or "failing"), ``timestamp_ms``, ``num_eliminations``,
        ``num_departed_hotkeys``, ``pid``, ``started_ms``, ``state_dir``, sizes in bytes, counts, and ``problems``:
        what is wrong, the oldest first, as dicts with ``name``, ``subject``, ``text``, ``severity``, ``remedy``,
        ``since_ms``.
        """
