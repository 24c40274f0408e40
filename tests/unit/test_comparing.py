"""A list is compared before anything is done with it: what is the same, and what others change meanwhile."""

import random
from math import nan
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import row

from shmelim import EliminationManagerServer
from shmelim.eliminations import comparing
from shmelim.eliminations.comparing import Comparison
from shmelim.eliminations.record import check_record, decode, encode, prepare
from shmelim.eliminations.state import changes, thread
from shmelim.eliminations.store import store as stores


@pytest.fixture
def server():
    with EliminationManagerServer() as server:
        yield server


def compared(server, rows):
    comparison = Comparison(server.reader)
    assert comparison.extend(rows) == len(rows)
    return comparison.finish()


def with_info(value):
    return {**row("a"), "info": value}


SAME = {
    "tuple and list": ((1, (2.5,)), [1, [2.5]]),
    "NaN and None": (nan, None),
    "None and NaN": (None, nan),
    "NaN in a list": ([nan], [None]),
    "0.0 and -0.0": (0.0, -0.0),
    "-0.0 in a list": ([-0.0, 1.5], [0.0, 1.5]),
    "another order of keys": ({"x": 1, "y": {"p": 1, "q": 2}}, {"y": {"q": 2, "p": 1}, "x": 1}),
    "a mapping and a dict": (MappingProxyType({"x": 1}), {"x": 1}),
    "a scalar of numpy and a number": (np.float64(1.5), 1.5),
}
OTHER = {
    "1 and True": (1, True),
    "0 and False": ([0], [False]),
    "1 and 1.0": (1, 1.0),
    "text and number": ("1", 1),
    "None and a key that is missing": ({"x": None}, {}),
    "a longer list": ([1], [1, 2]),
    "another order of a list": ([1, 2], [2, 1]),
    "None and False": (None, False),
    "None and an empty list": (None, []),
    "numbers": (1.5, 1.25),
    "the same bytes elsewhere": ({"x": 1, "y": 2}, {"x": 2, "y": 1}),
    "letters in another order": ("ab", "ba"),
}


class TestMeaning:
    @pytest.mark.parametrize(("stored", "given"), SAME.values(), ids=SAME)
    def test_the_same_is_unchanged(self, server, stored, given):
        server.sync_eliminations_rpc([with_info(stored)])
        before = server.reader.version, server.health_check_rpc()["commits"], server.get_elimination_rpc("a")
        assert server.sync_eliminations_rpc([with_info(given)]) == []
        after = server.reader.version, server.health_check_rpc()["commits"], server.get_elimination_rpc("a")
        assert repr(after) == repr(before)

    @pytest.mark.parametrize(("stored", "given"), OTHER.values(), ids=OTHER)
    def test_what_differs_is_stored(self, server, stored, given):
        server.sync_eliminations_rpc([with_info(stored)])
        assert list(compared(server, [with_info(given)]).changed) == ["a"]
        server.sync_eliminations_rpc([with_info(given)])
        info = server.get_elimination_rpc("a")["info"]
        assert (type(info), info) == (type(given), given)

    def test_what_is_unchanged_is_not_checked_again(self, server, monkeypatch):
        rows = [row(f"h{n}", n) for n in range(100)]
        server.sync_eliminations_rpc(rows)
        prepared = []

        def check(data, **options):
            prepared.append(data["hotkey"])
            return check_record(data, **options)

        monkeypatch.setattr(comparing, "check_record", check)
        assert server.sync_eliminations_rpc([*rows[:40], row("h40", 1), *rows[41:]]) == []
        assert prepared == ["h40"]


class TestLists:
    def test_what_changed_what_is_new_and_what_is_gone(self, server):
        server.sync_eliminations_rpc([row(hotkey) for hotkey in "abcd"])
        comparison = compared(server, [row("new"), row("c", 1), row("a")])
        assert (list(comparison.changed), comparison.gone, len(comparison)) == (["new", "c"], ["b", "d"], 3)

    @pytest.mark.parametrize("stamps", [(0, 1), (1, 0), (1, 2), (1, 0, 1), (0, 0)])
    def test_of_a_hotkey_that_is_listed_twice_the_last_record_counts(self, server, stamps):
        server.sync_eliminations_rpc([row("a")])
        comparison = compared(server, [row("a", stamp) for stamp in stamps])
        assert list(comparison.changed) == (["a"] if stamps[-1] else [])
        assert len(comparison) == 1
        assert comparison.gone == []
        server.sync_eliminations_rpc([row("a", stamp) for stamp in stamps])
        assert server.get_elimination_rpc("a") == row("a", stamps[-1])

    def test_an_error_names_the_place_in_the_list(self, server):
        server.sync_eliminations_rpc([row("a"), row("b")])
        with pytest.raises(TypeError, match="elimination 2 of the list"):
            server.sync_eliminations_rpc([row("a"), row("c"), {**row("b"), "dd": "text"}])
        with pytest.raises(TypeError, match="elimination 7 of the list"):
            Comparison(server.reader).extend([row("a"), 5], first=6)
        assert server.get_eliminated_hotkeys_rpc() == {"a", "b"}

    def test_an_unchanged_sync_supersedes_no_tick_and_commits_nothing(self, server):
        rows = [row("a"), row("b")]
        server.sync_eliminations_rpc(rows)
        before, commits = server.get_replacements_rpc(), server.health_check_rpc()["commits"]
        server.sync_eliminations_rpc(rows)
        server.write_eliminations_to_disk_rpc(reversed(rows))
        assert (server.get_replacements_rpc(), server.health_check_rpc()["commits"]) == (before, commits)
        assert server.eliminate_rpc("c", row("c"), [], before) == "added"
        server.sync_eliminations_rpc(rows)
        assert server.get_replacements_rpc() == before + 1


class TestOvertaken:
    """Others change the state while a list is on its way: it is the list that stands in the end."""

    @pytest.mark.parametrize("remembered", [1, 3, 50_000])
    def test_by_anything(self, server, monkeypatch, remembered):
        monkeypatch.setattr(thread, "_VERSIONS", remembered)
        chosen = random.Random(5)
        for _ in range(60):
            hotkeys = [f"h{n}" for n in range(8)]
            server.sync_eliminations_rpc([row(h, chosen.randrange(2)) for h in chosen.sample(hotkeys, 5)])
            wanted = [row(h, chosen.randrange(3)) for h in chosen.sample(hotkeys, 5)]
            comparison = compared(server, wanted)
            for _ in range(chosen.randrange(5)):
                hotkey = chosen.choice(hotkeys)
                if chosen.random() < 0.5:
                    server.add_elimination_rpc(hotkey, row(hotkey, chosen.randrange(3)))
                else:
                    server.remove_elimination_rpc(hotkey)
            before = server.get_eliminated_hotkeys_rpc()
            removed = server._state.commit(changes.sync, comparison)
            assert set(removed) == before - {each["hotkey"] for each in wanted}
            assert server.get_eliminations_dict_rpc() == {each["hotkey"]: each for each in wanted}

    @pytest.mark.parametrize("remembered", [1, 3, 50_000])
    @pytest.mark.parametrize("many", [0, 64])
    def test_what_a_client_found_by_anything(self, server, monkeypatch, remembered, many):
        monkeypatch.setattr(thread, "_VERSIONS", remembered)
        monkeypatch.setattr(stores, "MANY", many)
        chosen, unknown = random.Random(6), 0
        hotkeys = [f"h{n}" for n in range(8)]

        def change():
            for _ in range(chosen.randrange(5)):
                hotkey = chosen.choice(hotkeys)
                if chosen.random() < 0.5:
                    server.add_elimination_rpc(hotkey, row(hotkey, chosen.randrange(3)))
                elif chosen.random() < 0.8:
                    server.remove_elimination_rpc(hotkey)
                else:
                    server.sync_eliminations_rpc([row(h, 1) for h in chosen.sample(hotkeys, 5)])

        for _ in range(100):
            server.sync_eliminations_rpc([row(h, chosen.randrange(2)) for h in chosen.sample(hotkeys, 5)])
            wanted = [row(h, chosen.randrange(3)) for h in chosen.sample(hotkeys, 5)]
            found = comparing.difference(server.reader, wanted)
            change()
            comparison = Comparison(server.reader)
            comparison.extend(found.changed)
            change()
            before = server.get_eliminations_dict_rpc()
            removed = server._state.commit(changes.sync_difference, found.version, comparison, found.gone)
            if removed is None:
                assert server.get_eliminations_dict_rpc() == before
                unknown += 1
            else:
                assert set(removed) == before.keys() - {each["hotkey"] for each in wanted}
                assert server.get_eliminations_dict_rpc() == {each["hotkey"]: each for each in wanted}
        assert (unknown == 0) == (remembered > 10)
        assert unknown < 100

    @pytest.mark.parametrize("same_turn", [True, False])
    def test_by_a_departure_which_stays(self, server, same_turn):
        server.sync_eliminations_rpc([row("a")])
        comparison = compared(server, [row("a", 1), row("b")])

        def depart(step):
            return changes.record_departures(step, {"a": 17, "b": 18}, "gone")

        def sync(step):
            if same_turn:
                depart(step)
            return changes.sync(step, comparison)

        if not same_turn:
            server._state.commit(depart)
        server._state.commit(sync)
        assert server.get_eliminations_dict_rpc() == {"a": row("a", 1), "b": row("b")}
        assert server.get_departed_hotkeys_rpc() == {"a": {"detected_ms": 17}, "b": {"detected_ms": 18}}
        assert server._state.read(lambda store: dict(store.departed())) == {"a": 17, "b": 18}

    def test_by_a_change_of_the_same_turn(self, server):
        server.sync_eliminations_rpc([row("a"), row("b")])
        comparison = compared(server, [row("a"), row("c")])

        def both(step):
            changes.add(step, *prepare(row("d")))
            changes.add(step, *prepare(row("a", 1)))
            changes.remove(step, ["b"])
            return changes.sync(step, comparison)

        assert server._state.commit(both) == ["d"]
        assert server.get_eliminations_dict_rpc() == {"a": row("a"), "c": row("c")}
        stored = server._state.read(lambda store: dict(store.eliminated()))
        assert {hotkey: decode(each) for hotkey, each in stored.items()} == {"a": row("a"), "c": row("c")}

    def test_what_a_client_found_by_a_change_of_the_same_turn(self, server):
        server.sync_eliminations_rpc([row("a"), row("b"), row("d")])
        found = comparing.difference(server.reader, [row("a"), row("c"), row("d")])
        comparison = Comparison(server.reader)
        comparison.extend(found.changed)

        def both(step):
            changes.add(step, *prepare(row("e")))
            changes.add(step, *prepare(row("a", 1)))
            changes.remove(step, ["b", "d"])
            return changes.sync_difference(step, found.version, comparison, found.gone)

        assert server._state.commit(both) == ["e"]
        assert server.get_eliminations_dict_rpc() == {"a": row("a"), "c": row("c"), "d": row("d")}


# ------------------------------------------------------------------ at the client


def one_by_one(server, records):
    """What ``difference`` finds, found by looking at each record."""
    stored = {
        hotkey: server.reader.encoded_elimination(hotkey) for hotkey in server.reader.get_eliminated_hotkeys()
    }
    order = list(server.reader.get_eliminations_dict())
    listed, changed = set(), []
    for record in records:
        if type(record) is not dict or type(hotkey := record.get("hotkey")) is not str or hotkey in listed:
            return None
        listed.add(hotkey)
        if stored.get(hotkey) != encode(record):
            changed.append(encode(record))
    return changed, [hotkey for hotkey in order if hotkey not in listed]


def another_list(chance, rows):
    """Some of the same records, and some others."""
    listed = [dict(each) for each in rows]
    for _ in range(chance.randint(0, 4)):
        n = chance.randrange(len(listed) + 1)
        part = listed[n : n + 1]
        listed[n : n + 1] = chance.choice(
            (
                [{**each, "dd": chance.random()} for each in part],
                [dict(reversed(each.items())) for each in part],
                [],
                [*part, row(f"new {chance.random()}")],
                part * 2 if chance.random() < 0.2 else part,
            )
        )
    if chance.random() < 0.2:
        chance.shuffle(listed)
    if listed and chance.random() < 0.2:
        listed[-1] = chance.choice([None, {}, {"hotkey": 5}, {"hotkey": []}, MappingProxyType(listed[-1])])
    return listed


@given(
    seed=st.integers(0, 10**9), size=st.sampled_from([0, 1, 5, 15, 16, 40]), at_once=st.sampled_from([1, 2, 3, 16])
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_many_compared_at_once_are_compared_as_one_by_one(monkeypatch, seed, size, at_once):
    monkeypatch.setattr(comparing, "_AT_ONCE", at_once)
    chance = random.Random(seed)
    rows = [row("long name " * chance.randint(0, 4) + f"h{n}") for n in range(size)]
    listed = another_list(chance, rows)
    with EliminationManagerServer(sync_guard="off") as server:
        server.sync_eliminations_rpc(rows)
        found = comparing.difference(server.reader, listed)
        wanted = one_by_one(server, listed)
    assert (found is None) == (wanted is None)
    if wanted is not None:
        assert [bytes(memoryview(each)) for each in found.changed] == wanted[0]
        assert found.gone == wanted[1]


def test_what_stands_inside_of_a_record_is_not_taken_for_one_of_the_table(monkeypatch):
    """Its bytes may be the same as those of the whole list."""
    monkeypatch.setattr(comparing, "_AT_ONCE", 1)
    inner = row("inner")
    outer = [row("a", 1), {**row("b"), "price_info": {"inner": inner}}]
    with EliminationManagerServer() as server:
        server.sync_eliminations_rpc(outer)
        found = comparing.difference(server.reader, [row("a", 2), inner])
    assert len(found.changed) == 2
    assert found.gone == ["b"]
