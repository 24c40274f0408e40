"""Where a name's things are, and who may see them."""

import os
from pathlib import Path

import platformdirs
import pytest
from crashing import call

from shmelim.eliminations.runtime import RuntimeDirectory, ServerInfo, StateLock, default_state_directory
from shmelim.errors import AlreadyServingError, NotServingError, StoreError


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
        "content", [b"", b"{", b"[]", b'{"address": 5, "state_dir": null, "pid": 1}', b"\xff"]
    )
    def test_that_is_damaged_counts_as_none(self, tmp_path, content):
        runtime = RuntimeDirectory("name", tmp_path).create()
        (runtime.path / "server.json").write_bytes(content)
        with pytest.raises(NotServingError, match="'name'"):
            runtime.server()

    def test_that_is_missing_names_the_command(self, tmp_path):
        with pytest.raises(NotServingError) as caught:
            RuntimeDirectory("name", tmp_path).server()
        assert "shmelim serve --name name" in str(caught.value)


class TestStateLock:
    def test_excludes_another(self, tmp_path):
        first, second = StateLock(tmp_path / "a" / "b"), StateLock(tmp_path / "a" / "b")
        first.acquire()
        with pytest.raises(AlreadyServingError) as caught:
            second.acquire()
        assert str(tmp_path) in str(caught.value)
        assert caught.value.hint
        first.release()
        first.release()
        second.acquire()
        second.release()

    def test_a_refused_one_keeps_nothing_open(self, tmp_path):
        first = StateLock(tmp_path)
        first.acquire()
        before = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(5):
            with pytest.raises(AlreadyServingError):
                StateLock(tmp_path).acquire()
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        first.release()

    def test_a_child_lets_go_of_its_copy_and_not_of_the_lock(self, tmp_path):
        lock = StateLock(tmp_path)
        lock.acquire()

        def child():
            assert lock._descriptor is None
            with pytest.raises(AlreadyServingError):
                StateLock(tmp_path).acquire()
            return True

        assert call(child)
        with pytest.raises(AlreadyServingError):
            StateLock(tmp_path).acquire()
        lock.release()

    def test_a_link_in_its_place_is_not_followed(self, tmp_path):
        (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(StoreError):
            StateLock(tmp_path).acquire()
        assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_default_place_below_somebody_elses_directory_is_refused(tmp_path, monkeypatch):
    above = tmp_path / "runtime"
    monkeypatch.setattr(platformdirs, "user_runtime_dir", lambda _: str(above / "shmelim"))
    above.mkdir(mode=0o700)
    RuntimeDirectory("ours").create()
    os.chown(above, 12345, -1)
    with pytest.raises(StoreError, match="belongs to uid 12345"):
        RuntimeDirectory("theirs").create()
