"""The thread that changes the state: the order of its promises, who shares a turn, and who suffers from what."""

import random
import signal
import sqlite3
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from crashing import call
from serving import row
from waiting import until

from shmelim.eliminations.record import decode, prepare
from shmelim.eliminations.rows import Status, decode_eliminations, pack
from shmelim.eliminations.starting.recovery import origin_record
from shmelim.eliminations.state import changes, thread
from shmelim.eliminations.state.changes import Step
from shmelim.eliminations.state.thread import State
from shmelim.eliminations.store import opening
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import SegmentFullError, ShmelimError, StoreError
from shmelim.shm import ITEMS, PrivateNamespace, TableReader, TableWriter, Transaction


class Rig:
    """A state with its store in memory, or in a directory, and its table in private memory; all steps noted."""

    def __init__(self, patch, *, threaded, directory=None):
        self.notes, self.failing = [], {}
        self.namespace = PrivateNamespace()
        self.store = Store.in_memory() if directory is None else Store.open(directory, "process")
        self.subject = State(
            self.store, TableWriter(self.namespace), self.namespace, lambda: None, threaded=threaded
        )
        self.subject.publish_all(origin_record(None))
        self.reader = TableReader(self.namespace)
        for kind, names in ((Store, ("begin", "put_elimination", "commit")), (Transaction, ("stage", "publish"))):
            for name in names:
                patch.setattr(kind, name, self._noting(name, getattr(kind, name)))
        patch.setattr(State, "_note_shown", self._noting("published", State._note_shown))

    def _noting(self, name, method):
        def noted(target, *args):
            self.notes.append(name)
            if name in self.failing:
                raise self.failing[name]
            return method(target, *args)

        return noted

    def add(self, hotkey, stamp=0, pad=0):
        return self.subject.commit(changes.add, *prepare(row(hotkey, stamp, pad=pad)))

    def in_table(self):
        entries = self.reader.snapshot(verify=True).entries
        return decode_eliminations(pack(entries, Status.ELIMINATED, ITEMS))

    def in_store(self):
        assert not self.store.in_transaction
        return {hotkey: decode(record) for hotkey, record in self.store.eliminated()}

    def state(self):
        """What is in both, which must be the same."""
        stored = self.subject.read(lambda _: self.in_store())
        assert self.in_table() == stored
        return stored


@pytest.fixture(params=["thread", "direct"])
def rig(request, monkeypatch):
    rig = Rig(monkeypatch, threaded=request.param == "thread")
    yield rig
    rig.subject.close()


@pytest.fixture
def threaded(monkeypatch):
    rig = Rig(monkeypatch, threaded=True)
    yield rig
    rig.subject.close()


@pytest.fixture
def direct(monkeypatch):
    rig = Rig(monkeypatch, threaded=False)
    yield rig
    rig.subject.close()


class TestOrder:
    def test_is_stage_commit_publish_acknowledge(self, rig):
        assert rig.add("a") is True
        assert rig.notes == ["begin", "put_elimination", "stage", "commit", "publish", "published"]
        assert rig.state() == {"a": row("a")}

    def test_nothing_is_seen_before_the_commit_and_all_of_it_before_the_acknowledgement(self, rig, monkeypatch):
        seen = {}
        commit = Store.commit

        def looking(store):
            seen["before the commit"] = "a" in rig.in_table()
            commit(store)
            seen["after the commit"] = "a" in rig.in_table()

        monkeypatch.setattr(Store, "commit", looking)
        settle = TableWriter.settle

        def answered(table):
            seen["when it is answered"] = "a" in rig.in_table()
            settle(table)

        monkeypatch.setattr(TableWriter, "settle", answered)
        rig.add("a")
        assert seen == {"before the commit": False, "after the commit": False, "when it is answered": True}

    def test_a_commit_that_fails_publishes_nothing_and_leaves_all_usable(self, rig):
        rig.add("a")
        version = rig.reader.version
        rig.notes.clear()
        rig.failing["commit"] = StoreError("disk full")
        for _ in range(3):
            with pytest.raises(StoreError, match="disk full"):
                rig.add("b")
            with pytest.raises(StoreError, match="disk full"):
                rig.subject.commit(changes.remove, ["a"])
        assert "publish" not in rig.notes
        assert "published" not in rig.notes
        assert rig.reader.version == version
        rig.failing.clear()
        assert rig.state() == {"a": row("a")}
        for n in range(5):
            assert rig.add(f"c{n}") is True
        assert list(rig.state()) == ["a", *(f"c{n}" for n in range(5))]

    def test_staging_that_fails_commits_nothing(self, rig):
        rig.failing["stage"] = SegmentFullError("no room")
        with pytest.raises(SegmentFullError):
            rig.add("a")
        assert "commit" not in rig.notes
        rig.failing.clear()
        assert rig.state() == {}
        assert rig.add("a") is True
        assert rig.state() == {"a": row("a")}

    def test_what_changes_nothing_is_neither_committed_nor_published(self, rig):
        rig.add("a")
        rig.notes.clear()
        before = rig.reader.version, rig.subject.commits
        assert rig.add("a") is False
        assert rig.subject.commit(changes.remove, ["b"]) == []
        assert rig.subject.commit(changes.update_metagraph, []) == []
        assert (rig.reader.version, rig.subject.commits) == before
        assert "commit" not in rig.notes
        assert "published" not in rig.notes

    def test_a_meta_value_is_committed_and_not_published(self, rig):
        version = rig.reader.version
        rig.subject.commit(Step.set_meta, "k", 5)
        assert rig.subject.read(lambda store: store.meta("k")) == 5
        assert rig.reader.version == version
        assert "published" not in rig.notes

    def test_a_change_that_raises_is_undone(self, rig):
        def half(step: Step):
            changes.add(step, *prepare(row("half")))
            raise LookupError("in the middle")

        rig.add("a")
        with pytest.raises(LookupError):
            rig.subject.commit(half)
        assert rig.state() == {"a": row("a")}
        assert rig.subject.read(lambda store: store.events("half")) == []

    @pytest.mark.parametrize("count", [1, 999, 1000, 1001, 5000])
    def test_many_at_once_are_published_as_they_are_stored(self, rig, count):
        """From some size on the whole table is made anew."""
        for n in range(7):
            rig.add(f"old{n}")
        records = dict(prepare(row(f"new{n}", n)) for n in range(count))
        removed = rig.subject.commit(changes.replace_all, records)
        assert removed == [f"old{n}" for n in range(7)]
        assert list(rig.state()) == list(records)
        rig.subject.commit(changes.update_metagraph, [f"new{n}" for n in range(count)])
        rig.subject.commit(changes.update_metagraph, [f"new{n}" for n in range(0, count, 2)])
        assert rig.reader.get(b"\xff:origin") is not None
        rows = {row.hotkey: row for row in rig.store.rows()}
        for n in range(count):
            registered = rig.reader.flags(b"new%d" % n) >> 2
            assert registered == rows[f"new{n}"].registered

    def test_a_table_made_anew_keeps_what_did_not_change(self, rig):
        rig.subject.commit(changes.update_metagraph, ["away", "here"])
        rig.subject.commit(changes.update_metagraph, ["here"])
        for stamp in range(2):
            records = dict(prepare(row(f"new{n}", stamp)) for n in range(1000))
            rig.subject.commit(changes.replace_all, records)
            assert len(rig.state()) == 1000
            assert (rig.reader.flags(b"away"), rig.reader.flags(b"here")) == (Status.DEPARTED, Status.REGISTERED)
            assert rig.reader.get(b"\xff:origin") is not None


class Group:
    """Changes that are queued while a question keeps the thread busy, so that they go into one turn."""

    def __init__(self, rig):
        self.rig = rig
        self.threads = []
        self.outcomes = {}
        self.go_on = threading.Event()

    def __enter__(self):
        asked = threading.Event()
        self._start("busy", self.rig.subject.read, lambda _: (asked.set(), self.go_on.wait())[1])
        asked.wait()
        return self

    def _start(self, name, function, *args):
        def run():
            try:
                self.outcomes[name] = function(*args)
            except BaseException as error:
                self.outcomes[name] = error

        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()

    def queue(self, name, change, *args):
        before = len(self.rig.subject._queue)
        self._start(name, self.rig.subject.commit, change, *args)
        until(lambda: len(self.rig.subject._queue) > before)

    def add(self, hotkey, stamp=0, pad=0):
        self.queue(hotkey, changes.add, *prepare(row(hotkey, stamp, pad=pad)))

    def __exit__(self, *_):
        self.go_on.set()
        for each in self.threads:
            each.join()
        assert self.outcomes.pop("busy") is True


class TestTurns:
    def test_one_that_comes_alone_takes_its_own_turn(self, threaded):
        with ThreadPoolExecutor(1) as pool:
            own = pool.submit(threading.get_ident).result()
            assert pool.submit(threaded.subject.read, lambda _: threading.get_ident()).result() == own

    def test_the_main_thread_which_signals_interrupt_takes_none(self, threaded):
        assert threaded.subject.read(lambda _: threading.get_ident()) != threading.get_ident()

    def test_nobody_overtakes_those_that_wait(self, threaded):
        with Group(threaded) as group:
            group.add("a")
            group.queue("later", lambda step: list(step.store.written))
        assert group.outcomes == {"a": True, "later": ["a"]}

    def test_changes_that_come_together_share_one_commit(self, threaded):
        before = threaded.reader.version
        with Group(threaded) as group:
            for n in range(20):
                group.add(f"h{n}")
        assert group.outcomes == {f"h{n}": True for n in range(20)}
        assert (threaded.subject.commits, threaded.subject.changes) == (1, 20)
        assert list(threaded.state()) == [f"h{n}" for n in range(20)]
        assert threaded.reader.version == before + 1

    def test_changes_of_a_turn_see_each_other_in_order(self, threaded):
        with Group(threaded) as group:
            group.add("a", 1)
            group.queue("again", changes.add, *prepare(row("a", 2)))
            group.queue("gone", changes.remove, ["a"])
            group.queue("once more", changes.remove, ["a"])
            group.add("b")
        assert group.outcomes == {"a": True, "again": False, "gone": ["a"], "once more": [], "b": True}
        assert list(threaded.state()) == ["b"]

    def test_a_question_is_answered_with_what_is_committed(self, threaded):
        with Group(threaded) as group:
            group.add("a")
            before = len(threaded.subject._queue)
            group._start("question", threaded.subject.read, lambda store: store.get("a"))
            until(lambda: len(threaded.subject._queue) > before)
            threaded.failing["commit"] = StoreError("disk full")
        assert group.outcomes.pop("question") is None

    def test_one_that_raises_does_not_undo_the_others(self, threaded):
        def half(step):
            changes.add(step, *prepare(row("half")))
            changes.remove(step, ["before"])
            raise LookupError("in the middle")

        with Group(threaded) as group:
            group.add("before")
            group.queue("half", half)
            group.add("after")
        assert isinstance(group.outcomes.pop("half"), LookupError)
        assert group.outcomes == {"before": True, "after": True}
        assert list(threaded.state()) == ["before", "after"]
        assert threaded.subject.commits == 1

    def test_ordinals_of_one_that_raises_are_free_again(self, threaded):
        def half(step):
            changes.add(step, *prepare(row("half")))
            raise LookupError

        with Group(threaded) as group:
            group.add("a")
            group.queue("half", half)
            group.add("b")
        ordinals = [row.eliminated_ordinal for row in threaded.store.rows()]
        assert ordinals == [1, 2]
        assert list(threaded.state()) == ["a", "b"]

    def test_one_too_large_for_shared_memory_does_not_take_others_with_it(self, threaded):
        create = threaded.namespace.create_data

        def small(generation, size):
            if size > 4 << 20:
                raise SegmentFullError(f"no room for {size} bytes")
            return create(generation, size)

        threaded.namespace.create_data = small
        with Group(threaded) as group:
            group.add("a")
            many = dict(prepare(row(f"large{n}", pad=500_000)) for n in range(9))
            group.queue("large", changes.merge, many, "test")
            group.add("b")
        assert isinstance(group.outcomes.pop("large"), SegmentFullError)
        assert group.outcomes == {"a": True, "b": True}
        assert list(threaded.state()) == ["a", "b"]
        assert threaded.add("c") is True

    def test_one_with_which_the_store_fails_does_not_take_others_with_it(self, threaded):
        def full(step):
            changes.add(step, *prepare(row("half")))
            raise StoreError("disk full")

        with Group(threaded) as group:
            group.add("a")
            group.queue("full", full)
            group.add("b")
        assert isinstance(group.outcomes.pop("full"), StoreError)
        assert group.outcomes == {"a": True, "b": True}
        assert list(threaded.state()) == ["a", "b"]

    def test_one_that_cannot_be_staged_for_another_reason_does_not_take_others_with_it(
        self, threaded, monkeypatch
    ):
        """Whatever a mistake raises there, it is its own caller's."""

        def poisoned(entry):
            if entry.hotkey == "poison":
                raise ArithmeticError("a mistake")
            return row_entry(entry)

        row_entry = thread.row_entry
        monkeypatch.setattr(thread, "row_entry", poisoned)
        with Group(threaded) as group:
            group.add("a")
            group.add("poison")
            group.add("b")
        assert isinstance(group.outcomes.pop("poison"), ArithmeticError)
        assert group.outcomes == {"a": True, "b": True}
        assert list(threaded.state()) == ["a", "b"]

    def test_many_threads_share_commits(self, threaded):
        go, acknowledged = threading.Barrier(16), []

        def work(number):
            go.wait()
            for n in range(20):
                assert threaded.add(f"h{number}-{n}") is True
                acknowledged.append(f"h{number}-{n}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert threaded.subject.changes == len(acknowledged) == 320
        assert set(threaded.state()) == set(acknowledged)

    def test_a_change_asked_for_in_the_middle_of_another_one_is_refused(self, rig):
        refused = []

        def nested(step):
            changes.add(step, *prepare(row("a")))
            for ask in (lambda: rig.add("b"), lambda: rig.subject.read(Store.counts)):
                with pytest.raises(ShmelimError, match="in the middle of another"):
                    ask()
                refused.append(ask)

        rig.subject.commit(nested)
        assert len(refused) == 2
        assert list(rig.state()) == ["a"]


class TestFailures:
    @pytest.mark.parametrize("threaded", [True, False])
    def test_a_store_that_another_process_holds_refuses_all_that_wait_together(
        self, tmp_path, monkeypatch, threaded
    ):
        monkeypatch.setattr(opening, "BUSY_TIMEOUT", 1.0)
        rig = Rig(monkeypatch, threaded=threaded, directory=tmp_path)
        with closing(rig.subject), closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as holder:
            rig.add("a")
            rig.notes.clear()
            holder.execute("BEGIN IMMEDIATE")
            refused = []

            def add(n):
                try:
                    rig.add(f"h{n}")
                except StoreError as error:
                    refused.append(str(error))

            threads = [threading.Thread(target=add, args=(n,)) for n in range(6)]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
            assert len(set(refused)) == 1
            assert len(refused) == 6
            assert "locked" in refused[0]
            (problem,) = rig.subject._problems.standing()
            assert problem.name == "commit_failed"
            assert time.strftime("%Y-%m-%dT", time.gmtime()) in problem.text, "when the last good commit was"
            # A loaded machine may have let some of them come after the failure.
            assert rig.notes.count("begin") < 6
            holder.execute("ROLLBACK")
            assert rig.add("b") is True
            assert rig.subject._problems.standing() == []
            assert list(rig.state()) == ["a", "b"]

    def test_those_that_come_while_it_fails_are_told_without_another_try(self, threaded, monkeypatch):
        tries, refused = [], []

        def busy(_store):
            tries.append(1)
            if len(tries) == 1:
                until(lambda: len(threaded.subject._queue) == 5)
            raise StoreError("database is locked")

        def add(n):
            with pytest.raises(StoreError, match="locked"):
                threaded.add(f"h{n}")
            refused.append(n)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "begin", busy)
            threads = [threading.Thread(target=add, args=(n,)) for n in range(6)]
            threads[0].start()
            until(lambda: tries)
            for each in threads[1:]:
                each.start()
            for each in threads:
                each.join()
        assert (len(tries), sorted(refused)) == (1, list(range(6)))
        assert threaded.add("after") is True

    def test_those_that_waited_while_the_store_failed_are_told_and_the_next_is_tried(self, threaded):
        def fails(_step):
            threaded.store.rollback()  # as a full disk does by itself
            raise StoreError("disk full")

        with Group(threaded) as group:
            group.queue("fails", fails)
            group.add("with it")
        assert [str(error) for error in group.outcomes.values()] == ["disk full"] * 2
        assert threaded.add("after") is True
        assert list(threaded.state()) == ["after"]


class TestClose:
    @pytest.mark.parametrize("threaded", [True, False])
    def test_changes_come_in_while_it_closes(self, tmp_path, monkeypatch, threaded):
        """Each is either acknowledged and in the store, or refused and not there."""
        rig = Rig(monkeypatch, threaded=threaded, directory=tmp_path)
        acknowledged, refused = set(), {}

        def work(number):
            for n in range(10_000):
                hotkey = f"h{number}-{n}"
                try:
                    rig.add(hotkey)
                except StoreError as error:
                    refused[hotkey] = str(error)
                    return
                acknowledged.add(hotkey)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for each in threads:
            each.start()
        until(lambda: len(acknowledged) >= 50)
        rig.subject.close()
        rig.subject.close()
        for each in threads:
            each.join()
        assert len(refused) == 6
        assert all("shut down" in message for message in refused.values())
        with Store.open(tmp_path) as store:
            assert {hotkey for hotkey, _ in store.eliminated()} == acknowledged

    def test_a_change_or_question_after_it_is_refused(self, rig):
        rig.subject.close()
        with pytest.raises(StoreError, match="shut down"):
            rig.add("a")
        with pytest.raises(StoreError, match="shut down"):
            rig.subject.read(Store.counts)

    def test_a_forked_child_reads_as_of_the_fork_with_one_warning_and_changes_nothing(self, rig, caplog):
        rig.add("a")

        def in_child():
            assert caplog.messages == []
            assert [rig.reader.flags(b"a") for _ in range(3)] == [1, 1, 1]
            (message,) = caplog.messages
            assert "as it was at the fork" in message
            for ask in (lambda: rig.add("b"), lambda: rig.subject.read(Store.counts)):
                with pytest.raises(StoreError, match="belongs to process"):
                    ask()
            rig.subject.close()
            return list(rig.in_table())

        assert call(in_child) == ["a"]
        assert rig.add("b") is True
        assert rig.reader.flags(b"a") == 1
        assert caplog.messages == []


def _at_line(number, files, act):
    """From now on count the lines that this thread runs in some files; at one of them, act.

    But for the function with the lock: a trace function can come between a ``with`` block and its end, which no
    signal handler does.
    """
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
        code = frame.f_code
        return inside if Path(code.co_filename).name in files and code.co_name != "_have" else None

    sys.settrace(outside)


def interrupt(*_):
    raise KeyboardInterrupt


_FILES = {"thread.py", "changes.py", "store.py", "database.py", "history.py", "writer.py"}


class TestInterrupts:
    """Ctrl-C: in direct mode it comes in the middle of the turn, else only the caller's waiting is interrupted."""

    def test_inside_a_change_undoes_it(self, rig):
        def interrupted(step):
            changes.add(step, *prepare(row("half")))
            raise KeyboardInterrupt

        rig.add("a")
        with pytest.raises(KeyboardInterrupt):
            rig.subject.commit(interrupted)
        assert rig.state() == {"a": row("a")}
        assert rig.add("b") is True
        assert list(rig.state()) == ["a", "b"]

    def test_right_after_the_commit_it_is_published(self, rig, monkeypatch):
        commit = Store.commit

        def interrupted(store):
            commit(store)
            raise KeyboardInterrupt

        rig.add("a")
        with monkeypatch.context() as patch:
            patch.setattr(Store, "commit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                rig.add("b")
        assert list(rig.state()) == ["a", "b"]
        assert rig.notes[-1] == "published"

    def test_while_it_waits_for_its_turn_it_is_not_carried_out_later(self, threaded):
        main = threading.get_ident()
        before = signal.signal(signal.SIGUSR1, interrupt)
        try:
            with Group(threaded) as group:
                group.add("other")

                def interrupt_main():
                    until(lambda: len(threaded.subject._queue) > 1)
                    signal.pthread_kill(main, signal.SIGUSR1)

                threading.Thread(target=interrupt_main).start()
                with pytest.raises(KeyboardInterrupt):
                    threaded.add("a")
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert group.outcomes == {"other": True}
        assert list(threaded.state()) == ["other"]

    @pytest.mark.parametrize("twice", [False, True])
    def test_at_any_line_leaves_every_change_whole(self, rig, twice):
        """The caller is interrupted at each line of its call in turn, and perhaps again in what mends that."""
        number, interrupted = 0, 0
        while True:
            number += 1
            rig.subject.commit(changes.replace_all, dict(prepare(row(hotkey)) for hotkey in ("stays", "goes")))
            _at_line(number, _FILES, interrupt)
            try:
                rig.subject.commit(changes.replace_all, dict(prepare(row(hotkey)) for hotkey in ("stays", "own")))
                reached = False
            except KeyboardInterrupt:
                reached = True
            finally:
                sys.settrace(None)
            if twice:
                _at_line(random.randrange(1, 60), _FILES, interrupt)
                try:
                    rig.add("stays")
                except KeyboardInterrupt:
                    pass
                finally:
                    sys.settrace(None)
            rig.add("stays")
            assert rig.state().keys() in ({"stays", "own"}, {"stays", "goes"}), number
            interrupted += reached
            if not reached:
                break
        assert interrupted > (100 if rig.subject._thread is None else 0)
