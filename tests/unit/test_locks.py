"""A lease keeps others out however its holder dies, and whoever takes its file for a stale one."""

import errno
import fcntl
import os
import time

import freezegun
import pytest
from serving import row
from waiting import until

from shmelim import EliminationManagerServer
from shmelim.eliminations.holding import BEAT_INTERVAL
from shmelim.errors import AlreadyServingError, StoreError
from shmelim.shm import SharedNamespace
from shmelim.system.locks import Lease


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock"


def test_a_removed_file_lets_nobody_in(path):
    lease = Lease(path)
    lease.acquire()
    lease.secure()
    path.unlink()
    with pytest.raises(BlockingIOError):
        Lease(path).acquire()
    lease.release()
    Lease(path).acquire()


def test_a_directory_that_is_locked_is_not_waited_for_longer_where_the_time_stands_still(path):
    directory = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(directory, fcntl.LOCK_EX)
    with freezegun.freeze_time("2030-01-01"), pytest.raises(BlockingIOError):
        Lease(path).acquire()
    os.close(directory)


def test_a_removed_file_is_put_back_and_names_its_holder(path):
    lease = Lease(path)
    lease.acquire()
    assert lease.keep()
    path.unlink()
    assert lease.keep()
    assert lease.holder() == os.getpid()
    with pytest.raises(BlockingIOError):
        Lease(path).acquire()
    lease.release()


def test_a_pipe_in_its_place_is_not_waited_for(path):
    os.mkfifo(path)
    lease = Lease(path)
    lease.acquire()
    with pytest.raises(BlockingIOError):
        Lease(path).acquire()
    assert Lease(path).holder() is None
    lease.release()


def test_a_file_that_somebody_else_has_locked_is_noticed(path):
    lease = Lease(path)
    lease.acquire()
    path.unlink()
    with path.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert not lease.keep()
    assert lease.keep()
    lease.release()


def test_a_file_that_goes_between_open_and_lock_is_not_taken_for_the_lock(path, monkeypatch):
    flock = fcntl.flock
    removed = []

    def remove_first(descriptor, operation):
        if not removed:
            removed.append(path.unlink())
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    lease = Lease(path)
    lease.acquire()
    assert path.exists()
    assert lease.holder() == os.getpid()
    lease.release()


def test_a_second_server_stays_out_and_the_first_one_puts_the_lock_back(tmp_path):
    with EliminationManagerServer(None, tmp_path) as server:
        (tmp_path / "lock").unlink()
        with pytest.raises(AlreadyServingError, match="in use by another server"):
            EliminationManagerServer(None, tmp_path)
        (tmp_path / "lock").unlink(missing_ok=True)
        until((tmp_path / "lock").exists)
        assert server.add_elimination_rpc(
            "a", {"hotkey": "a", "reason": "ZOMBIE", "elimination_initiated_time_ms": 5}
        )


def test_a_lock_that_another_process_has_is_a_named_problem_until_it_is_given_back(tmp_path):
    with EliminationManagerServer(None, tmp_path) as server:
        new = tmp_path / "new"
        with new.open("w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            new.replace(tmp_path / "lock")
            until(
                lambda: [one["name"] for one in server.health_check_rpc()["problems"]] == ["state_dir_contested"]
            )
        until(lambda: server.health_check_rpc()["problems"] == [])


@pytest.mark.parametrize("instead", ["nothing", "a file", "a circle"])
def test_a_state_directory_that_is_gone_is_no_end_of_the_heartbeat(table_name, tmp_path, instead):
    directory = tmp_path / "state"
    namespace = SharedNamespace(table_name)
    with EliminationManagerServer(namespace, directory, durability="process", files="off") as server:
        directory.rename(tmp_path / "moved")
        if instead == "a file":
            directory.touch()
        elif instead == "a circle":
            directory.symlink_to(directory)
        gone = time.monotonic()
        until(lambda: time.monotonic() - server.reader.writer.heartbeat_age > gone + 3 * BEAT_INTERVAL)
        assert [one["name"] for one in server.health_check_rpc()["problems"]] == ["debts_unreadable"]
        if instead != "nothing":
            directory.unlink()
        (tmp_path / "moved").rename(directory)
        server.add_elimination_rpc("a", row("a"))


def test_a_file_system_without_locks_is_not_a_directory_in_use(tmp_path, monkeypatch):
    def refuse(*_args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StoreError, match="No locks available") as caught:
        EliminationManagerServer(None, tmp_path / "state")
    assert "local" in caught.value.hint
