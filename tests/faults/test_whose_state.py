"""Whose state it is: a start that would take another's name, or an older state, for its own is refused."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from serving import listing, row, state_in_store, state_in_table

from shmelim import EliminationManager, EliminationManagerServer, EliminationReader
from shmelim.eliminations.starting.registry import Registry
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import AlreadyServingError, StateConflictError, StoreError
from shmelim.shm import SharedNamespace, TableReader


@pytest.fixture
def state_dir(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def registry(tmp_path):
    return tmp_path / "registry"


@pytest.fixture
def start(table_name, state_dir, registry):
    """Start a server object; all are closed at the end."""
    servers = []

    def make(directory=state_dir, namespace=None, **options):
        options = {"durability": "process", "registry": registry} | options
        servers.append(EliminationManagerServer(namespace or SharedNamespace(table_name), directory, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def served(table_name, start):
    """A name that was served with two eliminations and a departure, and is no longer."""
    with start() as server:
        server.sync_eliminations_rpc([row("a"), row("b")])
        server.update_metagraph_rpc(["a", "gone"])
        server.update_metagraph_rpc(["a"])
        return state_in_table(server.reader)


def reboot(table_name):
    SharedNamespace(table_name).remove()


def copy_of(state_dir, tmp_path):
    return shutil.copytree(state_dir, tmp_path / "copy")


def held(server):
    return [p["text"] for p in server.health_check_rpc()["problems"] if p["name"] == "money_held"]


def identity(table_name):
    return TableReader(SharedNamespace(table_name)).identity()


# ---------------------------------------------------------------------- another directory


@pytest.mark.parametrize("rebooted", [False, True], ids=["published", "remembered"])
class TestAnotherDirectory:
    """Of a typing error, a volume that is not mounted, another default."""

    @pytest.fixture(autouse=True)
    def _known(self, table_name, served, rebooted):
        if rebooted:
            reboot(table_name)

    def test_is_refused_with_both_sides_and_the_ways_out(self, table_name, tmp_path, state_dir, start, rebooted):
        for _ in range(2):
            with pytest.raises(StateConflictError) as caught:
                start(tmp_path / "other")
            message, hint = caught.value.message, caught.value.hint
            assert repr(table_name) in message
            assert f"no store in {tmp_path / 'other'}" in message
            assert str(state_dir) in message
            assert "2 eliminated, 1 departed, commit" in message
            assert ("ago" in message) is not rebooted
            assert "UTC" in message
            assert str(state_dir) in hint
            assert "--replace-published" in hint
            # Where there is no table it cannot be the truth.
            assert ("--adopt-published" in hint) is not rebooted
            assert not list((tmp_path / "other").glob(f"{FILE_NAME}*"))

    def test_is_refused_when_it_has_a_store_of_its_own(self, tmp_path, start):
        with start(tmp_path / "other", registry=None, replace_published=True) as other:
            other.add_elimination_rpc("x", row("x"))
        with start(replace_published=True):
            pass
        with pytest.raises(StateConflictError, match="has 1 eliminated, 0 departed, commit"):
            start(tmp_path / "other")

    def test_the_own_one_goes_on(self, start, served):
        server = start()
        assert state_in_table(server.reader) == (served)
        assert held(server) == []

    def test_may_take_the_place_when_it_is_said(self, table_name, tmp_path, start):
        with start(tmp_path / "other", replace_published=True) as server:
            assert server.get_eliminated_hotkeys_rpc() == set()
            assert "--replace" not in str(held(server))
            assert held(server)
            assert [event["action"] for event in server.get_history_rpc()][-2:] == ["hold", "start"]
        # And that is known from now on.
        assert start(tmp_path / "other")

    @pytest.mark.parametrize("files", ["lagged", "off"])
    def test_with_what_its_files_say_where_they_are_all_there_is(self, tmp_path, start, files):
        other = tmp_path / "other"
        other.mkdir()
        (other / "eliminations.json").write_text(json.dumps({"eliminations": [row("c")]}))
        with start(other, replace_published=True, files=files) as server:
            assert server.get_eliminated_hotkeys_rpc() == {"c"}
            assert [p["name"] for p in server.health_check_rpc()["problems"]] == ["money_held"]


class TestAdopting:
    def test_an_empty_directory_takes_over_what_is_published(self, table_name, tmp_path, start, served):
        reader, before = EliminationReader(table_name), identity(table_name)
        server = start(tmp_path / "other", adopt_published=True)
        assert state_in_table(server.reader) == served
        assert state_in_table(reader) == served
        assert identity(table_name).root_id == before.root_id
        assert held(server)
        server.add_elimination_rpc("new", row("new"))
        assert reader.is_hotkey_eliminated("new")
        server.close()
        assert len(state_in_store(tmp_path / "other").eliminations) == 3
        # The first directory is an older copy of it from now on.
        with pytest.raises(StateConflictError):
            start()

    def test_a_store_of_its_own_says_what_is_published(self, table_name, tmp_path, start, served):
        with EliminationManagerServer(None, tmp_path / "other") as other:
            other.add_elimination_rpc("a", row("a", 99))
            other.add_elimination_rpc("x", row("x"))
        server = start(tmp_path / "other", adopt_published=True)
        assert set(server.get_eliminated_hotkeys_rpc()) == {"a", "b"}
        assert server.get_elimination_rpc("a") == row("a")
        assert [event["action"] for event in server.get_history_rpc("x")] == ["remove", "add"]
        assert held(server)

    def test_there_must_be_something_to_adopt(self, table_name, tmp_path, start, served):
        reboot(table_name)
        with pytest.raises(StateConflictError):
            start(tmp_path / "other", adopt_published=True)

    def test_both_ways_at_once_contradict_each_other(self, start):
        with pytest.raises(ValueError, match="contradict"):
            start(adopt_published=True, replace_published=True)


# ---------------------------------------------------------------------- an older store


@pytest.mark.parametrize("rebooted", [False, True], ids=["published", "remembered"])
class TestAnOlderStore:
    """A backup that somebody put there by hand, or a file system that was rolled back."""

    @pytest.fixture(autouse=True)
    def _rolled_back(self, table_name, tmp_path, state_dir, start, served, rebooted):
        older = copy_of(state_dir, tmp_path)
        with start() as server:
            server.add_elimination_rpc("late", row("late"))
        shutil.rmtree(state_dir)
        older.rename(state_dir)
        if rebooted:
            reboot(table_name)

    def test_is_refused(self, state_dir, start):
        before = listing(state_dir)
        for _ in range(2):
            with pytest.raises(StateConflictError, match="3 eliminated") as caught:
                start()
            assert "restore its latest backup" in caught.value.hint
        assert listing(state_dir) == before

    def test_may_go_on_when_it_is_said_and_holds_money(self, table_name, state_dir, start, served, rebooted):
        reader = None if rebooted else EliminationReader(table_name)
        with start(replace_published=True) as server:
            assert state_in_table(server.reader) == served
            assert held(server)
            if reader is not None:
                assert state_in_table(reader) == served
        server = start()
        assert state_in_table(server.reader) == served
        assert held(server)
        assert server.release_money_rpc()
        assert held(server) == []
        assert not server.release_money_rpc()

    def test_no_commit_number_comes_twice(self, table_name, state_dir, start, registry):
        lost = Registry(registry, table_name).recall().commit
        with start(replace_published=True), Store.read_only(state_dir) as store:
            assert store.commit_number > lost

    def test_is_brought_up_to_date_from_what_is_published(self, start, rebooted):
        if rebooted:
            with pytest.raises(StateConflictError):
                start(adopt_published=True)
            return
        server = start(adopt_published=True)
        assert server.get_eliminated_hotkeys_rpc() == {"a", "b", "late"}
        assert held(server)


# ---------------------------------------------------------------------- a copy that went its own way


@pytest.mark.parametrize("rebooted", [False, True], ids=["published", "remembered"])
@pytest.mark.parametrize("changes", [1, 3], ids=["as many commits", "more commits"])
class TestACopyThatWentItsOwnWay:
    """Of the same identity, and by its commits as new as what is known under the name; it lacks some of that."""

    @pytest.fixture(params=["while nobody served", "while it was served"])
    def went(self, request, table_name, tmp_path, state_dir, start, served, changes, rebooted):
        copy = tmp_path / "copy"
        with start() as server:
            server.add_elimination_rpc("before", row("before"))
            if request.param == "while it was served":
                with Store.read_only(state_dir) as store:
                    copy.mkdir()
                    store.copy_to(copy / FILE_NAME)
                server.add_elimination_rpc("here", row("here"))
        if request.param == "while nobody served":
            shutil.copytree(state_dir, copy)
            with start() as server:
                server.add_elimination_rpc("here", row("here"))
        with EliminationManagerServer(None, copy) as other:
            for stamp in range(changes):
                other.add_elimination_rpc("there", row("there", stamp))
        if rebooted:
            reboot(table_name)
        return copy

    def test_is_refused(self, start, went):
        before = listing(went)
        for _ in range(2):
            with pytest.raises(StateConflictError, match="is not the state of this directory"):
                start(went)
        assert listing(went) == before

    def test_may_take_the_place_when_it_is_said(self, table_name, start, went):
        with start(went, replace_published=True) as server:
            assert server.get_eliminated_hotkeys_rpc() == {"a", "b", "before", "there"}
            assert EliminationReader(table_name).get_eliminated_hotkeys() == {"a", "b", "before", "there"}
            assert held(server)
        # It is the one of that name from now on, whatever the other one has.
        start(went).close()
        with pytest.raises(StateConflictError):
            start()

    def test_takes_over_what_is_published_when_it_is_said(self, start, went, rebooted):
        if rebooted:
            with pytest.raises(StateConflictError):
                start(went, adopt_published=True)
            return
        with start(went, adopt_published=True) as server:
            assert server.get_eliminated_hotkeys_rpc() == {"a", "b", "before", "here"}
        start(went).close()
        with pytest.raises(StateConflictError):
            start()


def test_a_copy_that_has_all_that_is_known_goes_on(table_name, tmp_path, state_dir, start, served):
    copy = copy_of(state_dir, tmp_path)
    with start(copy) as server:
        server.add_elimination_rpc("later", row("later"))
    with pytest.raises(StateConflictError):
        start()
    with start(copy) as server:
        assert server.is_hotkey_eliminated_rpc("later")
        assert held(server) == []


# ---------------------------------------------------------------------- what is no conflict


def test_an_unchanged_restart_moves_no_reader_and_publishes_nothing(table_name, start, served):
    reader, before = EliminationReader(table_name), identity(table_name)
    version = reader.version
    server = start()
    after = identity(table_name)
    assert (after.root_id, after.sequence) == (before.root_id, before.sequence)
    assert reader.version == version
    assert state_in_table(server.reader) == served
    server.remove_elimination_rpc("a")
    assert not reader.is_hotkey_eliminated("a")
    assert state_in_table(reader) == state_in_table(server.reader)


def test_a_table_behind_by_some_commits_is_brought_up_to_date_where_it_lies(table_name, state_dir, start, served):
    reader, before = EliminationReader(table_name), identity(table_name)
    # As a server that died between its commits and its publishing leaves them.
    with Store.open(state_dir) as store:
        for hotkey in ("c", "d"):
            with store.transaction():
                store.put_elimination(hotkey, b"\x80")
        with store.transaction():
            store.remove_eliminations(["a"])
            store.set_registered(["b", "m"])
    start(files="off")
    assert identity(table_name).root_id == before.root_id
    assert reader.get_eliminated_hotkeys() == {"b", "c", "d"}
    found = reader.snapshot()
    assert set(found.registered) == {"b", "m"}
    assert list(found.eliminations) == ["b", "c", "d"]


def test_a_damaged_table_is_made_anew(table_name, start, served):
    (segment,) = Path("/dev/shm").glob(f"shmelim.{table_name}.[0-9]*")
    with segment.open("r+b") as file:
        content = file.read()
        for key in (b"return_info", b"price_info"):
            file.seek(content.index(key))
            file.write(b"x" * len(key))
            file.seek(content.rindex(key))
            file.write(b"x" * len(key))
    assert state_in_table(start().reader) == served


class TestATableOfAnOlderFormat:
    """As a version before the last one left it, which may still have readers."""

    @pytest.fixture(autouse=True)
    def _older(self, table_name, served):
        with Path(f"/dev/shm/shmelim.{table_name}").open("r+b") as root:
            root.seek(8)
            root.write((1).to_bytes(4, "little"))

    def test_is_replaced_by_what_the_store_says(self, table_name, start, served):
        server = start()
        assert state_in_table(server.reader) == state_in_table(EliminationReader(table_name)) == served
        assert held(server) == []

    def test_is_nothing_that_an_empty_directory_replaces_by_itself(self, tmp_path, start):
        for _ in range(2):
            with pytest.raises(StateConflictError, match="cannot be read") as caught:
                start(tmp_path / "other", registry=None)
            assert "--adopt" not in caught.value.hint
        assert start(tmp_path / "other", registry=None, replace_published=True)


def test_a_name_in_which_nothing_was_is_anybodys(tmp_path, start):
    with start():
        pass
    with start(tmp_path / "other") as server:
        server.add_elimination_rpc("a", row("a"))
        assert held(server) == []


def test_after_a_reboot_the_own_store_goes_on(table_name, start, served):
    reboot(table_name)
    server = start()
    assert state_in_table(server.reader) == served
    assert held(server) == []


# ---------------------------------------------------------------------- money, registry, must_exist


def slash(server):
    server.eliminate_rpc("slashed", row("slashed"), ["slash"])
    assert server.begin_slash_rpc("slashed", "token")
    assert server.settle_debt_rpc("slashed", "slash", "token")


class TestAStoreWithSlashes:
    @pytest.fixture(autouse=True)
    def _slashed(self, start):
        with start() as server:
            slash(server)

    def test_goes_on_where_the_registry_remembers_it(self, table_name, start):
        reboot(table_name)
        assert held(start()) == []

    def test_holds_money_where_the_registry_is_gone_too(self, table_name, start, registry):
        reboot(table_name)
        shutil.rmtree(registry)
        server = start()
        assert held(server)
        server.eliminate_rpc("owing", row("owing"), ["slash"])
        assert not server.begin_slash_rpc("owing", "token")
        server.release_money_rpc()
        assert server.begin_slash_rpc("owing", "token")

    def test_goes_on_where_the_table_tells(self, start, registry):
        shutil.rmtree(registry)
        assert held(start()) == []

    def test_goes_on_where_there_is_to_be_no_registry(self, table_name, start):
        reboot(table_name)
        assert held(start(registry=None)) == []


def test_the_registry_is_exact_after_an_orderly_end(table_name, state_dir, start, registry, served):
    memory = Registry(registry, table_name).recall()
    with Store.read_only(state_dir) as store:
        assert (memory.store_id, memory.commit) == (store.store_id.hex(), store.commit_number)
    assert (memory.directory, memory.eliminated, memory.departed) == (str(state_dir), 2, 1)


def test_nothing_is_remembered_of_direct_mode(tmp_path, registry, monkeypatch):
    monkeypatch.setenv("SHMELIM_REGISTRY", str(registry))
    manager = EliminationManager(None, None, None, running_unit_tests=True, state_dir=tmp_path / "state")
    manager.add_elimination("a", row("a"))
    manager.shutdown()
    assert not registry.exists()


def locks_of_sqlite(state_dir):
    """How many POSIX locks there are on the database."""
    inode = f":{(state_dir / FILE_NAME).stat().st_ino}"
    with suppress(FileNotFoundError):
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
        return sum(fields[1] == "POSIX" and fields[5].endswith(inode) for fields in lines)
    return 0


@pytest.mark.parametrize("link", [os.link, os.symlink])
@pytest.mark.parametrize("is_new", [True, False])
def test_one_store_in_two_directories_has_one_server(state_dir, tmp_path, start, new_name, link, is_new):
    """Each would keep a log, and a table, of its own: what the one acknowledged, the other's end took back."""
    if not is_new:
        start().close()
    first, other = start(), tmp_path / "other"
    other.mkdir()
    link(state_dir / FILE_NAME, other / FILE_NAME)
    before = locks_of_sqlite(state_dir)
    assert before or not Path("/proc/locks").exists()
    with pytest.raises(
        AlreadyServingError, match=r"other/shmelim\.sqlite is locked by another process, most likely"
    ):
        start(other, namespace=SharedNamespace(new_name()))
    assert locks_of_sqlite(state_dir) == before  # which end where any descriptor of the file is closed
    assert first.add_elimination_rpc("c", row("c"))
    first.close()
    with start(other, namespace=SharedNamespace(new_name())) as second:
        assert second.is_hotkey_eliminated_rpc("c")


def test_a_registry_that_cannot_be_used_is_a_problem_and_no_refusal(start, registry):
    registry.write_text("in the way")
    server = start()
    server.add_elimination_rpc("a", row("a"))
    assert "registry_behind" in {problem["name"] for problem in server.health_check_rpc()["problems"]}


def test_must_exist_refuses_every_new_store(state_dir, start):
    for _ in range(2):
        with pytest.raises(StoreError, match="must_exist"):
            start(must_exist=True)
        assert not list(state_dir.glob(f"{FILE_NAME}*"))
    with start() as server:
        server.add_elimination_rpc("a", row("a"))
    assert start(must_exist=True).is_hotkey_eliminated_rpc("a")


def test_must_exist_refuses_files_without_a_store(state_dir, start):
    state_dir.mkdir()
    (state_dir / "eliminations.json").write_text('{"eliminations": []}')
    with pytest.raises(StoreError, match="must_exist"):
        start(must_exist=True)


def test_a_server_in_memory_takes_the_place_of_another_one_only(table_name, start, served):
    for options in ({}, {"must_exist": True}):
        with pytest.raises(StoreError):
            start(None, **options)
    with start(None, replace_published=True) as server:
        server.add_elimination_rpc("x", row("x"))
    with start(None) as server:
        assert server.get_eliminated_hotkeys_rpc() == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_another_users_directory_is_refused_before_anything_is_made_in_it(state_dir, start):
    state_dir.mkdir()
    os.chown(state_dir, 12345, 12345)
    with pytest.raises(StoreError, match="belongs to uid 12345") as caught:
        start()
    assert "run as its owner" in caught.value.hint
    assert list(state_dir.iterdir()) == []
