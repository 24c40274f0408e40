"""A store of an older schema: brought up to date whole or not at all, and readable as it is."""

import os
import shutil
import sqlite3
import threading

import pytest
from crashing import Child, Counter, at_line, kill_self
from serving import Served, listing, row, state_in_table

from shmelim import EliminationManagerServer
from shmelim.eliminations.store import opening, schema
from shmelim.eliminations.store.history import Change
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import DebtFigures, Store
from shmelim.errors import DamagedStoreError, StoreError


def as_before(patch):
    """Make this a version that knows the first schema only."""
    patch.setattr(schema, "SCHEMA_NUMBER", 1)
    patch.setattr(schema, "_SCHEMAS", (schema._FIRST,))
    patch.setattr(Store, "debtors", lambda _store: set())


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A state directory of schema 1, whose last changes stand in the log only."""
    directory = tmp_path / "old"

    def fill():
        with monkeypatch.context() as patch:
            as_before(patch)
            server = EliminationManagerServer(None, directory, durability="process")
            server.sync_eliminations_rpc([row(f"h{n}", n) for n in range(20)])
            server.update_metagraph_rpc(["h1", "m1"])
            server.update_metagraph_rpc(["h1"])
            server.save_eliminations_rpc()
            kill_self()

    with Child(fill) as child:
        assert child.wait() == -9
    assert (directory / f"{FILE_NAME}-wal").stat().st_size
    return directory


def schema_of(directory):
    db = sqlite3.connect(f"file:{directory / FILE_NAME}?mode=ro", uri=True)
    try:
        (number,) = db.execute("PRAGMA user_version").fetchone()
        return number, db.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()
    finally:
        db.close()


def content(directory):
    """All that an older version knew of; read without changing anything."""
    db = sqlite3.connect(f"file:{directory / FILE_NAME}?mode=ro", uri=True)
    try:
        return [
            db.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in ("hotkeys", "events", "meta")
        ]
    finally:
        db.close()


def test_it_is_of_schema_1(old):
    assert schema_of(old)[0] == 1
    hotkeys, events, meta = content(old)
    assert (len(hotkeys), len(events)) == (21, 21)
    assert meta


def test_opening_brings_it_up_to_date(old, tmp_path):
    before = content(old)
    with Store.open(old) as store:
        store.check()
        assert store.debts() == []
        assert store.slashes() == []
    Store.open(tmp_path / "new").close()
    assert schema_of(old) == schema_of(tmp_path / "new")
    assert content(old) == before


def test_a_server_goes_on_with_it(old):
    with EliminationManagerServer(None, old, durability="process") as server:
        assert [r["hotkey"] for r in server.get_eliminations_from_memory_rpc()] == [f"h{n}" for n in range(20)]
        assert server.is_hotkey_eliminated_rpc("h7")
        assert list(server.get_departed_hotkeys_rpc()) == ["m1"]
        assert server.get_replacements_rpc() == 1
        assert server.eliminate_rpc("new", row("new"), ["slash"]) == "added"
        assert server.health_check_rpc()["num_debts"] == 1
        assert [event["action"] for event in server.get_history_rpc(limit=2)] == ["owe", "add"]
        state = state_in_table(server.reader)
    with EliminationManagerServer(None, old, durability="process") as server:
        assert state_in_table(server.reader) == state
        assert server.begin_slash_rpc("new", "token")
        assert server.settle_debt_rpc("new", "slash", "token")
        assert [made["hotkey"] for made in server.get_slashes_rpc()] == ["new"]


def test_readers_of_an_old_store_change_nothing(old):
    events = content(old)[1]
    # The index of the log is a reader's too.
    before = {name: data for name, data in listing(old).items() if not name.endswith("-shm")}
    with Store.read_only(old) as store:
        assert [event.id for event in store.events(limit=None)][::-1] == [event[0] for event in events]
        assert store.debts() == store.debts("h1") == []
        assert store.debt_figures() == DebtFigures(0, [])
        assert store.slashes() == store.slashes("h1") == []
    assert {name: data for name, data in listing(old).items() if not name.endswith("-shm")} == before
    assert schema_of(old)[0] == 1


def test_readers_of_a_store_that_is_brought_up_to_date_meanwhile(old):
    reading = opening.connect_read_only(old / FILE_NAME)
    try:
        reading.execute("BEGIN")
        before = reading.execute("SELECT count(*) FROM events").fetchone()
        with Store.open(old) as store, store.transaction():
            store.add_events([Change("test")])
        assert reading.execute("SELECT count(*) FROM events").fetchone() == before
        reading.execute("COMMIT")
        assert reading.execute("SELECT count(*) FROM events").fetchone() == (before[0] + 1,)
        assert reading.execute("SELECT count(*) FROM main.debts").fetchone() == (0,)
    finally:
        reading.close()


def test_an_older_version_refuses_the_new_one(old, monkeypatch):
    Store.open(old).close()
    before = listing(old)
    as_before(monkeypatch)
    with pytest.raises(StoreError, match=r"schema 2.*up to 1") as caught:
        Store.open(old)
    assert "upgrade" in caught.value.hint
    assert listing(old) == before


def test_a_failure_leaves_it_as_it_was(old, monkeypatch):
    before = content(old), schema_of(old)
    with monkeypatch.context() as patch:
        patch.setattr(schema, "_SCHEMAS", (schema._FIRST, (*schema._SECOND, "CREATE TABLE slashes (x)")))
        with pytest.raises(StoreError, match="slashes already exists"):
            Store.open(old)
    assert (content(old), schema_of(old)) == before
    Store.open(old).close()
    assert schema_of(old)[0] == 2


def test_of_two_that_open_it_at_once_one_brings_it_up_to_date(old, monkeypatch):
    # Both have seen schema 1 before either goes on.
    both_saw = threading.Barrier(2)
    identify = schema.identify

    def slow(db, path):
        found = identify(db, path)
        if not db.in_transaction:
            assert found == 1
            both_saw.wait(30)
        return found

    failures = []

    def open_it():
        try:
            Store.open(old).close()
        except Exception as error:
            failures.append(error)

    monkeypatch.setattr(schema, "identify", slow)
    threads = [threading.Thread(target=open_it) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    monkeypatch.undo()
    assert schema_of(old)[0] == 2
    Store.open(old).close()


@pytest.mark.parametrize("number", [0, -1])
def test_a_schema_that_never_was_is_damage(old, number):
    Store.open(old).close()
    db = sqlite3.connect(old / FILE_NAME)
    db.execute(f"PRAGMA user_version={number}")
    db.close()
    with pytest.raises(DamagedStoreError, match=f"schema {number}"):
        Store.open(old)


def test_kill_at_every_line(old, tmp_path):
    before, upgraded = content(old), 0
    directory = tmp_path / "killed"
    number = 0
    while True:
        number += 1
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(old, directory)
        done = Counter()

        def run(number=number, done=done):
            at_line(number, kill_self, ("install", "identify"), (schema.__file__,))
            Store.open(directory)
            done.value = 1
            os._exit(0)

        with Child(run) as child:
            child.wait()
        found, _ = schema_of(directory)
        assert found == 2 if done.value else found in (1, 2), f"line {number}"
        assert content(directory) == before
        upgraded += found == 2
        with Store.open(directory) as store:
            store.check()
        assert schema_of(directory)[0] == 2
        assert content(directory) == before
        if done.value:
            break
    assert number > 15
    assert upgraded >= 1


def test_a_served_name_goes_on_after_an_upgrade(new_name, old):
    name = new_name()
    with Served(name, old) as served:
        client = served.client()
        assert client.get_debts() == []
        assert client.get_slashes() == []
        assert len(client) == 20
        client.close()
