"""The store: rows, order, transactions, history."""

import os
import random
import sqlite3

import pytest

from shmelim.eliminations.rows import Row
from shmelim.eliminations.store.history import Change, Origin
from shmelim.eliminations.store.store import Counts, Store
from shmelim.errors import DamagedStoreError, StoreError


@pytest.fixture(params=["memory", "disk"])
def store(request, tmp_path):
    with Store.in_memory() if request.param == "memory" else Store.open(tmp_path / "state") as opened:
        yield opened


def reopened(store):
    """The same store after a clean end; a store in memory is returned as it is."""
    if store.path.name == ":memory:":
        return store
    store.close()
    return Store.open(store.path.parent)


class TestRows:
    def test_nothing_at_first(self, store):
        assert store.get("a") is None
        assert list(store.rows()) == list(store.eliminated()) == list(store.departed()) == []
        assert store.registered() == set()
        assert store.counts() == Counts(0, 0, 0, 0)

    def test_new_then_updated(self, store):
        with store.transaction():
            assert store.put_elimination("a", b"1") is None
            assert store.put_elimination("b", b"2") is None
            assert store.put_elimination("a", b"3") == b"1"
        assert list(store.eliminated()) == [("a", b"3"), ("b", b"2")]
        assert store.get("a") == Row("a", 1, b"3", None, None, registered=False)
        assert type(store.get("a").registered) is bool

    def test_state_survives_a_clean_end(self, store):
        with store.transaction():
            store.put_eliminations([("b", b"1"), ("a", b"2")])
            store.put_departed("d", 5)
            store.set_registered(["a", "r"])
            store.set_meta("key", {"x": [1, None]})
            store.add_events([Change("add", "a")])
        before = list(store.rows())
        with reopened(store) as again:
            assert list(again.rows()) == before
            assert list(again.eliminated()) == [("b", b"1"), ("a", b"2")]
            assert list(again.departed()) == [("d", 5)]
            assert again.registered() == {"a", "r"}
            assert again.meta("key") == {"x": [1, None]}
            assert again.counts() == Counts(2, 1, 2, 1)
            again.check()

    def test_removed_row_is_gone(self, store):
        with store.transaction():
            store.put_eliminations([("a", b"1"), ("b", b"2"), ("c", b"3")])
            assert store.remove_eliminations(["a"]) == {"a": b"1"}
            assert store.remove_eliminations(["a"]) == {}
            assert list(store.remove_eliminations(["x", "c", "b", "c"]).items()) == [("c", b"3"), ("b", b"2")]
        assert list(store.rows()) == []

    def test_removed_row_keeps_what_else_is_known(self, store):
        with store.transaction():
            for hotkey in "abc":
                store.put_elimination(hotkey, b"1")
            store.put_departed("a", 7)
            store.set_registered(["b"])
            store.remove_eliminations("abc")
        assert {row.hotkey: row for row in store.rows()} == {
            "a": Row("a", None, None, 4, 7, registered=False),
            "b": Row("b", None, None, None, None, registered=True),
        }

    def test_again_eliminated_comes_last(self, store):
        with store.transaction():
            store.put_eliminations([("a", b"1"), ("b", b"2")])
            store.remove_eliminations(["a"])
            store.put_elimination("a", b"3")
        assert list(store.eliminated()) == [("b", b"2"), ("a", b"3")]

    def test_departed_once_and_for_ever(self, store):
        with store.transaction():
            assert store.put_departed("b", 5) is True
            assert store.put_departed("a", 0) is True
            assert store.put_departed("b", 9) is False
        assert list(store.departed()) == [("b", 5), ("a", 0)]

    def test_registered_is_replaced_as_a_whole(self, store):
        with store.transaction():
            assert store.set_registered(["a", "b", "a"]) == {"a", "b"}
            assert store.set_registered(["c", "b"]) == {"a", "c"}
            assert store.registered() == {"b", "c"}
            assert store.set_registered([]) == {"b", "c"}
        assert list(store.rows()) == []

    def test_bulk_says_what_it_replaced(self, store):
        with store.transaction():
            assert store.put_eliminations([("a", b"1"), ("b", b"2"), ("a", b"3")]) == {}
            store.put_departed("c", 1)
            assert store.put_eliminations([("c", b"4"), ("b", b"5"), ("a", b"3")]) == {"b": b"2", "a": b"3"}
        assert list(store.eliminated()) == [("a", b"3"), ("b", b"5"), ("c", b"4")]
        assert store.get("c") == Row("c", 4, b"4", 3, 1, registered=False)

    def test_many_hotkeys_that_are_new_and_only_registered(self, store):
        hotkeys = [f"h{n}" for n in range(120)]
        with store.transaction():
            assert store.set_registered(hotkeys) == set(hotkeys)
            store.put_eliminations((f"e{n}", b"1") for n in range(120))
        assert store.get("h7") == Row("h7", None, None, None, None, registered=True)
        assert store.get("e7") == Row("e7", 8, b"1", None, None, registered=False)
        assert store.counts() == Counts(120, 0, 120, 0)

    @pytest.mark.parametrize("count", [0, 1, 499, 500, 501, 1500])
    def test_chunks_leave_nothing_out(self, store, count):
        records = [(f"h{n}", b"%d" % n) for n in range(count)]
        with store.transaction():
            store.put_eliminations(records)
            assert store.put_eliminations((hotkey, b"x") for hotkey, _ in records) == dict(records)
        assert list(store.eliminated()) == [(hotkey, b"x") for hotkey, _ in records]
        assert set(store.get_many([*dict(records), "unknown"])) == set(dict(records))
        with store.transaction():
            assert store.remove_eliminations(dict(records)).keys() == dict(records).keys()
        assert list(store.rows()) == []

    @pytest.mark.parametrize("hotkey", ["x" * 255, "é\u2028'\"%_", "nul\0inside", "\ufeff", "10", " "])
    def test_any_text_is_a_hotkey(self, store, hotkey):
        with store.transaction():
            store.put_elimination(hotkey, b"r")
        assert store.get(hotkey).hotkey == hotkey
        assert list(store.eliminated()) == [(hotkey, b"r")]
        assert hotkey in store.get_many([hotkey])

    def test_counts_agree_with_the_streams(self, store):
        with store.transaction():
            store.put_eliminations([(f"e{n}", b"1") for n in range(7)])
            for n in range(5):
                store.put_departed(f"e{n * 2}", n)
            store.set_registered(["e1", "z"])
        counts = store.counts()
        assert counts.eliminated == len(list(store.eliminated())) == 7
        assert counts.departed == len(list(store.departed())) == 5
        assert counts.registered == len(store.registered()) == 2


class TestTransactions:
    @pytest.mark.parametrize(
        "change",
        [
            lambda s: s.put_elimination("a", b"1"),
            lambda s: s.put_eliminations([("a", b"1")]),
            lambda s: s.remove_eliminations(["there"]),
            lambda s: s.put_departed("a", 1),
            lambda s: s.set_registered(["a"]),
            lambda s: s.add_events([Change("add")]),
            lambda s: s.set_meta("a", 1),
            lambda s: s.savepoint().__enter__(),
            lambda s: s.commit(),
        ],
    )
    def test_changes_outside_are_refused(self, store, change):
        with store.transaction():
            store.put_elimination("there", b"1")
        before = list(store.rows())
        with pytest.raises(StoreError, match="transaction"):
            change(store)
        assert list(store.rows()) == before

    def test_rollback_undoes_everything(self, store):
        store.begin()
        assert store.in_transaction
        store.put_elimination("a", b"1")
        store.add_events([Change("add", "a")])
        store.set_meta("k", 1)
        store.rollback()
        store.rollback()
        assert not store.in_transaction
        assert (list(store.rows()), store.events(), store.meta("k")) == ([], [], None)

    def test_block_that_raises_is_undone(self, store):
        with pytest.raises(KeyError), store.transaction():  # noqa: PT012 - undone as a whole
            store.put_elimination("a", b"1")
            raise KeyError
        assert not store.in_transaction
        assert store.get("a") is None

    def test_commit_that_is_refused_is_rolled_back(self, store):
        # A deferred constraint is the one refusal after which SQLite itself keeps the transaction open.
        store._db.execute("PRAGMA foreign_keys=ON")
        store._db.execute("CREATE TEMP TABLE one (x PRIMARY KEY)")
        store._db.execute("CREATE TEMP TABLE two (x REFERENCES one DEFERRABLE INITIALLY DEFERRED)")
        store.begin()
        store.put_elimination("a", b"1")
        store._db.execute("INSERT INTO two VALUES (1)")
        with pytest.raises(StoreError, match="FOREIGN KEY"):
            store.commit()
        assert not store.in_transaction
        with store.transaction():
            store.put_elimination("b", b"1")
        assert list(store.rows()) == [Row("b", 1, b"1", None, None, registered=False)]

    def test_second_begin_is_refused(self, store):
        with store.transaction():
            with pytest.raises(StoreError, match="within a transaction"):
                store.begin()
            store.put_elimination("a", b"1")
        assert store.get("a") is not None

    def test_savepoint_undoes_its_part(self, store):
        with store.transaction():
            store.put_elimination("a", b"1")
            with pytest.raises(KeyError), store.savepoint():  # noqa: PT012 - undone as a whole
                store.put_elimination("b", b"2")
                store.put_elimination("a", b"3")
                raise KeyError
            with store.savepoint():
                store.put_elimination("c", b"4")
        assert list(store.eliminated()) == [("a", b"1"), ("c", b"4")]

    def test_savepoints_nest(self, store):
        with store.transaction(), store.savepoint():
            store.put_elimination("a", b"1")
            with pytest.raises(KeyError), store.savepoint():  # noqa: PT012 - undone as a whole
                with store.savepoint():
                    store.put_elimination("b", b"2")
                store.put_elimination("c", b"3")
                raise KeyError
            store.put_elimination("d", b"4")
        assert list(store.eliminated()) == [("a", b"1"), ("d", b"4")]


class TestOrdinals:
    def ordinals(self, store):
        return [row.eliminated_ordinal or row.departed_ordinal for row in store.rows()]

    def test_strictly_rising_in_every_way_of_adding(self, store):
        with store.transaction():
            store.put_elimination("a", b"1")
            store.put_eliminations([("b", b"1"), ("a", b"2"), ("c", b"1")])
            store.put_departed("d", 1)
            store.put_elimination("e", b"1")
        with store.transaction():
            store.put_departed("f", 1)
            store.put_eliminations([("g", b"1")])
        assert self.ordinals(store) == [1, 2, 3, 4, 5, 6, 7]

    def test_right_after_rollback(self, store):
        with store.transaction():
            store.put_elimination("a", b"1")
        store.begin()
        store.put_eliminations([("x", b"1"), ("y", b"1")])
        store.rollback()
        with store.transaction():
            store.put_elimination("b", b"1")
            store.put_elimination("c", b"1")
        assert self.ordinals(store) == [1, 2, 3]

    def test_right_after_rollback_to_savepoint(self, store):
        with store.transaction():
            store.put_elimination("a", b"1")
            for _ in range(2):
                with pytest.raises(KeyError), store.savepoint():  # noqa: PT012 - undone as a whole
                    store.put_eliminations([("x", b"1"), ("y", b"1")])
                    raise KeyError
                with store.savepoint():
                    store.put_elimination("b", b"1")
            store.put_departed("c", 1)
        assert self.ordinals(store) == [1, 2, 3]

    def test_right_when_the_first_one_is_taken_in_a_savepoint(self, store):
        with store.transaction():
            with pytest.raises(KeyError), store.savepoint():  # noqa: PT012 - undone as a whole
                store.put_elimination("x", b"1")
                raise KeyError
            store.put_elimination("a", b"1")
            with store.savepoint():
                store.put_elimination("b", b"1")
            store.put_elimination("c", b"1")
        assert self.ordinals(store) == [1, 2, 3]

    def test_right_after_a_clean_end(self, store):
        with store.transaction():
            store.put_elimination("a", b"1")
            store.put_departed("b", 1)
        with reopened(store) as again, again.transaction():
            again.put_elimination("c", b"1")
            assert again.get("c").eliminated_ordinal == 3

    def test_failed_statement_in_a_savepoint_takes_none(self, store):
        with store.transaction():
            with pytest.raises(StoreError, match="CHECK"), store.savepoint():
                store.put_departed("x", None)
            store.put_elimination("a", b"1")
        assert list(store.eliminated()) == [("a", b"1")]
        assert self.ordinals(store) == [1]


class TestMeta:
    def test_values_and_default(self, store):
        assert store.meta("k") is None
        assert store.meta("k", 5) == 5
        with store.transaction():
            store.set_meta("k", [1, {"a": None}])
            store.set_meta("k", 0)
        assert store.meta("k", 5) == 0

    def test_items_by_prefix(self, store):
        with store.transaction():
            for key in ("owed:a", "other"):
                store.set_meta(key, key)
        assert store.meta_items("owed:") == {"owed:a": "owed:a"}
        assert set(store.meta_items()) == {"owed:a", "other", "branches"}


class TestEvents:
    def test_newest_first_with_everything(self, store):
        origin = Origin(123, None, "validator")
        with store.transaction():
            store.add_events([Change("add", "a")], origin, 10)
            store.add_events([Change("remove", "a", old=b"1", note="by hand")], origin, 11)
        assert [tuple(event) for event in store.events()] == [
            (2, 11, "remove", "a", 123, None, "validator", "by hand", b"1", None, 1),
            (1, 10, "add", "a", 123, None, "validator", None, None, b"1", 1),
        ]

    def test_origin_is_this_process_by_default(self, store):
        with store.transaction():
            store.add_events([Change("add")])
        (event,) = store.events()
        assert (event.pid, event.uid) == (os.getpid(), os.getuid())
        assert event.program
        assert event.at_ms > 1_700_000_000_000

    def test_pages_of_one_hotkey(self, store):
        with store.transaction():
            store.add_events(Change("add", "ab"[n % 2], note=str(n)) for n in range(10))
        assert [event.note for event in store.events("b", limit=2)] == ["9", "7"]
        page = store.events("b", limit=2)
        assert [event.note for event in store.events("b", 9, page[-1].id)] == ["5", "3", "1"]
        assert len(store.events(limit=None)) == 10
        assert store.events(limit=0) == []
        with pytest.raises(ValueError, match="-1"):
            store.events(limit=-1)

    @pytest.mark.parametrize("seed", range(3))
    def test_old_and_new_records_in_pages_of_any_size_whatever_was_changed_at_once(self, store, seed):
        """Neither is stored twice, and a change of many hotkeys is one row: nobody who reads sees that."""
        chosen = random.Random(seed)
        hotkeys = [f"h{n}" for n in range(150)]
        records, told = {}, []
        for turn in range(25):
            changes = []
            many = chosen.sample(hotkeys, chosen.choice([1, 2, 64, 65, 120]))
            with store.transaction():
                for n, hotkey in enumerate(many):
                    old, new = records.get(hotkey), None if chosen.random() < 0.3 else b"%d-%d" % (turn, n)
                    if old is None and new is None:
                        changes.append(("depart", hotkey, None, None))
                    else:
                        action = "remove" if new is None else "add" if old is None else "update"
                        changes.append((action, hotkey, old, new))
                        records.pop(hotkey, None) if new is None else records.update({hotkey: new})
                store.add_events([Change(action, hotkey, old, str(turn)) for action, hotkey, old, _ in changes])
                store.put_eliminations((hotkey, new) for _, hotkey, _, new in changes if new is not None)
                store.remove_eliminations(hotkey for action, hotkey, *_ in changes if action == "remove")
            told += [(*change, str(turn), store.commit_number) for change in changes]
        expected = [(n, *each) for n, each in enumerate(told, 1)][::-1]

        def seen(hotkey, limit):
            found, before = [], None
            while page := store.events(hotkey, limit, before):
                assert len(page) <= limit
                found += page
                before = page[-1].id
            return [(e.id, e.action, e.hotkey, e.old, e.new, e.note, e.commit_number) for e in found]

        for limit in (1000, 100, 7):
            assert seen(None, limit) == expected
        for hotkey in chosen.sample(hotkeys, 20):
            assert seen(hotkey, 3) == [each for each in expected if each[2] == hotkey]
        assert seen("unknown", 5) == []
        assert store._ask("SELECT count(*) FROM events")[0][0] < len(told) / 2
        assert store.counts().events == len(told)

    def test_a_row_of_many_that_is_damaged_is_said_to_be(self, store):
        with store.transaction():
            store.add_events(Change("add", f"h{n}") for n in range(65))
            store._db.execute("DROP TRIGGER events_are_not_changed")
            store._db.execute("UPDATE events SET old = x'00'")
        with pytest.raises(DamagedStoreError, match="event 65"):
            store.events("h3")

    @pytest.mark.parametrize("sql", ["UPDATE events SET note = 'x'", "DELETE FROM events"])
    def test_append_only(self, store, sql):
        with store.transaction():
            store.add_events([Change("add", "a")])
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            store._db.execute(sql)
        assert len(store.events()) == 1

    def test_numbers_never_come_twice(self, store):
        with store.transaction():
            store.add_events([Change("one")])
        store.begin()
        store.add_events([Change("undone")])
        store.rollback()
        with store.transaction():
            store.add_events([Change("two")])
        assert [(event.id, event.action) for event in store.events()] == [(2, "two"), (1, "one")]
