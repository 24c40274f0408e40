"""Commands that look, against a real server: what they print of hotkeys, of the history, and as it comes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from commanding import A, B, T, document, environment, row, runner, serving
from invoking import CliRunner
from waiting import PATIENCE, until

import shmelim.shm
from shmelim import EliminationReader
from shmelim.cli.main import cli
from shmelim.shm import SharedNamespace

# ------------------------------------------------------------------ looking


def test_check_tells_of_each_hotkey(run):
    assert run("add", "mine", "--reason", "ZOMBIE").exit_code == 0
    result = run("check", A, B, "mine", "other")
    assert result.exit_code == 1
    assert result.stdout == f"{A}\tdeparted\n{B}\tre-registered\nmine\teliminated\nother\tclear\n"
    assert run("check", A, B).exit_code == 0


def test_check_as_json(run):
    run("add", A, "--reason", "ZOMBIE")
    found = document(run("check", A, B, "--json"), code=1)
    assert set(found) == {"name", "eliminated", "writer_alive", "hotkeys"}
    assert found["eliminated"] == 1
    assert found["hotkeys"] == [
        {"hotkey": A, "eliminated": True, "departed": True, "registered": False, "re_registered": False}
        | {"ss58": True},
        {"hotkey": B, "eliminated": False, "departed": True, "registered": True, "re_registered": True}
        | {"ss58": True},
    ]


def test_hotkeys_from_stdin(run):
    run("add", A, "--reason", "ZOMBIE")
    result = run("check", "-", stdin=f"{A}\n\n  other \n")
    assert (result.exit_code, result.stdout) == (1, f"{A}\teliminated, departed\nother\tclear\n")
    assert document(run("get", "-", "--json", stdin=f"{A}\n"))["eliminations"][0]["hotkey"] == A


def test_a_hotkey_from_stdin_is_whole_whatever_stands_in_it(run):
    hotkey = "a\u2028b\x0cc\x85"
    assert run("add", hotkey, "--reason", "ZOMBIE").exit_code == 0
    result = run("check", "-", "--json", stdin=f"{hotkey}\r\n")
    assert [each["hotkey"] for each in document(result, 1)["hotkeys"]] == [hotkey]


@pytest.mark.parametrize(
    ("stdin", "problem"), [("", "no hotkey"), ("a\n" + "x" * 256, "line 2"), (b"\xff\n", "line 1")]
)
def test_bad_hotkeys_from_stdin(run, stdin, problem):
    result = run("check", "-", stdin=stdin)
    assert result.exit_code == 2
    assert problem in result.stderr


def test_get_prints_the_record(run):
    run("add", A, "--reason", "LIQUIDATED", "--dd", "0.25", "--time-ms", str(T))
    lines = dict(line.split("\t") for line in run("get", A).stdout.splitlines())
    assert lines["hotkey"] == A
    assert (lines["reason"], lines["dd"], lines["(UTC)"]) == ("LIQUIDATED", "0.25", "2025-05-04 22:07:15")
    record = {**row(A, reason="LIQUIDATED", dd=0.25), "price_info": {}, "return_info": {}}
    found = document(run("get", A, "other", "--json"), code=1)
    assert found == {"name": found["name"], "eliminations": [record], "missing": ["other"]}


def test_get_of_what_is_not_eliminated(run):
    result = run("get", A)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"not eliminated: {A}\n"


def test_list_in_order_and_by_reason(run):
    run("add", B, "--reason", "PLAGIARISM", "--time-ms", str(T))
    run("add", A, "--reason", "ZOMBIE", "--dd", "0.1", "--time-ms", str(T))
    assert (
        run("list").stdout == f"{B}\tPLAGIARISM\t-\t2025-05-04 22:07:15\n{A}\tZOMBIE\t0.1\t2025-05-04 22:07:15\n"
    )
    assert run("list", "--reason", "ZOMBIE").stdout.startswith(f"{A}\t")
    found = document(run("list", "--json"))
    assert set(found) == {"name", "version", "count", "eliminations"}
    assert [record["hotkey"] for record in found["eliminations"]] == [B, A]
    assert document(run("list", "--reason", "NONE", "--json"))["count"] == 0


def test_list_of_the_departed(run):
    lines = run("list", "--departed").stdout.splitlines()
    assert len(lines) == 367
    assert f"{A}\t2025-05-04 22:07:15" in lines
    found = document(run("list", "--departed", "--json"))
    assert found["count"] == len(found["departed"]) == 367
    assert {"hotkey": A, "detected_ms": T} in found["departed"]


def test_what_strangers_chose_reaches_no_terminal_as_a_command(run):
    run("add", "evil\x1b[2J\there", "--reason", "\x1b]0;title\x07", "--time-ms", str(T))
    for arguments in (("list",), ("get", "evil\x1b[2J\there"), ("history", "--limit", "1")):
        result = run(*arguments)
        assert "\x1b" not in result.output
        assert "evil\\x1b[2J\\there" in result.stdout


def test_status(run, served):
    found = document(run("status", "--verify", "--json"))
    assert found["writer"]["pid"] == served.process.pid
    assert found["writer"]["alive"]
    assert found["writer"]["state"] == "serving"
    assert found["channel"]["answers"]
    assert found["state_dir"].endswith(served.name)
    assert found["server"]["problems"] == []
    assert (found["eliminated"], found["departed"], found["registered"]) == (0, 367, 1)
    assert found["verified"] == found["entries"] == 368
    assert found["table"]["usable"] * 2 == found["table"]["capacity"]
    lines = dict(line.split("\t", 1) for line in run("status").stdout.splitlines())
    assert lines["writer"].startswith(f"process {served.process.pid}, alive, serving")
    assert lines["departed"] == "367"
    assert lines["read path"] == found["read_path"] == shmelim.shm.READ_PATH


@pytest.mark.parametrize("said", [None, "nowhere", "relative"])
def test_the_server_is_found_from_any_environment_of_its_user(run, served, tmp_path, said):
    """As from cron, sudo, or `docker exec`: the table says where it is."""
    env = {"XDG_RUNTIME_DIR": str(tmp_path / said) if said == "nowhere" else said, "SHMELIM_NAME": served.name}
    result = CliRunner().invoke(cli, ["add", A, "--reason", "ZOMBIE"], env=env)
    assert (result.exit_code, result.stdout) == (0, f"added: {A}\n")
    assert CliRunner().invoke(cli, ["health"], env=env).exit_code == 0


def test_status_without_a_key(run, served, tmp_path):
    result = run("status", "--runtime-dir", str(tmp_path), "--json")
    found = document(result)
    assert found["eliminated"] == 0
    assert found["server"] is None
    assert not found["channel"]["answers"]
    assert found["channel"]["problem"]


# ------------------------------------------------------------------ history


def test_history_online(run):
    run("add", A, "--reason", "ZOMBIE", "--dd", "0.1", "--time-ms", str(T))
    run("add", A, "--reason", "LIQUIDATED", "--dd", "0.1", "--time-ms", str(T))
    run("remove", A)
    lines = [line.split("\t") for line in run("history", A, "--limit", "3").stdout.splitlines()]
    assert [line[1] for line in lines] == ["remove", "update", "add"]
    assert [line[4] for line in lines] == [
        "LIQUIDATED dd 0.1 →",
        "reason: ZOMBIE → LIQUIDATED",
        "→ ZOMBIE dd 0.1",
    ]
    assert all(f"[{os.getpid()}] uid {os.getuid()}" in line[3] for line in lines)
    found = document(run("history", A, "--limit", "2", "--json"))
    assert found["source"] == "server"
    assert [event["action"] for event in found["events"]] == ["remove", "update"]
    assert set(found["events"][0]) == {
        *("id", "at_ms", "action", "hotkey", "pid", "uid", "program", "note", "old", "new", "commit_number")
    }
    assert found["events"][1]["old"]["reason"] == "ZOMBIE"


def test_history_in_pages(run):
    found = document(run("history", "--limit", "350", "--json"))["events"]
    assert len(found) == 350
    numbers = [event["id"] for event in found]
    assert numbers == list(range(numbers[0], numbers[0] - 350, -1))


def test_history_of_a_hotkey_without_any(run):
    result = run("history", "nobody")
    assert (result.exit_code, result.stdout) == (0, "")


def test_history_in_a_directory_without_a_store(run, tmp_path):
    result = run("history", "--state-dir", str(tmp_path))
    assert result.exit_code == 4
    assert str(tmp_path) in result.stderr


@pytest.mark.parametrize("odd", [A[:-1], f"{A} ", f"{A[:-1]}t", "hotkey123"])
def test_check_says_what_is_no_address(run, odd):
    assert run("check", A).stderr == ""
    said = run("check", A, odd)
    assert (said.exit_code, said.stderr) == (0, f"note: {odd!r} is not a valid SS58 address\n")


def test_verify_says_that_the_store_of_what_is_served_is_gone(tmp_path):
    name = f"gone-{os.getpid()}"
    with serving(name, tmp_path, "--state-dir", str(tmp_path / "state")) as server:
        run = runner(name, tmp_path)
        assert run("verify").exit_code == 0
        server.end()
        (tmp_path / "state" / "shmelim.sqlite").unlink()
        said = run("verify")
        assert (said.exit_code, f"there is no store {tmp_path / 'state'}" in said.stdout) == (1, True)
    SharedNamespace(name).remove()


def test_check_of_a_dead_writer_says_so(tmp_path):
    name = f"dead-{os.getpid()}"
    with serving(name, tmp_path) as server:
        run = runner(name, tmp_path)
        assert run("check", A).stderr == ""
        server.end(signal.SIGKILL)
        until(lambda: not EliminationReader(name).writer.alive)
        said = run("check", A)
        assert (said.exit_code, said.stdout) == (0, f"{A}\tclear\n")
        assert said.stderr.startswith(f"note: the writer, process {server.process.pid}, is not alive")


# ------------------------------------------------------------------ as it comes


def test_watch_shows_changes_in_order_from_a_version_on(run, served):
    with contextlib.closing(served.client()) as client:
        since = client.version
        client.add_elimination(A, row(A))
        client.add_elimination("two\nlines", row("two\nlines"))
        client.remove_elimination(A)
        lines = run("watch", "--since", str(since), "--count", "3").stdout.splitlines()
        assert [line.split("\t")[1:3] for line in lines] == [["add", A], ["add", r"two\nlines"], ["remove", A]]
        found = run("watch", "--since", str(since), "--count", "3", "--json").stdout.splitlines()
        assert [json.loads(line)["hotkey"] for line in found] == [A, "two\nlines", A]
        assert json.loads(found[2])["version"] == client.version


def test_watch_says_what_it_cannot_tell_and_goes_on(run, served):
    command = [sys.executable, "-m", "shmelim", "watch", "--name", served.name, "--since", "1", "--json"]
    watching = subprocess.Popen(
        command,
        env={**os.environ, **environment(served.home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Whoever runs tests in the background may ignore it, and children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )
    lines = []
    reading = threading.Thread(target=lambda: lines.append(watching.stdout.readline()))
    try:
        assert b"what changed since version 1 is not known" in watching.stderr.readline()
        # It goes on from the version that it saw then, whichever that was.
        reading.start()
        numbers = iter(range(10**6))
        with contextlib.closing(served.client()) as client:
            until(lambda: (client.add_elimination(A, row(A, dd=next(numbers) / 2)), *lines)[1:])
        reading.join()
        assert json.loads(lines[0])["hotkey"] == A
        watching.send_signal(signal.SIGINT)
        watching.communicate(timeout=PATIENCE)
        assert watching.returncode == 130
    finally:
        watching.kill()
        watching.communicate()


def test_names_lists_what_is_served_here(run, served):
    damaged = Path("/dev/shm", f"shmelim.bad-{os.getpid()}")
    damaged.write_bytes(b"x" * 4096)
    try:
        found = {each["name"]: each for each in document(run("names", "--json"))["names"]}
    finally:
        damaged.unlink()
    assert found[served.name]["status"] == "alive"
    assert found[served.name]["pid"] == served.process.pid
    assert found[served.name]["departed"] >= 1
    assert found[f"bad-{os.getpid()}"]["status"] == "unreadable"
    assert found[f"bad-{os.getpid()}"]["problem"]
