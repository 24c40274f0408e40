"""A recovery of a damaged store that ends in the middle: the next start has every acknowledged change."""

import errno
import os
import random
import shutil
import socket
import sys

import pytest
from crashing import Child, Counter, kill_self, package_files
from serving import listing, row, state_in_store, state_in_table

from shmelim import EliminationManagerServer, EliminationReader
from shmelim.eliminations.files import mirror
from shmelim.eliminations.starting import replacement
from shmelim.eliminations.store.history import Change
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import DamagedStoreError, StoreError
from shmelim.shm import SharedNamespace

_TRACED = frozenset(
    package_files(
        "eliminations/starting/recovery.py",
        "eliminations/starting/replacement.py",
        "eliminations/store/database.py",
        "eliminations/store/opening.py",
        "eliminations/store/schema.py",
        "eliminations/files/format.py",
        "system/durable.py",
    )
)
_STRIDE = 13


class _InterruptedError(BaseException):
    """As Ctrl-C, or what a signal handler raises."""


def _interrupt():
    raise _InterruptedError


def start(name, state_dir, **options):
    options.setdefault("durability", "process")
    return EliminationManagerServer(SharedNamespace(name), state_dir, **options)


def left_in(state_dir):
    """Every file with its content, but for the lock, which names whoever tried last."""
    return {name: content for name, content in listing(state_dir).items() if name != "lock"}


def prepare(name, state_dir, files="lagged"):
    """A damaged store, and a table with acknowledged changes that no file shows."""

    def run():
        mirror._COALESCE = 1e6
        server = start(name, state_dir, files=files)
        server.sync_eliminations_rpc([row(f"h{n}", n) for n in range(6)])
        server.save_eliminations_rpc()
        server.update_metagraph_rpc(["m1", "m2"])
        server.update_metagraph_rpc(["m2"])
        server.add_elimination_rpc("late", row("late", 7))
        server.remove_elimination_rpc("h2")
        kill_self()

    with Child(run) as child:
        assert child.wait() == -9
    with Store.open(state_dir):
        pass  # the log is folded in, so that damage to the file matters
    with (state_dir / FILE_NAME).open("r+b") as file:
        file.write(b"\xff" * 100)
    return state_in_table(EliminationReader(name))


def at_line(number, act, count):
    """From now on count the lines of recovery that this thread runs; at one of them, act."""

    def inside(_frame, event, _arg):
        if event == "line":
            count.value += 1
            if count.value == number:
                act()
        return inside

    def outside(frame, _event, _arg):
        wanted = frame.f_code.co_filename in _TRACED and not frame.f_code.co_name.startswith("<")
        return inside if wanted else None

    sys.settrace(outside)


def unfinished(name, state_dir, number, act, files):
    """Start, and have recovery ended at a line; returns how many lines there were."""
    count = Counter()

    def run():
        at_line(number, act, count)
        try:
            start(name, state_dir, files=files)
        except _InterruptedError:
            pass
        finally:
            sys.settrace(None)
        kill_self()

    with Child(run) as child:
        assert child.wait() == -9
    return count.value


@pytest.mark.long
@pytest.mark.parametrize("files", ["current", "off"])
@pytest.mark.parametrize("act", [kill_self, _interrupt])
def test_at_some_lines_with_shared_memory(new_name, tmp_path, act, files):
    number = random.randrange(1, _STRIDE + 1)
    print(f"every {_STRIDE}th line from {number}")
    # The line after the last: until a start gets to its end.
    while True:
        name, state_dir = new_name(), tmp_path / f"{number}"
        before = prepare(name, state_dir, files)
        reached = unfinished(name, state_dir, number, act, files)
        with start(name, state_dir, files=files) as server:
            assert state_in_table(server.reader) == before, f"line {number}"
        assert state_in_store(state_dir) == before, f"line {number}"
        assert not (state_dir / ".rebuilding").exists()
        SharedNamespace(name).remove()
        shutil.rmtree(state_dir)
        if reached < number:
            break
        number += _STRIDE
    assert reached > 100


def die_between_the_renames(name, state_dir, files="current"):
    def run():
        move_aside = replacement.move_aside
        replacement.move_aside = lambda *args: (move_aside(*args), kill_self())
        start(name, state_dir, files=files)

    with Child(run) as child:
        assert child.wait() == -9
    assert not (state_dir / FILE_NAME).exists()


@pytest.fixture
def state_dir(tmp_path):
    return tmp_path / "state"


class TestBetweenTheTwoRenames:
    @pytest.mark.parametrize("files", ["current", "off"])
    def test_the_finished_replacement_is_used(self, table_name, state_dir, files):
        before = prepare(table_name, state_dir, files)
        die_between_the_renames(table_name, state_dir, files)
        SharedNamespace(table_name).remove()
        with start(table_name, state_dir, files=files) as server:
            assert state_in_table(server.reader) == before

    def test_shared_memory_is_used_where_the_replacement_is_gone(self, table_name, state_dir):
        before = prepare(table_name, state_dir)
        die_between_the_renames(table_name, state_dir)
        shutil.rmtree(state_dir / ".rebuilding")
        with start(table_name, state_dir) as server:
            assert state_in_table(server.reader) == before

    def test_the_files_are_used_where_both_are_gone(self, table_name, state_dir):
        prepare(table_name, state_dir)
        die_between_the_renames(table_name, state_dir)
        shutil.rmtree(state_dir / ".rebuilding")
        SharedNamespace(table_name).remove()
        with start(table_name, state_dir) as server:
            assert server.get_eliminated_hotkeys_rpc() == {f"h{n}" for n in range(6)}

    def test_with_nothing_left_a_start_is_refused_until_the_damaged_store_is_moved_away(
        self, table_name, tmp_path, state_dir
    ):
        prepare(table_name, state_dir, "off")
        die_between_the_renames(table_name, state_dir, "off")
        shutil.rmtree(state_dir / ".rebuilding")
        SharedNamespace(table_name).remove()
        before = left_in(state_dir)
        for _ in range(2):
            with pytest.raises(DamagedStoreError, match="no other record") as caught:
                start(table_name, state_dir, files="off")
            assert f"remove {FILE_NAME}-wal and -shm first" in caught.value.hint
            assert f"move every {FILE_NAME}* out of the directory" in caught.value.hint
            assert left_in(state_dir) == before
        (tmp_path / "elsewhere").mkdir()
        for path in state_dir.glob(f"{FILE_NAME}*"):
            path.rename(tmp_path / "elsewhere" / path.name)
        with start(table_name, state_dir, files="off") as server:
            assert server.get_eliminated_hotkeys_rpc() == set()

    def test_the_log_of_the_damaged_store_is_not_replayed(self, table_name, state_dir):
        before = prepare(table_name, state_dir)
        die_between_the_renames(table_name, state_dir)
        (state_dir / f"{FILE_NAME}-wal").write_bytes(os.urandom(9000))
        with start(table_name, state_dir) as server:
            assert state_in_table(server.reader) == before
        assert state_in_store(state_dir) == before


def test_a_replacement_that_cannot_be_written_leaves_the_damaged_store_in_its_place(
    table_name, state_dir, monkeypatch
):
    before = prepare(table_name, state_dir)
    stood = left_in(state_dir)

    def full(*_args):
        raise StoreError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "commit", full)
        with pytest.raises(StoreError, match="disk full"):
            start(table_name, state_dir)
    assert left_in(state_dir) == stood
    with start(table_name, state_dir) as server:
        assert state_in_table(server.reader) == before


def test_a_replacement_that_cannot_be_forgotten_refuses_the_start(table_name, state_dir, monkeypatch):
    """Left there, it would take the place of a later state that is damaged."""
    with start(table_name, state_dir) as server:
        server.add_elimination_rpc("a", row("a"))
    place = state_dir / ".rebuilding"
    place.mkdir()
    shutil.copy(state_dir / FILE_NAME, place)

    def refuse(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "rmdir", refuse)
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(StoreError, match=r"\.rebuilding cannot be removed"):
        start(table_name, state_dir)
    monkeypatch.undo()
    start(table_name, state_dir).close()
    assert not place.exists()


def test_a_replacement_is_forgotten_when_the_store_is_whole_again(table_name, state_dir):
    prepare(table_name, state_dir)
    replacement.build(state_dir, lambda step: step.store.add_events([Change("recover")]))
    backup = state_dir.parent / "backup"
    with Store.open(backup) as store, store.transaction():
        store.add_events([Change("backup")])
    (backup / FILE_NAME).replace(state_dir / FILE_NAME)
    with start(table_name, state_dir, files="off", replace_published=True) as server:
        assert server.get_history_rpc()[-1]["action"] == "backup"
    assert not replacement.is_finished(state_dir)


def something_else(kind, path):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            os.chdir(path.parent)  # the path may be too long for a socket
            bound.bind(path.name)
    elif kind == "directory":
        path.mkdir()
    elif kind == "file":
        path.write_text("x")
    else:
        path.symlink_to("elsewhere")


@pytest.mark.parametrize("is_damaged", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "socket", "directory", "file", "link"])
@pytest.mark.parametrize("name", [".rebuilding", ".rebuilding.part", "-wal", "-shm", "-journal"])
def test_something_else_under_a_name_that_is_needed_is_refused_by_name_and_not_waited_for(
    table_name, state_dir, monkeypatch, name, kind, is_damaged
):
    is_wanted = kind == ("directory" if name.startswith(".") else "file")
    with EliminationManagerServer(None, state_dir) as server:
        server.add_elimination_rpc("a", row("a"))
    monkeypatch.chdir(state_dir)
    if is_damaged:
        (state_dir / FILE_NAME).write_bytes(b"x" * 4096)
    place = state_dir / (name if name.startswith(".") else FILE_NAME + name)
    something_else(kind, place)
    if is_wanted:
        EliminationManagerServer(None, state_dir).close()
        return
    with pytest.raises(StoreError, match="is not a") as caught:
        EliminationManagerServer(None, state_dir)
    assert str(place) in str(caught.value)
    assert caught.value.hint == "move it away"
    assert os.path.lexists(place)
    if not name.startswith(".") and not is_damaged:
        with pytest.raises(StoreError, match="is not a file"), Store.read_only(state_dir):
            pass
    place.rmdir() if kind == "directory" else place.unlink()
    with EliminationManagerServer(None, state_dir) as server:
        assert server.get_eliminated_hotkeys_rpc() == {"a"}


def test_a_damaged_store_behind_a_link_is_not_rebuilt_in_the_links_place(state_dir, tmp_path):
    with EliminationManagerServer(None, state_dir) as server:
        server.add_elimination_rpc("a", row("a"))
    store, there = state_dir / FILE_NAME, tmp_path / "volume.sqlite"
    there.write_bytes(b"x" * 4096)
    store.unlink()
    store.symlink_to(there)
    with pytest.raises(StoreError, match=f"is a link to {there}") as caught:
        EliminationManagerServer(None, state_dir)
    assert "remove the link" in caught.value.hint
    assert store.is_symlink()
    assert there.read_bytes() == b"x" * 4096
    store.unlink()
    with EliminationManagerServer(None, state_dir) as server:
        assert server.get_eliminated_hotkeys_rpc() == {"a"}
