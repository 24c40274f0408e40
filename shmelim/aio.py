"""Changing eliminations, and waiting for changes, without blocking an asyncio loop.

Reads need nothing of this: they take nanoseconds, wait for nobody, and are those of the client itself.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from math import inf
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar

from shmelim.eliminations.calls import Calls
from shmelim.eliminations.client import EliminationClient
from shmelim.system.arguments import number

P = ParamSpec("P")
R = TypeVar("R")

_CALLS: Final = 4  # at once; more wait for their turn
_LOOK: Final = 0.25  # seconds after which a wait that nobody wants any more ends


def _awaited(
    method: Callable[Concatenate[Any, P], R],
) -> Callable[Concatenate[AsyncEliminationClient, P], Coroutine[Any, Any, R]]:
    """Make a client's call one that is awaited, while a thread makes it."""

    @functools.wraps(method)
    async def call(self: AsyncEliminationClient, /, *args: P.args, **kwargs: P.kwargs) -> R:
        made: Callable[[], R] = functools.partial(getattr(self.client, method.__name__), *args, **kwargs)
        if self._is_closed:
            return made()  # which says so, at once
        return await asyncio.get_running_loop().run_in_executor(self._callers, made)

    return call


class AsyncEliminationClient:
    """The calls of an :class:`~shmelim.EliminationClient`, awaited; each costs a hand-over to a thread besides.

    Arguments, answers and errors are those of the client. A call that is cancelled may still be carried out, as
    the server cannot be told otherwise. For one loop, and not to be used in a forked child. An async context
    manager, which closes the client.

    Parameters
    ----------
    client
        What makes the calls, an ``EliminationClient``; all its reads may be used directly, as none of them waits.

    Examples
    --------
    >>> import asyncio, tempfile
    >>> from shmelim import EliminationClient, EliminationManager
    >>> from shmelim.aio import AsyncEliminationClient
    >>> async def main(client):
    ...     async with AsyncEliminationClient(client) as eliminations:
    ...         events = eliminations.watch()
    ...         waiting = asyncio.ensure_future(anext(events))
    ...         await asyncio.sleep(0)
    ...         added = await eliminations.append_elimination_row("5C4…", 0.11, "MAX_TOTAL_DRAWDOWN")
    ...         event = await waiting
    ...         return added, event["action"], "5C4…" in client
    >>> place = tempfile.mkdtemp(prefix="shmelim-")
    >>> apart = {"port": None, "state_dir": f"{place}/state", "runtime_base": place}
    >>> with EliminationManager(None, None, None, name="doc-aio", **apart):
    ...     asyncio.run(main(EliminationClient("doc-aio", runtime_base=place)))
    (True, 'add', True)
    >>> from shmelim.shm import SharedNamespace
    >>> SharedNamespace("doc-aio").remove()

    """

    def __init__(self, client: EliminationClient) -> None:
        if not hasattr(client, "wait_for_change"):
            raise TypeError(f"client must be an EliminationClient, not {client!r:.100}")
        self.client: Final = client
        self._callers = ThreadPoolExecutor(_CALLS, "shmelim-aio")
        # One thread waits for all; each waiter sees for himself whether that was for him.
        self._waiter = ThreadPoolExecutor(1, "shmelim-aio-wait")
        self._waiting: asyncio.Future[bool] | None = None
        self._is_closed = False

    async def wait_for_change(self, timeout: float | None = None, since: int | None = None) -> bool:  # noqa: ASYNC109
        """Wait for a publish, as the reader's method does: seconds or None, a version or None; False: none came.

        Any number of tasks may wait, for one thread altogether. Cancelling it ends it at once.
        """
        seen = self.client.version if since is None else since
        seconds = None if timeout is None else float(number("timeout", timeout, least=-inf))
        try:
            async with asyncio.timeout(seconds):
                while not self.client.wait_for_change(0, seen):
                    if self._waiting is None or self._waiting.done():
                        look = functools.partial(self.client.wait_for_change, _LOOK, seen)
                        self._waiting = asyncio.get_running_loop().run_in_executor(self._waiter, look)
                        # What it raises is for who still waits; that it was closed, mostly for nobody.
                        self._waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
                    await asyncio.shield(self._waiting)
        except TimeoutError:
            return False
        return True

    async def watch(self, since: int | None = None) -> AsyncIterator[dict[str, Any]]:
        """Yield the events after a version (None: that of now) as they come, in order, leaving nothing out.

        Each is as ``get_history`` has it. ChangesUnknownError where the server no longer knows what came first,
        and the client's errors where it cannot be asked: take a snapshot, and watch again from its version.
        """
        seen = self.client.version if since is None else since
        while True:
            found = await self.changes(seen)
            for event in found["events"]:
                yield event
            seen = found["version"]
            await self.wait_for_change(None, seen)

    async def close(self) -> None:
        """Close the client's connections, and end the threads. Idempotent."""
        self._is_closed = True
        self._waiter.shutdown(wait=False, cancel_futures=True)
        self._callers.shutdown(wait=False)
        self.client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    accept_loss = _awaited(Calls.accept_loss)
    acknowledge = _awaited(Calls.acknowledge)
    add_elimination = _awaited(Calls.add_elimination)
    append_elimination_row = _awaited(Calls.append_elimination_row)
    as_of = _awaited(Calls.as_of)
    changes = _awaited(Calls.changes)
    clear_departed_hotkeys = _awaited(Calls.clear_departed_hotkeys)
    clear_eliminations = _awaited(Calls.clear_eliminations)
    delete_eliminations = _awaited(Calls.delete_eliminations)
    get_debts = _awaited(Calls.get_debts)
    get_eliminations_from_disk = _awaited(Calls.get_eliminations_from_disk)
    get_first_refresh_ran = _awaited(Calls.get_first_refresh_ran)
    get_history = _awaited(Calls.get_history)
    get_missing_hotkeys = _awaited(Calls.get_missing_hotkeys)
    get_money_held = _awaited(Calls.get_money_held)
    get_slashes = _awaited(Calls.get_slashes)
    health_check = _awaited(EliminationClient.health_check)
    load_eliminations_from_disk = _awaited(Calls.load_eliminations_from_disk)
    rearm_slash = _awaited(Calls.rearm_slash)
    release_money = _awaited(Calls.release_money)
    reload_from_disk = _awaited(Calls.reload_from_disk)
    remove_elimination = _awaited(Calls.remove_elimination)
    resolve_slash = _awaited(Calls.resolve_slash)
    rollback = _awaited(Calls.rollback)
    prune_history = _awaited(Calls.prune_history)
    save_eliminations = _awaited(Calls.save_eliminations)
    set_first_refresh_ran = _awaited(Calls.set_first_refresh_ran)
    sync_eliminations = _awaited(Calls.sync_eliminations)
    undo_departures = _awaited(Calls.undo_departures)
    update_metagraph = _awaited(Calls.update_metagraph)
    write_eliminations_to_disk = _awaited(Calls.write_eliminations_to_disk)
