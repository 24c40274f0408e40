"""Eliminations from an asyncio loop: every call, waiting, and watching, while the loop goes on."""

import asyncio
import gc
import inspect
import math
import threading

import pytest
from serving import row

from shmelim import ChangesUnknownError
from shmelim.aio import AsyncEliminationClient
from shmelim.eliminations.calls import Calls
from shmelim.errors import ChannelError, ReaderClosedError


@pytest.fixture
def run(serve):
    """Run a coroutine function with an asynchronous client of a new server."""
    served = serve()

    def run(work):
        async def main():
            async with AsyncEliminationClient(served.client()) as client:
                return await work(client)

        return asyncio.run(main())

    return run


def test_every_call_of_a_client_can_be_awaited():
    calls = {name for name, member in vars(Calls).items() if inspect.isfunction(member) and name[0] != "_"}
    awaited = {
        name for name, member in vars(AsyncEliminationClient).items() if inspect.iscoroutinefunction(member)
    }
    assert calls - awaited == set()
    assert inspect.signature(AsyncEliminationClient.add_elimination) == inspect.signature(Calls.add_elimination)


def test_a_name_is_no_client():
    with pytest.raises(TypeError, match="client must be an EliminationClient, not 'shmelim'"):
        AsyncEliminationClient("shmelim")


def test_changes_and_errors_are_the_clients(run):
    async def work(client):
        assert await client.add_elimination("a", row("a")) is True
        assert "a" in client.client
        with pytest.raises(ValueError, match="not of 'b'"):
            await client.add_elimination("b", row("a"))
        assert await client.sync_eliminations([row("b"), row("c")]) == ["a"]
        assert set(client.client) == {"b", "c"}
        return (await client.health_check())["status"]

    assert run(work) == "ok"


def test_the_loop_goes_on_while_tasks_wait(run):
    async def work(client):
        threads = threading.active_count()
        since = client.client.version
        waiting = [asyncio.ensure_future(client.wait_for_change(60, since)) for _ in range(50)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        assert threading.active_count() <= threads + 1, "one waits for all"
        await client.add_elimination("a", row("a"))
        assert await asyncio.gather(*waiting) == [True] * 50
        assert await client.wait_for_change(0.01) is False
        assert await client.wait_for_change(None, since) is True

    run(work)


@pytest.mark.parametrize(("timeout", "error"), [(math.nan, ValueError), ("1", TypeError)])
def test_a_wait_of_no_time_is_refused_as_the_readers_is(run, timeout, error):
    async def work(client):
        with pytest.raises(error, match=r"^timeout must"):
            await asyncio.wait_for(client.wait_for_change(timeout), 2)

    run(work)


def test_a_wait_that_is_cancelled_ends_at_once_and_disturbs_no_other(run):
    async def work(client):
        since = client.client.version
        first, second = (asyncio.ensure_future(client.wait_for_change(None, since)) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await client.add_elimination("a", row("a"))
        assert await second is True

    run(work)


def test_closing_under_a_wait_leaves_no_error_that_nobody_asked_for(serve):
    left = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: left.append(context))
        client = AsyncEliminationClient(serve().client())
        waiting = asyncio.ensure_future(client.wait_for_change(60))
        await asyncio.sleep(0)
        waiting.cancel()
        await client.close()
        await asyncio.gather(waiting, return_exceptions=True)
        waiter = client._waiting
        await asyncio.wait([waiter])
        del client, waiting, waiter
        gc.collect()

    asyncio.run(main())
    assert left == []


def test_watching_yields_every_event_in_order(run):
    async def work(client):
        seen = []

        async def watch():
            async for event in client.watch(since):
                seen.append(event["new"] and event["new"]["elimination_initiated_time_ms"])
                if len(seen) == 20:
                    return

        since = client.client.version
        watching = asyncio.ensure_future(watch())
        for number in range(20):
            await client.add_elimination("a", row("a", number))
        await watching
        assert seen == [row("a", number)["elimination_initiated_time_ms"] for number in range(20)]
        with pytest.raises(ChangesUnknownError):
            await anext(client.watch(since - 1000))

    run(work)


def test_what_is_closed_says_so_as_the_client_does(run):
    async def work(client):
        waiting = asyncio.ensure_future(client.wait_for_change())
        await asyncio.sleep(0)
        await client.close()
        await client.close()
        for call in (client.add_elimination("a", row("a")), client.health_check(), client.get_history()):
            with pytest.raises(ChannelError, match="the client is closed"):
                await call
        for call in (waiting, client.wait_for_change(0), client.sync_eliminations([])):
            with pytest.raises(ReaderClosedError):
                await call

    run(work)
