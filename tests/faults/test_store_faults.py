"""The store when the world is unkind: damaged files, a full disk, no permission, death at any moment."""

import errno
import os
import pickle
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import pytest

from shmelim import EliminationManagerServer
from shmelim.eliminations.files import format as files
from shmelim.eliminations.record import encode, generate_row, normalise
from shmelim.eliminations.starting import beginning
from shmelim.eliminations.store import schema
from shmelim.eliminations.store.history import Change
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import DamagedStoreError, StoreError
from shmelim.system.durable import move_aside

RECORD = encode(normalise(generate_row("h", 1.0, "ZOMBIE", 5, return_info={"x": "y" * 400})))


def read_events(directory):
    with Store.read_only(directory) as store:
        return store.events()


def in_child(work):
    """Run a function in a forked child and return or raise what it does."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        try:
            outcome = (True, work())
        except BaseException as error:
            outcome = (False, error)
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(pickle.dumps(outcome))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    os.waitpid(pid, 0)
    worked, value = pickle.loads(data)
    if worked:
        return value
    raise value


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    directory = tmp_path_factory.mktemp("filled")
    with Store.open(directory) as store, store.transaction():
        store.put_eliminations([(f"hotkey-{n}", RECORD + b"%d" % n) for n in range(300)])
        for n in range(50):
            store.put_departed(f"hotkey-{n * 3}", n)
            store.add_events([Change("add", f"hotkey-{n}")])
    return directory


@pytest.fixture
def damaged(filled, tmp_path):
    shutil.copy(filled / FILE_NAME, tmp_path)
    return tmp_path / FILE_NAME


def read_all(directory):
    """Everything that a server reads at its start, and a change."""
    with Store.open(directory) as store:
        store.check()
        found = (list(store.rows()), list(store.eliminated()), list(store.departed()), store.events(limit=None))
        with store.transaction():
            store.put_elimination("another", RECORD)
        return found


class TestDamage:
    @pytest.mark.parametrize("keep", [0, 1, 50, 100, 2000, 4096, 5000, 40_960])
    def test_truncated(self, damaged, keep):
        os.truncate(damaged, keep)
        with pytest.raises(DamagedStoreError, match=r"shmelim\.sqlite"):
            read_all(damaged.parent)

    @pytest.mark.parametrize("junk", [b"\0" * 4096, b"\xff" * 100, b'{"eliminations": []}'])
    def test_overwritten_header(self, damaged, junk):
        with damaged.open("r+b") as file:
            file.write(junk)
        with pytest.raises(DamagedStoreError) as caught:
            read_all(damaged.parent)
        assert "aside" in caught.value.hint
        with pytest.raises(DamagedStoreError):
            read_events(damaged.parent)

    @pytest.mark.parametrize("seed", range(20))
    def test_flipped_pages_never_raise_anything_else(self, damaged, seed):
        rng = random.Random(seed)
        data = bytearray(damaged.read_bytes())
        page = 4096 * rng.randrange(1, len(data) // 4096)
        data[page : page + 4096] = bytes(byte ^ 0xFF for byte in data[page : page + 4096])
        damaged.write_bytes(data)
        with pytest.raises(DamagedStoreError):
            read_all(damaged.parent)

    def test_flipped_bits_are_noticed_or_change_nothing_that_is_published(self, filled, tmp_path):
        whole = (filled / FILE_NAME).read_bytes()
        outcomes = {"noticed": 0, "read": 0}
        for seed in range(60):
            directory = tmp_path / str(seed)
            directory.mkdir()
            rng = random.Random(seed)
            data = bytearray(whole)
            for _ in range(seed % 5):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            (directory / FILE_NAME).write_bytes(data)
            try:
                found = read_all(directory)
            except StoreError:
                outcomes["noticed"] += 1
                continue
            outcomes["read"] += 1
            if seed == 0:  # nothing is flipped in the first one
                truth = found
                assert [len(part) for part in truth] == [300, 300, 50, 50]
            # SQLite compares what is indexed, records carry a checksum; a time or an event's text has neither.
            assert found[1] == truth[1], f"seed {seed}"
            assert [hotkey for hotkey, _ in found[2]] == [hotkey for hotkey, _ in truth[2]], f"seed {seed}"
        assert min(outcomes.values()) >= 5, outcomes

    def test_a_bit_flipped_inside_a_record_is_noticed(self, tmp_path):
        record = b"a record of some length, as it stands on the page"
        with Store.open(tmp_path) as store, store.transaction():
            store.put_elimination("hotkey", record)
        path = tmp_path / "shmelim.sqlite"
        data = path.read_bytes()
        assert data.count(record) == 1
        path.write_bytes(data.replace(record, record.replace(b"length", b"lengtj")))
        with Store.open(tmp_path) as store:
            store.check()
            for read in (store.rows, store.eliminated, lambda: [store.get("hotkey")]):
                with pytest.raises(DamagedStoreError, match="'hotkey'"):
                    list(read())

    @pytest.mark.parametrize("wrong", ["record = 'text'", "checksum = NULL", "checksum = 1.5", "record = 17"])
    def test_a_row_of_wrong_types_is_damage(self, tmp_path, wrong):
        with Store.open(tmp_path) as store, store.transaction():
            store.put_elimination("hotkey", b"record")
        with closing(sqlite3.connect(tmp_path / FILE_NAME)) as db:
            db.execute("PRAGMA ignore_check_constraints=ON")
            db.execute(f"UPDATE hotkeys SET {wrong}")
            db.commit()
        with Store.open(tmp_path) as store:
            for read in (store.rows, store.eliminated, lambda: [store.get("hotkey")], store.check_records):
                with pytest.raises(DamagedStoreError, match="'hotkey'"):
                    list(read())

    def test_start_after_a_move_aside(self, damaged):
        damaged.write_bytes(b"junk" * 2000)
        with pytest.raises(DamagedStoreError):
            Store.open(damaged.parent)
        aside = move_aside(damaged)
        with Store.open(damaged.parent) as store:
            assert list(store.rows()) == []
        assert aside.read_bytes() == b"junk" * 2000

    def test_hotkey_that_is_no_text(self, tmp_path):
        with Store.open(tmp_path) as store:
            store._db.execute("INSERT INTO hotkeys (hotkey, registered) VALUES (CAST(x'ff' AS TEXT), 1)")
            with pytest.raises(DamagedStoreError, match="UTF-8"):
                list(store.rows())

    def test_value_that_cannot_be_decoded(self, tmp_path):
        with Store.open(tmp_path) as store:
            store._db.execute("INSERT INTO meta VALUES ('k', x'c1')")
            with pytest.raises(DamagedStoreError, match="'k'"):
                store.meta("k")


class TestFullDisk:
    def full(self, directory):
        store = Store.open(directory)
        with store.transaction():
            store.put_eliminations([(f"h{n}", RECORD) for n in range(20)])
        pages = store._db.execute("PRAGMA page_count").fetchone()[0]
        store._db.execute(f"PRAGMA max_page_count={pages + 2}")
        return store

    def test_refused_transaction_is_undone(self, tmp_path):
        with self.full(tmp_path) as store:
            before = list(store.rows())
            with pytest.raises(StoreError, match="SQLITE_FULL") as caught, store.transaction():
                store.put_eliminations([(f"new{n}", RECORD) for n in range(500)])
            assert "room" in caught.value.hint
            assert not isinstance(caught.value, DamagedStoreError)
            assert not store.in_transaction
            assert list(store.rows()) == before
            with store.transaction():
                assert store.remove_eliminations(["h3"]) == {"h3": RECORD}
                store.put_elimination("h3", RECORD)
            assert store.get("h3").eliminated_ordinal == 21
            store.check()

    def test_inside_a_savepoint(self, tmp_path):
        with self.full(tmp_path) as store:
            with pytest.raises(StoreError, match="SQLITE_FULL"), store.transaction(), store.savepoint():
                store.put_eliminations([(f"new{n}", RECORD) for n in range(500)])
            assert not store.in_transaction
            assert len(list(store.eliminated())) == 20
            store.begin()
            store.rollback()

    def test_commit_that_fails_leaves_no_transaction(self, tmp_path):
        def work():
            store = Store.open(tmp_path)
            with store.transaction():
                store.put_elimination("old", RECORD)
            size = (tmp_path / f"{FILE_NAME}-wal").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5000, resource.RLIM_INFINITY))
            store.begin()
            store.put_eliminations([(f"new{n}", RECORD) for n in range(100)])
            with pytest.raises(StoreError) as caught:
                store.commit()
            state = (store.in_transaction, [row.hotkey for row in store.rows()], str(caught.value))
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            with store.transaction():
                store.put_elimination("later", RECORD)
            ordinal = store.get("later").eliminated_ordinal
            store.close()
            return *state, ordinal

        in_transaction, hotkeys, message, ordinal = in_child(work)
        assert not in_transaction
        assert hotkeys == ["old"]
        assert "SQLITE_" in message
        assert ordinal == 2
        with Store.open(tmp_path) as store:
            store.check()
            assert [hotkey for hotkey, _ in store.eliminated()] == ["old", "later"]

    # The last limit cuts the last write short, of which the system says only how far it came.
    @pytest.mark.parametrize("limit", [0, 100, 4096, 300_000, -2])
    def test_json_file_keeps_its_old_content(self, tmp_path, limit):
        path = tmp_path / "eliminations.json"
        files.write_eliminations(path, [RECORD])
        old = path.read_bytes()
        told = []
        files.write_eliminations(tmp_path / "whole", [RECORD] * 3000)
        whole = (tmp_path / "whole").stat().st_size
        (tmp_path / "whole").unlink()

        def work():
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit % whole, resource.RLIM_INFINITY))
            files.write_eliminations(path, [RECORD] * 3000, before_rename=told.append)

        with pytest.raises(StoreError, match="could not be written"):
            in_child(work)
        assert path.read_bytes() == old
        assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_new_store_that_cannot_be_made_whole_is_none(tmp_path, monkeypatch):
    """What stands in its log comes into the file when it is closed, which tells nobody of errors."""
    install, others = schema.install, []

    def install_and_hold(db, path):
        install(db, path)
        other = sqlite3.connect(path)
        others.append(other)
        other.execute("SELECT count(*) FROM sqlite_master").fetchone()

    monkeypatch.setattr(schema, "install", install_and_hold)
    with pytest.raises(StoreError, match="could not be folded"):
        Store.open(tmp_path)
    monkeypatch.undo()
    others.pop().close()
    assert not (tmp_path / FILE_NAME).exists()
    with Store.open(tmp_path) as store:
        store.check()


class TestNoPermission:
    @pytest.fixture
    def directory(self):
        # Not below pytest's own directory, which only its owner may enter.
        made = Path(tempfile.mkdtemp())
        yield made
        made.chmod(0o700)
        shutil.rmtree(made)

    @staticmethod
    def as_nobody(work):
        def dropped():
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            return work()

        return in_child(dropped)

    def test_unwritable_directory(self, directory):
        directory.chmod(0o555)
        for place in (directory, directory / "state"):
            with pytest.raises(StoreError, match="cannot be used: Permission denied") as caught:
                self.as_nobody(lambda place=place: Store.open(place))
            assert "writable" in caught.value.hint
            with pytest.raises(StoreError, match="Permission denied"):
                self.as_nobody(lambda place=place: files.write_eliminations(directory / "e.json", []))

    def test_history_where_nothing_may_be_written(self, directory):
        with Store.open(directory) as store, store.transaction():
            store.add_events([Change("add", "a")])
        (directory / FILE_NAME).chmod(0o444)
        directory.chmod(0o555)
        assert [event.action for event in self.as_nobody(lambda: read_events(directory))] == ["add"]

    def test_a_copy_of_a_killed_servers_store_is_read_with_its_log_where_nothing_may_be_written(self, directory):
        with tempfile.TemporaryDirectory() as served, Store.open(Path(served)) as store:
            with store.transaction():
                store.add_events([Change("add", "a")])
            for name in (FILE_NAME, f"{FILE_NAME}-wal"):
                shutil.copy(Path(served, name), directory / name)
                (directory / name).chmod(0o444)
        directory.chmod(0o555)
        assert [event.action for event in self.as_nobody(lambda: read_events(directory))] == ["add"]
        assert {path.name for path in directory.iterdir()} == {FILE_NAME, f"{FILE_NAME}-wal"}

    def test_unreadable_files(self, directory):
        with Store.open(directory):
            pass
        (directory / "e.json").write_text("[]")
        for name in (FILE_NAME, "e.json"):
            (directory / name).chmod(0)
        directory.chmod(0o555)
        with pytest.raises(StoreError, match="Permission denied"):
            self.as_nobody(lambda: files.read_eliminations(directory / "e.json"))
        with pytest.raises(StoreError, match="cannot be read: Permission denied; this process runs as user 65534"):
            self.as_nobody(lambda: read_events(directory))


def die_at(directory, acknowledged, seed):
    """Fork a child that streams transactions and reports each; kill it after so many. Returns the reports."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        rng = random.Random(seed)
        store = Store.open(directory, "process")
        for n in range(1_000_000):
            with store.transaction():
                store.put_elimination(f"h{n % 50}", b"%d" % n)
                if rng.random() < 0.2:
                    store.put_eliminations([(f"b{n}-{k}", b"%d" % n) for k in range(rng.randrange(200))])
                store.add_events([Change("add", f"h{n % 50}", note=str(n))])
            os.write(writer, b"%d\n" % n)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        reports = [int(next(pipe)) for _ in range(acknowledged)]
        os.kill(pid, signal.SIGKILL)
        reports += map(int, pipe)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    return reports


@pytest.mark.parametrize("seed", range(6))
def test_killed_writer_loses_nothing_that_it_acknowledged(tmp_path, seed):
    reports = die_at(tmp_path, 20 + 37 * seed, seed)
    with Store.open(tmp_path) as store:
        store.check()
        notes = sorted(int(event.note) for event in store.events(limit=None))
        assert notes[: len(reports)] == reports
        # At most the one that was committed and not yet reported; never a part of one.
        last = notes[-1]
        assert last - reports[-1] <= 1
        rows = dict(store.eliminated())
        for n in range(max(0, last - 49), last + 1):
            assert rows[f"h{n % 50}"] == b"%d" % n
        ordinals = [row.eliminated_ordinal for row in store.rows()]
        assert len(set(ordinals)) == len(ordinals)
        with store.transaction():
            store.put_elimination("next", b"1")
        assert store.get("next").eliminated_ordinal == max(ordinals) + 1


def test_killed_file_writer_leaves_the_old_file_and_the_next_one_cleans_up(tmp_path):
    path = tmp_path / "eliminations.json"
    files.write_eliminations(path, [RECORD])
    old = path.read_bytes()
    pid = os.fork()
    if pid == 0:
        files.write_eliminations(path, [RECORD] * 5, before_rename=lambda _: os.kill(os.getpid(), signal.SIGKILL))
    os.waitpid(pid, 0)
    assert path.read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 2
    files.write_eliminations(path, [RECORD])
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_forked_child_is_refused_and_does_no_harm(tmp_path):
    with Store.open(tmp_path) as store:
        with store.transaction():
            store.put_elimination("a", b"1")
        with pytest.raises(StoreError, match="after the fork"):
            in_child(store.begin)
        in_child(store.close)
        with store.transaction():
            store.put_elimination("b", b"2")
        store.check()
    with Store.open(tmp_path) as store:
        assert list(store.eliminated()) == [("a", b"1"), ("b", b"2")]


def test_a_pipe_in_the_place_of_the_store_is_not_waited_for_by_who_only_reads(tmp_path):
    os.mkfifo(tmp_path / FILE_NAME)
    with pytest.raises(DamagedStoreError, match="not a file"):
        Store.read_only(tmp_path)


def test_a_directory_in_the_place_of_the_store_is_refused_and_left_as_it_is(tmp_path):
    place = tmp_path / "state" / FILE_NAME
    place.mkdir(parents=True)
    place.chmod(0o755)
    with pytest.raises(StoreError, match="not a file"):
        EliminationManagerServer(None, tmp_path / "state")
    assert place.is_dir()
    assert place.stat().st_mode & 0o777 == 0o755


def test_a_page_that_the_disk_does_not_give_for_a_moment_has_no_store_put_aside(tmp_path, monkeypatch):
    with EliminationManagerServer(state_dir=tmp_path, registry=None) as server:
        server.sync_eliminations_rpc([])
    ask = Store._ask

    def not_given(store, sql, *args):
        if "integrity_check" in sql:
            return [("Tree 5 page 13 cell 0: Page 13: unable to get the page. error code=266",)]
        return ask(store, sql, *args)

    with monkeypatch.context() as disk:
        disk.setattr(Store, "_ask", not_given)
        with pytest.raises(StoreError, match="cannot be read through") as caught:
            EliminationManagerServer(state_dir=tmp_path, registry=None)
    assert not isinstance(caught.value, DamagedStoreError)
    with EliminationManagerServer(state_dir=tmp_path, registry=None) as server:
        assert server.health_check_rpc()["problems"] == []


def test_a_start_whose_file_system_does_not_answer_names_the_directory(tmp_path, monkeypatch):
    def gone(*_args):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), "state")

    monkeypatch.setattr(beginning, "name_kept", gone)
    with pytest.raises(StoreError, match=r"state directory .*/state cannot be used: Stale file handle"):
        EliminationManagerServer(state_dir=tmp_path / "state", registry=None)


SYNC_FAILS = r"""
#include <errno.h>
#include <unistd.h>
int fail_syncs;
int fdatasync(int fd) { (void)fd; return fail_syncs ? (errno = EIO, -1) : 0; }
int fsync(int fd) { (void)fd; return fail_syncs ? (errno = EIO, -1) : 0; }
"""
CHANGES_THAT_ARE_NOT_SYNCED = """
import ctypes, os, sys
from serving import row
from shmelim import EliminationManagerServer
from shmelim.errors import StoreError
syncs = ctypes.c_int.in_dll(ctypes.CDLL(sys.argv[2]), "fail_syncs")
with EliminationManagerServer(state_dir=sys.argv[1], registry=None, files="off") as server:
    server.sync_eliminations_rpc([row("a"), row("b")])
    syncs.value = 1
    refused = 0
    for change in (lambda: server.add_elimination_rpc("c", row("c")), lambda: server.remove_elimination_rpc("a")):
        try:
            change()
        except StoreError:
            refused += 1
    assert server.get_eliminated_hotkeys_rpc() == {"a", "b"}
    if sys.argv[3] == "killed":
        os._exit(refused)
sys.exit(refused)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="makes a library that has fsync fail")
@pytest.mark.parametrize("how", ["killed", "closed"])
def test_a_change_that_was_refused_for_want_of_a_sync_is_not_there_after_a_restart(tmp_path, how):
    library, state = tmp_path / "sync_fails.so", tmp_path / "state"
    subprocess.run(["cc", "-shared", "-fPIC", "-xc", "-", "-o", library], input=SYNC_FAILS.encode(), check=True)
    done = subprocess.run(
        [sys.executable, "-c", CHANGES_THAT_ARE_NOT_SYNCED, state, library, how],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(Path(__file__).parents[1])},
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    with EliminationManagerServer(state_dir=state, registry=None, files="off") as server:
        assert server.get_eliminated_hotkeys_rpc() == {"a", "b"}
