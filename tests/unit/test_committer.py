"""Group commit: the order of its promises, who shares a commit, and who suffers from what."""

import os
import random
import sys
import threading
from collections import deque
from pathlib import Path

import pytest
from serving import row

from shmelim.eliminations.record import decode, prepare
from shmelim.eliminations.rows import Status, decode_eliminations, pack
from shmelim.eliminations.starting.recovery import origin_record
from shmelim.eliminations.state import changes, committer
from shmelim.eliminations.state.changes import Step
from shmelim.eliminations.state.committer import Committer, _Request
from shmelim.eliminations.store.store import Store
from shmelim.errors import SegmentFullError, StoreError
from shmelim.shm import ITEMS, PrivateNamespace, TableReader, TableWriter


class Noting:
    """Stands before a store or a table, and notes what is called; a call can be made to fail."""

    def __init__(self, target, notes, *names):
        self._target, self._notes, self._names = target, notes, names
        self.failing = {}

    def __getattr__(self, name):
        found = getattr(self._target, name)
        if name not in self._names:
            return found

        def noted(*args, **kwargs):
            self._notes.append(name)
            if name in self.failing:
                raise self.failing[name]
            result = found(*args, **kwargs)
            if name == "transaction":
                inner = Noting(result, self._notes, "stage", "publish", "abort")
                inner.failing = self.failing
                return inner
            return result

        return noted


class Rig:
    """A committer over a store in memory and a table in private memory, all steps noted."""

    def __init__(self):
        self.notes = []
        self.namespace = PrivateNamespace()
        self.real_store, self.real_table = Store.in_memory(), TableWriter(self.namespace)
        self.store = Noting(self.real_store, self.notes, "begin", "commit", "rollback", "put_elimination")
        self.table = Noting(self.real_table, self.notes, "transaction")
        self.committer = Committer(self.store, self.real_table, lambda: None)
        self.committer.published = lambda: self.notes.append("published")
        self.committer.publish_all(origin_record(None))
        self.committer._table = self.table
        self.reader = TableReader(self.namespace)
        self.notes.clear()

    def add(self, hotkey, stamp=0, pad=0):
        return self.committer.commit(changes.add, *prepare(row(hotkey, stamp, pad=pad)))

    def in_table(self):
        entries = self.reader.snapshot(verify=True).entries
        return decode_eliminations(pack(entries, Status.ELIMINATED, ITEMS))

    def in_store(self):
        assert not self.real_store.in_transaction
        return {hotkey: decode(record) for hotkey, record in self.real_store.eliminated()}

    def state(self):
        """What is in both, which must be the same."""
        assert self.in_table() == self.in_store()
        return self.in_table()


@pytest.fixture
def rig():
    rig = Rig()
    yield rig
    rig.committer.close()


class TestOrder:
    def test_is_stage_commit_publish_acknowledge(self, rig):
        assert rig.add("a") is True
        assert rig.notes == ["begin", "put_elimination", "transaction", "stage", "commit", "publish", "published"]
        assert rig.state() == {"a": row("a")}

    def test_nothing_is_seen_before_the_commit_and_all_of_it_before_the_acknowledgement(self, rig):
        seen = {}
        commit = rig.real_store.commit

        def looking():
            seen["before the commit"] = "a" in rig.in_table()
            commit()
            seen["after the commit"] = "a" in rig.in_table()

        rig.real_store.commit = looking
        rig.committer.published = lambda: seen.update(published="a" in rig.in_table())
        rig.add("a")
        assert seen == {"before the commit": False, "after the commit": False, "published": True}

    def test_a_commit_that_fails_publishes_nothing_and_leaves_all_usable(self, rig):
        rig.add("a")
        version = rig.reader.version
        rig.notes.clear()
        rig.store.failing["commit"] = StoreError("disk full")
        for _ in range(3):
            with pytest.raises(StoreError, match="disk full"):
                rig.add("b")
            with pytest.raises(StoreError, match="disk full"):
                rig.committer.commit(changes.remove, ["a"])
        assert "publish" not in rig.notes
        assert "published" not in rig.notes
        assert rig.reader.version == version
        rig.store.failing.clear()
        assert rig.state() == {"a": row("a")}
        for n in range(5):
            assert rig.add(f"c{n}") is True
        assert list(rig.state()) == ["a", *(f"c{n}" for n in range(5))]

    def test_staging_that_fails_commits_nothing(self, rig):
        rig.store.failing.clear()
        rig.table.failing["stage"] = SegmentFullError("no room")
        with pytest.raises(SegmentFullError):
            rig.add("a")
        assert "commit" not in rig.notes
        rig.table.failing.clear()
        assert rig.state() == {}
        assert rig.add("a") is True
        assert rig.state() == {"a": row("a")}

    def test_what_changes_nothing_is_neither_committed_nor_published(self, rig):
        rig.add("a")
        rig.notes.clear()
        before = rig.reader.version, rig.committer.commits
        assert rig.add("a") is False
        assert rig.committer.commit(changes.remove, ["b"]) == []
        assert rig.committer.commit(changes.update_metagraph, []) == []
        assert (rig.reader.version, rig.committer.commits) == before
        assert "commit" not in rig.notes
        assert "published" not in rig.notes

    def test_a_meta_value_is_committed_and_not_published(self, rig):
        version = rig.reader.version
        rig.committer.commit(Step.set_meta, "k", 5)
        assert rig.committer.read(lambda store: store.meta("k")) == 5
        assert rig.reader.version == version
        assert "published" not in rig.notes

    def test_a_change_that_raises_is_undone(self, rig):
        def half(step: Step):
            changes.add(step, *prepare(row("half")))
            raise LookupError("in the middle")

        rig.add("a")
        with pytest.raises(LookupError):
            rig.committer.commit(half)
        assert rig.state() == {"a": row("a")}
        assert rig.committer.read(lambda store: store.events("half")) == []

    @pytest.mark.parametrize("count", [1, 999, 1000, 1001, 5000])
    def test_many_at_once_are_published_as_they_are_stored(self, rig, count):
        """From some size on the whole table is made anew."""
        for n in range(7):
            rig.add(f"old{n}")
        records = dict(prepare(row(f"new{n}", n)) for n in range(count))
        removed = rig.committer.commit(changes.replace_all, records)
        assert removed == [f"old{n}" for n in range(7)]
        assert list(rig.state()) == list(records)
        rig.committer.commit(changes.update_metagraph, [f"new{n}" for n in range(count)])
        rig.committer.commit(changes.update_metagraph, [f"new{n}" for n in range(0, count, 2)])
        assert rig.reader.get(b"\xff:origin") is not None
        rows = {row.hotkey: row for row in rig.real_store.rows()}
        for n in range(count):
            registered = rig.reader.flags(b"new%d" % n) >> 2
            assert registered == rows[f"new{n}"].registered


class Group:
    """Changes that are queued by threads while the lock is held, so that they go into one group."""

    def __init__(self, rig):
        self.rig = rig
        self.threads = []
        self.outcomes = {}

    def __enter__(self):
        self.rig.committer._leading.acquire()
        return self

    def queue(self, name, change, *args):
        def run():
            try:
                self.outcomes[name] = self.rig.committer.commit(change, *args)
            except BaseException as error:
                self.outcomes[name] = error

        before = len(self.rig.committer._queue)
        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()
        while len(self.rig.committer._queue) == before:
            os.sched_yield()

    def add(self, hotkey, stamp=0, pad=0):
        self.queue(hotkey, changes.add, *prepare(row(hotkey, stamp, pad=pad)))

    def __exit__(self, *_):
        self.rig.committer._leading.release()
        for thread in self.threads:
            thread.join()


class TestGroups:
    def test_changes_that_come_together_share_one_commit(self, rig):
        before = rig.reader.version
        with Group(rig) as group:
            for n in range(20):
                group.add(f"h{n}")
        assert group.outcomes == {f"h{n}": True for n in range(20)}
        assert (rig.committer.commits, rig.committer.changes) == (1, 20)
        assert list(rig.state()) == [f"h{n}" for n in range(20)]
        assert rig.reader.version == before + 1

    def test_changes_of_a_group_see_each_other_in_order(self, rig):
        with Group(rig) as group:
            group.add("a", 1)
            group.queue("again", changes.add, *prepare(row("a", 2)))
            group.queue("gone", changes.remove, ["a"])
            group.queue("once more", changes.remove, ["a"])
            group.add("b")
        assert group.outcomes == {"a": True, "again": False, "gone": ["a"], "once more": [], "b": True}
        assert list(rig.state()) == ["b"]

    def test_more_than_fit_into_one_group_all_come_through(self, rig, monkeypatch):
        monkeypatch.setattr(committer, "MAX_GROUP", 3)
        with Group(rig) as group:
            for n in range(20):
                group.add(f"h{n}")
        assert set(rig.state()) == {f"h{n}" for n in range(20)}
        assert all(group.outcomes.values())
        assert not rig.committer._queue

    def test_one_that_raises_does_not_undo_the_others(self, rig):
        def half(step):
            changes.add(step, *prepare(row("half")))
            changes.remove(step, ["before"])
            raise LookupError("in the middle")

        with Group(rig) as group:
            group.add("before")
            group.queue("half", half)
            group.add("after")
        assert isinstance(group.outcomes.pop("half"), LookupError)
        assert group.outcomes == {"before": True, "after": True}
        assert list(rig.state()) == ["before", "after"]
        assert rig.committer.commits == 1

    def test_ordinals_of_one_that_raises_are_free_again(self, rig):
        def half(step):
            changes.add(step, *prepare(row("half")))
            raise LookupError

        with Group(rig) as group:
            group.add("a")
            group.queue("half", half)
            group.add("b")
        ordinals = [row.eliminated_ordinal for row in rig.real_store.rows()]
        assert ordinals == [1, 2]
        assert list(rig.state()) == ["a", "b"]

    def test_one_too_large_for_shared_memory_does_not_take_others_with_it(self, rig):
        create = rig.namespace.create_data

        def small(generation, size):
            if size > 4 << 20:
                raise SegmentFullError(f"no room for {size} bytes")
            return create(generation, size)

        rig.namespace.create_data = small
        with Group(rig) as group:
            group.add("a")
            many = dict(prepare(row(f"large{n}", pad=500_000)) for n in range(9))
            group.queue("large", changes.merge, many, "test")
            group.add("b")
        assert isinstance(group.outcomes.pop("large"), SegmentFullError)
        assert group.outcomes == {"a": True, "b": True}
        assert list(rig.state()) == ["a", "b"]
        assert rig.add("c") is True

    def test_one_with_which_the_store_fails_does_not_take_others_with_it(self, rig):
        def full(step):
            changes.add(step, *prepare(row("half")))
            raise StoreError("disk full")

        with Group(rig) as group:
            group.add("a")
            group.queue("full", full)
            group.add("b")
        assert isinstance(group.outcomes.pop("full"), StoreError)
        assert group.outcomes == {"a": True, "b": True}
        assert list(rig.state()) == ["a", "b"]

    def test_one_that_cannot_be_staged_for_any_other_reason_does_not_take_others_with_it(self, rig, monkeypatch):
        """Whatever a mistake raises there, it is its own caller's."""

        def poisoned(entry):
            if entry.hotkey == "poison":
                raise ArithmeticError("a mistake")
            return row_entry(entry)

        row_entry = committer.row_entry
        monkeypatch.setattr(committer, "row_entry", poisoned)
        with Group(rig) as group:
            group.add("a")
            group.add("poison")
            group.add("b")
        assert isinstance(group.outcomes.pop("poison"), ArithmeticError)
        assert group.outcomes == {"a": True, "b": True}
        assert list(rig.state()) == ["a", "b"]

    def test_from_many_threads_at_once_fewer_commits_than_changes(self, rig):
        barrier = threading.Barrier(16)
        commit = rig.real_store.commit
        queue = rig.committer._queue

        def first_commit():
            # It takes as long as the others need to queue up.
            while len(queue) < 12:
                pass
            rig.real_store.commit = commit
            commit()

        def work(number):
            barrier.wait()
            for n in range(20):
                assert rig.add(f"h{number}-{n}") is True

        rig.real_store.commit = first_commit
        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert rig.committer.changes == 320
        assert rig.committer.commits < 320
        assert set(rig.state()) == {f"h{number}-{n}" for number in range(16) for n in range(20)}

    def test_what_is_done_is_not_kept(self, rig):
        with Group(rig) as group:
            for n in range(5):
                group.add(f"h{n}")
        assert rig.committer._queue == deque()


class TestClose:
    def test_changes_come_in_while_it_closes(self, rig, tmp_path):
        """Each is either acknowledged and in the store, or refused and not there."""
        with Store.open(tmp_path):
            pass
        store = Store.open(tmp_path, "process")
        table = TableWriter(PrivateNamespace())
        acknowledged, refused = set(), {}
        subject = Committer(store, table, lambda: None)
        subject.publish_all(origin_record(None))

        def work(number):
            for n in range(10_000):
                hotkey = f"h{number}-{n}"
                try:
                    subject.commit(changes.add, *prepare(row(hotkey)))
                except StoreError as error:
                    refused[hotkey] = str(error)
                    return
                acknowledged.add(hotkey)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        while len(acknowledged) < 50:
            pass
        subject.close()
        subject.close()
        for thread in threads:
            thread.join()
        assert len(refused) == 6
        assert all("shut down" in message for message in refused.values())
        with Store.open(tmp_path) as store:
            assert {hotkey for hotkey, _ in store.eliminated()} == acknowledged

    def test_a_change_after_it_is_refused(self, rig):
        rig.committer.close()
        with pytest.raises(StoreError, match="shut down"):
            rig.add("a")


def _at_line(number, files, act):
    """From now on count the lines that this thread runs in some files; at one of them, act."""
    counted = 0

    def inside(_frame, event, _arg):
        nonlocal counted
        if event == "line":
            counted += 1
            if counted == number:
                sys.settrace(None)
                act()
        return inside

    def outside(frame, _event, _arg):
        return inside if Path(frame.f_code.co_filename).name in files else None

    sys.settrace(outside)


def interrupt():
    raise KeyboardInterrupt


_FILES = {"committer.py", "changes.py", "store.py", "database.py", "history.py", "writer.py"}


class TestInterrupts:
    """Ctrl-C in direct mode, where the change runs in the caller's own thread."""

    def test_inside_a_change_undoes_it(self, rig):
        def interrupted(step):
            changes.add(step, *prepare(row("half")))
            raise KeyboardInterrupt

        rig.add("a")
        with pytest.raises(KeyboardInterrupt):
            rig.committer.commit(interrupted)
        assert rig.state() == {"a": row("a")}
        assert rig.add("b") is True
        assert list(rig.state()) == ["a", "b"]

    def test_right_after_the_commit_it_is_published(self, rig):
        commit = rig.real_store.commit

        def interrupted():
            commit()
            raise KeyboardInterrupt

        rig.add("a")
        rig.real_store.commit = interrupted
        with pytest.raises(KeyboardInterrupt):
            rig.add("b")
        rig.real_store.commit = commit
        assert list(rig.state()) == ["a", "b"]
        assert rig.notes[-2:] == ["publish", "published"]

    def test_while_it_waits_for_its_turn_it_is_not_carried_out_later(self, rig):
        class Interrupted:
            def __enter__(self):
                raise KeyboardInterrupt

            def __exit__(self, *_):
                pass

        leading, rig.committer._leading = rig.committer._leading, Interrupted()
        with pytest.raises(KeyboardInterrupt):
            rig.add("a")
        rig.committer._leading = leading
        rig.add("b")
        assert list(rig.state()) == ["b"]

    @pytest.mark.parametrize(("others", "stride"), [(0, 1), (2, 7), pytest.param(2, 1, marks=pytest.mark.long)])
    def test_at_any_line_leaves_every_change_whole_and_those_of_others_made(self, rig, others, stride):
        """The leader is interrupted at each line of the committer, the store and the writer in turn."""
        number, interrupted = random.randrange(-stride + 1, 1), 0
        print("first line", number + stride, "stride", stride)
        everybody_else = {f"other-{n}" for n in range(others)}
        while True:
            number += stride
            rig.committer.commit(changes.replace_all, dict(prepare(row(hotkey)) for hotkey in ("stays", "goes")))
            own = _Request(
                changes.replace_all, (dict(prepare(row(hotkey)) for hotkey in ("stays", "own")),), {}, None
            )
            with Group(rig) as group:
                rig.committer._queue.append(own)
                for n in range(others):
                    group.add(f"other-{n}")
                _at_line(number, _FILES, interrupt)
                try:
                    rig.committer._lead(own)
                    reached = False
                except KeyboardInterrupt:
                    reached = True
                    own.wanted = False
                finally:
                    sys.settrace(None)
                # As it is now, before anybody else leads.
                done = {"stays", "own"} if own.round.finished else {"stays", "goes"}
                assert rig.state().keys() == (done | everybody_else if own.round.finished else done), number
            assert group.outcomes == dict.fromkeys(everybody_else, True), number
            assert rig.state().keys() == done | everybody_else
            interrupted += reached
            if not reached:
                break
        assert interrupted > 100 / stride
