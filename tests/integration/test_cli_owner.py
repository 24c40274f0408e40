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
from serving import listing, serve_and_exit

import shmelim
from shmelim.cli.main import cli
from shmelim.eliminations.serve import ServeOptions
from shmelim.eliminations.store.store import Store
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


@pytest.mark.parametrize(
    "words", [("backup", "new"), ("restore", "old", "--yes"), ("verify",), ("forget", "--yes")]
)
def test_keeping_is_of_the_state_that_is_meant_and_never_of_ones_own(theirs, words, tmp_path, monkeypatch):
    """A state of the same name of one's own, which none of these may take for theirs, or make."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    with Store.open(tmp_path / "home" / "shmelim" / theirs), Store.open(tmp_path / "own"):
        pass
    assert run("backup", "old", "--state-dir", "own").exit_code == 0
    before = listing(tmp_path)
    for owner in ((), ("--owner", str(STRANGER))):
        found = run(*words, "--name", theirs, *owner)
        refused = {1} if words[0] in {"restore", "forget"} and owner else {3, 4}
        assert found.exit_code in refused, (owner, found.stdout, found.stderr)
        assert "--owner" in found.stderr or "sudo" in found.stderr
        assert str(tmp_path / "home") not in found.stderr
    assert listing(tmp_path) == before
    # A user who serves nothing, of whom nothing tells where his state is: it is not this user's.
    found = run(*words, "--name", "nobody-has-it", "--owner", str(STRANGER))
    assert found.exit_code == (1 if words[0] in {"restore", "forget"} else 3), found.stderr
    assert listing(tmp_path) == before


def test_root_backs_up_and_checks_the_state_of_the_user_that_it_names(theirs, tmp_path):
    assert run("add", HOTKEY, "--reason", "ZOMBIE", "--name", theirs, "--owner", str(NOBODY)).exit_code == 0
    made = run("backup", str(tmp_path / "made"), "--name", theirs, "--owner", str(NOBODY), "--json")
    assert (json.loads(made.stdout)["eliminated"], made.exit_code) == (1, 0)
    assert run("verify", str(tmp_path / "made")).exit_code == 0
    directory = Path(json.loads(made.stdout)["state_dir"])
    # SQLite makes files beside the store, of which the server must be the owner, too.
    assert {path.stat().st_uid for path in directory.iterdir()} == {NOBODY}


def as_nobody(work):
    """Return what comes of a call by somebody who is not root."""
    os.seteuid(NOBODY)
    try:
        return work()
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("words", [("verify",), ("restore", "--yes", "--state-dir")])
def test_a_backup_of_another_user_that_may_not_be_read_is_said_to_be_his(words):
    home = Path(tempfile.mkdtemp(prefix="shmelim-"))
    home.chmod(0o755)
    with Store.open(home / "state"):
        pass
    assert run("backup", str(home / "backup"), "--state-dir", str(home / "state")).exit_code == 0
    state = [str(home / "new")] if "--state-dir" in words else []
    found = as_nobody(lambda: run(*words, *state, str(home / "backup")))
    assert found.exit_code in {1, 4}
    shown = " ".join((found.stdout + found.stderr).split())
    assert f"runs as user {NOBODY}, {home / 'backup'} belongs to user 0" in shown
    shutil.rmtree(home)


@pytest.mark.parametrize("words", [("serve",), ("follow", "--from", "redis://nowhere.invalid")])
def test_nobody_serves_in_the_place_of_another_user(words, new_name, tmp_path):
    name = new_name()
    state = ("--state-dir", str(tmp_path / "state")) if words == ("serve",) else ()
    refused = run(*words, *state, "--name", name, "--owner", str(NOBODY))
    assert refused.exit_code == 1
    assert f"sudo -u '#{NOBODY}' shmelim {words[0]} --name {name}" in refused.stderr
    assert not (tmp_path / "state").exists()
    assert not list(Path("/dev/shm").glob(f"shmelim.{name}*"))


def test_who_is_to_follow_as_another_name_is_told_both(new_name):
    words = ("--from", "redis://nowhere.invalid", "--name", "there", "--as", new_name(), "--owner", str(NOBODY))
    refused = run("follow", *words)
    assert f"shmelim follow --name there --as {words[5]}" in refused.stderr


def test_what_only_its_own_user_can_do_or_see_is_said(theirs, monkeypatch):
    monkeypatch.setenv(OWNER_VARIABLE, str(NOBODY))
    for words in (["forget"], ["restore", "any"]):
        refused = CliRunner().invoke(cli, [*words, "--name", theirs, "--yes"])
        assert refused.exit_code == 1
        assert f"sudo -u '#{NOBODY}' shmelim {words[0]} --name {theirs}" in refused.stderr
    verified = CliRunner().invoke(cli, ["verify", "--name", theirs, "--json"])
    assert "registry" not in [finding["what"] for finding in json.loads(verified.stdout)["findings"]]
    found = json.loads(CliRunner().invoke(cli, ["doctor", "--name", theirs, "--json"]).stdout)["findings"]
    assert [finding for finding in found if "remove it" in finding["remedy"]] == []
