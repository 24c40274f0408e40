"""The JSON files: when they are current, when they may be behind, and when nothing is written."""

import json
import os
import threading

import pytest
from serving import listing, row, state_in_files, state_in_table
from waiting import PATIENCE, until

from shmelim import EliminationManagerServer
from shmelim.eliminations.files import format as files
from shmelim.eliminations.files import mirror, taking
from shmelim.errors import SegmentError, StoreError


@pytest.fixture
def state_dir(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def server(state_dir):
    with EliminationManagerServer(state_dir=state_dir, durability="process") as server:
        server.save_eliminations_rpc()
        yield server


@pytest.fixture
def lagged(state_dir):
    with EliminationManagerServer(state_dir=state_dir, durability="process", files="lagged") as server:
        server.save_eliminations_rpc()
        yield server


@pytest.fixture
def never_by_itself(monkeypatch):
    """Nothing is written but what somebody waits for."""
    monkeypatch.setattr(mirror, "_COALESCE", 1e6)


def same(server, state_dir):
    return state_in_files(state_dir) == state_in_table(server.reader).without_registered()


def in_file(state_dir):
    return [
        record["hotkey"] for record in json.loads((state_dir / "eliminations.json").read_text())["eliminations"]
    ]


SAVING = {
    "append": lambda server: server.append_elimination_row_rpc("new", 1.0, "ZOMBIE"),
    "delete": lambda server: server.delete_eliminations_rpc(["a", "b"]),
    "sync": lambda server: server.sync_eliminations_rpc([row("c"), row("a")]),
    "sync in parts": lambda server: _upload(server, [row("c"), row("a")]),
    "clear": lambda server: server.clear_eliminations_rpc(),
    "write": lambda server: server.write_eliminations_to_disk_rpc([row("c"), row("a")]),
    "save": lambda server: server.save_eliminations_rpc(),
    "read": lambda server: server.get_eliminations_from_disk_rpc(),
}

CHANGING = {
    "add": lambda server: server.add_elimination_rpc("new", row("new")),
    "update": lambda server: server.add_elimination_rpc("a", row("a", 7)),
    "remove": lambda server: server.remove_elimination_rpc("a"),
    "departure": lambda server: server.update_metagraph_rpc(["m1"]),
}


def _upload(server, rows):
    token = server.begin_upload_rpc()
    server.upload_rpc(token, rows)
    server.sync_uploaded_rpc(token)


def fill(server):
    server.add_elimination_rpc("a", row("a"))
    server.add_elimination_rpc("b", row("b"))
    server.update_metagraph_rpc(["m1", "m2"])


def test_what_changes_while_the_one_file_is_written_is_not_in_the_other(
    never_by_itself, lagged, state_dir, monkeypatch
):
    """Or that would have more than the commit that is noted of it."""
    lagged.update_metagraph_rpc(["m1", "m2"])
    write = files.write_eliminations

    def meanwhile(*args, **options):
        lagged.update_metagraph_rpc(["m2"])
        return write(*args, **options)

    monkeypatch.setattr(files, "write_eliminations", meanwhile)
    lagged._mirror.flush()
    assert json.loads((state_dir / "departed_hotkeys.json").read_text()) == {"departed_hotkeys": {}}
    assert lagged.reader.get_departed_hotkeys().keys() == {"m1"}


def test_a_table_that_cannot_be_read_for_a_while_leaves_the_files_behind_and_is_named(
    lagged, state_dir, monkeypatch
):
    monkeypatch.setattr(mirror, "_RETRY", 0.01)
    refused = []

    class Unreadable:
        def pack_eliminations(self):
            refused.append(True)
            raise SegmentError("Too many open files")

    published = lagged._mirror._published
    lagged._mirror._published = Unreadable()
    lagged.add_elimination_rpc("a", row("a"))
    until(lambda: [one["name"] for one in lagged.health_check_rpc()["problems"]] == ["files_behind"])
    lagged._mirror._published = published
    until(lambda: in_file(state_dir) == ["a"])
    until(lambda: lagged.health_check_rpc()["problems"] == [])


class TestCurrent:
    @pytest.mark.parametrize("call", [*SAVING, *CHANGING])
    def test_when_any_call_returns(self, never_by_itself, server, state_dir, call):
        fill(server)
        assert same(server, state_dir)
        (SAVING | CHANGING)[call](server)
        assert same(server, state_dir)

    @pytest.mark.parametrize("call", ["write", "save", "read"])
    def test_when_a_call_returns_that_says_so_though_the_others_lag(
        self, never_by_itself, lagged, state_dir, call
    ):
        fill(lagged)
        assert not same(lagged, state_dir)
        SAVING[call](lagged)
        assert same(lagged, state_dir)

    @pytest.mark.parametrize("call", CHANGING)
    def test_soon_after_any_other(self, lagged, state_dir, call):
        fill(lagged)
        lagged.save_eliminations_rpc()
        CHANGING[call](lagged)
        until(lambda: same(lagged, state_dir))

    def test_what_is_on_record_alone_writes_none_anew(self, server, state_dir):
        server.eliminate_rpc("a", row("a"), ["positions"])
        server.save_eliminations_rpc()
        written = (state_dir / "eliminations.json").stat().st_ino
        assert server.settle_debt_rpc("a", "positions")
        server.save_eliminations_rpc()
        assert (state_dir / "eliminations.json").stat().st_ino == written

    def test_when_the_server_has_closed(self, never_by_itself, state_dir):
        with EliminationManagerServer(state_dir=state_dir) as server:
            fill(server)
        assert same(server, state_dir)

    def test_soon_after_a_start(self, state_dir):
        with EliminationManagerServer(state_dir=state_dir, files="off") as server:
            fill(server)
        assert not (state_dir / "eliminations.json").exists()
        with EliminationManagerServer(state_dir=state_dir) as server:
            until((state_dir / "departed_hotkeys.json").exists)
            assert same(server, state_dir)

    def test_when_a_call_returns_that_says_so_while_a_write_is_under_way(self, lagged, state_dir, monkeypatch):
        writing, go_on, returned = threading.Event(), threading.Event(), threading.Event()
        write = files.write_eliminations

        def slow(*args, **kwargs):
            writing.set()
            assert go_on.wait(PATIENCE)
            return write(*args, **kwargs)

        def caller():
            lagged.save_eliminations_rpc()
            seen.extend(in_file(state_dir))
            returned.set()

        seen = []
        monkeypatch.setattr(files, "write_eliminations", slow)
        lagged.add_elimination_rpc("a", row("a"))
        assert writing.wait(PATIENCE)
        lagged.add_elimination_rpc("b", row("b"))
        thread = threading.Thread(target=caller)
        thread.start()
        assert not returned.is_set()
        go_on.set()
        thread.join()
        assert seen == ["a", "b"]

    def test_many_saving_calls_at_once(self, server, state_dir):
        wrong = []

        def work(number):
            for n in range(15):
                hotkey = f"h{number}-{n}"
                server.append_elimination_row_rpc(hotkey, 1.0, "ZOMBIE")
                if hotkey not in in_file(state_dir):
                    wrong.append(hotkey)
                server.add_elimination_rpc(f"other-{hotkey}", row(f"other-{hotkey}"))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_behind_a_link_that_stays_one_with_the_mode_that_a_person_gave_it(self, server, state_dir, tmp_path):
        elsewhere, link = tmp_path / "shared.json", state_dir / "eliminations.json"
        link.rename(elsewhere)
        link.symlink_to(elsewhere)
        elsewhere.chmod(0o640)
        for hotkey in "ab":
            server.append_elimination_row_rpc(hotkey, 1.0, "ZOMBIE")
        assert link.readlink() == elsewhere
        assert in_file(state_dir) == ["a", "b"]
        assert elsewhere.stat().st_mode & 0o777 == 0o640

    def test_each_is_a_file_of_json_that_keeps_the_order(self, server, state_dir):
        for hotkey in ("z", "a", "m"):
            server.add_elimination_rpc(hotkey, row(hotkey))
        server.append_elimination_row_rpc("b", None, "ZOMBIE")
        assert in_file(state_dir) == ["z", "a", "m", "b"]
        assert (state_dir / "eliminations.json").stat().st_mode & 0o777 == 0o600
        assert server.get_eliminations_from_disk_rpc() == server.get_eliminations_from_memory_rpc()


class TestBehind:
    def test_lagged_calls_do_not_wait_for_the_files(self, never_by_itself, state_dir):
        with EliminationManagerServer(state_dir=state_dir, files="lagged") as server:
            fill(server)
            for call in ("append", "delete", "sync", "clear"):
                SAVING[call](server)
            assert not (state_dir / "eliminations.json").exists()

    def test_lagged_files_follow(self, state_dir):
        with EliminationManagerServer(state_dir=state_dir, files="lagged") as server:
            fill(server)
            until(lambda: (state_dir / "departed_hotkeys.json").exists() and same(server, state_dir))
            server.append_elimination_row_rpc("new", 1.0, "ZOMBIE")
            until(lambda: same(server, state_dir))

    def test_off_writes_none(self, state_dir):
        with EliminationManagerServer(state_dir=state_dir, files="off") as server:
            fill(server)
            for call in SAVING.values():
                call(server)
            disk = server.get_eliminations_from_disk_rpc()
            assert disk == server.get_eliminations_from_memory_rpc()
        assert not list(state_dir.glob("*.json"))

    def test_in_memory_writes_nothing_at_all(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        with EliminationManagerServer() as server:
            fill(server)
            for call in SAVING.values():
                call(server)
            assert server.get_eliminations_from_disk_rpc() == server.get_eliminations_from_memory_rpc()
        assert listing(tmp_path) == {}


class TestNotRewritten:
    @pytest.fixture
    def written(self, monkeypatch):
        written = []
        for name in ("write_eliminations", "write_departed"):
            write = getattr(files, name)
            monkeypatch.setattr(
                files, name, lambda *a, _write=write, _name=name, **k: (written.append(_name), _write(*a, **k))[1]
            )
        return written

    def test_when_nothing_changed(self, written, server):
        server.sync_eliminations_rpc([row("a"), row("b")])
        server.update_metagraph_rpc(["m1"])
        server.save_eliminations_rpc()
        written.clear()
        assert server.add_elimination_rpc("a", row("a")) is False
        server.remove_elimination_rpc("absent")
        server.delete_eliminations_rpc([])
        server.update_metagraph_rpc(["m1"])
        server.sync_eliminations_rpc([row("a"), row("b")])
        server._mirror.stop()
        assert written == []

    def test_departed_when_only_eliminations_changed(self, written, server):
        fill(server)
        server.save_eliminations_rpc()
        written.clear()
        server.append_elimination_row_rpc("new", 1.0, "ZOMBIE")
        assert written == ["write_eliminations"]

    def test_many_changes_share_a_write(self, written, lagged, state_dir):
        written.clear()
        for n in range(100):
            lagged.add_elimination_rpc(f"h{n}", row(f"h{n}"))
        until(lambda: same(lagged, state_dir))
        assert len(written) < 100


class TestFailing:
    @pytest.fixture
    def full(self, monkeypatch):
        """Switch on and off that the files cannot be written."""
        switch = {"on": False}
        write = files._write

        def failing(path, *args):
            if switch["on"]:
                raise StoreError(f"{path} could not be written: no space left", hint="make room")
            return write(path, *args)

        monkeypatch.setattr(files, "_write", failing)
        return switch

    def test_the_change_stands_and_health_names_the_problem_until_it_is_solved(
        self, full, server, state_dir, caplog
    ):
        fill(server)
        server.save_eliminations_rpc()
        full["on"] = True
        assert server.append_elimination_row_rpc("new", 1.0, "ZOMBIE") is True
        assert server.is_hotkey_eliminated_rpc("new")
        assert "new" not in in_file(state_dir)
        health = server.health_check_rpc()
        assert health["status"] == "degraded"
        assert [problem["name"] for problem in health["problems"]] == ["files_behind"]
        assert "no space left" in str(health["problems"])
        assert "no space left" in caplog.text
        with pytest.raises(StoreError, match="no space left"):
            server.save_eliminations_rpc()
        full["on"] = False
        # Without anybody asking.
        until(lambda: same(server, state_dir))
        until(lambda: server.health_check_rpc()["problems"] == [])

    def test_the_files_are_written_by_the_next_saving_call_that_works(
        self, full, never_by_itself, server, state_dir
    ):
        full["on"] = True
        server.append_elimination_row_rpc("new", 1.0, "ZOMBIE")
        full["on"] = False
        server.save_eliminations_rpc()
        assert same(server, state_dir)
        assert server.health_check_rpc()["problems"] == []

    def test_closing_does_not_hang_and_the_next_start_has_everything(self, full, state_dir):
        with EliminationManagerServer(state_dir=state_dir) as server:
            full["on"] = True
            server.append_elimination_row_rpc("new", 1.0, "ZOMBIE")
        full["on"] = False
        with EliminationManagerServer(state_dir=state_dir) as server:
            assert server.get_eliminated_hotkeys_rpc() == {"new"}
            server.save_eliminations_rpc()
            assert same(server, state_dir)

    def test_a_mistake_in_writing_does_not_end_the_writer(self, server, state_dir, monkeypatch):
        write = files.write_eliminations
        monkeypatch.setattr(files, "write_eliminations", lambda *_a, **_k: 1 / 0)
        server.append_elimination_row_rpc("new", 1.0, "ZOMBIE")
        assert "division" in str(server.health_check_rpc()["problems"])
        monkeypatch.setattr(files, "write_eliminations", write)
        server.save_eliminations_rpc()
        assert same(server, state_dir)

    def test_a_damaged_file_is_answered_from_the_store(self, server, state_dir):
        server.append_elimination_row_rpc("new", 1.0, "ZOMBIE")
        (state_dir / "eliminations.json").write_text("{")
        assert [record["hotkey"] for record in server.get_eliminations_from_disk_rpc()] == ["new"]

    def test_a_file_that_is_gone_is_answered_from_the_store_and_comes_back(self, server, state_dir):
        server.append_elimination_row_rpc("new", 1.0, "ZOMBIE")
        (state_dir / "eliminations.json").unlink()
        assert [record["hotkey"] for record in server.get_eliminations_from_disk_rpc()] == ["new"]
        server.save_eliminations_rpc()
        assert in_file(state_dir) == ["new"]


class TestAFileThatIsEditedWhileTheServerRuns:
    @pytest.fixture
    def edited(self, never_by_itself, server, state_dir):
        """The text of an edit, made in place."""
        server.append_elimination_row_rpc("a", 1.0, "ZOMBIE")
        path = state_dir / "eliminations.json"
        text = json.dumps({"eliminations": [row("of-a-person")]})
        path.write_text(text)
        return text

    @staticmethod
    def asides(state_dir, name="eliminations.json"):
        return sorted(state_dir.glob(f"{name}.edited-*"))

    def test_is_moved_aside_and_named(self, edited, server, state_dir, caplog):
        server.append_elimination_row_rpc("b", 1.0, "ZOMBIE")
        assert in_file(state_dir) == ["a", "b"]
        (aside,) = self.asides(state_dir)
        assert aside.read_text() == edited
        assert f"shmelim sync {aside}" in caplog.text
        (event,) = [event for event in server.get_history_rpc(limit=None) if event["action"] == "edited"]
        assert aside.name in event["note"]

    def test_is_a_named_problem_until_somebody_takes_it_away(self, edited, server, state_dir):
        server.append_elimination_row_rpc("b", 1.0, "ZOMBIE")
        (aside,) = self.asides(state_dir)
        (problem,) = server.health_check_rpc()["problems"]
        assert (problem["name"], problem["subject"], problem["severity"]) == (
            "file_not_applied",
            str(aside),
            "degraded",
        )
        assert f"shmelim sync {aside}" in problem["remedy"]
        aside.unlink()
        assert server.health_check_rpc()["problems"] == []

    def test_is_moved_aside_once(self, edited, server, state_dir):
        for hotkey in "bcd":
            server.append_elimination_row_rpc(hotkey, 1.0, "ZOMBIE")
        assert len(self.asides(state_dir)) == 1

    def test_each_edit_is_kept(self, edited, server, state_dir):
        server.append_elimination_row_rpc("b", 1.0, "ZOMBIE")
        # As an editor saves: another file takes the name.
        (state_dir / "new").write_text("not even JSON")
        (state_dir / "new").replace(state_dir / "eliminations.json")
        server.append_elimination_row_rpc("c", 1.0, "ZOMBIE")
        assert sorted(path.read_text() for path in self.asides(state_dir)) == sorted([edited, "not even JSON"])
        assert same(server, state_dir)

    def test_of_departed_hotkeys_is_kept_too(self, never_by_itself, server, state_dir, caplog):
        path = state_dir / "departed_hotkeys.json"
        path.write_text('{"departed_hotkeys": ["mine"]}')
        server.save_eliminations_rpc()
        (aside,) = self.asides(state_dir, path.name)
        assert aside.read_text() == '{"departed_hotkeys": ["mine"]}'
        assert f"--import {aside}" in caplog.text

    def test_that_is_only_touched_or_copied_is_ours(self, never_by_itself, server, state_dir):
        path = state_dir / "eliminations.json"
        os.utime(path, ns=(1, 1))
        server.append_elimination_row_rpc("a", 1.0, "ZOMBIE")
        (state_dir / "copy").write_bytes(path.read_bytes())
        (state_dir / "copy").replace(path)
        server.append_elimination_row_rpc("b", 1.0, "ZOMBIE")
        assert self.asides(state_dir) == []
        assert not [event for event in server.get_history_rpc(limit=None) if event["action"] == "edited"]

    def test_behind_a_link_is_moved_aside_where_it_is_and_the_link_stays(
        self, never_by_itself, server, state_dir, tmp_path
    ):
        elsewhere, link = tmp_path / "shared.json", state_dir / "eliminations.json"
        link.rename(elsewhere)
        link.symlink_to(elsewhere)
        elsewhere.write_text("an edit")
        server.append_elimination_row_rpc("a", 1.0, "ZOMBIE")
        assert link.readlink() == elsewhere
        assert in_file(state_dir) == ["a"]
        assert [path.read_text() for path in self.asides(tmp_path, "shared.json")] == ["an edit"]
        assert self.asides(state_dir) == []

    def test_before_the_first_write_is_kept(self, never_by_itself, state_dir):
        with EliminationManagerServer(state_dir=state_dir, durability="process") as server:
            server.append_elimination_row_rpc("a", 1.0, "ZOMBIE")
        with EliminationManagerServer(state_dir=state_dir, durability="process") as server:
            (state_dir / "eliminations.json").write_text("an edit")
            server.append_elimination_row_rpc("b", 1.0, "ZOMBIE")
            assert [path.read_text() for path in self.asides(state_dir)] == ["an edit"]

    def test_that_cannot_be_moved_is_not_overwritten(self, edited, server, state_dir, monkeypatch):
        def refuse(*_args):
            raise StoreError("cannot be moved")

        with monkeypatch.context() as patch:
            patch.setattr(taking, "move_aside", refuse)
            with pytest.raises(StoreError, match="cannot be moved"):
                server.save_eliminations_rpc()
            assert (state_dir / "eliminations.json").read_text() == edited
            assert server.health_check_rpc()["problems"]
        server.save_eliminations_rpc()
        assert same(server, state_dir)
        assert [path.read_text() for path in self.asides(state_dir)] == [edited]
