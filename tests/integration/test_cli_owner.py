"""Another user's name on the command line: not by mistake, and all of it where that user is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from invoking import CliRunner
from serving import serve_and_exit

import shmelim
from shmelim.cli.main import cli
from shmelim.eliminations.serve import ServeOptions
from shmelim.shm import SharedNamespace
from shmelim.system.owner import OWNER_VARIABLE, named_owner

NOBODY, STRANGER = 65534, 4711
HOTKEY = "5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs"

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")


@pytest.fixture
def theirs(new_name):
    """A name that somebody else serves."""
    name, home = new_name(), Path(tempfile.mkdtemp(prefix="shmelim-"))
    os.chown(home, NOBODY, NOBODY)
    reading, writing = os.pipe()
    assert shmelim.__version__  # what this loads, somebody else may not be able to read
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        serve_and_exit(ServeOptions(name, home / "state", runtime_base=home, registry=None), writing)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"ready"
    yield name
    os.kill(pid, signal.SIGTERM)
    os.waitpid(pid, 0)
    SharedNamespace(name).remove()
    shutil.rmtree(home)


def run(*arguments: str, **environment: str):
    return CliRunner(env=environment).invoke(cli, arguments)


COMMANDS = [
    ("status",),
    ("health",),
    ("get", HOTKEY),
    ("list",),
    ("history",),
    ("debts",),
    ("slash", "list"),
    ("diff", "1"),
    ("missing",),
    ("add", HOTKEY, "--reason", "ZOMBIE"),
    ("remove", HOTKEY),
    ("metrics",),
    ("export", "-"),
]


def test_every_command_works_for_root_that_names_the_user(theirs):
    assert run("add", HOTKEY, "--reason", "ZOMBIE", "--name", theirs, "--owner", str(NOBODY)).exit_code == 0
    for command in COMMANDS:
        found = run(*command, "--name", theirs, "--owner", str(NOBODY))
        assert found.exit_code in {0, 1}, (command, found.stderr)
    assert named_owner() is None  # it was for the command
    found = run("history", "--json", "--name", theirs, **{OWNER_VARIABLE: str(NOBODY)})
    assert [event["action"] for event in json.loads(found.stdout)["events"]][:2] == ["remove", "update"]


@pytest.mark.parametrize("command", COMMANDS)
def test_and_none_for_who_does_not(theirs, command):
    for owner in ((), ("--owner", str(STRANGER))):
        found = run(*command, "--name", theirs, *owner)
        assert found.exit_code in {3, 4} or command == ("metrics",), found.stdout
        assert "Traceback" not in found.stderr
    if command == ("status",):
        assert "--owner" in run(*command, "--name", theirs).stderr


@pytest.mark.parametrize("text", ["root", "-1", "1.5"])
def test_who_is_named_is_a_uid(text):
    assert run("status", "--name", "any", "--owner", text).exit_code == 2
    found = run("status", "--name", "any", **{OWNER_VARIABLE: text})
    assert found.exit_code == 2
    assert OWNER_VARIABLE in found.stderr


def test_a_command_that_is_refused_leaves_nothing_behind():
    before = dict(os.environ)
    assert run("history", "one", "two", "three", "--owner", "1", "--runtime-dir", "/nowhere").exit_code == 2
    assert dict(os.environ) == before


def test_what_only_its_own_user_can_do_or_see_is_said(theirs, monkeypatch):
    monkeypatch.setenv(OWNER_VARIABLE, str(NOBODY))
    forgotten = CliRunner().invoke(cli, ["forget", "--name", theirs, "--yes"])
    assert forgotten.exit_code == 1
    assert f"sudo -u '#{NOBODY}' shmelim forget --name {theirs}" in forgotten.stderr
    verified = CliRunner().invoke(cli, ["verify", "--name", theirs, "--json"])
    assert "registry" not in [finding["what"] for finding in json.loads(verified.stdout)["findings"]]
    found = json.loads(CliRunner().invoke(cli, ["doctor", "--name", theirs, "--json"]).stdout)["findings"]
    assert [finding for finding in found if "remove it" in finding["remedy"]] == []
