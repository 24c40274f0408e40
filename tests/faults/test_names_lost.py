"""Names in /dev/shm that vanish under a running server: it publishes again, and every reader follows."""

import threading
from pathlib import Path

import pytest
from serving import row, state_in_table
from waiting import PATIENCE, until

from shmelim import EliminationManagerServer, EliminationReader
from shmelim.errors import SegmentFullError
from shmelim.shm import SharedNamespace, TableReader, TableWriter
from shmelim.shm.layout import MAX_GENERATION


@pytest.fixture
def server(table_name, tmp_path):
    with EliminationManagerServer(SharedNamespace(table_name), tmp_path / "state", durability="process") as server:
        server.add_elimination_rpc("a", row("a"))
        yield server


def remove_names(name, pattern=""):
    """As systemd's RemoveIPC does at a logout."""
    for path in Path("/dev/shm").glob(f"shmelim.{name}{pattern}*"):
        path.unlink()


def root_of(name):
    return TableReader(SharedNamespace(name)).identity().root_id


def test_it_publishes_again_and_every_reader_follows(server, table_name):
    told = []
    server.problems.subscribe(lambda change, problem: told.append((change, problem.name)))
    attached, root = EliminationReader(table_name), root_of(table_name)
    remove_names(table_name)
    until(lambda: ("cleared", "shared_memory_lost") in told, "the end of the problem")
    assert told[0] == ("raised", "shared_memory_lost")
    assert root_of(table_name) != root
    server.add_elimination_rpc("b", row("b"))
    assert state_in_table(attached) == state_in_table(EliminationReader(table_name))
    assert attached.get_eliminated_hotkeys() == {"a", "b"}
    assert server.health_check_rpc()["problems"] == []


def test_they_are_made_again_though_there_was_no_thread_to_be_had_at_first(server, table_name, monkeypatch):
    tried = threading.Event()

    def none_left(_thread):
        tried.set()
        raise RuntimeError("can't start new thread")

    root = root_of(table_name)
    with monkeypatch.context() as at_the_limit:
        at_the_limit.setattr(threading.Thread, "start", none_left)
        remove_names(table_name)
        assert tried.wait(PATIENCE)
    until(lambda: Path(f"/dev/shm/shmelim.{table_name}").exists(), "the names")
    assert root_of(table_name) != root


@pytest.mark.parametrize("when", ["names lost", "generations used up"])
def test_changes_are_told_across_the_version_under_which_the_same_is_published_again(
    server, table_name, monkeypatch, when
):
    before = server.reader.version
    if when == "names lost":
        remove_names(table_name)
        until(lambda: server.reader.version > before, "the names")
    else:
        monkeypatch.setattr(TableWriter, "_stage", with_generations_used_up(TableWriter._stage))
        with pytest.raises(SegmentFullError):
            server.add_elimination_rpc("b", row("b"))
        monkeypatch.undo()
    again = server.reader.version
    assert again > before
    assert server.changes_rpc(before) == {"version": again, "events": []}
    server.add_elimination_rpc("c", row("c"))
    for since in (before, again):
        assert [event["hotkey"] for event in server.changes_rpc(since)["events"]] == ["c"]


def with_generations_used_up(stage):
    """Stage with the last generation in use, and with no room for what comes then."""

    def staging(writer, *args, **kwargs):
        writer._generation = MAX_GENERATION
        stage(writer, *args, **kwargs)
        raise SegmentFullError("no room")

    return staging


def test_it_answers_and_takes_changes_while_they_are_gone_again(server, table_name):
    told = []
    server.problems.subscribe(lambda change, problem: told.append((change, problem.name)))
    remove_names(table_name)
    until(lambda: ("cleared", "shared_memory_lost") in told, "the end of the problem")
    remove_names(table_name)
    assert not server.add_elimination_rpc("a", row("a", 1))
    assert server.sync_eliminations_rpc([row("b")]) == ["a"]
    assert server.get_eliminated_hotkeys_rpc() == {"b"}
    server.save_eliminations_rpc()
    assert server.health_check_rpc()["num_eliminations"] == 1


def test_the_beat_goes_on_while_a_long_change_keeps_the_names_waiting(server, table_name):
    began, go_on = threading.Event(), threading.Event()

    def long_change(_step):
        began.set()
        assert go_on.wait(60)

    changing = threading.Thread(target=server._state.commit, args=(long_change,))
    changing.start()
    assert began.wait(60)
    reader = EliminationReader(table_name)
    remove_names(table_name)
    until(lambda: server.problems.stands("shared_memory_lost"), "the problem")
    beats = {reader.writer.heartbeat_age for _ in range(3)}
    until(lambda: reader.writer.heartbeat_age < min(beats), "another beat")
    go_on.set()
    changing.join()
    until(lambda: not server.problems.stands("shared_memory_lost"), "the end of the problem")
    assert EliminationReader(table_name).is_hotkey_eliminated("a")


def test_a_server_that_starts_after_they_were_removed_serves_the_same(table_name, tmp_path):
    def serve():
        return EliminationManagerServer(SharedNamespace(table_name), tmp_path / "state", durability="process")

    with serve() as server:
        server.add_elimination_rpc("a", row("a"))
        version = server.reader.version
    remove_names(table_name)
    with serve() as server:
        assert server.is_hotkey_eliminated_rpc("a")
        assert server.reader.version > version
