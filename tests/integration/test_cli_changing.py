"""Commands that change, against a real server, and files that they read and write."""

import contextlib
import json
import math
import os
import stat
import subprocess
import sys

import pytest
from commanding import A, B, T, document, environment, row, runner, serving, write
from waiting import PATIENCE

from shmelim import EliminationReader


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


@pytest.mark.parametrize("where", [".", "missing/export.json"])
def test_export_to_where_no_file_can_be(run, tmp_path, where):
    result = run("export", str(tmp_path / where))
    assert result.exit_code == 4
    assert "directory" in result.stderr
    assert list(tmp_path.iterdir()) == []


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
