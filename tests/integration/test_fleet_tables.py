"""The two ends of a fleet on one host: the outbox of a real store, a follower's table in shared memory."""

from __future__ import annotations

import errno
import json
import os
import signal
import sqlite3
import threading
from contextlib import closing
from types import SimpleNamespace
from typing import ClassVar

import pytest
from invoking import CliRunner
from memory_engine import MemoryEngine
from serving import row

from shmelim import EliminationClient, EliminationManagerServer, EliminationReader
from shmelim.cli import fleet
from shmelim.cli.main import cli
from shmelim.eliminations.rows import Status
from shmelim.eliminations.runtime import default_state_directory
from shmelim.eliminations.store import touched
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.errors import (
    AlreadyServingError,
    FollowerError,
    StateConflictError,
    StoreError,
    UntrustedSegmentError,
)
from shmelim.fleet.engine import EngineError
from shmelim.fleet.follower import Applied, Follower
from shmelim.fleet.local import LocalTable
from shmelim.fleet.messages import Row
from shmelim.fleet.outbox import StoreOutbox
from shmelim.fleet.publisher import Publisher
from shmelim.fleet.running import run_follower
from shmelim.shm import SharedNamespace, TableReader
from shmelim.shm.following import Position, position_of, source_of

SOURCE = "redis://engine/0"
STORE_ID = b"store-id-of-16-b"


@pytest.fixture
def server(tmp_path):
    server = EliminationManagerServer(state_dir=tmp_path / "state", files="off", registry=None, sync_guard="off")
    yield server
    server.close()


def published(server) -> dict[bytes, Row]:
    """What the server's own table says."""
    entries = TableReader(server.namespace).snapshot().entries
    return {
        key: Row(key, entry.flags, entry.record, entry.ordinal)
        for key, entry in entries.items()
        if not key.startswith(b"\xff")
    }


def followed(name: str) -> dict[bytes, Row]:
    entries = TableReader(SharedNamespace(name)).snapshot().entries
    return {
        key: Row(key, entry.flags, entry.record, entry.ordinal)
        for key, entry in entries.items()
        if not key.startswith(b"\xff")
    }


class TestOutbox:
    def test_a_cut_is_what_the_table_says_of_what_changed(self, server, tmp_path):
        server.add_elimination_rpc("before", row("before"))
        outbox = StoreOutbox(tmp_path / "state")
        begun = outbox.facts()
        assert begun.top == 0
        server.add_elimination_rpc("a", row("a"))
        server.add_elimination_rpc("b", row("b"))
        server.update_metagraph_rpc(["a", "c"])
        server.remove_elimination_rpc("b")
        cut = outbox.cut(begun.top, digest_rows=100)
        here = published(server)
        assert {each.key: each for each in cut.rows} == {key: here[key] for key in (b"a", b"c") if key in here}
        assert cut.gone == [b"b"]
        assert cut.rows[0].flags & Status.REGISTERED
        with outbox.whole() as whole:
            assert {each.key: each for each in whole.rows} == here
        assert outbox.cut(cut.facts.top).rows == []
        assert cut.digest == outbox.cut(0, digest_rows=len(here)).digest
        assert outbox.cut(0, digest_rows=len(here) - 1).digest is None

    def test_a_change_by_hand_is_noticed(self, server, tmp_path):
        server.add_elimination_rpc("a", row("a"))
        outbox = StoreOutbox(tmp_path / "state")
        with closing(sqlite3.connect(tmp_path / "state" / FILE_NAME)) as db, db:
            db.execute("UPDATE hotkeys SET hotkey = 'renamed' WHERE hotkey = 'a'")
        cut = outbox.cut(0)
        assert [each.key for each in cut.rows] == [b"renamed"]
        assert cut.gone == [b"a"]

    def test_each_start_is_a_run_of_its_own(self, server, tmp_path):
        server.add_elimination_rpc("a", row("a"))
        outbox = StoreOutbox(tmp_path / "state")
        server.add_elimination_rpc("b", row("b"))
        (first,) = outbox.facts().runs
        server.close()
        again = EliminationManagerServer(state_dir=tmp_path / "state", files="off", registry=None)
        again.add_elimination_rpc("c", row("c"))
        facts = outbox.facts()
        again.close()
        assert facts.runs[0] == first
        assert len(facts.runs) == 2
        assert facts.continues(first, 1)
        assert not facts.continues(first, 2)
        assert facts.continues(facts.runs[1], 2)

    def test_a_store_that_was_restored_does_not_go_on(self, server, tmp_path):
        """Numbers alone look right: the restored store has counted past them."""
        state = tmp_path / "state"
        server.add_elimination_rpc("a", row("a"))
        outbox = StoreOutbox(state)
        server.add_elimination_rpc("b", row("b"))
        server.close()
        kept = (state / FILE_NAME).read_bytes()
        later = EliminationManagerServer(state_dir=state, files="off", registry=None)
        later.add_elimination_rpc("c", row("c"))
        sent = outbox.facts()
        later.close()
        (state / FILE_NAME).with_suffix(".new").write_bytes(kept)
        (state / FILE_NAME).with_suffix(".new").chmod(0o600)
        (state / FILE_NAME).with_suffix(".new").rename(state / FILE_NAME)
        restored = EliminationManagerServer(state_dir=state, files="off", registry=None)
        restored.add_elimination_rpc("d", row("d"))
        facts = outbox.facts()
        restored.close()
        assert facts.store_id == sent.store_id
        assert facts.top == sent.top
        assert not facts.continues(sent.runs[-1], sent.top)

    def test_what_nobody_fetches_is_bounded(self, tmp_path, monkeypatch):
        monkeypatch.setattr(touched, "_KEPT", 1000)
        monkeypatch.setattr(
            touched, "_TABLES", tuple(statement.replace("200000", "1000") for statement in touched._TABLES)
        )
        with closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
            db.execute("CREATE TABLE hotkeys (hotkey TEXT PRIMARY KEY)")
            touched.switch_on(db)
            db.executemany("INSERT INTO hotkeys VALUES (?)", [(f"{n}",) for n in range(5000)])
            assert db.execute("SELECT count(*) FROM touched").fetchone()[0] == 1000
            assert touched.top(db) == 5000

    def test_no_store_is_said(self, tmp_path):
        with pytest.raises(StoreError, match="there is no store"):
            StoreOutbox(tmp_path)


class TestLocalTable:
    def test_changes_and_where_they_lead_are_one_transaction(self, new_name):
        name = new_name()
        with LocalTable(SharedNamespace(name), SOURCE) as table:
            assert table.applied is None
            table.replace(Applied(STORE_ID, 5, 10, 1), [Row(b"a", 1, b"x" * 20, 3), Row(b"b", 4, b"y" * 20, 4)])
            first = table.digest
            table.apply(Applied(STORE_ID, 5, 11, 1), [Row(b"c", 1, b"z" * 20, 5)], [b"a"])
            assert len(table) == 2
            table.apply(Applied(STORE_ID, 5, 12, 1), [Row(b"a", 1, b"x" * 20, 3)], [b"c", b"nobody"])
            assert table.digest == first
        with LocalTable(SharedNamespace(name), SOURCE) as again:
            assert again.applied == Applied(STORE_ID, 5, 12, 1)
            assert (again.digest, len(again)) == (first, 2)

    def test_readers_stay_when_a_follower_ends_and_the_next_begins(self, new_name):
        name = new_name()
        with LocalTable(SharedNamespace(name), SOURCE) as table:
            table.replace(Applied(STORE_ID, 5, 10, 1), [Row(b"a", 1, b"\0" * 16 + b"\x80", 3)])
            table.confirm(Position(1, 5, 10, 7, 8))
            reader = EliminationReader(name)
            assert reader.is_hotkey_eliminated("a")
        root = reader._table._view.root
        assert reader.is_hotkey_eliminated("a")
        with LocalTable(SharedNamespace(name), SOURCE) as again:
            assert again.position == Position(1, 5, 10, 7, 8)
            again.apply(Applied(STORE_ID, 5, 11, 1), [], [b"a"])
            assert not reader.is_hotkey_eliminated("a")
            assert reader._table._view.root is root
            assert source_of(root) == SOURCE
            assert position_of(root) == Position(1, 5, 10, 7, 8)

    def test_what_another_source_said_is_never_shown_as_what_this_one_says(self, new_name):
        name = new_name()
        first, other = (Applied(store, line=line, seq=5, run=1) for store, line in ((STORE_ID, 9), (b"o" * 16, 3)))
        with LocalTable(SharedNamespace(name), SOURCE) as table:
            table.replace(first, [Row(b"a", 1, b"1", 0)])
        reader = EliminationReader(name)
        with LocalTable(SharedNamespace(name), "redis://another/0") as table:
            assert (table.applied, table.position) == (None, None)
            assert ("a" in reader, reader.source) == (True, SOURCE)
            table.replace(other, [Row(b"b", 1, b"2", 0)])
            assert ("a" in reader, "b" in reader, reader.source) == (False, True, "redis://another/0")
            assert table.applied == other

    def test_a_snapshot_that_ends_early_changes_nothing(self, new_name):
        with LocalTable(SharedNamespace(new_name()), SOURCE) as table:
            table.replace(Applied(STORE_ID, 5, 10, 1), [Row(b"a", 1, b"x", 3)])

            def broken():
                yield Row(b"b", 1, b"y", 4)
                raise OSError("the connection broke")

            for store_id in (STORE_ID, STORE_ID[::-1]):
                with pytest.raises(OSError, match="broke"):
                    table.replace(Applied(store_id, 6, 11, 1), broken())
                assert followed(table._namespace.name) == {b"a": Row(b"a", 1, b"x", 3)}
            table.replace(Applied(STORE_ID[::-1], 6, 11, 1), [Row(b"c", 1, b"z", 3)])
            assert followed(table._namespace.name) == {b"c": Row(b"c", 1, b"z", 3)}

    def test_names_that_are_cleaned_away_come_back_with_source_and_position(self, new_name):
        name = new_name()
        namespace = SharedNamespace(name)
        with LocalTable(namespace, SOURCE) as table:
            table.replace(Applied(STORE_ID, 5, 10, 1), [Row(b"a", 1, b"x", 3)])
            table.confirm(Position(1, 5, 10, 7, 8))
            SharedNamespace(name).remove()
            table.keep()
            root = SharedNamespace(name).open_root()
            assert source_of(root) == SOURCE
            assert position_of(root) == Position(1, 5, 10, 7, 8)

    def test_nobody_can_change_what_a_follower_shows(self, new_name, tmp_path):
        name = new_name()
        with LocalTable(SharedNamespace(name), SOURCE) as table:
            table.replace(Applied(STORE_ID, 5, 10, 1), [Row(b"a", 1, b"\0" * 16 + b"\x80", 3)])
            with pytest.raises(FollowerError, match=SOURCE) as caught:
                EliminationClient(name, runtime_base=tmp_path)
            assert "fleet status" in str(caught.value)
        for adopt in (False, True):
            with pytest.raises(FollowerError, match=SOURCE):
                EliminationManagerServer(
                    SharedNamespace(name), state_dir=tmp_path / "state", registry=None, adopt_published=adopt
                )
        assert followed(name)
        server = EliminationManagerServer(
            SharedNamespace(name), state_dir=tmp_path / "state", registry=None, replace_published=True
        )
        assert followed(name) == {}
        assert source_of(SharedNamespace(name).open_root()) == ""
        server.close()

    def served_long_ago(self, new_name, tmp_path, monkeypatch):
        """Return a name that a server of this host had, which left its store behind."""
        name = new_name()
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        monkeypatch.setenv("SHMELIM_RUNTIME_DIR", str(tmp_path / "runtime"))
        server = EliminationManagerServer(
            SharedNamespace(name), state_dir=default_state_directory(name), registry=None
        )
        server.add_elimination_rpc("long ago", row("long ago"))
        server.close()
        SharedNamespace(name).remove()
        return name

    def test_verify_looks_at_what_is_followed_alone(self, new_name, tmp_path, monkeypatch):
        name = self.served_long_ago(new_name, tmp_path, monkeypatch)
        with LocalTable(SharedNamespace(name), SOURCE) as table:
            table.replace(Applied(STORE_ID, 5, 10, 1), [Row(b"a", 1, b"\0" * 16 + b"\x80", 3)])
            result = CliRunner().invoke(cli, ["verify", "--name", name, "--json"])
        assert result.exit_code == 0
        [finding] = json.loads(result.stdout)["findings"]
        assert (finding["what"], finding["problem"]) == ("table", None)
        assert SOURCE in finding["said"]

    @pytest.mark.parametrize(
        "command",
        [["history"], ["debts"], ["slash", "list"], ["add", "b", "--reason", "ZOMBIE"], ["backup"], ["serve"]],
    )
    def test_what_a_server_left_on_this_host_long_ago_is_not_taken_for_what_is_followed(
        self, new_name, tmp_path, monkeypatch, command
    ):
        name, target = self.served_long_ago(new_name, tmp_path, monkeypatch), tmp_path / "backup"
        if command == ["backup"]:
            command = [*command, str(target)]
        with LocalTable(SharedNamespace(name), SOURCE) as table:
            table.replace(Applied(STORE_ID, 5, 10, 1), [Row(b"a", 1, b"\0" * 16 + b"\x80", 3)])
            result = CliRunner().invoke(cli, [*command, "--name", name])
        assert result.exit_code in {3, 4}
        assert SOURCE in result.stderr
        assert "hint:" in result.stderr
        assert "long ago" not in result.stdout
        assert not target.exists()

    def test_a_name_that_is_taken_is_followed_as_another_one(self, new_name):
        name = new_name()
        snapshot = Applied(STORE_ID, 5, 10, 1), [Row(b"a", 1, b"x", 3)]
        with LocalTable(SharedNamespace(name), SOURCE) as table, LocalTable(SharedNamespace(name), SOURCE) as late:
            table.replace(*snapshot)
            for take in (lambda: late.replace(*snapshot), lambda: LocalTable(SharedNamespace(name), SOURCE)):
                with pytest.raises(AlreadyServingError, match=name) as caught:
                    take()
                assert "--as another name" in caught.value.hint

    def test_another_users_table_is_not_followed_over(self, new_name, monkeypatch):
        name = new_name()
        with LocalTable(SharedNamespace(name), SOURCE) as table:
            table.replace(Applied(STORE_ID, 5, 10, 1), [Row(b"a", 1, b"x", 3)])
        with monkeypatch.context() as patch:
            patch.setattr(os, "geteuid", lambda: 65534)
            with pytest.raises(UntrustedSegmentError, match=name) as caught:
                LocalTable(SharedNamespace(name), SOURCE)
        assert "as that user" in caught.value.hint
        assert followed(name)

    def test_a_servers_table_is_not_followed_over(self, new_name, tmp_path):
        name = new_name()
        server = EliminationManagerServer(SharedNamespace(name), state_dir=tmp_path, registry=None)
        server.add_elimination_rpc("a", row("a"))
        server.close()
        with pytest.raises(StateConflictError, match="server") as caught:
            LocalTable(SharedNamespace(name), SOURCE)
        assert "--as another name" in caught.value.hint
        assert EliminationReader(name).is_hotkey_eliminated("a")


class Idle:
    """A follower whose engine is away, or has nothing."""

    held = None
    problems: ClassVar[dict[str, str]] = {}

    def __init__(self, error=None):
        self.error = error

    def turn(self, _wait):
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("error", [None, EngineError("away")])
@pytest.mark.parametrize("has_table", [False, True])
def test_what_a_follower_says_that_gets_nothing(new_name, error, has_table):
    """It is ready where it has a table, though the engine is away; and else it says for what it waits."""
    said, stop = [], threading.Event()

    def say(event, **_about):
        said.append(event)
        if event in {"error", "waiting"} or (error is None and has_table):
            stop.set()

    with LocalTable(SharedNamespace(new_name()), SOURCE) as table:
        if has_table:
            table.replace(Applied(STORE_ID, 5, 10, 1), [Row(b"a", 1, b"x", 3)])
        run_follower(Idle(error), table, stop, say)
    wanted = ["following"] if has_table else []
    assert said == wanted + (["error"] if error else [] if has_table else ["waiting"])


@pytest.fixture
def handlers():
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_the_second_signal_ends_what_the_first_one_waits_for():
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = fleet._stopping()
    signal.raise_signal(signal.SIGINT)
    assert stop.is_set()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("as_json", [False, True])
def test_a_log_that_cannot_be_written_ends_nothing(monkeypatch, as_json):
    def fail(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fleet.click, "echo", fail)
    fleet._teller(SimpleNamespace(as_json=as_json), ready_at="following")("error", error="away")


def test_from_a_store_to_a_table(server, tmp_path, new_name):
    """All kinds of changes, restarts of both ends, and equal tables after each."""
    engine, name = MemoryEngine(), new_name()
    outbox = StoreOutbox(tmp_path / "state")
    publisher = Publisher(engine, outbox, beat=0.0)
    table = LocalTable(SharedNamespace(name), SOURCE)
    follower = Follower(engine, table, who="one")

    def equal() -> bool:
        publisher.turn()
        follower.turn()
        return followed(name) == published(server)

    server.sync_eliminations_rpc([row(f"h{n}") for n in range(50)])
    for _ in range(2):
        publisher.turn()
    assert equal()
    changes = [
        lambda: server.add_elimination_rpc("x", row("x")),
        lambda: server.update_metagraph_rpc([f"h{n}" for n in range(40)]),
        lambda: server.sync_eliminations_rpc([row(f"h{n}", n % 3) for n in range(10, 60)]),
        lambda: server.remove_elimination_rpc("h10"),
        server.clear_eliminations_rpc,
        lambda: server.sync_eliminations_rpc([row(f"h{n}", pad=50_000) for n in range(60)]),  # in parts
    ]
    for change in changes:
        change()
        assert equal()
    assert sum(table.applied[1:3]) > 0
    before = table.applied
    publisher = Publisher(engine, outbox, beat=0.0)
    table.close()
    table = LocalTable(SharedNamespace(name), SOURCE)
    follower = Follower(engine, table, who="one", position=table.position)
    server.add_elimination_rpc("y", row("y"))
    assert equal()
    assert table.applied.line == before.line
    table.close()
    outbox.close()
