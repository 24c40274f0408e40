"""Every command against a real server: what it prints, what it changes, how it ends."""

import contextlib
import json
import math
import os
import secrets
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from invoking import CliRunner
from waiting import PATIENCE, until

import shmelim.shm
from shmelim import EliminationClient, EliminationReader
from shmelim.cli.main import cli
from shmelim.shm import SharedNamespace

A = "5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs"
B = "5C5GANtAKokcPvJBGyLcFgY5fYuQaXC3MpVt75codZbLLZrZ"
T = 1_746_396_435_687


def environment(home):
    return {"XDG_RUNTIME_DIR": str(home / "run"), "XDG_STATE_HOME": str(home / "state")}


class Server:
    """A real ``python -m shmelim serve``, ready when it is made."""

    def __init__(self, name, home, *arguments):
        (home / "run").mkdir(mode=0o700, exist_ok=True)
        self.name, self.home, self.log = name, home, home / "stderr"
        reading, writing = os.pipe()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "shmelim", "serve", "--name", name, "--ready-fd", str(writing), *arguments],
                pass_fds=(writing,),
                env={**os.environ, **environment(home)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        os.close(writing)
        with os.fdopen(reading, "rb") as ready:
            assert ready.read() == b"ready\n", self.said()

    def said(self):
        return self.log.read_text()

    def end(self, number=signal.SIGTERM):
        if self.process.poll() is None:
            self.process.send_signal(number)
        output, _ = self.process.communicate(timeout=PATIENCE)
        assert output == b""
        return self.process.returncode

    def client(self):
        return EliminationClient(self.name, runtime_base=self.home / "run" / "shmelim")


def runner(name, home):
    def run(*arguments, stdin=None):
        env = {**environment(home), "SHMELIM_NAME": name, "COLUMNS": "200"}
        return CliRunner().invoke(cli, arguments, prog_name="shmelim", input=stdin, env=env)

    return run


@contextlib.contextmanager
def serving(name, home, *arguments):
    server = Server(name, home, *arguments)
    try:
        yield server
    finally:
        server.end(signal.SIGKILL)
        SharedNamespace(name).remove()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    departed = Path(sys.modules["shmelim"].__file__).parent / "data" / "default_departed_hotkeys.json"
    with serving(
        f"cli-{secrets.token_hex(4)}", tmp_path_factory.mktemp("c"), "--default-departed", str(departed)
    ) as server:
        yield server


@pytest.fixture
def run(served):
    client = served.client()
    client.clear_eliminations()
    client.update_metagraph([B])
    client.close()
    return runner(served.name, served.home)


def document(result, code=0):
    assert result.exit_code == code, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def row(hotkey, **more):
    return {"hotkey": hotkey, "reason": "ZOMBIE", "elimination_initiated_time_ms": T, **more}


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


# ------------------------------------------------------------------ changing


def test_add_and_replace(run, served):
    first = run("add", A, "--reason", "ZOMBIE")
    assert (first.exit_code, first.stdout, first.stderr) == (0, f"added: {A}\n", "")
    assert run("add", A, "--reason", "ZOMBIE").stdout == f"replaced: {A}\n"
    found = document(run("add", A, "--reason", "ZOMBIE", "--dd", "0.5", "--time-ms", str(T), "--json"))
    assert not found["added"]
    assert found["elimination"] == EliminationReader(served.name).get_elimination(A)


def test_an_unusual_reason_is_stored_and_remarked_upon(run):
    result = run("add", A, "--reason", "ZOMBY")
    assert result.exit_code == 0
    assert "ZOMBIE" in result.stderr
    assert document(run("get", A, "--json"))["eliminations"][0]["reason"] == "ZOMBY"


def test_remove(run):
    run("add", A, "--reason", "ZOMBIE")
    assert run("remove", A).stdout == f"removed: {A}\n"
    again = run("remove", A)
    assert (again.exit_code, again.stdout) == (1, f"not eliminated: {A}\n")
    found = document(run("remove", A, "--json"), code=1)
    assert found == {"name": found["name"], "hotkey": A, "removed": False}


def write(path, rows):
    path.write_text(json.dumps({"eliminations": rows}))
    return str(path)


def test_sync(run, tmp_path):
    run("add", A, "--reason", "ZOMBIE")
    file = write(tmp_path / "eliminations.json", [row(B), row("c")])
    assert run("sync", file).stdout == "1 removed, 2 eliminated now\n"
    found = document(run("sync", write(tmp_path / "two.json", [row("c")]), "--json"))
    assert {key: found[key] for key in ("records", "removed", "eliminated")} == {
        "records": 1,
        "removed": [B],
        "eliminated": 1,
    }


def test_sync_of_a_list_larger_than_a_message_part(run, tmp_path):
    file = write(tmp_path / "eliminations.json", [row(f"hotkey-{number}") for number in range(4500)])
    assert run("sync", file).stdout == "0 removed, 4500 eliminated now\n"


def test_sync_refuses_a_file_with_a_bad_row_whole(run, tmp_path):
    run("add", A, "--reason", "ZOMBIE")
    bad = {"hotkey": "c", "reason": 5, "elimination_initiated_time_ms": T}
    result = run("sync", write(tmp_path / "eliminations.json", [row(B), bad, row("d", dd="much")]))
    assert result.exit_code == 1
    assert "row 1:" in result.stderr
    assert "'reason'" in result.stderr
    assert "row 2:" in result.stderr
    assert "hint: nothing was changed" in result.stderr
    assert run("list").stdout.startswith(A)
    assert run("list").stdout.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "does not exist"),
        (b"", "0 bytes"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"other": []}', "holds neither"),
        (b"7", "holds neither"),
        ("directory", "is a directory"),
    ],
)
def test_sync_of_what_is_not_such_a_file(run, tmp_path, content, problem):
    run("add", A, "--reason", "ZOMBIE")
    path = tmp_path / "eliminations.json"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    result = run("sync", str(path))
    assert result.exit_code == 4
    assert problem in result.stderr
    assert str(path) in result.stderr
    assert result.stderr.count("\n") <= 2
    assert run("check", A).exit_code == 1
    assert set(json.loads(run("sync", str(path), "--json").stderr)) == {"error", "hint"}


def test_export_and_sync_are_each_others_reverse(run, tmp_path):
    run("add", B, "--reason", "PLAGIARISM", "--dd", "0.3")
    run("add", A, "--reason", "ZOMBIE")
    before = document(run("list", "--json"))["eliminations"]
    file = tmp_path / "export.json"
    assert run("export", str(file)).stdout == f"2 eliminations written to {file}\n"
    assert json.loads(file.read_text()) == {"eliminations": before}
    run("remove", A)
    run("remove", B)
    run("sync", str(file))
    assert document(run("list", "--json"))["eliminations"] == before
    found = document(run("export", str(file), "--json"))
    assert (found["count"], found["file"]) == (2, str(file))


def test_export_keeps_the_mode_of_what_it_replaces(run, tmp_path):
    file = tmp_path / "export.json"
    file.write_text("old")
    file.chmod(0o644)
    run("export", str(file))
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_nan_and_infinities_are_null_in_json(run, served):
    with served.client() as client:
        client.add_elimination(A, row(A, dd=math.nan, further=[math.inf]))
    for arguments in (("get", A, "--json"), ("list", "--json"), ("history", A, "--json")):
        found = run(*arguments)
        assert found.exit_code == 0
        json.loads(found.stdout, parse_constant=pytest.fail)


def test_export_to_stdout(run):
    run("add", A, "--reason", "ZOMBIE", "--time-ms", str(T))
    assert [record["hotkey"] for record in json.loads(run("export", "-").stdout)["eliminations"]] == [A]
    assert len(json.loads(run("export", "-", "--departed").stdout)["departed_hotkeys"]) == 367


def test_no_device_is_read_for_ever(run):
    found = run("sync", "/dev/zero")
    assert found.exit_code == 4
    assert "/dev/zero is a device" in found.stderr


def test_export_leaves_alone_what_is_not_a_regular_file(run, tmp_path):
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target"
    os.mkfifo(pipe)
    found = run("export", str(pipe))
    assert found.exit_code == 4
    assert "not a regular file" in found.stderr
    assert pipe.is_fifo()
    link.symlink_to(target)
    run("export", str(link))
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"eliminations": []}


@pytest.mark.parametrize("name", ["shmelim.sqlite", "shmelim.sqlite-wal", "lock", "slashes.jsonl", "backup.json"])
def test_export_writes_over_nothing_of_a_store(run, tmp_path, name):
    for one in {"shmelim.sqlite", name}:
        (tmp_path / one).write_text("precious")
    found = run("export", str(tmp_path / name))
    assert found.exit_code == 4
    assert "belongs to the store" in found.stderr
    assert (tmp_path / name).read_text() == "precious"
    assert run("export", str(tmp_path / "of-a-persons-own.txt")).exit_code == 0


def test_metrics_are_written_again_beside_a_store(run, tmp_path):
    (tmp_path / "shmelim.sqlite").write_text("precious")
    for _ in range(2):
        assert run("metrics", "--to", str(tmp_path / "shmelim.prom")).exit_code == 0


@pytest.mark.parametrize("wrong", [("--reason", " "), ("--reason", "ZOMBIE", "--dd", "nan")])
def test_add_refuses_what_says_nothing(run, wrong):
    found = run("add", A, *wrong)
    assert found.exit_code == 2
    assert run("check", A).exit_code == 0


@pytest.mark.parametrize(
    "wrong",
    [
        ("readers", "--interval", "nan"),
        ("top", "--interval", "nan"),
        ("demo", "--seconds", "nan"),
        ("publish", "--to", "redis://127.0.0.1", "--beat", "nan"),
        ("add", A, "--reason", "ZOMBIE", "--dd", "inf"),
        ("history", "--limit", "9" * 30),
        ("watch", "--count", "9" * 30),
    ],
)
def test_a_number_that_is_none_is_wrong_use(run, wrong):
    found = run(*wrong)
    assert found.exit_code == 2
    assert f"Invalid value for '{wrong[-2]}'" in found.stderr


@pytest.mark.parametrize("where", [".", "missing/export.json"])
def test_export_to_where_no_file_can_be(run, tmp_path, where):
    result = run("export", str(tmp_path / where))
    assert result.exit_code == 4
    assert "directory" in result.stderr
    assert list(tmp_path.iterdir()) == []


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


# ------------------------------------------------------------------ as programs of their own


def start(served, *arguments, **more):
    return subprocess.Popen(
        [sys.executable, "-m", "shmelim", *arguments],
        env={**os.environ, **environment(served.home), "SHMELIM_NAME": served.name},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **more},
    )


def test_a_reader_who_goes_away_ends_it_quietly(run, served, tmp_path):
    file = write(tmp_path / "eliminations.json", [row(f"{number:0200}") for number in range(2000)])
    run("sync", file)
    process = start(served, "list")
    assert process.stdout.readline().startswith("0" * 199)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(PATIENCE) == 141


def test_what_an_encoding_lacks_is_escaped(run, served):
    run("add", "größer日", "--reason", "ZOMBIE", "--time-ms", str(T))
    process = subprocess.run(
        [sys.executable, "-m", "shmelim", "list"],
        env={
            **os.environ,
            **environment(served.home),
            "SHMELIM_NAME": served.name,
            "PYTHONIOENCODING": "latin-1",
        },
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(b"gr\xf6\xdfer\\u65e5\t")


def test_a_guarded_change_needs_force_and_is_acknowledged(tmp_path):
    name, many = f"guard-{os.getpid()}", [row(f"h{n}") for n in range(20)]
    with serving(name, tmp_path, "--sync-guard", "refuse"):
        run = runner(name, tmp_path)
        full, empty = tmp_path / "full", tmp_path / "empty"
        full.write_text(json.dumps({"eliminations": many}))
        empty.write_text('{"eliminations": []}')
        assert run("sync", str(full)).exit_code == 0
        refused = run("sync", str(empty))
        assert (refused.exit_code, "20 of 20" in refused.stderr, "--force" in refused.stderr) == (1, True, True)
        assert run("ack").exit_code == 1
        assert run("sync", str(empty), "--force").exit_code == 0
        health = run("health")
        assert (health.exit_code, "20 of 20" in health.stdout) == (0, True)
        assert document(run("ack", "--json"))["acknowledged"] == ["sync: take back 20 of 20 eliminations"]
        assert "20 of 20" not in run("health").stdout


def test_a_departure_that_was_none_is_undone(run, served):
    with contextlib.closing(served.client()) as client:
        client.update_metagraph([A, B])
        client.update_metagraph([B])
        assert client.get_departed_hotkey_info(A)
        assert run("returned", A).exit_code == 2, "nobody to ask"
        assert client.get_departed_hotkey_info(A)
        done = run("returned", A, "--yes")
        assert (done.exit_code, done.stdout) == (0, "no longer departed: 1 hotkeys\n")
        assert A in done.stderr
        assert client.get_departed_hotkey_info(A) is None
        assert run("returned", A, "--yes").exit_code == 1


@pytest.mark.parametrize("odd", [A[:-1], f"{A} ", f"{A[:-1]}t", "hotkey123"])
def test_check_says_what_is_no_address(run, odd):
    assert run("check", A).stderr == ""
    said = run("check", A, odd)
    assert (said.exit_code, said.stderr) == (0, f"note: {odd!r} is not a valid SS58 address\n")


MISTYPED = "{0!r} is not a valid SS58 address"


@pytest.mark.parametrize("odd", [A[:-1], f"{A} "], ids=["short", "blank"])
def test_every_command_that_finds_nothing_of_a_mistyped_hotkey_says_so(run, odd):
    for words in (("get",), ("remove",), ("history",), ("debts",), ("returned",), ("slash", "list")):
        assert MISTYPED.format(odd) in run(*words, odd).stderr, words
        assert "not a valid" not in run(*words, A).stderr, words
    for words in (("slash", "re-arm"), ("slash", "resolve", "--made"), ("add", "--reason", "ZOMBIE")):
        said = run(*words, odd)
        assert said.stderr.startswith(f"note: {MISTYPED.format(odd)}\n"), words
    assert said.exit_code == 0


@pytest.mark.parametrize("odd", ["-1", str(1 << 64)])
@pytest.mark.parametrize("words", [("watch", "--since"), ("slash", "resolve", A, "--made", "--registration")])
def test_a_number_that_no_version_and_no_registration_has_is_wrong_usage(run, words, odd):
    said = run(*words, odd)
    assert (said.exit_code, f"{odd} is" in said.stderr) == (2, True)


@pytest.mark.parametrize("odd", ["yesterday", " ", "-5", "2026-13-01", "1e400"])
@pytest.mark.parametrize(
    "words",
    [("list", "--as-of={}"), ("diff", "--", "{}"), ("rollback", "--to={}"), ("history", "--prune-before={}")],
    ids=lambda words: words[0],
)
def test_what_is_no_moment_is_wrong_usage(run, words, odd):
    said = run(*(word.format(odd) for word in words))
    assert (said.exit_code, "is not a moment" in said.stderr, "--help" in said.stderr) == (2, True, True)


def test_what_is_to_come_is_not_answered(run):
    for words in (
        ("list", "--as-of", "2999-01-01"),
        ("get", A, "--as-of", "32472144000000"),
        ("diff", "2999-01-01"),
        ("rollback", "--to", "2999-01-01", "--yes"),
        ("history", "--prune-before", "2999-01-01", "--yes"),
    ):
        said = run(*words)
        assert (said.exit_code, "is in the future: it is 20" in said.stderr) == (2, True), words


@pytest.mark.parametrize(
    "words",
    [
        ("slash", "resolve", A, "--made", "--not-made", "--yes"),
        ("slash", "resolve", A, "--yes"),
        ("verify", "backup", "--state-dir", "state"),
        ("missing", "--yes"),
        ("list", "--departed", "--as-of", "1"),
        ("serve", "--adopt-published", "--replace-published"),
        ("history", "--yes"),
    ],
    ids=" ".join,
)
def test_options_that_exclude_each_other_are_wrong_usage(run, words):
    said = run(*words)
    assert (said.exit_code, said.stdout) == (2, "")


@pytest.mark.parametrize(
    "words",
    [("verify",), ("history",), ("backup", "new"), ("publish", "--to", "redis://127.0.0.1:1/0")],
    ids=lambda words: words[0],
)
def test_a_state_directory_that_is_not_there_is_named(run, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run(*words, "--state-dir", "no/such")
    assert said.exit_code == (1 if words == ("verify",) else 4)
    assert "no store" in said.stdout + said.stderr
    assert "no/such" in said.stdout + said.stderr
    assert list(tmp_path.iterdir()) == []


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


def test_an_export_is_json_whatever_the_locale(served, run):
    with contextlib.closing(served.client()) as client:
        client.append_elimination_row("ключ", 0.1, "é")
    environ = {
        **os.environ,
        **environment(served.home),
        "LC_ALL": "C",
        "PYTHONIOENCODING": "ascii",
        "PYTHONUTF8": "0",
    }
    command = [sys.executable, "-m", "shmelim", "export", "-", "--name", served.name]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True, timeout=PATIENCE)
    (found,) = json.loads(done.stdout)["eliminations"]
    assert (found["hotkey"], found["reason"]) == ("ключ", "é")


def test_going_back_in_time(run, served):
    with contextlib.closing(served.client()) as client:
        client.add_elimination(A, row(A, reason="PLAGIARISM"))
        event = client.get_history(limit=1)[0]["id"]
        client.add_elimination(A, row(A, reason="ZOMBIE"))
        client.add_elimination(B, row(B))
        assert client.as_of(event)[A]["reason"] == "PLAGIARISM"
        then = "--as-of", str(event), "--json"
        for asked in (("get", A), ("list",)):
            assert document(run(*asked, *then))["eliminations"] == [row(A, reason="PLAGIARISM")]
        found = document(run("diff", str(event), "--json"), 1)
        assert [each["hotkey"] for each in found["added"]] == [B]
        assert found["changed"] == [{"hotkey": A, "fields": {"reason": ["PLAGIARISM", "ZOMBIE"]}}]
        assert run("diff", str(event), str(event)).exit_code == 0
        assert document(run("rollback", "--to", str(event), "--dry-run", "--json"))["done"] is False
        assert run("rollback", "--to", str(event)).exit_code == 2, "nobody to ask"
        assert len(client) == 2
        assert run("rollback", "--to", str(event), "--yes").stdout == "rolled back: 2 eliminations\n"
        assert client.get_eliminations_dict() == client.as_of(event)
        assert run("rollback", "--to", str(event), "--yes").exit_code == 1
        assert "the history begins" in run("list", "--as-of", "1999-01-01").stderr
        assert "is not a moment" in run("list", "--as-of", "yesterday").stderr
        prune = "history", "--prune-before", str(event)
        assert run(*prune, "--dry-run").stdout == f"would forget {event} events\n"
        assert run(*prune).exit_code == 2, "nobody to ask"
        assert run(*prune, A).exit_code == run("history", "--yes").exit_code == 2
        assert client.as_of(event - 1) is not None
        assert document(run(*prune, "--yes", "--json")) == {"name": client.name, "events": event, "pruned": event}
        assert run(*prune, "--yes").exit_code == 1
        assert client.as_of(event)[A]["reason"] == "PLAGIARISM"
        assert f"up to event {event} was pruned" in run("diff", str(event - 1)).stderr


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


def test_a_path_that_leads_in_a_circle_is_an_error_with_a_hint(run, tmp_path):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for command in (
        ["export", str(loop)],
        ["sync", str(loop)],
        ["serve", "--state-dir", str(loop), "--name", "other"],
    ):
        result = run(*command)
        assert result.exit_code == 4, result.stderr
        assert "unexpected" not in result.stderr
