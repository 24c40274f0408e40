"""SPEC 9: whose state it is, at a start, after a reboot, after a restore."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from contract_services import kill
from contract_validator import row
from waiting import until

from shmelim import EliminationReader, NotServingError, StateConflictError
from shmelim.errors import ShmelimError


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def name(unused_name):
    return unused_name()


@pytest.fixture
def again(make, name, state):
    """Make managers of one name, one after the other."""
    made = []

    def again(directory=state, **options):
        for earlier in made:
            earlier.shutdown()
        made.append(make("rpc", name=name, state_dir=directory, **options))
        return made[-1]

    return again


def reboot(name):
    """What is in shared memory does not survive it."""
    for segment in Path("/dev/shm").glob(f"shmelim.{name}*"):
        segment.unlink()


def run(*arguments):
    command = [sys.executable, "-m", "shmelim", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("rebooted", [False, True])
def test_another_directory_is_refused_with_both_sides_and_the_ways_out(again, name, tmp_path, state, rebooted):
    manager = again()
    manager.sync_eliminations([row("a"), row("b")])
    manager.shutdown()
    if rebooted:
        reboot(name)
    with pytest.raises(StateConflictError) as caught:
        again(tmp_path / "other")
    text = str(caught.value)
    for said in (str(state), str(tmp_path / "other"), "2 eliminated", "--replace-published"):
        assert said in text
    assert ("--adopt-published" in text) is not rebooted
    assert again().get_eliminated_hotkeys() == {"a", "b"}


def test_an_older_store_is_refused(again, tmp_path, state):
    manager = again()
    manager.add_elimination("a", row("a"))
    manager.shutdown()
    shutil.copytree(state, tmp_path / "older")
    manager = again()
    manager.add_elimination("b", row("b"))
    manager.shutdown()
    shutil.rmtree(state)
    (tmp_path / "older").rename(state)
    with pytest.raises(StateConflictError):
        again()
    assert again(adopt_published=True).get_eliminated_hotkeys() == {"a", "b"}


def test_the_published_table_may_be_the_truth(again, tmp_path):
    again().sync_eliminations([row("a"), row("b")])
    manager = again(tmp_path / "other", adopt_published=True)
    assert manager.get_eliminations_from_memory() == [row("a"), row("b")]


def test_the_directory_may_be_the_truth(again, tmp_path):
    again().sync_eliminations([row("a"), row("b")])
    assert again(tmp_path / "other", replace_published=True).get_eliminations_from_memory() == []


def test_must_exist_refuses_every_new_store(again):
    with pytest.raises(ShmelimError, match="must_exist"):
        again(must_exist=True)
    again().add_elimination("a", row("a"))
    assert again(must_exist=True).is_hotkey_eliminated("a")


def test_without_a_registry_nothing_is_remembered(again, name, tmp_path):
    again(registry=None).add_elimination("a", row("a"))
    again(registry=None).shutdown()
    reboot(name)
    assert again(tmp_path / "other", registry=None).get_eliminations_from_memory() == []


def test_the_registry_is_where_it_is_said_and_private(again, name, tmp_path):
    again(registry=tmp_path / "registry").add_elimination("a", row("a"))
    (file,) = (tmp_path / "registry").iterdir()
    assert name in file.name
    assert file.stat().st_mode & 0o077 == 0


def test_a_restart_moves_no_reader(again, name):
    manager = again()
    manager.sync_eliminations([row("a"), row("b")])
    reader = EliminationReader(name)
    version = reader.version
    manager.shutdown()
    again()
    assert reader.version == version
    assert reader.get_eliminated_hotkeys() == {"a", "b"}


def test_a_server_that_was_killed_is_adopted_too(again, name):
    manager = again(enable_health_check=False)
    manager.sync_eliminations([row("a"), row("b")])
    reader = EliminationReader(name)
    version = reader.version
    killed = reader.writer.pid
    kill(killed)
    until(lambda: reader.writer.pid != killed and reader.writer.state == "serving")
    assert reader.version == version

    def added():
        with contextlib.suppress(NotServingError):
            return manager.add_elimination("c", row("c"))

    until(added)
    assert reader.version == version + 1
    assert reader.get_eliminated_hotkeys() == {"a", "b", "c"}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_another_users_directory_is_refused_before_anything_is_made_in_it(again, state):
    state.mkdir()
    os.chown(state, 12345, 12345)
    with pytest.raises(ShmelimError, match="12345"):
        again()
    assert list(state.iterdir()) == []


def test_a_backup_while_serving_is_verified_and_restored(again, name, tmp_path, state):
    manager = again()
    manager.sync_eliminations([row("a"), row("b")])
    backup = tmp_path / "backup"
    assert run("backup", backup, "--name", name).returncode == 0
    assert run("verify", backup).returncode == 0
    manager.clear_eliminations()
    manager.shutdown()
    restored = run("restore", backup, "--name", name, "--state-dir", state, "--yes", "--json")
    assert restored.returncode == 0
    assert json.loads(restored.stdout)["eliminated"] == 2
    manager = again()
    assert manager.get_eliminated_hotkeys() == {"a", "b"}
    health = manager._server_proxy.health_check_rpc()
    assert "money_held" in {problem["name"] for problem in health["problems"]}
    assert run("slash", "release", "--name", name, "--yes").returncode == 0


def test_a_name_is_forgotten(again, name, tmp_path):
    again().add_elimination("a", row("a"))
    assert run("forget", "--name", name, "--yes").returncode == 1
    again().shutdown()
    assert run("forget", "--name", name, "--yes").returncode == 0
    assert again(tmp_path / "other").get_eliminations_from_memory() == []
