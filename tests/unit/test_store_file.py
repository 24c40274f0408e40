"""The file of a store: who reads it, which one it is, its copies, and how it is opened, made and kept small."""

import os
import shutil
import sqlite3
import stat
import threading

import pytest
from crashing import call
from serving import row
from waiting import until

from shmelim.eliminations.server import EliminationManagerServer
from shmelim.eliminations.store import opening
from shmelim.eliminations.store.history import Change
from shmelim.eliminations.store.opening import store_bytes
from shmelim.eliminations.store.schema import FILE_NAME, SCHEMA_NUMBER
from shmelim.eliminations.store.store import Store
from shmelim.errors import DamagedStoreError, StoreError


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
