"""Starting from whatever is left: damaged stores and files, edited files, files of others, none at all."""

import json
import os
import random
import sqlite3
import sys
from pathlib import Path

import pytest
from crashing import Child, Counter, call, kill_self, package_files
from serving import State, die_after, listing, row, state_in_files, state_in_store, state_in_table

from shmelim import EliminationManagerServer, EliminationReader
from shmelim.eliminations.files import taking
from shmelim.eliminations.files.taking import NAMES
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import DamagedFileError, DamagedStoreError, StateConflictError, StoreError
from shmelim.shm import SharedNamespace

HOTKEYS = [f"hotkey-{n}" for n in range(40)]


def fill(server):
    """Eliminations, departed and registered hotkeys, and some history."""
    server.sync_eliminations_rpc([row(hotkey, n) for n, hotkey in enumerate(HOTKEYS)])
    server.remove_elimination_rpc(HOTKEYS[3])
    server.update_metagraph_rpc([*HOTKEYS, "always"])
    server.update_metagraph_rpc([*HOTKEYS[5:], "always"])
    server.update_metagraph_rpc([*HOTKEYS[4:], "always"])
    server.save_eliminations_rpc()
    return state_in_table(server.reader)


def overwrite_header(path):
    with path.open("r+b") as file:
        file.write(b"\xff" * 100)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2 + 100)


def flip_pages(path):
    data = bytearray(path.read_bytes())
    rng = random.Random(7)
    for page in rng.sample(range(1, len(data) // 4096), 3):
        data[page * 4096 : page * 4096 + 4096] = bytes(byte ^ 0xFF for byte in data[page * 4096 :][:4096])
    path.write_bytes(data)


def empty(path):
    os.truncate(path, 0)


damages = pytest.mark.parametrize("damage", [overwrite_header, truncate, flip_pages, empty])


def same_in_all(server, state_dir):
    """The state, which must be the same in table and files now, and in the store after closing."""
    state = state_in_table(server.reader)
    server.save_eliminations_rpc()
    assert state_in_files(state_dir) == state.without_registered()
    server.close()
    assert state_in_store(state_dir) == state
    return state


class TestDamagedStore:
    @damages
    def test_is_restored_from_shared_memory_with_every_acknowledged_change(
        self, table_name, state_dir, start, damage
    ):
        with start() as server:
            fill(server)

        def changes_that_no_file_shows(server):
            server.add_elimination_rpc("late", row("late", 77))
            server.remove_elimination_rpc(HOTKEYS[0])
            server.add_elimination_rpc(HOTKEYS[1], row(HOTKEYS[1], 1000))
            server.update_metagraph_rpc([*HOTKEYS[6:], "always"])

        die_after(table_name, state_dir, changes_that_no_file_shows)
        before = state_in_table(EliminationReader(table_name))
        assert state_in_files(state_dir) != before.without_registered()
        _checkpoint(state_dir)
        damage(state_dir / FILE_NAME)
        server = start()
        assert state_in_table(server.reader) == before
        assert [event["action"] for event in server.get_history_rpc(limit=None)][-1] == "recover"
        assert same_in_all(server, state_dir) == before
        assert list(state_dir.glob(f"{FILE_NAME}.damaged-*"))

    def test_restored_state_outlives_another_restart(self, table_name, state_dir, start):
        with start() as server:
            fill(server)
        die_after(table_name, state_dir, lambda server: server.add_elimination_rpc("late", row("late")))
        before = state_in_table(EliminationReader(table_name))
        _checkpoint(state_dir)
        overwrite_header(state_dir / FILE_NAME)
        die_after(table_name, state_dir, lambda _: None)
        assert state_in_table(start().reader) == before

    @damages
    def test_is_restored_from_the_files_where_shared_memory_is_gone(self, table_name, state_dir, start, damage):
        with start() as server:
            before = fill(server)
        SharedNamespace(table_name).remove()
        damage(state_dir / FILE_NAME)
        server = start()
        assert state_in_table(server.reader) == before.without_registered()
        assert same_in_all(server, state_dir) == before.without_registered()

    def test_is_not_restored_from_the_table_of_another_directory(self, table_name, tmp_path, state_dir, start):
        with start() as server:
            before = fill(server)
        namespace = SharedNamespace(table_name)
        with EliminationManagerServer(namespace, tmp_path / "other", replace_published=True) as other:
            other.add_elimination_rpc("stranger", row("stranger"))
        overwrite_header(state_dir / FILE_NAME)
        with pytest.raises(StateConflictError, match="1 eliminated"):
            start()
        assert state_in_table(start(replace_published=True).reader) == before.without_registered()

    @pytest.mark.parametrize("use_files", ["current", "off"])
    def test_with_nothing_to_restore_it_from_is_refused_and_left_as_it_is(
        self, table_name, state_dir, start, use_files
    ):
        with start(files="off") as server:
            fill(server)
        SharedNamespace(table_name).remove()
        overwrite_header(state_dir / FILE_NAME)
        before = listing(state_dir)
        for _ in range(2):
            with pytest.raises(DamagedStoreError) as caught:
                start(files=use_files)
            assert FILE_NAME in str(caught.value)
            assert listing(state_dir) == before

    def test_with_damaged_files_and_no_table_is_refused_and_left_as_it_is(self, table_name, state_dir, start):
        with start() as server:
            fill(server)
        SharedNamespace(table_name).remove()
        overwrite_header(state_dir / FILE_NAME)
        (state_dir / "eliminations.json").write_text('{"eliminations": [')
        before = listing(state_dir)
        for _ in range(2):
            with pytest.raises(StoreError, match=r"eliminations\.json is damaged"):
                start()
            assert listing(state_dir) == before

    @pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read")
    def test_that_the_disk_does_not_give_is_refused_and_left_as_it_is(self, state_dir, start):
        with start() as server:
            server.add_elimination_rpc("a", row("a"))
        store = state_dir / FILE_NAME
        kept = store.rename(state_dir / "kept")
        store.symlink_to("/proc/self/mem")  # which has nothing at its beginning: EIO
        for _ in range(2):
            with pytest.raises(StoreError, match="cannot be read: Input/output error") as caught:
                start()
            assert caught.value.hint == "check the disk"
        kept.replace(store)
        assert start().get_history_rpc("a")

    def test_of_a_newer_schema_is_refused_and_left_as_it_is(self, state_dir, start):
        with start() as server:
            fill(server)
        with sqlite3.connect(state_dir / FILE_NAME) as db:
            db.execute("PRAGMA user_version=99")
        db.close()
        before = listing(state_dir)
        with pytest.raises(StoreError, match="schema 99") as caught:
            start()
        assert "upgrade" in caught.value.hint
        assert listing(state_dir) == before

    @pytest.mark.parametrize("seed", range(25))
    def test_flipped_anywhere_gives_the_right_state(self, table_name, state_dir, start, seed):
        with start() as server:
            before = fill(server)
        rng = random.Random(seed)
        path = state_dir / FILE_NAME
        data = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 5, 50])):
            place = rng.randrange(len(data))
            # Where it says whose database it is and of which schema: there, it could be another's and be refused.
            if not 60 <= place < 72:
                data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        assert state_in_table(start().reader).eliminations == before.eliminations


class TestDamagedFiles:
    @pytest.mark.parametrize("content", ["", "{", '{"something": []}', "[1, 2", "\0" * 100, '"text"'])
    def test_beside_a_store_are_moved_aside_and_cost_nothing(self, state_dir, start, content):
        with start() as server:
            before = fill(server)
        for name in ("eliminations.json", "departed_hotkeys.json"):
            (state_dir / name).write_text(content)
        server = start()
        assert state_in_table(server.reader) == before
        noted = [event["note"] for event in server.get_history_rpc() if event["action"] == "damaged"]
        assert len(noted) == 2
        for name in ("eliminations.json", "departed_hotkeys.json"):
            (aside,) = state_dir.glob(f"{name}.damaged-*")
            assert aside.read_text() == content
            assert any(aside.name in note for note in noted)
        assert same_in_all(server, state_dir) == before

    @pytest.mark.parametrize("name", ["eliminations.json", "departed_hotkeys.json"])
    def test_without_a_store_are_refused_again_and_again_and_nothing_is_changed(self, state_dir, start, name):
        state_dir.mkdir()
        (state_dir / "eliminations.json").write_text(json.dumps({"eliminations": [row("a")]}))
        (state_dir / name).write_text('{"eliminations": [{"hotkey"')
        # The lock file and the like may come; what a person put there stays, and no state is made up.
        before = listing(state_dir)
        for _ in range(3):
            with pytest.raises(DamagedFileError) as caught:
                start()
            assert name in str(caught.value)
            assert caught.value.hint
            after = listing(state_dir)
            assert {path: after.get(path) for path in before} == before
            assert not [path for path in after if path.startswith(FILE_NAME)]

    def test_are_refused_also_after_a_start_that_died_before_it_had_taken_them(self, table_name, state_dir, start):
        state_dir.mkdir()
        (state_dir / "eliminations.json").write_text(json.dumps({"eliminations": [row("a")]}))

        def die_while_reading():
            taking.read_file = lambda _path: kill_self()
            EliminationManagerServer(SharedNamespace(table_name), state_dir)

        with Child(die_while_reading) as child:
            assert child.wait() == -9
        whole = (state_dir / "eliminations.json").read_text()
        (state_dir / "eliminations.json").write_text(whole[:-5])
        with pytest.raises(DamagedFileError, match=r"eliminations\.json is damaged"):
            start()
        (state_dir / "eliminations.json").write_text(whole)
        assert start().get_eliminated_hotkeys_rpc() == {"a"}

    def test_can_be_repaired_after_a_refusal(self, state_dir, start):
        state_dir.mkdir()
        (state_dir / "eliminations.json").write_text("{")
        with pytest.raises(DamagedFileError, match=r"eliminations\.json is damaged"):
            start()
        (state_dir / "eliminations.json").write_text(json.dumps({"eliminations": [row("a"), row("b")]}))
        assert start().get_eliminations_from_memory_rpc() == [row("a"), row("b")]


class TestBadRows:
    def test_are_set_aside_by_name_and_the_rest_loads(self, state_dir, start, caplog):
        state_dir.mkdir()
        bad = [17, {"reason": "ZOMBIE"}]
        content = {"eliminations": [row("a"), *bad, row("b")]}
        (state_dir / "eliminations.json").write_text(json.dumps(content))
        server = start()
        assert server.get_eliminations_from_memory_rpc() == [row("a"), row("b")]
        (quarantine,) = state_dir.glob("eliminations.json.quarantine-*")
        assert [entry["row"] for entry in json.loads(quarantine.read_text())["rows"]] == bad
        assert "row 2: the elimination record lacks" in caplog.text
        assert quarantine.name in caplog.text

    @pytest.mark.parametrize("value", [10**30, 10**5000, "x" * (2 << 20)], ids=["large", "5,000 digits", "1 MiB"])
    @pytest.mark.parametrize("named", [False, True], ids=["list", "by hotkey"])
    @pytest.mark.parametrize("imported", [False, True], ids=["in the state directory", "imported"])
    def test_cost_no_elimination_for_the_sake_of_another_field(
        self, tmp_path, state_dir, start, value, named, imported
    ):
        before = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(0)
        rows = [row("a"), row("b") | {"odd": value}, {"reason": "ZOMBIE", "odd": value}]
        text = json.dumps({one.get("hotkey", ""): one for one in rows} if named else {"eliminations": rows})
        sys.set_int_max_str_digits(before)
        if named:
            text = f'{{"eliminations": {text}}}'
        state_dir.mkdir()
        place = tmp_path / "import.json" if imported else state_dir / "eliminations.json"
        place.write_text(text)
        server = start(*([place] if imported else []))
        found = server.get_eliminations_dict_rpc()
        assert list(found) == ["a", "b"]
        assert {key: found["b"][key] for key in row("b")} == row("b")
        # What stood there is kept.
        (quarantine,) = place.parent.glob(f"{place.name}.quarantine-*")
        assert len(json.loads(quarantine.read_text())["rows"]) == 2

    def test_of_a_hotkey_that_the_store_knows_leave_it_as_it_is(self, state_dir, start):
        with start() as server:
            server.sync_eliminations_rpc([row("a", 5), row("b", 5)])
        path = state_dir / "eliminations.json"
        path.write_text(json.dumps({"eliminations": [row("a", 6) | {"odd": 10**30}, row("b", 6)]}))
        assert start().get_eliminations_dict_rpc() == {"a": row("a", 5), "b": row("b", 6)}

    @pytest.mark.parametrize("hotkey", ["\ud800", "", "x" * 256, 5, None, ["a"]], ids=ascii)
    def test_whose_hotkey_is_none_stop_no_start(self, state_dir, start, hotkey):
        with start() as server:
            server.sync_eliminations_rpc([row("a"), row("b")])
        path = state_dir / "eliminations.json"
        path.write_text(json.dumps({"eliminations": [row("a"), {"hotkey": hotkey}]}))
        assert start().get_eliminated_hotkeys_rpc() == {"a"}
        assert list(state_dir.glob("eliminations.json.quarantine-*"))

    def test_do_not_remove_what_the_store_knows_of_their_hotkeys(self, state_dir, start):
        with start() as server:
            for hotkey in ("a", "b", "c", "d"):
                server.add_elimination_rpc(hotkey, row(hotkey, 5))
        broken = row("b") | {"elimination_initiated_time_ms": "yesterday"}
        (state_dir / "eliminations.json").write_text(
            json.dumps({"eliminations": [row("a", 9), broken, row("d", 5)]})
        )
        server = start()
        # c is gone because the file says so; b stays because what the file says of it cannot be believed.
        assert server.get_eliminations_dict_rpc() == {"a": row("a", 9), "b": row("b", 5), "d": row("d", 5)}

    def test_of_a_departed_file_are_set_aside_and_the_rest_loads(self, state_dir, start):
        state_dir.mkdir()
        content = {
            "departed_hotkeys": {"a": {"detected_ms": 5}, "x" * 256: {"detected_ms": 1}, "": {"detected_ms": 1}}
        }
        (state_dir / "departed_hotkeys.json").write_text(json.dumps(content))
        assert start().get_departed_hotkeys_rpc() == {"a": {"detected_ms": 5}}
        (quarantine,) = state_dir.glob("departed_hotkeys.json.quarantine-*")
        assert len(json.loads(quarantine.read_text())["rows"]) == 2


class TestEditedFiles:
    def test_are_taken_over_and_the_history_says_so(self, state_dir, start):
        with start() as server:
            fill(server)
        edited = [row("b", 3), row(HOTKEYS[7], 3), row("a", 3)]
        (state_dir / "eliminations.json").write_text(json.dumps({"eliminations": edited}, indent=4))
        server = start()
        # A hotkey that stays keeps its place, new ones follow in the order of the file.
        assert server.get_eliminations_from_memory_rpc() == [edited[1], edited[0], edited[2]]
        imports = [event for event in server.get_history_rpc(limit=None) if event["action"] == "import"]
        assert len(imports) == 1
        assert "eliminations.json" in imports[0]["note"]
        (event,) = server.get_history_rpc(HOTKEYS[9], limit=1)
        assert (event["action"], event["new"], event["note"]) == ("remove", None, "file eliminations.json")

    def test_are_taken_over_once(self, state_dir, start):
        with start() as server:
            fill(server)
        (state_dir / "eliminations.json").write_text(json.dumps({"eliminations": [row("a")]}))
        with start() as server:
            server.add_elimination_rpc("b", row("b"))
        with start() as server:
            assert server.get_eliminated_hotkeys_rpc() == {"a", "b"}
            assert sum(event["action"] == "import" for event in server.get_history_rpc(limit=None)) == 1

    def test_survive_a_crash_before_they_are_written_anew(self, table_name, state_dir, start):
        with start() as server:
            fill(server)
        (state_dir / "eliminations.json").write_text(json.dumps({"eliminations": [row("a")]}))
        die_after(table_name, state_dir, lambda server: server.add_elimination_rpc("b", row("b")))
        assert start().get_eliminated_hotkeys_rpc() == {"a", "b"}

    def test_an_earlier_version_that_is_put_back_is_taken_over(self, state_dir, start):
        path = state_dir / "eliminations.json"
        with start() as server:
            server.append_elimination_row_rpc("a", 1.0, "ZOMBIE")
            earlier = path.read_bytes()
            server.clear_eliminations_rpc()
        path.write_bytes(earlier)
        assert start().get_eliminated_hotkeys_rpc() == {"a"}

    def test_unchanged_files_are_not_taken_over(self, state_dir, start):
        with start() as server:
            before = fill(server)
            events = server.get_history_rpc(limit=None)
        with start() as server:
            assert server.get_history_rpc(limit=None) == events
            assert state_in_table(server.reader) == before

    def test_an_added_departed_hotkey_is_taken_over(self, state_dir, start):
        with start() as server:
            before = fill(server)
        path = state_dir / "departed_hotkeys.json"
        content = json.loads(path.read_text())
        content["departed_hotkeys"]["new"] = {"detected_ms": 17}
        path.write_text(json.dumps(content))
        server = start()
        assert list(server.get_departed_hotkeys_rpc()) == [*before.departed, "new"]
        assert server.get_departed_hotkey_info_rpc("new") == {"detected_ms": 17}

    def test_are_not_looked_at_where_files_are_off(self, state_dir, start):
        with start() as server:
            before = fill(server)
        (state_dir / "eliminations.json").write_text(json.dumps({"eliminations": []}))
        assert state_in_table(start(files="off").reader) == before


class TestCrashWhileAFileIsWritten:
    """Between what is written down of a file and its rename, the file on disk is the one before."""

    @staticmethod
    def dies_before_renaming(change):
        def work(server):
            replace = Path.replace

            def die(path, target):
                if target.name in NAMES:
                    kill_self()
                return replace(path, target)

            for kind in (Path, type(Path())):
                kind.replace = die
            change(server)
            server.save_eliminations_rpc()

        return work

    @pytest.mark.parametrize("crashes", [1, 2, 3, 5])
    def test_never_brings_the_file_before_back(self, table_name, state_dir, start, crashes):
        with start() as server:
            fill(server)
        old = (state_dir / "eliminations.json").read_bytes()
        for n in range(crashes):
            work = self.dies_before_renaming(
                lambda server, n=n: server.add_elimination_rpc(f"new-{n}", row(f"new-{n}", n))
            )
            die_after(table_name, state_dir, work)
            assert (state_dir / "eliminations.json").read_bytes() == old
        server = start()
        assert {f"new-{n}" for n in range(crashes)} <= server.get_eliminated_hotkeys_rpc()
        assert not [event for event in server.get_history_rpc(limit=None) if event["action"] == "import"]
        same_in_all(server, state_dir)

    def test_an_edit_after_that_is_set_aside_as_nobody_knows_what_it_was_made_from(
        self, table_name, state_dir, start
    ):
        with start() as server:
            fill(server)
        die_after(table_name, state_dir, self.dies_before_renaming(lambda server: server.clear_eliminations_rpc()))
        edit = json.dumps({"eliminations": [row("edited")]})
        (state_dir / "eliminations.json").write_text(edit)
        server = start()
        assert server.get_eliminated_hotkeys_rpc() == set()
        (aside,) = state_dir.glob("eliminations.json.edited-*")
        assert aside.read_text() == edit
        assert [problem["name"] for problem in server.health_check_rpc()["problems"]] == [
            "file_not_applied",
            "guarded_change",  # all were cleared
        ]

    def test_a_rename_that_fails_again_and_again_never_brings_the_file_before_back(
        self, table_name, state_dir, start
    ):
        with start() as server:
            fill(server)

        def rename_fails(server):
            replace = Path.replace

            def fail(path, target):
                if target.name in NAMES:
                    raise OSError(1, "not permitted")
                return replace(path, target)

            for kind in (Path, type(Path())):
                kind.replace = fail
            for n in range(5):
                server.add_elimination_rpc(f"new-{n}", row(f"new-{n}", n))
                with pytest.raises(StoreError, match="could not be written: not permitted"):
                    server.save_eliminations_rpc()
            assert server.health_check_rpc()["problems"]

        die_after(table_name, state_dir, rename_fails)
        server = start()
        assert {f"new-{n}" for n in range(5)} <= server.get_eliminated_hotkeys_rpc()


class TestDeparted:
    def test_a_legacy_list_reads_as_detected_at_0(self, state_dir, start):
        state_dir.mkdir()
        (state_dir / "departed_hotkeys.json").write_text(json.dumps({"departed_hotkeys": ["a", "b"]}))
        server = start()
        assert server.get_departed_hotkeys_rpc() == {"a": {"detected_ms": 0}, "b": {"detected_ms": 0}}
        server.save_eliminations_rpc()
        assert json.loads((state_dir / "departed_hotkeys.json").read_text()) == {
            "departed_hotkeys": {"a": {"detected_ms": 0}, "b": {"detected_ms": 0}}
        }

    def test_the_default_file_is_used_only_while_nothing_is_known(self, tmp_path, state_dir, start):
        default = tmp_path / "default.json"
        default.write_text(json.dumps({"departed_hotkeys": {"d": {"detected_ms": 1}}}))
        with start(default_departed=default) as server:
            assert server.get_departed_hotkeys_rpc() == {"d": {"detected_ms": 1}}
        default.write_text(json.dumps({"departed_hotkeys": {"e": {"detected_ms": 2}}}))
        with start(default_departed=default) as server:
            assert server.get_departed_hotkeys_rpc() == {"d": {"detected_ms": 1}}

    def test_the_default_file_gives_way_to_a_file_in_the_state_directory(self, tmp_path, state_dir, start):
        default = tmp_path / "default.json"
        default.write_text(json.dumps({"departed_hotkeys": {"d": {"detected_ms": 1}}}))
        state_dir.mkdir()
        (state_dir / "departed_hotkeys.json").write_text(json.dumps({"departed_hotkeys": ["own"]}))
        assert list(start(default_departed=default).get_departed_hotkeys_rpc()) == ["own"]

    def test_a_default_file_that_is_missing_or_damaged_is_an_error(self, tmp_path, start):
        with pytest.raises(StoreError, match="nowhere"):
            start(default_departed=tmp_path / "nowhere.json")
        (tmp_path / "bad.json").write_text("{")
        with pytest.raises(DamagedFileError, match="bad"):
            start(default_departed=tmp_path / "bad.json")

    def test_the_default_file_also_serves_a_server_in_memory(self, tmp_path):
        default = tmp_path / "default.json"
        default.write_text(json.dumps({"departed_hotkeys": ["d"]}))
        with EliminationManagerServer(default_departed=default) as server:
            assert server.get_departed_hotkeys_rpc() == {"d": {"detected_ms": 0}}


class TestImports:
    def test_are_merged_once(self, tmp_path, state_dir, start):
        other = tmp_path / "other.json"
        other.write_text(json.dumps({"eliminations": [row("a"), row("b")]}))
        with start(other) as server:
            server.remove_elimination_rpc("a")
        with start(other) as server:
            assert server.get_eliminated_hotkeys_rpc() == {"b"}

    def test_a_file_that_is_missing_stops_the_start(self, tmp_path, start):
        with pytest.raises(StoreError, match="nowhere"):
            start(tmp_path / "nowhere.json")
        start()  # the lock was given back


class TestStateDirectory:
    def test_that_cannot_be_written_is_a_clear_error(self, table_name, tmp_path):
        if os.geteuid() != 0:
            pytest.skip("needs root, to become somebody else")
        directory = tmp_path / "of-root"
        directory.mkdir(mode=0o755)
        for path in (tmp_path, *tmp_path.parents[:2]):
            path.chmod(path.stat().st_mode | 0o055)

        def as_nobody():
            os.setgid(65534)
            os.setuid(65534)
            with pytest.raises(StoreError) as caught:
                EliminationManagerServer(None, directory / "state")
            return str(caught.value), caught.value.hint

        message, hint = call(as_nobody)
        assert str(directory) in message
        assert "writable" in hint
        assert list(directory.iterdir()) == []

    def test_with_a_link_to_a_store_that_is_not_mounted_is_a_clear_error(self, tmp_path, state_dir, start):
        state_dir.mkdir()
        (state_dir / FILE_NAME).symlink_to(tmp_path / "mount" / FILE_NAME)
        for there in (False, True):
            if there:
                (tmp_path / "mount").mkdir()
            with pytest.raises(StoreError, match=r"is a link to .*/mount/shmelim\.sqlite, which is not there"):
                start()

    def test_that_is_a_file_is_a_clear_error(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="file"):
            EliminationManagerServer(None, tmp_path / "file")


def _checkpoint(state_dir):
    """Fold the log into the file, so that damage to the file matters."""
    with Store.open(state_dir):
        pass


def test_two_states_are_told_apart():
    assert State.of([row("a")], [], []) != State.of([row("a", 1)], [], [])
    assert State.of([row("a"), row("b")], [], []) != State.of([row("b"), row("a")], [], [])
    assert State.of([], ["a", "b"], []) != State.of([], ["b", "a"], [])
    assert State.of([], [], ["a"]) != State.of([], [], ["b"])


class TestDeathDuringRecovery:
    """A start may be killed as well, by an impatient supervisor for instance; the next one finds all there is."""

    @staticmethod
    def lines_until_death(table_name, state_dir, number):
        """Start, and die at some line of recovery; returns how many lines there were before."""
        count = Counter()

        def inside(_frame, event, _arg):
            if event == "line":
                count.value += 1
                if count.value == number:
                    kill_self()
            return inside

        def outside(frame, _event, _arg):
            name = frame.f_code.co_name
            return inside if frame.f_code.co_filename in _TRACED and not name.startswith("<") else None

        def run():
            sys.settrace(outside)
            EliminationManagerServer(SharedNamespace(table_name), state_dir, durability="process", files="current")
            kill_self()

        with Child(run) as child:
            assert child.wait() == -9
        return count.value

    @pytest.mark.parametrize("stride", [60, pytest.param(1, marks=pytest.mark.long)])
    def test_of_a_damaged_store_from_shared_memory(self, new_name, tmp_path, stride):
        self.check(new_name, tmp_path, stride, remove_table=False)

    @pytest.mark.parametrize("stride", [60, pytest.param(1, marks=pytest.mark.long)])
    def test_of_a_damaged_store_from_files(self, new_name, tmp_path, stride):
        self.check(new_name, tmp_path, stride, remove_table=True)

    def check(self, new_name, tmp_path, stride, *, remove_table):
        lines = self.start_and_die(new_name(), tmp_path / "all", 1 << 30, remove_table=remove_table)
        assert lines > 50
        first = random.randrange(1, stride + 1)
        print(f"{lines} lines, every {stride}th from {first}")
        for number in range(first, lines + 1, stride):
            self.start_and_die(new_name(), tmp_path / f"{number}", number, remove_table=remove_table)

    def start_and_die(self, name, state_dir, number, *, remove_table):
        """Damage a store, start and die at a line, and start again; returns how many lines the first one made."""
        with EliminationManagerServer(SharedNamespace(name), state_dir, durability="process") as server:
            fill(server)
        if not remove_table:
            die_after(name, state_dir, lambda server: server.add_elimination_rpc("late", row("late")))
        before = state_in_table(EliminationReader(name))
        if remove_table:
            SharedNamespace(name).remove()
            before = before.without_registered()
        _checkpoint(state_dir)
        overwrite_header(state_dir / FILE_NAME)
        lines = self.lines_until_death(name, state_dir, number)
        with EliminationManagerServer(SharedNamespace(name), state_dir, durability="process") as server:
            assert state_in_table(server.reader) == before, f"line {number}"
            assert same_in_all(server, state_dir) == before
        # A name that was taken for it just before the death stays behind, empty.
        asides = [path for path in state_dir.glob(f"{FILE_NAME}.damaged-*") if path.stat().st_size]
        assert len(asides) == 1
        assert not (state_dir / ".rebuilding").exists()
        SharedNamespace(name).remove()
        return lines


_TRACED = frozenset(
    package_files(
        "eliminations/starting/recovery.py",
        "eliminations/starting/replacement.py",
        "eliminations/store/database.py",
        "system/durable.py",
    )
)
