"""The store: rows, order, transactions, history, permissions."""

import os
import random
import shutil
import sqlite3
import stat
import threading

import pytest
from crashing import call
from serving import row
from waiting import until

from shmelim.eliminations.rows import Row
from shmelim.eliminations.server import EliminationManagerServer
from shmelim.eliminations.store import opening
from shmelim.eliminations.store.history import Change, Origin
from shmelim.eliminations.store.opening import store_bytes
from shmelim.eliminations.store.schema import FILE_NAME, SCHEMA_NUMBER
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


def read_events(directory, hotkey=None):
    with Store.read_only(directory) as store:
        return store.events(hotkey)


class TestReadOnly:
    def test_beside_an_open_transaction_in_another_thread(self, tmp_path):
        with Store.open(tmp_path / "state") as store:
            with store.transaction():
                store.add_events([Change("add", "a")])
            store.begin()
            store.add_events([Change("not yet", "a")])
            seen = []
            thread = threading.Thread(target=lambda: seen.extend(read_events(tmp_path / "state", "a")))
            thread.start()
            thread.join()
            store.rollback()
        assert [event.action for event in seen] == ["add"]

    def test_without_a_writer(self, tmp_path):
        with Store.open(tmp_path / "odd ?#%name") as store, store.transaction():
            store.put_elimination("a", b"1")
            store.add_events([Change("add", "a")])
        assert [event.new for event in read_events(tmp_path / "odd ?#%name")] == [b"1"]
        assert read_events(tmp_path / "odd ?#%name", "b") == []

    def test_nothing_is_changed_through_it(self, tmp_path):
        with Store.open(tmp_path) as store, Store.read_only(tmp_path) as reading:
            with store.transaction():
                store.put_elimination("a", b"1")
            assert reading.get("a").record == b"1"
            with pytest.raises(StoreError, match="readonly"), reading.transaction():
                reading.put_elimination("b", b"1")
            assert not reading.debtors()

    def test_where_nothing_is(self, tmp_path):
        with pytest.raises(StoreError, match=r"shmelim\.sqlite"):
            read_events(tmp_path)
        assert list(tmp_path.iterdir()) == []


class TestIdentity:
    def test_no_two_stores_have_the_same(self, tmp_path):
        def made(directory):
            with Store.open(directory) as store:
                return store.store_id

        # A forked child has the random state of its parent.
        ids = [made(tmp_path / "a"), *(call(lambda n=n: made(tmp_path / f"{n}")) for n in range(2))]
        ids += [Store.in_memory().store_id for _ in range(2)]
        assert {len(store_id) for store_id in ids} == {16}
        assert len(set(ids)) == 5

    def test_a_store_keeps_it(self, tmp_path):
        with Store.open(tmp_path) as store:
            before = store.store_id
        with Store.open(tmp_path) as store:
            assert store.store_id == before
        with Store.read_only(tmp_path) as store:
            assert store.store_id == before

    def test_each_transaction_that_changes_anything_has_the_next_number(self, tmp_path):
        with Store.open(tmp_path) as store:
            assert store.commit_number == 0
            with store.transaction():
                assert store.next_commit == 1
                store.add_events([Change("a"), Change("b")])
                store.put_elimination("a", b"1")
            with store.transaction():
                store.set_meta("k", 1)
            assert store.commit_number == 2
            with store.transaction():
                assert store.get("a")
            store.begin()
            store.add_events([Change("never")])
            store.rollback()
            assert store.commit_number == 2
            with store.transaction():
                store.add_events([Change("c")])
        with Store.open(tmp_path) as store:
            assert store.commit_number == 3
            assert [(event.action, event.commit_number) for event in store.events()] == [
                ("c", 3),
                ("b", 1),
                ("a", 1),
            ]


class TestBranches:
    """A commit is told from one of the same number that a copy of the store made."""

    @staticmethod
    def commit(directory, count=1):
        """Open the store and make commits; returns number and branch of the last."""
        with Store.open(directory, "process") as store:
            for _ in range(count):
                with store.transaction():
                    store.add_events([Change("a")])
            return store.commit_number, store.branch

    def test_a_store_knows_its_own_commits_and_no_copys(self, tmp_path):
        here, copy = tmp_path / "here", tmp_path / "copy"
        before = [self.commit(here), self.commit(here, 2)]
        shutil.copytree(here, copy)
        own, others = [self.commit(here), self.commit(here)], [self.commit(copy), self.commit(copy, 2)]
        for directory, made, not_made in (here, own, others), (copy, others, own):
            with Store.read_only(directory) as store:
                assert all(store.has_made(*each) for each in (*before, *made))
                assert not any(store.has_made(*each) for each in not_made)
                assert not store.has_made(store.commit_number + 1, store.branch)
                # An earlier release says nothing of branches.
                assert store.has_made(store.commit_number, 0)

    def test_one_that_goes_on_after_another_takes_all_before_for_its_own(self, tmp_path):
        here, copy = tmp_path / "here", tmp_path / "copy"
        self.commit(here)
        shutil.copytree(here, copy)
        last, other = self.commit(here, 3), self.commit(copy)
        with Store.open(copy, "process") as store:
            with store.transaction():
                store.go_on_from(last[0])
            assert store.commit_number == last[0] + 1
            assert store.has_made(*last)
            assert store.has_made(*other)
        further = self.commit(here, 2)
        with Store.read_only(copy) as store:
            assert not store.has_made(*further)

    def test_who_commits_nothing_begins_none(self, tmp_path):
        made = self.commit(tmp_path)
        assert self.commit(tmp_path, 0) == made
        with Store.open(tmp_path, "process") as store:
            store.begin()
            store.add_events([Change("never")])
            store.rollback()
            assert store.branch == made[1]
            with store.transaction():
                store.add_events([Change("a")])
            assert store.branch == store.own_branch != made[1]

    def test_only_the_last_ones_are_kept(self, tmp_path, monkeypatch):
        monkeypatch.setattr("shmelim.eliminations.store.database._BRANCHES_KEPT", 3)
        made = [self.commit(tmp_path) for _ in range(6)]
        with Store.read_only(tmp_path) as store:
            assert all(store.has_made(*each) for each in made)
            assert not store.has_made(5, made[1][1])


class TestCopying:
    def test_it_is_of_one_moment_while_others_write(self, tmp_path):
        with Store.open(tmp_path / "state", "process") as store:
            with store.transaction():
                store.put_eliminations((f"h{n}", b"x" * 1000) for n in range(10_000))
            seen = []

            def meanwhile(done, total):
                seen.append((done, total))
                with store.transaction():
                    store.put_elimination(f"late{done}", b"y" * 1000)

            with Store.read_only(tmp_path / "state") as reading:
                reading.copy_to(tmp_path / "copy", meanwhile)
            assert len(seen) > 2
            assert seen[-1][0] == seen[-1][1]
        (tmp_path / "restored").mkdir()
        (tmp_path / "copy").rename(tmp_path / "restored" / FILE_NAME)
        with Store.open(tmp_path / "restored") as copied:
            copied.check()
            assert copied.counts().eliminated == 10_000
            assert copied.commit_number == 1

    def test_where_it_cannot_be_there_is_none(self, tmp_path):
        with Store.open(tmp_path / "state") as store:
            with pytest.raises(StoreError, match="cannot be copied") as caught:
                store.copy_to(tmp_path / "missing" / "copy")
            assert caught.value.hint
        assert [path.name for path in tmp_path.iterdir()] == ["state"]


class TestOpening:
    @pytest.mark.parametrize("durability", ["power", "process"])
    def test_settings(self, tmp_path, durability):
        with Store.open(tmp_path, durability) as store:
            pragma = {
                name: store._db.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("journal_mode", "synchronous", "user_version", "application_id")
            }
        assert pragma == {
            "journal_mode": "wal",
            "synchronous": {"power": 2, "process": 1}[durability],
            "user_version": SCHEMA_NUMBER,
            "application_id": 0x73686D65,
        }

    def test_unknown_durability(self, tmp_path):
        with pytest.raises(ValueError, match="'disk'"):
            Store.open(tmp_path, "disk")

    def test_everything_is_private(self, tmp_path):
        before = os.umask(0)
        try:
            with Store.open(tmp_path / "state") as store:
                with store.transaction():
                    store.put_elimination("a", b"1")
                modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "state").iterdir()}
        finally:
            os.umask(before)
        assert modes == dict.fromkeys(("shmelim.sqlite", "shmelim.sqlite-wal", "shmelim.sqlite-shm"), 0o600)
        assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o700

    def test_wider_permissions_are_taken_back(self, tmp_path):
        Store.open(tmp_path).close()
        (tmp_path / FILE_NAME).chmod(0o666)
        with Store.open(tmp_path) as store:
            assert stat.S_IMODE(store.path.stat().st_mode) == 0o600

    def test_missing_parent(self, tmp_path):
        with Store.open(tmp_path / "a" / "b") as store:
            assert store.path.is_file()

    def test_file_in_the_way(self, tmp_path):
        (tmp_path / "state").write_text("x")
        with pytest.raises(StoreError, match="file stands"):
            Store.open(tmp_path / "state")

    def test_newer_schema_says_so_and_is_left_alone(self, tmp_path):
        Store.open(tmp_path).close()
        db = sqlite3.connect(tmp_path / FILE_NAME)
        db.execute("PRAGMA user_version=99")
        db.close()
        for attempt in (Store.open, read_events):
            with pytest.raises(StoreError, match=r"schema 99.*newer") as caught:
                attempt(tmp_path)
            assert not isinstance(caught.value, DamagedStoreError)

    def test_database_of_another_program_is_left_alone(self, tmp_path):
        db = sqlite3.connect(tmp_path / FILE_NAME)
        db.execute("CREATE TABLE theirs (x)")
        db.close()
        with pytest.raises(StoreError, match="another program"):
            Store.open(tmp_path)

    def test_transaction_of_another_process_is_waited_for(self, tmp_path, monkeypatch):
        monkeypatch.setattr(opening, "BUSY_TIMEOUT", 0.0)
        with Store.open(tmp_path) as one, Store.open(tmp_path) as two:
            with one.transaction(), pytest.raises(StoreError, match="SQLITE_BUSY") as caught:
                two.begin()
            assert "another process" in caught.value.hint
            with two.transaction():
                two.put_elimination("a", b"1")
            with one.transaction():
                one.put_elimination("b", b"1")
            assert [row.eliminated_ordinal for row in one.rows()] == [1, 2]

    def test_closed_store(self, tmp_path):
        store = Store.open(tmp_path)
        store.begin()
        store.put_elimination("a", b"1")
        store.close()
        store.close()
        assert not store.in_transaction
        with pytest.raises(StoreError, match="closed"):
            store.get("a")
        with pytest.raises(StoreError, match="closed"):
            store.begin()
        with Store.open(tmp_path) as again:
            assert again.get("a") is None

    def test_close_leaves_one_file(self, tmp_path):
        with Store.open(tmp_path) as store:
            with store.transaction():
                store.put_eliminations([(f"h{n}", b"x" * 500) for n in range(1000)])
            assert store_bytes(tmp_path) > 500_000
        assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]

    def test_log_stays_bounded(self, tmp_path):
        with Store.open(tmp_path, "process") as store:
            for n in range(3000):
                with store.transaction():
                    store.put_elimination(f"h{n % 300}", os.urandom(3000))
            assert (tmp_path / f"{FILE_NAME}-wal").stat().st_size < 20 << 20


class TestLengtheningTheLog:
    def test_commits_then_write_into_it_and_a_copy_of_the_files_has_all(self, tmp_path):
        place, copy = tmp_path / "state", tmp_path / "copy"
        log = place / f"{FILE_NAME}-wal"
        with Store.open(place) as store:
            with store.transaction():
                store.put_elimination("a", b"1")
            assert store.is_log_short()
            store.lengthen_log()
            size = log.stat().st_size
            assert size >= 1 << 20
            assert not store.is_log_short()
            for n in range(5):
                with store.transaction():
                    store.put_elimination(f"h{n}", b"2")
            assert log.stat().st_size == size
            shutil.copytree(place, copy)  # as a crash leaves them
        for directory in (place, copy):
            with Store.open(directory) as store:
                store.check()
                assert [hotkey for hotkey, _ in store.eliminated()] == ["a", *(f"h{n}" for n in range(5))]

    def test_what_is_known_of_the_rows_is_not_asked_for_again(self, tmp_path):
        with Store.open(tmp_path) as store:
            with store.transaction():
                store.put_eliminations((f"h{n}", b"1") for n in range(3))
            asked = []
            store._db.set_trace_callback(asked.append)
            store.lengthen_log()
            store.begin()
            store.put_eliminations([("new", b"2")])
            store.remove_eliminations(["h2"])
            store.rollback()
            with store.transaction():
                store.put_eliminations([("h0", b"3"), ("h1", b"3")])
            assert [sql for sql in asked if "rowid FROM hotkeys" in sql] == []
            with store.transaction():
                store.put_eliminations([("new", b"4"), ("h2", b"4")])
            assert dict(store.eliminated()) == {"h0": b"3", "h1": b"3", "h2": b"4", "new": b"4"}
            store.check()

    def test_where_commits_are_not_synced_it_is_left_alone(self, tmp_path):
        with Store.open(tmp_path, "process") as store:
            with store.transaction():
                store.put_elimination("a", b"1")
            size = (tmp_path / f"{FILE_NAME}-wal").stat().st_size
            store.lengthen_log()
            assert (tmp_path / f"{FILE_NAME}-wal").stat().st_size == size
            assert not store.is_log_short()

    def test_where_there_is_little_room_it_is_left_alone(self, tmp_path, monkeypatch):
        monkeypatch.setattr("shmelim.eliminations.store.store._ROOM", 1 << 60)
        with Store.open(tmp_path) as store:
            with store.transaction():
                store.put_elimination("a", b"1")
            size = (tmp_path / f"{FILE_NAME}-wal").stat().st_size
            store.lengthen_log()
            assert (tmp_path / f"{FILE_NAME}-wal").stat().st_size == size

    def test_a_server_does_so_by_itself(self, tmp_path):
        with EliminationManagerServer(state_dir=tmp_path, registry=None) as server:
            server.add_elimination_rpc("a", row("a"))
            until(lambda: (tmp_path / f"{FILE_NAME}-wal").stat().st_size > 1 << 20)
            server.add_elimination_rpc("b", row("b"))
            assert list(server.get_eliminations_dict_rpc()) == ["a", "b"]


class TestCreation:
    def test_a_creation_that_fails_leaves_nothing_that_looks_like_a_store(self, tmp_path, monkeypatch):
        def broken(db, path):
            db.execute("CREATE TABLE half (x)")
            raise RuntimeError("died here")

        with monkeypatch.context() as patch:
            patch.setattr("shmelim.eliminations.store.schema.install", broken)
            with pytest.raises(RuntimeError, match="died here"):
                Store.open(tmp_path)
        assert list(tmp_path.iterdir()) == []
        with Store.open(tmp_path) as store:
            assert not any(store.counts())

    def test_the_log_of_a_database_that_is_gone_is_not_replayed_onto_the_new_one(self, tmp_path):
        with Store.open(tmp_path) as store:
            with store.transaction():
                store.put_elimination("old", b"record")
            # As after a kill, and a deletion of the main file alone.
            for suffix in ("-wal", "-shm"):
                path = tmp_path / f"{FILE_NAME}{suffix}"
                path.with_name(f"kept{suffix}").write_bytes(path.read_bytes())
        (tmp_path / FILE_NAME).unlink()
        for suffix in ("-wal", "-shm"):
            (tmp_path / f"kept{suffix}").rename(tmp_path / f"{FILE_NAME}{suffix}")
        with Store.open(tmp_path) as store:
            store.check()
            assert not any(store.counts())

    def test_two_that_create_at_once_open_the_same_one(self, tmp_path, monkeypatch):
        make, opened = opening._make_file, []

        def late(path):
            # Another one was quicker: found missing, made and filled in between.
            monkeypatch.setattr(opening, "_make_file", make)
            opened.append(Store.open(tmp_path))
            with opened[0].transaction():
                opened[0].put_elimination("first", b"record")
            make(path)

        monkeypatch.setattr(opening, "_make_file", late)
        with Store.open(tmp_path) as store:
            assert store.get("first") is not None
        opened[0].close()

    def test_what_a_killed_creation_left_is_removed(self, tmp_path):
        (tmp_path / ".shmelim.sqlite.abc").write_bytes(b"half")
        with Store.open(tmp_path):
            pass
        assert [path.name for path in tmp_path.iterdir()] == ["shmelim.sqlite"]
        assert (tmp_path / "shmelim.sqlite").stat().st_mode & 0o777 == 0o600
