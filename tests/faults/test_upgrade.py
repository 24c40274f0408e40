"""A store of an older schema: brought up to date whole or not at all, and readable as it is."""

import errno
import os
import random
import shutil
import sqlite3
import stat
import threading

import old_stores
import pytest
from crashing import Child, Counter, at_line, kill_self
from serving import Served, listing, row, state_in_table

from shmelim import EliminationManagerServer
from shmelim.eliminations.record import encode
from shmelim.eliminations.store import copying, opening, schema
from shmelim.eliminations.store.history import Change
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import DamagedStoreError, StoreError


@pytest.fixture(params=old_stores.SCHEMAS)
def number(request):
    return request.param


@pytest.fixture
def old(tmp_path, number):
    """A state directory of an older schema, whose last changes stand in the log only."""
    return old_stores.make(tmp_path / "old", number)


def schema_of(directory):
    db = sqlite3.connect(f"file:{directory / FILE_NAME}?mode=ro", uri=True)
    try:
        (number,) = db.execute("PRAGMA user_version").fetchone()
        return number, db.execute("SELECT type, name, sql FROM sqlite_master ORDER BY name").fetchall()
    finally:
        db.close()


def content(directory, file=FILE_NAME):
    """All that an older version knew of; read without changing anything."""
    db = sqlite3.connect(f"file:{directory / file}?mode=ro", uri=True)
    try:
        tables = [table for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        events = "id, at_ms, action, hotkey, pid, uid, program, note, old, new"
        columns = {
            "events": events,
            "debts": "hotkey, kind, state, ordinal, due, since_ms, eliminated_ms, attempts, error, attempt,"
            " in_doubt_since_ms",
            "slashes": "hotkey, made_ms, eliminated_ms, said_by",
        }
        found = {
            table: db.execute(f"SELECT {columns.get(table, '*')} FROM {table} ORDER BY 1").fetchall()
            for table in ("hotkeys", "events", "meta", "debts", "slashes")
            if table in tables
        }
        found["meta"] = [(key, value) for key, value in found["meta"] if key != "money_held"]
        return found
    finally:
        db.close()


def without_empty(found):
    return {table: rows for table, rows in found.items() if rows}


def test_it_is_what_it_says(old, number):
    assert schema_of(old)[0] == number
    found = content(old)
    assert (len(found["hotkeys"]), len(found["events"])) == {1: (21, 21), 2: (23, 27)}[number]
    assert found["meta"]
    assert len(found.get("debts", ())) == {1: 0, 2: 2}[number]


def test_opening_brings_it_up_to_date(old, tmp_path, number):
    before = content(old)
    with Store.open(old) as store:
        store.check()
        assert len(store.debts()) == {1: 0, 2: 2}[number]
        assert [slash.hotkey for slash in store.slashes()] == {1: [], 2: ["slashed"]}[number]
        assert len(store.store_id) == 16
        assert store.commit_number == 0
        assert {event.commit_number for event in store.events(limit=None)} == {None}
    Store.open(tmp_path / "new").close()
    assert schema_of(old) == schema_of(tmp_path / "new")
    assert without_empty(content(old)) == without_empty(before)


@pytest.fixture
def second(tmp_path):
    """A store of schema 2 in which one miner owes a slash, and one was slashed; and what changes it."""
    directory = old_stores.make(tmp_path / "second", 2)

    def change(statement, *arguments):
        db = sqlite3.connect(directory / FILE_NAME)
        db.execute(statement, arguments)
        db.commit()
        db.close()

    return directory, change


def owes_again(directory, rule):
    """The registration for which who was slashed before the upgrade owes a slash by a rule; None if for none."""
    with EliminationManagerServer(None, directory, durability="process") as server:
        server.remove_elimination_rpc("slashed")
        server.eliminate_rpc("slashed", row("slashed"), ["slash"], None, rule)
        owed = [debt["registration"] for debt in server.get_debts_rpc("slashed") if debt["kind"] == "slash"]
        return owed[0] if owed else None


def test_an_old_slash_counts_for_every_rule(second):
    for rule in ("drawdown", "challenge_period", "perf_ledger"):
        assert owes_again(second[0], rule) is None


def test_until_he_departs_and_returns(second):
    directory, _ = second
    with EliminationManagerServer(None, directory, durability="process") as server:
        for hotkeys in (["m2", "slashed"], ["m2"], ["m2", "slashed"]):
            server.update_metagraph_rpc(hotkeys)
    assert owes_again(directory, "drawdown") == 1


@pytest.mark.parametrize(
    ("detected_ms", "registered", "again"), [(1 << 50, 1, 1), (1 << 50, 0, None), (5, 1, None)]
)
def test_or_had_done_so_before_the_upgrade(second, detected_ms, registered, again):
    directory, change = second
    change(
        "UPDATE hotkeys SET departed_ordinal = 1000, detected_ms = ?, registered = ? WHERE hotkey = 'slashed'",
        detected_ms,
        registered,
    )
    assert owes_again(directory, "drawdown") == again


@pytest.mark.parametrize(
    ("reason", "rule"),
    [
        ("MAX_TOTAL_DRAWDOWN", "drawdown"),
        ("FAILED_CHALLENGE_PERIOD_TIME", "challenge_period"),
        ("LIQUIDATED", "perf_ledger"),
        ("of somebody's own", ""),
    ],
)
def test_an_old_debt_takes_the_rule_of_its_eliminations_event_else_money_is_held(second, reason, rule):
    directory, change = second
    record = encode(row("owing", reason=reason))
    change("UPDATE debts SET eliminated_ms = ?", row("owing")["elimination_initiated_time_ms"])
    change(
        "INSERT INTO events (at_ms, action, hotkey, pid, program, new) VALUES (1, 'add', 'owing', 1, 'x', ?)",
        record,
    )
    with EliminationManagerServer(None, directory, durability="process") as server:
        (debt,) = [debt for debt in server.get_debts_rpc("owing") if debt["kind"] == "slash"]
        assert (debt["rule"], debt["reason"], debt["share_asked"]) == (rule, reason, False)
        assert (server.get_money_held_rpc() is None) is bool(rule)
        assert server.begin_slash_rpc("owing", "t") is bool(rule)


def test_a_copy_of_it_is_kept(old, number):
    before = content(old), schema_of(old)
    Store.open(old).close()
    kept = old / f"{FILE_NAME}.schema-{number}"
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    # It is a store of its schema, which an older version goes on with when it is put in its place.
    kept.rename(old / FILE_NAME)
    assert (content(old), schema_of(old)) == before


def test_a_second_upgrade_leaves_the_first_copy_alone(old, number):
    kept = old / f"{FILE_NAME}.schema-{number}"
    kept.write_text("an earlier one")
    before = content(old)
    Store.open(old).close()
    assert kept.read_text() == "an earlier one"
    assert content(old, f"{kept.name}-1") == before


def test_without_room_for_the_copy_it_stays_as_it_was(old, monkeypatch):
    before = content(old), schema_of(old)

    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(schema, "copy", full)
        with pytest.raises(StoreError, match="a copy of it cannot be kept") as caught:
            Store.open(old)
        assert "make room" in caught.value.hint
    assert (content(old), schema_of(old)) == before


def test_a_server_goes_on_with_it(old):
    with EliminationManagerServer(None, old, durability="process") as server:
        found = [r["hotkey"] for r in server.get_eliminations_from_memory_rpc()]
        assert found[:20] == [f"h{n}" for n in range(20)]
        owed = server.health_check_rpc()["num_debts"]
        assert server.is_hotkey_eliminated_rpc("h7")
        assert list(server.get_departed_hotkeys_rpc()) == ["m1"]
        assert server.get_replacements_rpc() == 1
        assert server.eliminate_rpc("new", row("new"), ["slash"]) == "added"
        assert server.health_check_rpc()["num_debts"] == owed + 1
        assert [event["action"] for event in server.get_history_rpc(limit=2)] == ["owe", "add"]
        state = state_in_table(server.reader)
    with EliminationManagerServer(None, old, durability="process") as server:
        assert state_in_table(server.reader) == state
        # The rule of a slash that was owed is not known.
        assert server.release_money_rpc() is bool(owed)
        assert server.begin_slash_rpc("new", "token")
        assert server.settle_debt_rpc("new", "slash", "token")
        assert server.get_slashes_rpc()[-1]["hotkey"] == "new"


def test_readers_of_an_old_store_change_nothing(old, number):
    found = content(old)
    # The index of the log is a reader's too.
    before = {name: data for name, data in listing(old).items() if not name.endswith("-shm")}
    with Store.read_only(old) as store:
        assert [event.id for event in store.events(limit=None)][::-1] == [event[0] for event in found["events"]]
        assert len(store.debts()) == store.debt_figures().debts == len(found.get("debts", ()))
        assert len(store.slashes()) == len(found.get("slashes", ()))
        assert store.debts("h1") == store.slashes("h1") == []
        assert (store.store_id, store.commit_number) == (None, 0)
    assert {name: data for name, data in listing(old).items() if not name.endswith("-shm")} == before
    assert schema_of(old)[0] == number


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
        assert reading.execute("SELECT max(commit_number) FROM events").fetchone() == (1,)
        assert reading.execute("SELECT commit_number FROM main.identity").fetchone() == (1,)
    finally:
        reading.close()


def test_an_older_version_refuses_the_new_one(old, monkeypatch):
    Store.open(old).close()
    before = listing(old)
    monkeypatch.setattr(schema, "SCHEMA_NUMBER", 2)
    with pytest.raises(StoreError, match=r"schema 3.*up to 2") as caught:
        Store.open(old)
    assert "upgrade" in caught.value.hint
    assert listing(old) == before


def test_a_failure_leaves_it_as_it_was(old, monkeypatch):
    before = content(old), schema_of(old)
    with monkeypatch.context() as patch:
        *earlier, last = schema._SCHEMAS
        failing = last._replace(statements=(*last.statements, "CREATE TABLE identity (x)"))
        patch.setattr(schema, "_SCHEMAS", (*earlier, failing))
        with pytest.raises(StoreError, match="identity already exists"):
            Store.open(old)
    assert (content(old), schema_of(old)) == before
    Store.open(old).close()
    assert schema_of(old)[0] == schema.SCHEMA_NUMBER


def test_of_two_that_open_it_at_once_one_brings_it_up_to_date(old, monkeypatch, number):
    # Both have seen the old schema before either goes on.
    both_saw = threading.Barrier(2)
    identify = schema.identify

    def slow(db, path):
        found = identify(db, path)
        if not db.in_transaction:
            assert found == number
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
    assert schema_of(old)[0] == schema.SCHEMA_NUMBER
    Store.open(old).close()


@pytest.mark.parametrize("never", [0, -1])
def test_a_schema_that_never_was_is_damage(tmp_path, never):
    Store.open(tmp_path).close()
    db = sqlite3.connect(tmp_path / FILE_NAME)
    db.execute(f"PRAGMA user_version={never}")
    db.close()
    with pytest.raises(DamagedStoreError, match=f"schema {never}"):
        Store.open(tmp_path)


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.long)])
def test_kill_at_every_line(old, tmp_path, number, stride):
    before, upgraded = without_empty(content(old)), 0
    directory = tmp_path / "killed"
    for line in range(random.randint(1, stride), 1 << 30, stride):
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(old, directory)
        done = Counter()

        def run(line=line, done=done):
            at_line(
                line,
                kill_self,
                ("install", "identify", "_keep_copy", "copy", "_give_causes", "_reason_of"),
                (schema.__file__, copying.__file__),
            )
            Store.open(directory)
            done.value = 1
            os._exit(0)

        with Child(run) as child:
            child.wait()
        found, _ = schema_of(directory)
        assert found == schema.SCHEMA_NUMBER if done.value else found in (number, schema.SCHEMA_NUMBER), (
            f"line {line}"
        )
        assert without_empty(content(directory)) == before
        upgraded += found == schema.SCHEMA_NUMBER
        with Store.open(directory) as store:
            store.check()
        assert schema_of(directory)[0] == schema.SCHEMA_NUMBER
        assert without_empty(content(directory)) == before
        # However often it was begun, there is a copy that is whole, and nothing half-made.
        assert without_empty(content(directory, f"{FILE_NAME}.schema-{number}")) == before
        assert not list(directory.glob(".*"))
        if done.value:
            break
    assert line > 30
    assert upgraded >= 1


def test_a_served_name_goes_on_after_an_upgrade(new_name, old, number):
    name = new_name()
    with Served(name, old) as served:
        client = served.client()
        assert len(client.get_debts()) == {1: 0, 2: 2}[number]
        assert len(client.get_slashes()) == {1: 0, 2: 1}[number]
        assert len(client) == {1: 20, 2: 22}[number]
        client.close()
