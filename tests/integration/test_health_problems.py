"""What a server says is wrong: by name, since when, how bad, what to do; logged once, and gone when it is over."""

import importlib.metadata
import os
import resource
import sqlite3
import tempfile
import threading
from contextlib import closing
from pathlib import Path

import pytest
from crashing import call
from ledger import Alerts
from serving import row
from waiting import until

from shmelim import EliminationManager
from shmelim.eliminations import server as server_module
from shmelim.eliminations.server import EliminationManagerServer
from shmelim.eliminations.store import store
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import DamagedStoreError, SegmentFullError, StoreError
from shmelim.shm import SharedNamespace
from shmelim.system import clock

FIELDS = {"name", "subject", "text", "severity", "remedy", "since_ms"}


@pytest.fixture
def server(tmp_path):
    with EliminationManagerServer(state_dir=tmp_path, files="off", durability="process") as server:
        yield server


def raising(error):
    def fail(*_args, **_kwargs):
        raise error

    return fail


def test_nothing_is_wrong(server):
    health = server.health_check_rpc()
    assert (health["status"], health["problems"]) == ("ok", [])


@pytest.mark.parametrize(
    "error",
    [StoreError("no space left", hint="make room"), DamagedStoreError("a page is damaged", hint="restart")],
    ids=["full", "damaged"],
)
def test_a_commit_that_failed_is_named_logged_once_and_over_with_the_next_that_works(
    server, monkeypatch, caplog, error
):
    with monkeypatch.context() as patch:
        patch.setattr(server._state._store, "commit", raising(error))
        for number in range(50):
            with pytest.raises(type(error)):
                server.add_elimination_rpc(f"h{number}", row(f"h{number}"))
        health = server.health_check_rpc()
        (problem,) = health["problems"]
        assert set(problem) == FIELDS
        assert (problem["name"], problem["severity"], problem["remedy"]) == (
            "commit_failed",
            "degraded",
            error.hint,
        )
        assert error.message in problem["text"]
        assert server.started_ms <= problem["since_ms"] <= health["timestamp_ms"]
        assert health["status"] == "degraded"
    assert server.add_elimination_rpc("a", row("a")) is True
    assert (server.health_check_rpc()["status"], server.health_check_rpc()["problems"]) == ("ok", [])
    lines = [message for message in caplog.messages if "commit_failed" in message]
    assert len(lines) == 2
    assert "over after" in lines[1]


def test_a_change_that_changes_nothing_does_not_end_a_problem(server, monkeypatch):
    server.add_elimination_rpc("a", row("a"))
    with monkeypatch.context() as patch:
        patch.setattr(server._state._store, "commit", raising(StoreError("no space left")))
        with pytest.raises(StoreError):
            server.add_elimination_rpc("b", row("b"))
    assert server.remove_elimination_rpc("unknown") is False
    assert server.health_check_rpc()["status"] == "degraded"


def test_a_change_that_is_refused_for_itself_is_nobody_elses_problem(server):
    with pytest.raises(TypeError, match="reason"):
        server.add_elimination_rpc("a", {"hotkey": "a", "reason": 5})
    assert server.health_check_rpc()["problems"] == []


def test_a_log_that_a_forgotten_read_keeps_growing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_LARGE_LOG", 1 << 20)
    with (
        EliminationManagerServer(state_dir=tmp_path, durability="process", files="off") as server,
        closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as forgotten,
    ):

        def add(stamp):
            for n in range(8):
                server.add_elimination_rpc(f"h{n}", row(f"h{n}", stamp, pad=50_000))
            return [(problem["name"], problem["remedy"]) for problem in server.health_check_rpc()["problems"]]

        # A log is as large as the changes between two checkpoints: with nobody reading, that is not a problem.
        assert add(0) == add(1) == add(2) == add(3) == []
        forgotten.execute("BEGIN")
        forgotten.execute("SELECT count(*) FROM hotkeys").fetchone()
        ((name, remedy),) = [add(stamp) for stamp in range(4, 8)][-1]
        assert name == "wal_large"
        assert "fuser" in remedy
        forgotten.execute("ROLLBACK")
        assert add(9) == []


def test_full_shared_memory_is_named(server, monkeypatch):
    with monkeypatch.context() as patch:
        error = SegmentFullError("no room for 5 bytes", hint="enlarge /dev/shm")
        patch.setattr(server._state, "_stage", raising(error))
        with pytest.raises(SegmentFullError):
            server.add_elimination_rpc("a", row("a"))
        (problem,) = server.health_check_rpc()["problems"]
        assert (problem["name"], problem["remedy"]) == ("shared_memory_full", "enlarge /dev/shm")
    server.add_elimination_rpc("a", row("a"))
    assert server.health_check_rpc()["problems"] == []


def test_a_server_that_is_closed_has_no_problem_with_its_commits(server):
    server.close()
    with pytest.raises(StoreError, match="closed"):
        server.add_elimination_rpc("a", row("a"))
    assert server.problems.standing() == []


def test_debts_that_cannot_be_read_are_named(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Store, "debt_figures", raising(StoreError("unreadable")))
        health = server.health_check_rpc()
        assert (health["num_debts"], health["slashes_in_doubt"]) == (None, None)
        assert [problem["name"] for problem in health["problems"]] == ["debts_unreadable"]
    assert server.health_check_rpc()["problems"] == []


def test_files_that_are_not_written_in_time_are_behind(tmp_path, monkeypatch):
    go_on = threading.Event()
    with EliminationManagerServer(state_dir=tmp_path, durability="process") as server:
        server.save_eliminations_rpc()
        write, writing = server._mirror._write, threading.Event()
        monkeypatch.setattr("shmelim.eliminations.files.mirror._FLUSH_LIMIT", 0.01)
        monkeypatch.setattr(
            server._mirror, "_write", lambda **how: (writing.set(), go_on.wait(60), write(**how))[2]
        )
        other = threading.Thread(target=server.save_eliminations_rpc)
        other.start()
        assert writing.wait(60)
        assert server.append_elimination_row_rpc("a", 1.0, "ZOMBIE") is True
        assert [problem["name"] for problem in server.health_check_rpc()["problems"]] == ["files_behind"]
        go_on.set()
        other.join()
        monkeypatch.setattr("shmelim.eliminations.files.mirror._FLUSH_LIMIT", 60)
        server.save_eliminations_rpc()
        assert server.health_check_rpc()["problems"] == []


def test_saving_calls_say_once_that_the_files_are_behind(tmp_path, caplog):
    with EliminationManagerServer(state_dir=tmp_path, durability="process") as server:
        server.save_eliminations_rpc()  # nothing is written behind our back
        (tmp_path / ".eliminations.json.next" / "in the way").mkdir(parents=True)
        for number in range(30):
            assert server.append_elimination_row_rpc(f"h{number}", 1.0, "ZOMBIE") is True
        assert server.health_check_rpc()["status"] == "degraded"
        assert len([message for message in caplog.messages if "files_behind" in message]) == 1


def test_what_is_wrong_with_its_channel_is_in_its_health(new_name, tmp_path):
    with (
        tempfile.TemporaryDirectory() as base,  # short enough for a socket
        EliminationManager(
            None, None, None, name=new_name(), port=None, runtime_base=Path(base), state_dir=tmp_path
        ) as manager,
    ):
        proxy = manager._server_proxy
        assert proxy.health_check_rpc()["problems"] == []
        (socket,) = Path(base).rglob("socket")
        socket.unlink()
        socket.write_text("in the place of the socket")
        (problem,) = until(lambda: proxy.health_check_rpc()["problems"], "the problem")
        assert (problem["name"], problem["severity"]) == ("channel_unreachable", "degraded")
        socket.unlink()
        until(lambda: proxy.health_check_rpc()["problems"] == [], "the end of the problem")
        for lost in ("server.json", "key"):  # which clients need as well
            (socket.parent / lost).unlink()
            (socket.parent / lost).mkdir()
            (problem,) = until(lambda: proxy.health_check_rpc()["problems"], "the problem")
            assert (problem["name"], problem["severity"]) == ("channel_unreachable", "degraded")
            (socket.parent / lost).rmdir()
            until(lambda: proxy.health_check_rpc()["problems"] == [], "the end of the problem")


class Statvfs:
    """What a file system says of itself that has so many bytes left."""

    f_frsize = 1

    def __init__(self, free):
        self.f_bavail = free


@pytest.mark.parametrize(
    ("where", "name", "least"),
    [("state", "disk_nearly_full", 32 << 20), ("/dev/shm", "shared_memory_nearly_full", None)],
)
def test_room_that_runs_out_is_named_before_a_change_is_refused(
    new_name, tmp_path, monkeypatch, where, name, least
):
    free = {}
    monkeypatch.setattr(os, "statvfs", lambda path: Statvfs(free.get(Path(path).name, 1 << 40)))
    with EliminationManagerServer(SharedNamespace(new_name()), tmp_path / "state", durability="process") as server:
        enough = least or 2 * server.reader.table.segment_size
        free[Path(where).name] = enough - 1
        (problem,) = server.health_check_rpc()["problems"]
        assert (problem["name"], problem["severity"]) == (name, "degraded")
        assert "MiB left" in problem["text"]
        assert "room" in problem["remedy"] or "enlarge" in problem["remedy"]
        free[Path(where).name] = enough
        assert server.health_check_rpc()["problems"] == []


def test_what_is_owed_for_long_is_named(server, monkeypatch):
    before = server.health_check_rpc()["timestamp_ms"]
    for hours, rests in ((2, True), (2, False), (0.9, False)):
        monkeypatch.setattr(clock, "now_ms", lambda hours=hours: before - int(hours * 3_600_000))
        server.eliminate_rpc("a", row("a"), ["positions"])
        if rests:
            server.remove_elimination_rpc("a")
        monkeypatch.undo()
        names = [problem["name"] for problem in server.health_check_rpc()["problems"]]
        assert names == (["debts_old"] if hours > 1 and not rests else [])
        server.settle_debt_rpc("a", "positions")
        server.remove_elimination_rpc("a")


def test_the_process_that_made_a_manager_tells_slack_of_its_servers_problems_once_each(managers):
    alerts = Alerts()
    manager = managers(running_unit_tests=True, slack_notifier=alerts, health_check_interval_s=0)
    problems = manager._server_proxy.problems
    problems.report("commit_failed", "the disk is full", remedy="make room")
    assert [manager.health_check() for _ in range(3)] == [True] * 3, "degraded is well enough"
    problems.clear("commit_failed")
    assert manager.health_check()
    (raised,), (over,) = alerts.of("error"), alerts.of("success")
    assert "the disk is full" in raised
    assert "make room" in raised
    assert "the disk is full" in over


def test_at_the_limit_of_descriptors_the_health_is_told_all_the_same():
    def health():
        server_module._found_version.cache_clear()  # as in a process that was never asked
        importlib.metadata.version("shmelim")
        with EliminationManagerServer() as server:
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
            return server.health_check_rpc()

    answer = call(health)
    assert (answer["status"], answer["package_version"]) == ("ok", "unknown")
