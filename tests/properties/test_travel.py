"""Going back in time: every published state is known after the event that made it, and can be had again."""

from __future__ import annotations

import datetime as dt
import sqlite3
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import row

from shmelim import EliminationManagerServer
from shmelim.eliminations.moments import Moment
from shmelim.eliminations.store import store as stores
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.errors import ChangesUnknownError

NAMES = [f"h{n}" for n in range(9)]
some = st.lists(st.sampled_from(NAMES), max_size=9, unique=True)
change = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(NAMES), st.integers(0, 3)),
    st.tuples(st.just("remove"), st.sampled_from(NAMES)),
    st.tuples(st.just("delete"), some),
    st.tuples(st.just("sync"), some, st.integers(0, 3)),
    st.tuples(st.just("look"), some),
    st.tuples(st.just("back"), st.integers(0, 30)),
    st.just(("clear",)),
)


def last_event(server):
    events = server.get_history_rpc(limit=1)
    return events[0]["id"] if events else 0


def make(server, what, *how):
    match what:
        case "add":
            server.add_elimination_rpc(how[0], row(how[0], how[1]))
        case "remove":
            server.remove_elimination_rpc(*how)
        case "delete":
            server.delete_eliminations_rpc(*how)
        case "sync":
            server.sync_eliminations_rpc([row(name, how[1]) for name in how[0]])
        case "look":
            server.update_metagraph_rpc(*how)
        case "back":
            server.rollback_rpc(how[0] % (last_event(server) + 1))
        case "clear":
            server.clear_eliminations_rpc()


def states_after(server, listed):
    """Make changes; return the eliminations after each event, and before the first."""
    states = {0: {}}
    for each in listed:
        make(server, *each)
        states[last_event(server)] = server.get_eliminations_dict_rpc()
    return states


@pytest.mark.parametrize("many", [64, 2], ids=["events one by one", "most in rows of many"])
@settings(max_examples=60)
@given(st.lists(change, max_size=15))
def test_every_state_is_known_after_its_event_and_can_be_had_again(many, listed):
    with pytest.MonkeyPatch.context() as patch, EliminationManagerServer() as server:
        patch.setattr(stores, "MANY", many)
        states = states_after(server, listed)
        for event, state in states.items():
            assert server.as_of_rpc(event) == state
        departed, registered = server.get_departed_hotkeys_rpc(), server.reader.snapshot().registered
        for event, state in states.items():
            server.rollback_rpc(event)
            assert server.get_eliminations_dict_rpc() == state
        assert (server.get_departed_hotkeys_rpc(), server.reader.snapshot().registered) == (departed, registered)


@pytest.mark.parametrize("many", [64, 2], ids=["events one by one", "most in rows of many"])
@settings(max_examples=40)
@given(st.lists(change, min_size=1, max_size=12), st.lists(change, max_size=4), st.data())
def test_what_came_before_is_forgotten_and_nothing_else(many, listed, later, data):
    with pytest.MonkeyPatch.context() as patch, EliminationManagerServer() as server:
        patch.setattr(stores, "MANY", many)
        states = states_after(server, listed)
        at = data.draw(st.integers(0, last_event(server)))
        kept = [event for event in server.get_history_rpc(limit=None) if event["id"] > at]
        count = server.prune_history_rpc(at, dry_run=True)
        assert server.prune_history_rpc(at) == count == at
        assert server.prune_history_rpc(at) == 0
        left = [event for event in server.get_history_rpc(limit=None) if event["action"] != "prune"]
        assert [event for event in left if event["id"] > at] == kept
        for each in later:
            with pytest.MonkeyPatch.context() as past:
                past.setattr("shmelim.eliminations.server.changes.rollback", lambda step, moment: 0)
                make(server, *each)
            states[last_event(server)] = server.get_eliminations_dict_rpc()
        for event, state in states.items():
            if event >= at:
                assert server.as_of_rpc(event) == state
            else:
                with pytest.raises(ValueError, match=f"up to event {at} was pruned"):
                    server.as_of_rpc(event)
        for event, state in states.items():
            if event >= at:
                server.rollback_rpc(event)
                assert server.get_eliminations_dict_rpc() == state


def test_a_time_before_what_was_forgotten_is_an_error(monkeypatch):
    now = [1_700_000_000_000]
    monkeypatch.setattr("shmelim.eliminations.store.store.time.time_ns", lambda: now[0] * 1_000_000)
    with EliminationManagerServer() as server:
        for name in "abc":
            server.add_elimination_rpc(name, row(name))
            now[0] += 1000
        assert server.prune_history_rpc(now[0] - 1500) == 2
        assert list(server.as_of_rpc(now[0] - 1500)) == ["a", "b"]
        with pytest.raises(ValueError, match="up to event 2 was pruned"):
            server.as_of_rpc(now[0] - 2500)
        with pytest.raises(ValueError, match="there is no event 99 yet"):
            server.prune_history_rpc(99)


def test_changes_since_a_version_that_is_forgotten_are_not_left_out_in_silence():
    with EliminationManagerServer() as server:
        server.add_elimination_rpc("a", row("a"))
        version = server.reader.version
        server.add_elimination_rpc("b", row("b"))
        server.add_elimination_rpc("c", row("c"))
        assert [each["hotkey"] for each in server.changes_rpc(version)["events"]] == ["b", "c"]
        server.prune_history_rpc(2)
        with pytest.raises(ChangesUnknownError):
            server.changes_rpc(version)


def test_what_is_forgotten_while_a_past_state_is_put_together_is_known_to_it(tmp_path, monkeypatch):
    with EliminationManagerServer(None, tmp_path, durability="process") as server:
        for name in "abc":
            server.add_elimination_rpc(name, row(name))
        replaced_after = stores.Store.replaced_after

        def forgotten_meanwhile(store, event):
            monkeypatch.undo()
            server.prune_history_rpc(3)
            return replaced_after(store, event)

        monkeypatch.setattr(stores.Store, "replaced_after", forgotten_meanwhile)
        assert list(server.as_of_rpc(1)) == ["a"]
        with pytest.raises(ValueError, match="was pruned"):
            server.as_of_rpc(1)


def test_what_debts_are_made_of_stays():
    with EliminationManagerServer() as server:
        server.eliminate_rpc("a", row("a", reason="MAX_TOTAL_DRAWDOWN"), ["slash", "positions"], rule="drawdown")
        owed = {debt["kind"] for debt in server.get_debts_rpc()}
        server.settle_debt_rpc("a", "positions")
        server.remove_elimination_rpc("a")
        server.prune_history_rpc(last_event(server))
        server.add_elimination_rpc("a", row("a", reason="MAX_TOTAL_DRAWDOWN"))
        assert {debt["kind"] for debt in server.get_debts_rpc() if debt["due"]} == owed


def test_events_are_still_not_deleted_otherwise(tmp_path):
    with EliminationManagerServer(state_dir=tmp_path, registry=None) as server:
        server.add_elimination_rpc("a", row("a"))
        server.prune_history_rpc(1)
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as db, pytest.raises(sqlite3.Error, match="append-only"):
        db.execute("DELETE FROM events")


def test_a_time_is_answered_by_the_last_event_before_it(monkeypatch):
    now = [1_700_000_000_000]
    monkeypatch.setattr("shmelim.eliminations.store.store.time.time_ns", lambda: now[0] * 1_000_000)
    with EliminationManagerServer() as server:
        server.add_elimination_rpc("a", row("a"))
        now[0] += 1000
        server.add_elimination_rpc("b", row("b"))
        ask = lambda ms: list(server.as_of_rpc(ms))  # noqa: E731
        assert ask(now[0] - 1) == ["a"]
        assert ask(now[0]) == ask(now[0] + 1) == ["a", "b"]
        for call in (server.as_of_rpc, server.rollback_rpc, server.prune_history_rpc):
            with pytest.raises(
                ValueError, match=r"1701000001000 is in the future: it is 2023-11-14T22:13:21\.000Z"
            ):
                call(now[0] + 10**9)
        with pytest.raises(ValueError, match=r"the history begins at 2023-11-14T22:13:20\.000Z"):
            ask(now[0] - 1001)
        with pytest.raises(ValueError, match="there is no event 99 yet"):
            server.rollback_rpc(99)


def test_debts_are_neither_made_nor_unmade():
    with EliminationManagerServer() as server:
        server.eliminate_rpc("a", row("a", reason="MAX_TOTAL_DRAWDOWN"), ["slash", "positions"], rule="drawdown")
        owed, event = server.get_debts_rpc(), last_event(server)
        server.rollback_rpc(0)
        assert [debt["due"] for debt in server.get_debts_rpc()] == [False, False]
        server.rollback_rpc(event)
        assert server.get_debts_rpc() == owed


@pytest.mark.parametrize(
    ("when", "moment"),
    [
        (1200, (1200, None)),
        ("1200", (1200, None)),
        (1_700_000_000_000, (None, 1_700_000_000_000)),
        ("2026-01-31T12:00:00Z", (None, 1_769_860_800_000)),
        ("2026-01-31 12:00:00", (None, 1_769_860_800_000)),
        ("2026-01-31T13:00:00+01:00", (None, 1_769_860_800_000)),
        (dt.datetime(2026, 1, 31, 12), (None, 1_769_860_800_000)),  # noqa: DTZ001
    ],
)
def test_moments(when, moment):
    assert Moment.of(when) == moment


@pytest.mark.parametrize(
    "when", [5, 1_700_000_000_123, "0001-01-01", "0001-01-01T00:00+14:00", "2026-01-31T13:00:00+01:00"]
)
def test_a_moment_is_said_as_it_can_be_given_back(when):
    moment = Moment.of(when)
    assert Moment.of(str(moment).removeprefix("event ")) == moment


@pytest.mark.parametrize("when", ["yesterday", "", -1, "-5", 1 << 63, str(10**30), True, None, 1.5, "٣"])
def test_what_is_not_a_moment_is_refused(when):
    with pytest.raises((ValueError, TypeError), match="moment"):
        Moment.of(when)
