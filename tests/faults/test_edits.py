"""JSON files that a person put there: what is applied, what is set aside; nothing acknowledged is lost."""

import errno
import json
import os
from pathlib import Path

import pytest
from serving import die_after, row, state_in_files, state_in_table

from shmelim import EliminationManagerServer
from shmelim.eliminations.files import mirror
from shmelim.eliminations.files.sidecar import read_sidecars
from shmelim.eliminations.starting import keeping
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.errors import DamagedFileError, StoreError
from shmelim.shm import SharedNamespace
from shmelim.system import durable


@pytest.fixture
def path(state_dir):
    return state_dir / "eliminations.json"


def edit(path, *, remove=(), add=()):
    """Change a file as a person does: what stands there, less some rows, and more."""
    rows = json.loads(path.read_text())["eliminations"]
    changed = {one["hotkey"]: one for one in [*rows, *add] if one["hotkey"] not in remove}
    path.write_text(json.dumps({"eliminations": list(changed.values())}, indent=2))


def problems(server):
    return [problem["name"] for problem in server.health_check_rpc()["problems"]]


class TestAnEditOlderThanTheLastCommit:
    def test_loses_neither_what_it_changed_nor_what_was_acknowledged_since(
        self, table_name, state_dir, path, start
    ):
        def work(server):
            server.sync_eliminations_rpc([row("a"), row("b"), row("c")])
            server.save_eliminations_rpc()
            edit(path, remove=["b"], add=[row("c", 7), row("of-a-person")])
            server.add_elimination_rpc("acknowledged", row("acknowledged"))

        die_after(table_name, state_dir, work)
        server = start()
        assert server.get_eliminations_dict_rpc() == {
            "a": row("a"),
            "c": row("c", 7),
            "acknowledged": row("acknowledged"),
            "of-a-person": row("of-a-person"),
        }
        assert problems(server) == []
        assert [event["action"] for event in server.get_history_rpc(limit=None)].count("import") == 1

    def test_does_not_bring_back_what_was_removed_since_nor_an_earlier_record(
        self, table_name, state_dir, path, start
    ):
        def work(server):
            server.sync_eliminations_rpc([row("removed"), row("updated"), row("edited-and-removed"), row("gone")])
            server.save_eliminations_rpc()
            edit(path, remove=["gone"], add=[row("edited-and-removed", 7), row("of-a-person")])
            server.remove_elimination_rpc("removed")
            server.remove_elimination_rpc("edited-and-removed")
            server.add_elimination_rpc("updated", row("updated", 5))

        die_after(table_name, state_dir, work)
        server = start()
        assert server.get_eliminations_dict_rpc() == {
            "updated": row("updated", 5),
            "of-a-person": row("of-a-person"),
        }
        # Both changed one of them, so the edit is kept, and whoever made it is told.
        (aside,) = state_dir.glob("eliminations.json.edited-*")
        (problem,) = server.health_check_rpc()["problems"]
        assert (problem["name"], problem["subject"]) == ("file_not_applied", str(aside))
        assert "edited-and-removed" in problem["text"]
        assert row("edited-and-removed", 7) in json.loads(aside.read_text())["eliminations"]

    def test_of_a_row_that_was_updated_since_leaves_the_update(self, table_name, state_dir, path, start):
        def work(server):
            server.sync_eliminations_rpc([row("a"), row("b")])
            server.save_eliminations_rpc()
            edit(path, remove=["a"])
            server.add_elimination_rpc("a", row("a", 9))

        die_after(table_name, state_dir, work)
        server = start()
        assert server.get_eliminations_dict_rpc() == {"a": row("a", 9), "b": row("b")}
        assert problems(server) == ["file_not_applied"]

    def test_is_merged_once_though_the_server_dies_before_it_writes_the_file(
        self, table_name, state_dir, path, start
    ):
        with start() as server:
            server.sync_eliminations_rpc([row("a"), row("b")])
        edit(path, remove=["b"], add=[row("of-a-person")])
        die_after(
            table_name,
            state_dir,
            lambda server: (
                server.add_elimination_rpc("b", row("b")),
                server.remove_elimination_rpc("of-a-person"),
            ),
        )
        assert start().get_eliminated_hotkeys_rpc() == {"a", "b"}

    def test_of_departed_hotkeys_adds_those_that_it_added(self, table_name, state_dir, start):
        departed = state_dir / "departed_hotkeys.json"

        def work(server):
            server.update_metagraph_rpc(["m1", "m2"])
            server.update_metagraph_rpc(["m1"])
            server.save_eliminations_rpc()
            content = json.loads(departed.read_text())
            content["departed_hotkeys"]["of-a-person"] = {"detected_ms": 5}
            departed.write_text(json.dumps(content))
            server.clear_departed_hotkeys_rpc()

        die_after(table_name, state_dir, work)
        assert start().get_departed_hotkeys_rpc() == {"of-a-person": {"detected_ms": 5}}

    def test_of_departed_hotkeys_is_kept_where_it_takes_back_or_dates_anew(self, state_dir, start, table_name):
        departed = state_dir / "departed_hotkeys.json"

        def work(server):
            for hotkeys in (["a", "b", "c", "d"], ["d"]):
                server.update_metagraph_rpc(hotkeys)
            server.save_eliminations_rpc()

        die_after(table_name, state_dir, work)
        content = json.loads(departed.read_text())["departed_hotkeys"]
        edited = {"b": {"detected_ms": 5}, "c": None, "of-a-person": content["c"]}  # of "c" it says nothing else
        departed.write_text(json.dumps({"departed_hotkeys": edited}))
        server = start()
        assert server.get_departed_hotkeys_rpc() == {**content, "of-a-person": content["c"]}
        (problem,) = server.health_check_rpc()["problems"]
        assert problem["name"] == "file_not_applied"
        assert "but for 2 hotkeys that departed (b, a, …)" in problem["text"]
        assert "shmelim returned" in problem["remedy"]
        kept = json.loads(Path(problem["subject"]).read_text())
        assert kept == {"departed_hotkeys": edited}

    def test_that_dates_a_departure_anew_which_was_undone_since_is_kept(self, state_dir, start, table_name):
        departed = state_dir / "departed_hotkeys.json"

        def work(server):
            for hotkeys in (["a", "b"], ["b"]):
                server.update_metagraph_rpc(hotkeys)
            server.save_eliminations_rpc()
            departed.write_text(json.dumps({"departed_hotkeys": {"a": {"detected_ms": 5}}}))
            server.undo_departures_rpc(["a"])

        die_after(table_name, state_dir, work)
        server = start()
        assert server.get_departed_hotkeys_rpc() == {}
        (problem,) = server.health_check_rpc()["problems"]
        assert problem["name"] == "file_not_applied"

    def test_our_own_older_file_is_none(self, table_name, state_dir, path, start):
        def work(server):
            server.sync_eliminations_rpc([row("a"), row("b")])
            server.save_eliminations_rpc()
            server.clear_eliminations_rpc()

        die_after(table_name, state_dir, work)
        assert "hotkey" in path.read_text()
        server = start()
        assert server.get_eliminated_hotkeys_rpc() == set()
        assert problems(server) == []


class TestAFileThatIsNoEdit:
    @pytest.mark.parametrize(
        "content",
        [
            '{"eliminations": ["a", "b"]}',
            "[null]",
            '{"eliminations": {"a": "b"}}',
            '["a", "b"]',
            # Of two lists the empty one would be taken, of two hotkeys one would be lost.
            '{"eliminations": [{"hotkey": "a", "reason": "ZOMBIE"}], "eliminations": []}',
            '{"eliminations": [{"hotkey": "a", "reason": "ZOMBIE", "hotkey": "b"}]}',
        ],
        ids=range(6),
    )
    def test_but_has_not_one_usable_row_is_damaged_and_empties_nothing(self, state_dir, path, start, content):
        with start() as server:
            server.sync_eliminations_rpc([row("a"), row("b")])
        path.write_text(content)
        server = start()
        assert server.get_eliminated_hotkeys_rpc() == {"a", "b"}
        (aside,) = state_dir.glob("eliminations.json.damaged-*")
        assert aside.read_text() == content
        health = server.health_check_rpc()
        assert health["status"] == "degraded"
        assert [(one["name"], one["subject"]) for one in health["problems"]] == [("file_damaged", str(aside))]
        aside.unlink()
        assert server.health_check_rpc()["status"] == "ok"

    def test_but_is_the_only_one_and_has_not_one_usable_row_is_refused(self, state_dir, path, start):
        state_dir.mkdir()
        path.write_text(json.dumps({"eliminations": ["a", "b"]}))
        for _ in range(2):
            with pytest.raises(DamagedFileError, match="none of its 2 rows can be taken"):
                start()
        assert path.exists()

    def test_that_somebody_emptied_empties_the_state(self, state_dir, path, start):
        with start() as server:
            server.sync_eliminations_rpc([row("a"), row("b")])
        path.write_text(json.dumps({"eliminations": []}))
        server = start()
        assert server.get_eliminated_hotkeys_rpc() == set()
        assert problems(server) == []

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
    def test_but_something_else_is_neither_waited_for_nor_read(self, state_dir, path, start, make):
        with start() as server:
            server.sync_eliminations_rpc([row("a")])
        path.unlink()
        make(path)
        server = start()
        assert server.get_eliminated_hotkeys_rpc() == {"a"}
        assert problems(server) == ["file_damaged"]
        server.save_eliminations_rpc()
        assert [one["hotkey"] for one in json.loads(path.read_text())["eliminations"]] == ["a"]

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
    def test_but_something_else_and_the_only_one_is_refused(self, state_dir, path, start, make):
        state_dir.mkdir()
        make(path)
        with pytest.raises(DamagedFileError, match="not a file"):
            start()
        assert path.exists()

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
    def test_something_else_in_the_place_of_what_was_written_down_of_it_is_not_waited_for(
        self, state_dir, path, start, make
    ):
        with start() as server:
            server.sync_eliminations_rpc([row("a")])
            server.save_eliminations_rpc()
        sidecar = path.with_name(f".{path.name}.written")
        sidecar.unlink()
        make(sidecar)
        server = start()
        assert server.get_eliminated_hotkeys_rpc() == {"a"}

    def test_a_link_to_what_is_not_mounted_yet_is_no_empty_state(self, state_dir, path, start, tmp_path):
        state_dir.mkdir()
        path.symlink_to(tmp_path / "mount" / path.name)
        with pytest.raises(DamagedFileError, match="is a link to"):
            start()
        assert not (state_dir / "shmelim.sqlite").exists()
        (tmp_path / "mount").mkdir()
        with start() as server:
            server.sync_eliminations_rpc([row("a")])
            server.save_eliminations_rpc()
        assert (tmp_path / "mount" / path.name).is_file()


class TestAnEditWhileAFileIsWritten:
    """The file that is written takes its place, and the edit stands aside: never the one over the other."""

    @staticmethod
    def change(path):
        path.write_text(json.dumps({"eliminations": [row("a"), row("of-a-person")]}))

    def kept(self, server, path):
        (problem,) = server.health_check_rpc()["problems"]
        assert problem["name"] == "file_not_applied"
        aside = json.loads(Path(problem["subject"]).read_text())
        return [one["hotkey"] for one in aside["eliminations"]] == ["a", "of-a-person"]

    def test_right_before_it_takes_its_place(self, state_dir, path, start, monkeypatch):
        with start() as server:
            server.sync_eliminations_rpc([row("a"), row("b")])
            announce = mirror.announce

            def announce_and_change(announced, written):
                announce(announced, written)
                if announced == path:
                    self.change(path)

            monkeypatch.setattr(mirror, "announce", announce_and_change)
            server.add_elimination_rpc("c", row("c"))
            assert self.kept(server, path)
            assert state_in_files(state_dir) == state_in_table(server.reader)

    def test_right_after_it_took_its_place(self, state_dir, path, start, monkeypatch):
        with start() as server:
            server.sync_eliminations_rpc([row("a"), row("b")])
            sync = durable.sync_directory

            def sync_and_change(directory):
                sync(directory)
                if '"c"' in path.read_text():
                    self.change(path)

            monkeypatch.setattr(durable, "sync_directory", sync_and_change)
            server.add_elimination_rpc("c", row("c"))
            monkeypatch.undo()
            server.add_elimination_rpc("d", row("d"))
            assert self.kept(server, path)
            assert state_in_files(state_dir) == state_in_table(server.reader)


class TestWhatWasSetAside:
    @pytest.mark.parametrize(
        ("content", "name"), [('{"eliminations": [', "file_damaged"), ('{"eliminations": []}', "file_not_applied")]
    )
    @pytest.mark.parametrize("linked", [False, True], ids=["", "behind a link"])
    def test_is_a_problem_until_it_is_taken_away_whoever_serves(
        self, state_dir, path, start, tmp_path, content, name, linked
    ):
        if linked:
            state_dir.mkdir()
            path.symlink_to(tmp_path / "linked.json")
        with start(files="off") as server:
            server.add_elimination_rpc("a", row("a"))
        path.write_text(content)
        for _ in range(3):
            with start() as server:
                (problem,) = server.health_check_rpc()["problems"]
                assert problem["name"] == name
        Path(problem["subject"]).unlink()
        assert problems(server) == []
        assert problems(start()) == []


@pytest.mark.parametrize("name", ["eliminations.json", "departed_hotkeys.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, None], ids=["pipe", "directory", "itself"])
@pytest.mark.parametrize("serving", [False, True], ids=["at the start", "while it is served"])
def test_of_a_link_to_what_is_not_a_file_only_the_link_gives_way(state_dir, start, tmp_path, name, make, serving):
    path, place = state_dir / name, tmp_path / "place"

    def link():
        path.unlink()
        if make is not None:
            make(place)
        path.symlink_to(place if make is not None else path)

    with start() as server:
        server.sync_eliminations_rpc([row("a")])
        server.update_metagraph_rpc(["m1", "m2"])
        if serving:
            link()
            server.update_metagraph_rpc(["m1"])
    if not serving:
        link()
    server = start()
    server.save_eliminations_rpc()
    assert server.get_eliminated_hotkeys_rpc() == {"a"}
    if serving and make is not None:
        # The link is what was set aside, wherever it leads by then.
        place.unlink() if make is os.mkfifo else place.rmdir()
    # One that leads to itself keeps the files behind while it is served.
    assert problems(server) == ["file_not_applied" if serving and make is not None else "file_damaged"]
    assert state_in_files(state_dir) == state_in_table(server.reader).without_registered()
    assert not place.is_file()


class TestWithoutFilesAndWithThemAgain:
    def test_the_first_start_takes_what_stands_there_and_no_later_one_goes_back_to_it(
        self, state_dir, path, start
    ):
        state_dir.mkdir()
        path.write_text(json.dumps({"eliminations": [row("legacy"), row("later-removed")]}))
        with start(files="off") as server:
            assert server.get_eliminated_hotkeys_rpc() == {"legacy", "later-removed"}
            server.add_elimination_rpc("new", row("new"))
            server.remove_elimination_rpc("later-removed")
        for files in ("current", "off", "lagged"):
            with start(files=files) as server:
                assert server.get_eliminated_hotkeys_rpc() == {"legacy", "new"}
                assert problems(server) == []

    def test_a_file_that_comes_to_a_store_which_keeps_none_is_set_aside(self, state_dir, path, start):
        with start(files="off") as server:
            server.sync_eliminations_rpc([row(f"h{n}") for n in range(50)])
        path.write_text(json.dumps({"eliminations": [row("old")]}))
        server = start()
        assert len(server.get_eliminated_hotkeys_rpc()) == 50
        assert problems(server) == ["file_not_applied"]
        assert list(state_dir.glob("eliminations.json.edited-*"))

    def test_our_own_file_of_before_is_no_edit(self, state_dir, start):
        with start() as server:
            server.sync_eliminations_rpc([row("a")])
        with start(files="off") as server:
            server.add_elimination_rpc("b", row("b"))
        with start() as server:
            assert server.get_eliminated_hotkeys_rpc() == {"a", "b"}
            assert problems(server) == []


class TestAnEditBesideAStateThatCameFromElsewhere:
    """It is not applied, and is nobody's to throw away: of what it says, the new file has nothing."""

    @pytest.fixture(params=["rebuilt from the table", "adopted", "restored"])
    def state_from_elsewhere(self, request, table_name, tmp_path, state_dir, path, start):
        """Edit the file by hand, and return what makes a start that takes its state from elsewhere."""

        def begin(edited):
            with start() as server:
                server.sync_eliminations_rpc([row("a"), row("b")])
            keeping.back_up(state_dir, tmp_path / "backup")
            if request.param == "adopted":
                name = SharedNamespace(table_name)
                with EliminationManagerServer(name, tmp_path / "other", replace_published=True) as other:
                    other.sync_eliminations_rpc([row("a"), row("b")])
            edited()
            if request.param == "restored":
                keeping.restore(tmp_path / "backup", state_dir, None)
            elif request.param == "rebuilt from the table":
                (state_dir / FILE_NAME).write_bytes(b"damaged" * 1000)
            return start(adopt_published=request.param == "adopted")

        return begin

    def test_is_kept_and_named(self, state_dir, path, state_from_elsewhere):
        server = state_from_elsewhere(lambda: edit(path, add=[row("of-a-person")]))
        assert server.get_eliminated_hotkeys_rpc() == {"a", "b"}
        assert "file_not_applied" in problems(server)
        (kept,) = state_dir.glob("eliminations.json.edited-*")
        assert "of-a-person" in kept.read_text()
        server.save_eliminations_rpc()
        assert "of-a-person" not in path.read_text()

    def test_is_no_reason_for_a_traceback_where_it_cannot_be_kept(self, path, state_from_elsewhere, monkeypatch):
        def fail(*_args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def edited():
            edit(path, add=[row("of-a-person")])
            monkeypatch.setattr("shmelim.eliminations.files.taking.write_aside", fail)

        with pytest.raises(StoreError, match="could not be kept: No space left"):
            state_from_elsewhere(edited)
        assert "of-a-person" in path.read_text()
        assert not list(path.parent.glob("*.edited-*"))

    def test_but_not_where_it_changed_nothing(self, state_dir, path, state_from_elsewhere):
        server = state_from_elsewhere(lambda: edit(path))
        assert "file_not_applied" not in problems(server)
        assert not list(state_dir.glob("*.edited-*"))


def test_rows_of_a_pipe_that_cannot_be_taken_are_set_aside_beside_the_store(state_dir, start):
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        pipe.write(json.dumps({"eliminations": [row("a"), {"reason": "ZOMBIE"}]}))
    try:
        assert start(f"/dev/fd/{reading}").get_eliminated_hotkeys_rpc() == {"a"}
    finally:
        os.close(reading)
    (quarantine,) = state_dir.glob("import.quarantine-*.json")
    assert json.loads(quarantine.read_text())["rows"][0]["row"] == {"reason": "ZOMBIE"}


def test_files_of_a_store_in_which_nothing_was_yet_are_its_own(state_dir, path, start):
    for _ in range(3):
        with start() as server:
            assert server.get_history_rpc(limit=None) == []
    edit(path, add=[row("of-a-person")])
    with start() as server:
        assert server.get_eliminated_hotkeys_rpc() == {"of-a-person"}


def test_what_says_what_the_store_says_is_no_edit_wherever_it_comes_from(state_dir, path, start):
    with start() as server:
        server.sync_eliminations_rpc([row("a"), row("b")])
    for written in state_dir.glob(".*.written"):
        written.unlink()
    edit(path)
    with start() as server:
        assert problems(server) == []
        server.add_elimination_rpc("c", row("c"))
        server.save_eliminations_rpc()
        assert problems(server) == []
    assert start().get_eliminated_hotkeys_rpc() == {"a", "b", "c"}
    assert not list(state_dir.glob("*.edited-*"))


def test_files_cost_no_commit(state_dir, start):
    with start() as server:
        server.sync_eliminations_rpc([row("a")])
        before = server.health_check_rpc()["commits"]
        for n in range(5):
            server.add_elimination_rpc("a", row("a", n + 1))
            server.save_eliminations_rpc()
        assert server.health_check_rpc()["commits"] == before + 5


def test_what_was_written_is_known_by_its_rows(state_dir, path, start):
    with start() as server:
        server.sync_eliminations_rpc([row("a"), row("b")])
        known = read_sidecars(path)
    assert known.next is None
    assert len(known.written.rows) == 2 * 16
    assert len(known.written.store_id) == 16


def test_a_directory_that_a_link_led_to_is_written_wherever_the_link_and_the_process_go(tmp_path, monkeypatch):
    real, other, link = tmp_path / "real", tmp_path / "other", tmp_path / "link"
    real.mkdir()
    other.mkdir()
    link.symlink_to(real)
    monkeypatch.chdir(tmp_path)
    with EliminationManagerServer(None, "link", durability="process") as server:
        monkeypatch.chdir(other)
        link.unlink()
        link.symlink_to(other)
        server.add_elimination_rpc("a", row("a"))
    assert (real / "eliminations.json").exists()
    assert list(other.iterdir()) == []
