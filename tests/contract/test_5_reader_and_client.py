"""SPEC 5: `EliminationReader` for any process, and `EliminationClient`, which also changes."""

import contextlib
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from enum import IntFlag
from pathlib import Path

import numpy as np
import pytest
from contract_services import hang, kill
from contract_validator import row
from waiting import PATIENCE, until

from shmelim import ChangesUnknownError, EliminationClient, EliminationReader, NotServingError, Status
from shmelim.errors import KeyFileError, ReaderClosedError, ShmelimError, StaleError


@pytest.fixture
def served(make):
    """A manager whose state has all that can be read, in RPC mode; `health_check` restarts nothing here."""
    manager = make("rpc", enable_auto_restart=False)
    manager.sync_eliminations([row("b"), row("a")])
    manager.update_metagraph(["a", "m", "n"])
    manager.update_metagraph(["a", "n"])
    manager.update_metagraph(["a", "m"])
    return manager


@pytest.fixture
def reader(served):
    return EliminationReader(served.name)


@contextlib.contextmanager
def stopped(pid):
    hang(pid)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def assert_reads_all(reader):
    departed = reader.get_departed_hotkeys()
    assert list(departed) == ["m", "n"]
    assert reader.is_hotkey_eliminated("a") is True
    assert reader.is_hotkey_eliminated("m") is False
    assert reader.get_elimination("a") == reader.hotkey_in_eliminations("a") == row("a")
    assert reader.get_elimination("m") is reader.hotkey_in_eliminations("m") is None
    assert reader.get_eliminated_hotkeys() == {"a", "b"}
    assert reader.get_eliminations_from_memory() == [row("b"), row("a")]
    assert reader.eliminations == reader.get_eliminations_dict() == {"b": row("b"), "a": row("a")}
    assert reader.departed_hotkeys == departed
    assert reader.get_departed_hotkey_info("m") == departed["m"]
    assert reader.get_departed_hotkey_info("a") is None
    assert [reader.is_hotkey_re_registered(hotkey) for hotkey in "amnx"] == [False, True, False, False]
    assert reader.status("a") == Status.ELIMINATED | Status.REGISTERED
    assert reader.status("m") == Status.DEPARTED | Status.REGISTERED
    assert reader.status("n") == Status.DEPARTED
    assert reader.status("x") == Status(0)
    assert reader.are_eliminated(["x", "a", "b"]).tolist() == [False, True, True]
    assert len(reader) == 2
    assert "a" in reader
    assert "m" not in reader
    assert list(reader) == ["b", "a"]


def test_it_needs_no_key_no_socket_and_no_answer_of_the_server(served):
    """Killed, stopped or cleaned away: whatever happened to the server, its readers answer."""
    with stopped(served.server_pid):
        (found,) = Path(os.environ["XDG_RUNTIME_DIR"]).rglob(f"{served.name}/key")
        shutil.rmtree(found.parent)
        reader = EliminationReader(served.name)
        assert_reads_all(reader)
    kill(served.server_pid)
    assert_reads_all(reader)
    assert_reads_all(EliminationReader(served.name))


def test_status_is_an_int_flag(reader):
    assert issubclass(Status, IntFlag)
    assert {flag.name for flag in Status} == {"ELIMINATED", "DEPARTED", "REGISTERED"}
    assert isinstance(reader.status("a"), Status)


def test_are_eliminated_answers_in_an_array(reader):
    for hotkeys in (["a", "x"], ("a", "x"), iter(["a", "x"]), np.array([b"a", b"x"])):
        answers = reader.are_eliminated(hotkeys)
        assert isinstance(answers, np.ndarray)
        assert answers.dtype == np.bool_
        assert answers.tolist() == [True, False]
    assert reader.are_eliminated([]).shape == (0,)
    with pytest.raises(TypeError):
        reader.are_eliminated("a")
    with pytest.raises(TypeError):
        reader.are_eliminated([b"a"])


def test_read_hands_the_bytes_to_a_function(reader):
    assert len(reader.read("a", bytes)) == reader.read("a", len) > 50
    assert reader.read("m", bytes) is None
    with pytest.raises(ZeroDivisionError):
        reader.read("a", lambda view: 1 // 0)


def test_snapshot_is_everything_as_of_one_version(reader, served):
    before = reader.snapshot()
    assert before.version == reader.version
    assert before.eliminations == reader.eliminations
    assert before.departed == reader.departed_hotkeys
    assert before.registered == {"a", "m"}
    served.remove_elimination("a")
    assert reader.snapshot().version > before.version
    assert "a" in before.eliminations


def test_version_moves_with_each_change_and_only_then(reader, served):
    seen = [reader.version]
    for change in (
        lambda: served.add_elimination("c", row("c")),
        lambda: served.sync_eliminations([row("c", 1)]),
        lambda: served.update_metagraph(["a", "m", "new"]),
        served.clear_eliminations,
    ):
        change()
        seen.append(reader.version)
    assert seen == sorted(set(seen))
    served.clear_eliminations()
    served.remove_elimination("never")
    assert reader.version == seen[-1]


def test_writer_says_who_writes_and_whether_it_lives(reader, served):
    assert reader.writer.pid == served.server_pid
    assert reader.writer.alive is True
    assert 0 <= reader.writer.heartbeat_age < PATIENCE
    kill(served.server_pid)
    until(lambda: not reader.writer.alive, "the writer's death being seen")
    assert_reads_all(reader)


def test_wait_for_change(reader, served):
    assert reader.wait_for_change(0.01) is False
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(reader.wait_for_change(PATIENCE)))
    waiting.start()
    numbers = iter(range(10**6))
    until(lambda: served.add_elimination("c", row("c", next(numbers))) or answers, "the waiter's answer")
    waiting.join(PATIENCE)
    assert answers == [True]


def test_what_is_not_text_is_never_read_as_not_eliminated(reader):
    for read in (
        reader.is_hotkey_eliminated,
        reader.get_elimination,
        reader.is_hotkey_re_registered,
        reader.status,
    ):
        for hotkey in (b"a", 5, ["a"]):
            with pytest.raises(TypeError):
                read(hotkey)


def test_none_answers_as_a_dict_would(reader):
    assert reader.is_hotkey_eliminated(None) is False
    assert reader.is_hotkey_re_registered(None) is False
    assert reader.get_elimination(None) is reader.hotkey_in_eliminations(None) is None
    assert reader.get_departed_hotkey_info(None) is reader.read(None, bytes) is None
    assert reader.status(None) == Status(0)
    assert reader.are_eliminated([None, "a"]).tolist() == [False, True]
    assert None not in reader


# ---------------------------------------------------------------------- attaching


def test_a_name_that_nobody_serves_is_named_with_the_command_that_starts_it(unused_name):
    name = unused_name()
    for kind in (EliminationReader, EliminationClient):
        with pytest.raises(NotServingError, match=name) as caught:
            kind(name)
        assert f"shmelim serve --name {name}" in str(caught.value)
    command = [sys.executable, "-m", "shmelim", "serve", "--help"]
    assert subprocess.run(command, capture_output=True, timeout=PATIENCE, check=False).returncode == 0


@pytest.mark.parametrize("name", ["", "Capital", "a/b", "x" * 17, "ü"])
def test_an_illegal_name_is_a_value_error(name):
    with pytest.raises(ValueError, match="name"):
        EliminationReader(name)


@pytest.mark.parametrize("kind", [EliminationReader, EliminationClient])
def test_it_waits_for_a_writer_to_appear(make, unused_name, kind):
    name, found = unused_name(), []
    with pytest.raises(NotServingError):
        kind(name, wait=0.01)
    waiting = threading.Thread(target=lambda: found.append(kind(name, wait=PATIENCE)))
    waiting.start()
    make("rpc", name=name).add_elimination("a", row("a"))
    waiting.join(PATIENCE)
    (reader,) = found
    assert reader.is_hotkey_eliminated("a")


def test_it_is_safe_for_threads(reader, served):
    errors, stop = [], threading.Event()

    def look():
        try:
            while not stop.is_set():
                found = reader.snapshot().eliminations
                assert len({one["return_info"]["n"] for one in found.values()}) == 1, "torn"
                answers = reader.are_eliminated(list(found))
                assert len(answers) == len(found)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for n in range(1, 20):
        served.sync_eliminations([row(f"h{k}", n) for k in range(300)])
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert errors == []


def tell_what_is_read(reader, pipe):
    assert_reads_all(reader)
    pipe.send("as expected")


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
@pytest.mark.parametrize("kind", [EliminationReader, EliminationClient])
def test_it_goes_to_children_of_every_kind(served, method, kind):
    reader = kind(served.name)
    context = multiprocessing.get_context(method)
    here, there = context.Pipe()
    child = context.Process(target=tell_what_is_read, args=(reader, there), daemon=True)
    child.start()
    assert here.poll(PATIENCE)
    assert here.recv() == "as expected"
    child.join(PATIENCE)


def test_a_pickled_one_attaches_again(served, reader):
    copy = pickle.loads(pickle.dumps(reader))
    served.add_elimination("c", row("c"))
    assert type(copy) is EliminationReader
    assert list(copy) == list(reader) == ["b", "a", "c"]


def test_readers_move_over_to_the_next_server_by_themselves(make, served, reader, tmp_path):
    name = served.name
    served.shutdown()
    assert_reads_all(reader)
    again = make("rpc", name=name)
    again.add_elimination("c", row("c"))
    assert list(reader) == ["b", "a", "c"]


# ---------------------------------------------------------------------- how old it is (FLEET)


@pytest.mark.parametrize("kind", [EliminationReader, EliminationClient])
def test_a_reader_says_how_old_its_answers_are_and_may_refuse_to_give_them(served, kind):
    """Nothing while a local writer lives; of a follower's table see tests/unit/test_shm_staleness.py."""
    ways = ("serve", "raise", "refuse")
    readers = {when: kind(served.name, max_staleness=0.0, when_stale=when) for when in ways}
    for reader in readers.values():
        assert_reads_all(reader)
        assert (reader.source, reader.position, reader.staleness, reader.stale) == (None, None, 0.0, False)
    assert EliminationReader(served.name).as_of is None
    kill(served.server_pid)
    until(lambda: readers["serve"].stale, "the writer's death being seen")
    assert readers["serve"].staleness > 0
    assert_reads_all(readers["serve"])
    with pytest.raises(StaleError, match=served.name):
        readers["raise"].is_hotkey_eliminated("m")
    assert readers["refuse"].is_hotkey_eliminated("m") is True
    assert readers["refuse"].are_eliminated(["m", "x"]).tolist() == [True, True]
    with pytest.raises(StaleError, match=served.name):
        readers["refuse"].get_elimination("a")
    again = pickle.loads(pickle.dumps(readers["raise"]))
    with pytest.raises(StaleError):
        again.snapshot()


# ---------------------------------------------------------------------- closing


READS = {
    "is_hotkey_eliminated": lambda reader: reader.is_hotkey_eliminated("a"),
    "of None": lambda reader: reader.is_hotkey_eliminated(None),
    "of a text that is no hotkey": lambda reader: reader.get_elimination("x" * 300),
    "is_hotkey_re_registered": lambda reader: reader.is_hotkey_re_registered("a"),
    "status": lambda reader: reader.status("a"),
    "in": lambda reader: "a" in reader,
    "len": len,
    "iteration": list,
    "bool": bool,
    "get_elimination": lambda reader: reader.get_elimination("a"),
    "item": lambda reader: reader["a"],
    "read": lambda reader: reader.read("a", bytes),
    "get_departed_hotkey_info": lambda reader: reader.get_departed_hotkey_info("m"),
    "are_eliminated": lambda reader: reader.are_eliminated(["a"]),
    "are_eliminated, empty": lambda reader: reader.are_eliminated([]),
    "statuses": lambda reader: reader.statuses(["a"]),
    "get_eliminated_hotkeys": lambda reader: reader.get_eliminated_hotkeys(),
    "get_eliminations_from_memory": lambda reader: reader.get_eliminations_from_memory(),
    "eliminations": lambda reader: reader.eliminations,
    "departed_hotkeys": lambda reader: reader.departed_hotkeys,
    "snapshot": lambda reader: reader.snapshot(),
    "version": lambda reader: reader.version,
    "writer": lambda reader: reader.writer,
    "table": lambda reader: reader.table,
    "root_id": lambda reader: reader.root_id,
    "verify": lambda reader: reader.verify(),
    "wait_for_change": lambda reader: reader.wait_for_change(0.0),
}


def descriptors():
    return list(Path("/proc/self/fd").iterdir())


def mappings(name):
    found = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return [line for line in found if f"/shmelim.{name}" in line]


@pytest.mark.parametrize("kind", [EliminationReader, EliminationClient])
def test_a_closed_one_reads_no_more_and_keeps_nothing(served, kind):
    gc.collect()  # what other tests left
    owned = len(descriptors())
    mapped = len(mappings(served.name))
    with kind(served.name) as reader:
        for read in READS.values():
            read(reader)
        assert len(mappings(served.name)) > mapped
    assert len(mappings(served.name)) == mapped
    assert len(descriptors()) <= owned
    for what, read in READS.items():
        with pytest.raises(ReaderClosedError, match=served.name) as caught:
            pytest.fail(f"{what}: {read(reader)!r}")
        assert "closed" in str(caught.value)
    reader.close()
    assert "closed" in repr(reader)
    assert_reads_all(pickle.loads(pickle.dumps(reader)))


def test_a_closed_client_changes_nothing(served):
    client = EliminationClient(served.name)
    client.close()
    with pytest.raises(ShmelimError, match="closed"):
        client.add_elimination("c", row("c"))
    assert "c" not in served.eliminations


def test_closing_ends_a_wait_in_another_thread(reader):
    caught = []

    def wait():
        try:
            reader.wait_for_change(PATIENCE)
        except ReaderClosedError as error:
            caught.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    reader.close()
    waiting.join(PATIENCE)
    assert len(caught) == 1


# ---------------------------------------------------------------------- the client


def test_a_client_reads_and_has_every_mutation(served):
    client = EliminationClient(served.name)
    assert_reads_all(client)
    assert client.add_elimination("c", row("c")) is True
    assert client.add_elimination("c", row("c", 1)) is False
    assert client.append_elimination_row("d", 0.5, "ZOMBIE") is True
    assert client.remove_elimination("b") is True
    assert list(served.eliminations) == ["a", "c", "d"]
    client.delete_eliminations(["a", "d"])
    assert client.sync_eliminations([row("x")]) == ["c"]
    client.write_eliminations_to_disk([row("y")])
    client.save_eliminations()
    assert client.get_eliminations_from_disk() == [row("y")]
    client.clear_eliminations()
    assert served.eliminations == {}
    assert client.get_history(limit=1)[0]["action"] == "remove"
    client.close()


def test_a_client_in_another_process_finds_everything_by_the_name(served):
    code = (
        "import sys; from shmelim import EliminationClient; client = EliminationClient(sys.argv[1]);"
        "print(client.remove_elimination('a'), len(client))"
    )
    command = [sys.executable, "-c", code, served.name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.stdout.split() == ["True", "1"], done.stderr
    assert list(served.eliminations) == ["b"]


def test_who_may_not_read_the_key_changes_nothing(served):
    (key,) = Path(os.environ["XDG_RUNTIME_DIR"]).rglob(f"{served.name}/key")
    assert (key.stat().st_mode & 0o777, key.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    client = EliminationClient(served.name, connect_wait=0.0)
    with stopped(served.server_pid):  # so that it puts nothing back
        key.unlink()
        with pytest.raises((KeyFileError, NotServingError)):
            EliminationClient(served.name, connect_wait=0.0).add_elimination("c", row("c"))
        assert_reads_all(client)


def test_when_a_change_returns_every_later_read_sees_it(served, reader):
    client = EliminationClient(served.name)
    deadline = time.monotonic() + PATIENCE
    for n in range(300):
        client.add_elimination("c", row("c", n))
        assert reader.get_elimination("c") == row("c", n)
        assert time.monotonic() < deadline
    client.close()


# ---------------------------------------------------------------------- what changed since a version


def test_changes_since_a_version_leave_nothing_out_and_repeat_nothing(reader, served):
    told, since = [], reader.version
    for number in range(5):
        served.add_elimination("c", row("c", number))
        if number % 2:
            found = served.changes(since)
            told += found["events"]
            since = found["version"]
    found = served.changes(since)
    told += found["events"]
    assert found["version"] == reader.version
    assert [(event["action"], event["hotkey"]) for event in told] == [("add", "c")] + [("update", "c")] * 4
    assert [event["new"]["elimination_initiated_time_ms"] for event in told] == [
        row("c", number)["elimination_initiated_time_ms"] for number in range(5)
    ]
    assert served.changes(reader.version) == {"version": reader.version, "events": []}


def test_what_changed_beside_the_table_is_told_at_once_too(reader, served):
    served.add_elimination("c", row("c"))
    since = reader.version
    assert served.prune_history(served.get_history(limit=1)[0]["id"])
    assert reader.wait_for_change(PATIENCE, since)
    assert [event["action"] for event in served.changes(since)["events"]] == ["prune"]
    assert not served.changes(reader.version)["events"]


def test_changes_since_a_version_of_which_nobody_knows(reader, served):
    for since in (reader.version + 1, -1):
        with pytest.raises(ChangesUnknownError, match=f"since version {since} is not known"):
            served.changes(since)
    with pytest.raises(TypeError, match="since"):
        served.changes("1")
