"""Where a name's things are, and who may see them."""

import logging
import os
import shutil
import time
from pathlib import Path

import pytest
from crashing import call

from shmelim.channel import load_key
from shmelim.eliminations.runtime import (
    Announcement,
    RuntimeDirectory,
    ServerInfo,
    default_state_directory,
    lock_state,
)
from shmelim.errors import AddressError, AlreadyServingError, KeyFileError, NotServingError, StoreError
from shmelim.system.logs import LimitedLog


class TestRuntimeDirectory:
    def test_is_private(self, tmp_path):
        runtime = RuntimeDirectory("name", tmp_path / "base").create()
        assert runtime.path.stat().st_mode & 0o777 == 0o700
        assert runtime.key.parent == runtime.socket.parent == runtime.path

    def test_is_made_private_where_it_was_not(self, tmp_path):
        (tmp_path / "name").mkdir(mode=0o755)
        assert RuntimeDirectory("name", tmp_path).create().path.stat().st_mode & 0o777 == 0o700

    @pytest.mark.parametrize("name", ["..", "a/b", "", "UP"])
    def test_of_an_illegal_name(self, tmp_path, name):
        with pytest.raises(ValueError, match="name"):
            RuntimeDirectory(name, tmp_path)

    def test_that_is_a_link_is_refused(self, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "name").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(StoreError) as caught:
            RuntimeDirectory("name", tmp_path).create()
        assert caught.value.hint

    def test_that_is_a_file_is_refused(self, tmp_path):
        (tmp_path / "name").write_text("")
        with pytest.raises(StoreError):
            RuntimeDirectory("name", tmp_path).create()

    def test_of_another_user_is_refused(self, tmp_path):
        if os.geteuid() != 0:
            pytest.skip("needs root, to give it away")
        (tmp_path / "name").mkdir()
        os.chown(tmp_path / "name", 65534, 65534)
        with pytest.raises(StoreError, match="65534"):
            RuntimeDirectory("name", tmp_path).create()

    def test_by_default_is_the_users(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert tmp_path in RuntimeDirectory("name").path.parents
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        assert default_state_directory("name").name == "name"
        assert tmp_path / "state" in default_state_directory("name").parents


class TestAnnouncement:
    @pytest.mark.parametrize("address", ["/a/socket", ("127.0.0.1", 50004)])
    def test_is_read_as_it_was_written(self, tmp_path, address):
        runtime = RuntimeDirectory("name", tmp_path).create()
        info = ServerInfo(address, "/state", 5)
        runtime.announce(info)
        assert runtime.server() == info
        assert (runtime.path / "server.json").stat().st_mode & 0o777 == 0o600
        runtime.announce(ServerInfo(address, None, 6))
        assert runtime.server().pid == 6
        assert [path.name for path in runtime.path.iterdir()] == ["server.json"]

    @pytest.mark.parametrize(
        "content",
        [b"", b"{", b"[]", b'{"address": 5, "state_dir": null, "pid": 1}', b"\xff", b'{"state_dir": "\xff"}'],
    )
    def test_that_is_damaged_counts_as_none(self, tmp_path, content):
        runtime = RuntimeDirectory("name", tmp_path).create()
        (runtime.path / "server.json").write_bytes(content)
        with pytest.raises(NotServingError, match="'name'"):
            runtime.server()

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
    def test_something_else_in_its_place_counts_as_none_and_is_not_waited_for(self, tmp_path, make):
        runtime = RuntimeDirectory("name", tmp_path).create()
        make(runtime.path / "server.json")
        with pytest.raises(NotServingError, match="'name'"):
            runtime.server()

    def test_a_directory_in_its_place_is_found_before_anything_is_served(self, tmp_path):
        (tmp_path / "name" / "server.json").mkdir(parents=True)
        with pytest.raises(StoreError, match="move it away"):
            RuntimeDirectory("name", tmp_path).create()

    def test_that_is_missing_names_the_command(self, tmp_path):
        with pytest.raises(NotServingError) as caught:
            RuntimeDirectory("name", tmp_path).server()
        assert "shmelim serve --name name" in str(caught.value)

    @pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
    def test_that_may_not_be_read_is_the_askers_problem(self, tmp_path):
        runtime = RuntimeDirectory("name", tmp_path).create()
        runtime.announce(ServerInfo("/a/socket", None, 5))
        for directory in tmp_path.parents:
            if str(directory).startswith("/tmp/pytest"):
                directory.chmod(0o755)
        tmp_path.chmod(0o755)

        def as_nobody():
            os.setuid(65534)
            with pytest.raises(KeyFileError) as caught:
                runtime.server()
            return str(caught.value)

        text = call(as_nobody)
        assert "this process runs as user 65534" in text
        assert f"{runtime.path} belongs to user 0 and has mode 0700" in text


KEY = b"k" * 32


class TestKeeping:
    @pytest.fixture
    def runtime(self, tmp_path):
        return RuntimeDirectory("name", tmp_path / "base").create()

    @pytest.fixture
    def kept(self, runtime):
        announcement = Announcement(runtime, ServerInfo("/a/socket", None, os.getpid()), KEY)
        announcement.start()
        announcement.restore()
        yield runtime
        announcement.stop()

    def until_whole(self, runtime):
        deadline = time.monotonic() + 30
        while True:
            try:
                assert runtime.server() == ServerInfo("/a/socket", None, os.getpid())
                assert load_key(runtime.key) == KEY
                assert runtime.path.stat().st_mode & 0o777 == 0o700
            except (NotServingError, AssertionError):
                assert time.monotonic() < deadline, "it was not put back"
                time.sleep(0.01)
            else:
                return

    @pytest.mark.parametrize("lost", ["base", "base/name", "base/name/key", "base/name/server.json"])
    def test_what_was_removed_is_put_back(self, kept, tmp_path, lost):
        path = tmp_path / lost
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        self.until_whole(kept)

    @pytest.mark.parametrize("content", [b"", b"{}", b'{"address": "/b", "state_dir": null, "pid": 999999999}'])
    def test_what_was_replaced_is_put_back(self, kept, content):
        (kept.path / "server.json").write_bytes(content)
        self.until_whole(kept)

    def test_a_directory_that_was_opened_is_closed(self, kept):
        kept.path.chmod(0o777)
        self.until_whole(kept)

    def test_another_living_server_speaks_for_itself(self, runtime):
        ours, theirs = (ServerInfo("/a/socket", None, pid) for pid in (os.getpid(), os.getppid()))
        announcement = Announcement(runtime, ours, KEY)
        announcement.restore()
        runtime.announce(theirs)
        assert announcement.restore() is False
        assert runtime.server() == theirs

    def test_what_cannot_be_put_back_is_logged_until_it_can(self, kept, tmp_path, caplog):
        shutil.rmtree(tmp_path / "base")
        (tmp_path / "base").touch()
        deadline = time.monotonic() + 30
        while "cannot find the server" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        (tmp_path / "base").unlink()
        self.until_whole(kept)


def test_a_directory_too_long_for_a_socket_is_refused_before_it_is_made(tmp_path):
    runtime = RuntimeDirectory("name", tmp_path / ("x" * 100))
    with pytest.raises(AddressError, match="XDG_RUNTIME_DIR"):
        runtime.address()
    assert runtime.address(50004) == ("127.0.0.1", 50004)
    assert list(tmp_path.iterdir()) == []


class TestStateLock:
    def test_excludes_another(self, tmp_path):
        first = lock_state(tmp_path / "a" / "b")
        with pytest.raises(AlreadyServingError) as caught:
            lock_state(tmp_path / "a" / "b")
        assert str(tmp_path) in str(caught.value)
        assert f"process {os.getpid()}" in str(caught.value)
        assert caught.value.hint
        first.release()
        first.release()
        lock_state(tmp_path / "a" / "b").release()

    def test_a_refused_one_keeps_nothing_open(self, tmp_path):
        first = lock_state(tmp_path)
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            with pytest.raises(AlreadyServingError):
                lock_state(tmp_path)
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        first.release()

    def test_a_child_lets_go_of_its_copy_and_not_of_the_lock(self, tmp_path):
        lock = lock_state(tmp_path)

        def child():
            with pytest.raises(AlreadyServingError):
                lock_state(tmp_path)
            return True

        assert call(child)
        with pytest.raises(AlreadyServingError):
            lock_state(tmp_path)
        lock.release()

    def test_a_link_in_its_place_is_not_followed(self, tmp_path):
        (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(StoreError):
            lock_state(tmp_path)
        assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_default_place_below_somebody_elses_directory_is_refused(tmp_path, monkeypatch):
    above = tmp_path / "runtime"
    monkeypatch.setattr("tempfile.tempdir", str(above))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    above.mkdir(mode=0o700)
    RuntimeDirectory("ours").create()
    os.chown(above / "runtime-0", 12345, -1)
    with pytest.raises(StoreError, match="belongs to uid 12345"):
        RuntimeDirectory("theirs").create()


def test_a_directory_of_somebody_elses_is_not_used_for_ours(tmp_path, monkeypatch, caplog):
    """As with `sudo -E`; and whichever version of a library is installed."""
    monkeypatch.setattr("shmelim.eliminations.runtime._once", LimitedLog(logging.getLogger("shmelim.runtime")))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    mine = tmp_path.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    path = RuntimeDirectory("x").path
    assert (path.parent.parent.name, tmp_path in path.parents) == (f"runtime-{mine + 1}", False)
    assert f"belongs to uid {mine}" in caplog.text


def test_a_place_that_is_said_goes_before_all_others(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("SHMELIM_RUNTIME_DIR", str(tmp_path / "said"))
    assert RuntimeDirectory("x").path == tmp_path / "said" / "x"
    assert RuntimeDirectory("x", tmp_path).path == tmp_path / "x", "but for an argument"


@pytest.mark.parametrize(("mode", "level"), [(0o755, "WARNING"), (None, "INFO")])
def test_a_variable_that_cannot_be_used_is_worth_a_warning(tmp_path, monkeypatch, caplog, mode, level):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if mode is not None:
        (tmp_path / "run").mkdir(mode)
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr("shmelim.eliminations.runtime._once", LimitedLog(logging.getLogger("shmelim.runtime")))
    caplog.set_level(logging.INFO, "shmelim.runtime")
    if mode is None:
        monkeypatch.setattr(os, "geteuid", lambda: 4242)  # who has no directory in /run/user
    RuntimeDirectory("x")
    assert [(record.levelname, "XDG_RUNTIME_DIR" in record.message) for record in caplog.records] == [
        (level, True)
    ]
