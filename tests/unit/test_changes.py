"""The changes one by one, on a store in memory: what they return, touch, and write into the history."""

import threading
from typing import NamedTuple

import pytest
from serving import row

from shmelim.eliminations.record import prepare
from shmelim.eliminations.state import changes
from shmelim.eliminations.state.changes import Step
from shmelim.eliminations.store.history import Origin
from shmelim.eliminations.store.store import Store

ORIGIN = Origin(17, 18, "somebody")


@pytest.fixture
def store():
    with Store.in_memory() as store:
        yield store


class Left(NamedTuple):
    """What a change leaves for the commit: rows, and whether there is anything to commit."""

    written: dict
    dirty: bool


def apply(store, change, *args, **kwargs):
    """Make a change; returns its result, what it wrote, and the events of that, oldest first."""
    before = store.counts().events
    with store.transaction():
        result = change(Step(store, ORIGIN), *args, **kwargs)
        left = Left(store.written, store.dirty)
    events = store.events(limit=store.counts().events - before)[::-1]
    assert all((event.pid, event.uid, event.program) == ORIGIN for event in events)
    return result, left, [(event.action, event.hotkey, event.note) for event in events]


def add(store, *hotkeys):
    for hotkey in hotkeys:
        apply(store, changes.add, *prepare(row(hotkey)))


def test_add(store):
    hotkey, record = prepare(row("a"))
    result, left, events = apply(store, changes.add, hotkey, record)
    assert (result, list(left.written), left.dirty) == (True, ["a"], True)
    assert events == [("add", "a", None)]
    _, record = prepare(row("a", 1))
    result, left, events = apply(store, changes.add, hotkey, record)
    assert (result, list(left.written), events) == (False, ["a"], [("update", "a", None)])
    result, left, events = apply(store, changes.add, hotkey, record)
    assert (result, left.written, left.dirty, events) == (False, {}, False, [])


def test_remove(store):
    add(store, "a", "b", "c")
    result, left, events = apply(store, changes.remove, ["c", "x", "a"])
    assert (result, list(left.written)) == (["c", "a"], ["c", "a"])
    assert events == [("remove", "c", None), ("remove", "a", None)]
    result, left, events = apply(store, changes.remove, ["c", "x", "a"])
    assert (result, left.written, left.dirty, events) == ([], {}, False, [])


def test_replace_all_by_nothing(store):
    add(store, "a", "b")
    result, left, events = apply(store, changes.replace_all, {}, "because")
    assert (result, list(left.written)) == (["a", "b"], ["a", "b"])
    assert events == [("remove", "a", "because"), ("remove", "b", "because")]
    result, left, events = apply(store, changes.replace_all, {})
    assert (result, left.written, left.dirty, events) == ([], {}, False, [])


def test_replace_all(store):
    add(store, "a", "b", "c", "d")
    records = dict([prepare(row("e")), prepare(row("b", 1)), prepare(row("d"))])
    result, left, events = apply(store, changes.replace_all, records, "why", keep=["c", "unknown"])
    assert result == ["a"]
    assert set(left.written) == {"a", "b", "e"}
    assert events == [("remove", "a", "why"), ("add", "e", "why"), ("update", "b", "why")]
    assert [hotkey for hotkey, _ in store.eliminated()] == ["b", "c", "d", "e"]


def test_merge(store):
    add(store, "a", "b")
    records = dict([prepare(row("b", 1)), prepare(row("c")), prepare(row("a"))])
    result, left, events = apply(store, changes.merge, records, "why")
    assert (result, set(left.written)) == (2, {"b", "c"})
    assert events == [("update", "b", "why"), ("add", "c", "why")]


def test_record_departures(store):
    result, left, events = apply(store, changes.record_departures, {"a": 5, "b": 6}, "why")
    assert (result, list(left.written)) == (["a", "b"], ["a", "b"])
    assert events == [("depart", "a", "why"), ("depart", "b", "why")]
    result, left, events = apply(store, changes.record_departures, {"b": 7, "c": 8}, "why")
    assert (result, list(left.written)) == (["c"], ["c"])
    assert list(store.departed()) == [("a", 5), ("b", 6), ("c", 8)]


def test_update_metagraph(store, monkeypatch):
    monkeypatch.setattr(changes.clock, "now_ms", lambda: 6)
    result, left, events = apply(store, changes.update_metagraph, ["a", "b"])
    assert (result, set(left.written), left.dirty, events) == ([], {"a", "b"}, True, [])
    result, left, events = apply(store, changes.update_metagraph, ["b", "c"])
    assert (result, set(left.written)) == (["a"], {"a", "c"})
    assert events == [("depart", "a", "metagraph")]
    result, left, events = apply(store, changes.update_metagraph, ["c", "b"])
    assert (result, left.written, left.dirty, events) == ([], {}, False, [])
    assert list(store.departed()) == [("a", 6)]


def test_an_anomaly_keeps_the_lost_for_the_next_look(store):
    hotkeys = [f"h{n:02}" for n in range(44)]
    apply(store, changes.update_metagraph, hotkeys)
    result, left, events = apply(store, changes.update_metagraph, [*hotkeys[11:], "new"])
    assert (result, list(left.written)) == ([], ["new"])
    assert [(action, hotkey) for action, hotkey, _ in events] == [("anomaly", None)]
    assert store.registered() == {*hotkeys, "new"}
    result, _, _ = apply(store, changes.update_metagraph, [*hotkeys[10:], "new"])
    assert result == hotkeys[:10]


def test_newcomers_do_not_make_a_loss_believable(store):
    """A quarter is a quarter of those who were there before it, however many come while it stands."""
    hotkeys = [f"h{n:02}" for n in range(44)]
    apply(store, changes.update_metagraph, hotkeys)
    for newcomers in range(3):
        shown = [*hotkeys[11:], *(f"new{n}" for n in range(newcomers * 20))]
        assert apply(store, changes.update_metagraph, shown)[0] == []
    assert changes.missing(store) == hotkeys[:11]
    # Believed again, the newcomers count: 14 of 84 are no quarter.
    assert apply(store, changes.update_metagraph, [*hotkeys, *shown])[0] == []
    assert changes.missing(store) == []
    assert apply(store, changes.update_metagraph, shown[3:])[0] == hotkeys[:14]


def test_loss_that_is_true_can_be_accepted(store, monkeypatch):
    monkeypatch.setattr(changes.clock, "now_ms", lambda: 9)
    hotkeys = [f"h{n:02}" for n in range(44)]
    apply(store, changes.update_metagraph, hotkeys)
    apply(store, changes.update_metagraph, hotkeys[20:])
    assert changes.missing(store) == hotkeys[:20]
    result, left, events = apply(store, changes.accept_loss, [*hotkeys[:5], hotkeys[30], "unknown"])
    assert (result, set(left.written)) == (hotkeys[:5], set(hotkeys[:5]))
    assert events == [("depart", hotkey, "accepted") for hotkey in hotkeys[:5]]
    assert store.registered() == set(hotkeys[5:])
    assert list(store.departed()) == [(hotkey, 9) for hotkey in hotkeys[:5]]
    assert apply(store, changes.update_metagraph, hotkeys[20:])[0] == [], "15 of 44 are still missing"
    assert apply(store, changes.accept_loss, hotkeys[5:20])[0] == hotkeys[5:20]
    assert changes.missing(store) == []
    result, left, _ = apply(store, changes.accept_loss, hotkeys)
    assert (result, left.dirty) == ([], False)
    assert apply(store, changes.update_metagraph, hotkeys[21:])[0] == [hotkeys[20]]


def test_departures_can_be_cleared(store):
    add(store, "a")
    apply(store, changes.record_departures, {"a": 5, "b": 6, "c": 7}, "test")
    apply(store, changes.update_metagraph, ["c"])
    result, left, events = apply(store, changes.clear_departed)
    assert (result, list(left.written), left.dirty) == (None, ["a", "b", "c"], True)
    assert events == [("forget", hotkey, "departures cleared") for hotkey in "abc"]
    assert list(store.departed()) == []
    assert [hotkey for hotkey, _ in store.eliminated()] == ["a"]
    assert store.registered() == {"c"}
    assert store.get("b") is None
    _, left, events = apply(store, changes.clear_departed)
    assert (left.dirty, events) == (False, [])


def test_meta(store):
    _, left, events = apply(store, Step.set_meta, "k", [1])
    assert (left.dirty, left.written, events, store.meta("k")) == (True, {}, [], [1])


@pytest.mark.parametrize("can_start", [True, False])
def test_a_long_list_is_in_the_history_also_where_no_thread_can_be_had(store, monkeypatch, can_start):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    if not can_start:
        monkeypatch.setattr(threading.Thread, "start", refuse)
    lists = [dict(prepare(row(f"h{n}", stamp)) for n in range(stamp, 1200)) for stamp in (0, 1)]
    for records in lists:
        removed, left, events = apply(store, changes.replace_all, records)
    assert (removed, len(left.written)) == (["h0"], 1200)
    assert events == [("remove", "h0", "sync"), *(("update", f"h{n}", "sync") for n in range(1, 1200))]
    assert [event.old for event in store.events("h7")] == [lists[0]["h7"], None]
    assert dict(store.eliminated()) == lists[1]


def test_a_sync_asks_once_who_owes_anything(store, monkeypatch):
    asked = []
    monkeypatch.setattr(Store, "debtors", lambda store: asked.append(store) or set())
    apply(store, changes.replace_all, dict(prepare(row(f"h{n}")) for n in range(3)))
    assert len(asked) == 1
