"""``shmelim health``: what a monitor is told of a server that is well, is not, hangs, or is gone."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from invoking import CliRunner
from serving import row
from waiting import PATIENCE, until

from shmelim.cli import health
from shmelim.cli.main import cli
from shmelim.eliminations.reader import EliminationReader
from shmelim.shm import SharedNamespace
from shmelim.shm.layout import WRITER_CLOCK, WRITER_PID
from shmelim.watch.seeing import see

PROBLEM = {"subject": "a", "text": "evil\x1b[2J", "remedy": "look", "since_ms": 1_700_000_000_000}


@pytest.fixture
def server(short_path, serve):
    return serve(runtime_base=short_path / "shmelim", durability="process")


@pytest.fixture
def run(server):
    def run(*arguments):
        env = {"XDG_RUNTIME_DIR": str(server.runtime.parent), "SHMELIM_NAME": server.name}
        return CliRunner().invoke(cli, arguments, env=env)

    return run


def report(server, severity):
    client = server.client()
    problems = [PROBLEM | {"name": "positions", "severity": severity}]
    client._call("report_processing_rpc", (1_700_000_000_000, 300_000, problems))
    client.close()


def both(run):
    """What health and status say, of which the exit codes are one."""
    result = run("health", "--json")
    assert run("status").exit_code == result.exit_code
    return result.exit_code, json.loads(result.stdout)


def test_a_server_that_is_well(run, server):
    code, found = both(run)
    assert (code, found["status"], found["problems"]) == (0, "ok", [])
    assert found["pid"] == server.pid
    assert run("health").stdout.startswith("status\tok\n")


@pytest.mark.parametrize(
    ("severity", "code", "status"), [("notice", 0, "ok"), ("degraded", 1, "degraded"), ("failing", 2, "failing")]
)
def test_what_is_wrong_is_named_and_escaped(run, server, severity, code, status):
    report(server, severity)
    found = both(run)
    assert (found[0], found[1]["status"]) == (code, status)
    assert found[1]["problems"][0]["part"] == "processing"
    shown = run("health").stdout
    assert "positions" in shown
    assert "evil\\x1b[2J" in shown
    assert "\x1b" not in shown


def test_a_server_that_hangs_is_failing(run, server, monkeypatch):
    monkeypatch.setattr(health, "_ASKING", 0.2)
    os.kill(server.pid, signal.SIGSTOP)
    try:
        result = run("health", "--json")
    finally:
        os.kill(server.pid, signal.SIGCONT)
    # With a machine that is slow enough, the heartbeat may be missed before the question is.
    assert (result.exit_code, json.loads(result.stdout)["status"]) in [(2, "failing"), (3, "not served")]


def test_a_server_that_lives_and_cannot_be_reached_is_failing(run, server, tmp_path, monkeypatch):
    monkeypatch.setenv("SHMELIM_RUNTIME_DIR", str(tmp_path))
    seen = see(server.name)
    (problem,) = seen.problems
    assert (seen.status, problem["name"], problem["severity"]) == ("failing", "no_answer", "failing")
    assert "--runtime-dir" in problem["remedy"]
    assert (run("health").exit_code, run("status").exit_code) == (4, 0), "it is not known here"


def test_a_table_that_cannot_be_read_is_failing(new_name):
    name = new_name()
    path = Path("/dev/shm", f"shmelim.{name}")
    path.touch(0o600)
    path.write_bytes(b"x" * 8192)
    seen = see(name)
    (problem,) = seen.problems
    assert (seen.status, problem["name"], problem["severity"]) == ("failing", "table_unreadable", "failing")
    assert CliRunner().invoke(cli, ["health", "--name", name]).exit_code == 4


def test_a_server_that_is_gone(run, server):
    client = server.client()
    client.add_elimination("a", row("a"))
    client.close()
    server.kill()
    until(lambda: run("health").exit_code == 3)
    code, found = both(run)
    assert (code, found["status"]) == (3, "not served")
    (problem,) = found["problems"]
    assert (problem["name"], problem["remedy"]) == ("not_served", "start the server again")


def test_a_server_in_another_time_namespace_is_asked_whether_it_lives(run, server, monkeypatch):
    SharedNamespace(server.name).open_root(writable=True).words[WRITER_CLOCK] += 1
    code, found = both(run)
    assert (code, found["status"], found["heartbeat_age_s"]) == (0, "ok", None)
    assert (run("status").exit_code, run("check", "a").exit_code) == (0, 0)
    assert "nobody knows whether it lives" in run("check", "a").stderr
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(server.runtime.parent))
    assert see(server.name).is_served
    server.kill()
    code, found = both(run)
    assert (code, found["status"], found["problems"][0]["name"]) == (3, "not served", "not_served")
    assert run("status").exit_code == 3
    assert not see(server.name).is_served


def test_a_server_that_is_stopped_is_not_to_be_started_before_it_is_ended(run, server):
    os.kill(server.pid, signal.SIGSTOP)
    until(lambda: run("health").exit_code == 3)
    code, found = both(run)
    (problem,) = found["problems"]
    assert (code, found["status"], problem["name"]) == (3, "not served", "not_served")
    assert "hangs, or is stopped" in problem["text"]
    assert f"kill -KILL {server.pid}" in problem["remedy"]
    server.kill()
    until(lambda: f"kill -KILL {server.pid}" not in run("health").stdout)


def test_nobody_is_told_to_end_a_process_that_only_has_the_pid_of_a_server_elsewhere(run, server):
    server.kill()
    until(lambda: run("health").exit_code == 3)
    root = SharedNamespace(server.name).open_root(writable=True)
    root.words[WRITER_PID] = os.getpid()  # as a server in a container had it, whose pids are others
    (problem,) = both(run)[1]["problems"]
    assert (problem["name"], problem["remedy"]) == ("not_served", "start the server again")
    assert not EliminationReader(server.name).writer.hangs


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_who_watches_hears_once_that_the_server_is_waited_for(server, words):
    server.kill()
    command = [sys.executable, "-m", "shmelim", "watch", "--name", server.name, "--count", "1", *words]
    env = os.environ | {"XDG_RUNTIME_DIR": str(server.runtime.parent)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        said = watching.stderr.readline()
        assert "nobody serves at" in said
        assert "waiting for the server" in (json.loads(said)["warning"] if words else said)
        with server.start().client() as client:
            client.add_elimination("a", row("a"))
        assert "add" in watching.stdout.readline()
        assert (watching.wait(PATIENCE), watching.stderr.read()) == (0, "")


def test_a_name_that_was_never_served(new_name):
    result = CliRunner().invoke(cli, ["health", "--name", new_name()])
    assert result.exit_code == 3
    assert "shmelim serve --name" in result.stderr
