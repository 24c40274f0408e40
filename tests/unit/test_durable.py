"""Files that are written whole or not at all, through links and with their modes, and files that are set aside."""

from __future__ import annotations

import errno
import os
import re
import stat
import tempfile
import threading
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from shmelim.errors import DamagedFileError, StoreError
from shmelim.system import durable

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a [file].json"


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())


class TestWriteWhole:
    def test_new_file_has_the_mode_that_is_asked_for_whatever_the_umask(self, path: Path) -> None:
        before = os.umask(0o077)
        try:
            durable.write_whole(path, [b"one", b"", b"two"], mode=0o644)
        finally:
            os.umask(before)
        assert path.read_bytes() == b"onetwo"
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert names(path.parent) == [path.name]

    @pytest.mark.parametrize("mode", [0o400, 0o640, 0o604])
    def test_file_that_exists_keeps_its_mode(self, path: Path, mode: int) -> None:
        path.write_bytes(b"old")
        path.chmod(mode)
        durable.write_whole(path, [b"new"])
        assert path.read_bytes() == b"new"
        assert stat.S_IMODE(path.stat().st_mode) == mode

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a file away")
    def test_file_that_exists_keeps_its_owner_and_group(self, path: Path) -> None:
        path.write_bytes(b"old")
        os.chown(path, 1234, 12345)
        durable.write_whole(path, [b"new"])
        assert (path.stat().st_uid, path.stat().st_gid) == (1234, 12345)

    def test_no_other_group_gets_the_rights_of_one_that_cannot_be_kept(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        path.write_bytes(b"old")
        path.chmod(0o664)
        monkeypatch.setattr(os, "fchown", refuse)
        durable.write_whole(path, [b"new"])
        assert stat.S_IMODE(path.stat().st_mode) == 0o604

    @pytest.mark.parametrize("there", [True, False])
    def test_link_stays_a_link_and_its_target_is_written(self, path: Path, tmp_path: Path, there: bool) -> None:
        (tmp_path / "elsewhere").mkdir()
        target = tmp_path / "elsewhere" / "target"
        if there:
            target.write_bytes(b"old")
        (tmp_path / "between").symlink_to("elsewhere/target")
        path.symlink_to("between")
        durable.write_whole(path, [b"new"])
        assert str(path.readlink()) == "between"
        assert target.read_bytes() == b"new"
        assert not target.is_symlink()
        assert names(target.parent) == ["target"]

    def test_links_in_a_circle_are_an_error_that_says_so(self, path: Path) -> None:
        path.symlink_to(path.name)
        with pytest.raises(StoreError) as caught, durable.writing(f"{path} could not be written"):
            durable.write_whole(path, [b"new"])
        assert "circle" in str(caught.value.hint)
        assert names(path.parent) == [path.name]
        assert path.is_symlink()

    def test_what_the_parts_or_the_last_look_raise_leaves_the_old_file(self, path: Path) -> None:
        def parts() -> Any:
            yield b"new"
            raise KeyError

        def look(_: object) -> None:
            assert path.read_bytes() == b"old"
            raise KeyError

        path.write_bytes(b"old")
        with pytest.raises(KeyError):
            durable.write_whole(path, parts())
        with pytest.raises(KeyError):
            durable.write_whole(path, [b"new"], before_rename=look)
        assert path.read_bytes() == b"old"
        assert names(path.parent) == [path.name]

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
    @pytest.mark.parametrize("linked", [False, True], ids=["", "behind a link"])
    def test_what_is_not_a_file_is_not_replaced(self, path: Path, make: Any, linked: bool) -> None:
        place = path.with_name("place")
        if linked:
            path.symlink_to(place)
        make(place if linked else path)
        before = path.stat()
        with pytest.raises(DamagedFileError, match="not a file"):
            durable.write_whole(path, [b"new"])
        assert os.path.samestat(path.stat(), before)
        assert names(path.parent) == sorted({path.name, *([place.name] if linked else [])})

    def test_leftovers_of_dead_writers_are_removed_and_those_of_the_living_stay(self, path: Path) -> None:
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        dead, alive = f".{path.name}.{child}.x.tmp", f".{path.name}.{os.getppid()}.x.tmp"
        others = [f".{path.name}.word.tmp", f".other.{child}.x.tmp"]
        for name in (dead, alive, *others):
            (path.parent / name).touch()
        durable.write_whole(path, [b"new"])
        assert names(path.parent) == sorted([path.name, alive, *others])

    def test_content_is_on_disk_before_the_name_and_the_name_before_the_return(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced = []
        fsync = os.fsync

        def noted(descriptor: int) -> None:
            is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            synced.append(("names" if is_directory else "content", path.exists()))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", noted)
        durable.write_whole(path, [b"new"])
        assert synced == [("content", False), ("names", True)]

    def test_a_large_file_is_synced_in_pieces_and_keeps_the_disk_from_nobody_for_long(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = [0]

        def noted(descriptor: int) -> None:
            if not stat.S_ISDIR((found := os.fstat(descriptor)).st_mode):
                sizes.append(found.st_size)

        monkeypatch.setattr(os, "fsync", noted)
        part = bytes(durable.PIECE // 3)
        durable.write_whole(path, [part] * 20)
        assert sizes[-1] == path.stat().st_size == 20 * len(part)
        assert max(after - before for before, after in pairwise(sizes)) <= durable.PIECE + len(part)


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "limit"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EACCES, "writable for this user"),
        (errno.EPERM, "writable for this user"),
        (errno.EROFS, "mount"),
        (errno.ENAMETOOLONG, "shorter"),
        (errno.EIO, "disk"),
        (errno.EBUSY, "mount its directory instead"),
        (errno.EXDEV, "mount its directory instead"),
        (errno.ENOLCK, "cannot lock files"),
        (errno.ENOENT, "what the caller says"),
    ],
)
def test_error_says_why_and_what_to_do(path: Path, monkeypatch: pytest.MonkeyPatch, code: int, hint: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile, "mkstemp", fail)
    said = re.escape(f"{path} could not be written: {os.strerror(code)}")
    with (
        pytest.raises(StoreError, match=said) as caught,
        durable.writing(f"{path} could not be written", "what the caller says"),
    ):
        durable.write_whole(path, [b"new"])
    assert hint in str(caught.value.hint)


class TestReadOnce:
    def test_returns_what_stands_there_and_what_tells_it_from_every_other(self, path: Path) -> None:
        assert durable.read_once(path) is None
        assert durable.identity_of(path) is None
        path.write_bytes(b"one")
        found = durable.read_once(path)
        assert found == (b"one", durable.identity_of(path))
        path.write_bytes(b"another")
        assert durable.identity_of(path) != found.identity

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_directory_is_not_read(self, tmp_path: Path, stream: bool) -> None:
        with pytest.raises(DamagedFileError, match="is a directory, not a file"):
            durable.read_once(tmp_path, stream=stream)

    def test_a_pipe_is_read_where_somebody_named_it_and_else_not_waited_for(self, path: Path) -> None:
        os.mkfifo(path)
        with pytest.raises(DamagedFileError, match="is a pipe, not a file"):
            durable.read_once(path)
        writer = threading.Thread(target=path.write_bytes, args=(b"content",))
        writer.start()
        assert durable.read_once(path, stream=True) == (b"content", ())
        writer.join()


class TestAside:
    def test_a_directory_can_be_moved_too(self, path: Path) -> None:
        path.mkdir()
        (path / "inside").touch()
        first = durable.move_aside(path)
        path.mkdir()
        assert durable.move_aside(path) != first
        assert names(first) == ["inside"]
        assert len(names(path.parent)) == 2

    def test_one_that_cannot_be_moved_leaves_no_name(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def busy(*_: object) -> None:
            raise OSError(errno.EBUSY, "Device or resource busy")

        path.write_bytes(b"old")
        monkeypatch.setattr(type(path), "replace", busy)
        with pytest.raises(StoreError, match="resource busy") as caught:
            durable.move_aside(path)
        assert "mount its directory" in str(caught.value.hint)
        assert names(path.parent) == [path.name]

    def test_moving_overwrites_nothing_and_takes_the_companions_along(self, path: Path) -> None:
        moved = []
        for n in range(3):
            path.write_text(f"bad {n}")
            path.with_name(f"{path.name}-wal").write_text(f"wal {n}")
            moved.append(durable.move_aside(path, "damaged", ("-wal", "-shm")))
        assert [one.read_text() for one in moved] == ["bad 0", "bad 1", "bad 2"]
        assert [one.with_name(f"{one.name}-wal").read_text() for one in moved] == ["wal 0", "wal 1", "wal 2"]
        assert all(one.name.startswith(f"{path.name}.damaged-2") for one in moved)
        assert len(names(path.parent)) == 6

    def test_what_is_not_there_cannot_be_moved(self, path: Path) -> None:
        with pytest.raises(StoreError, match="cannot be moved aside: No such file"):
            durable.move_aside(path)
        assert names(path.parent) == []

    def test_file_behind_a_link_is_moved_where_it_is(self, path: Path, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "target").write_text("old")
        path.symlink_to("elsewhere/target")
        aside = durable.move_aside(path, "edited")
        assert aside.parent == tmp_path / "elsewhere"
        assert aside.read_text() == "old"
        assert path.is_symlink()

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, None], ids=["pipe", "directory", "itself"])
    def test_of_a_link_to_what_is_not_a_file_the_link_is_moved(
        self, path: Path, tmp_path: Path, make: Any
    ) -> None:
        place = tmp_path / "place"
        if make is None:
            path.symlink_to(path)
        else:
            make(place)
            path.symlink_to(place)
        aside = durable.move_aside(path)
        assert aside.is_symlink()
        assert names(tmp_path) == sorted([aside.name, *([] if make is None else [place.name])])

    def test_written_one_is_private_and_leaves_no_name_when_it_fails(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = durable.write_aside(path, "quarantine", b"x", ".json")
        assert durable.write_aside(path, "quarantine", b"y", ".json") != first
        assert first.read_bytes() == b"x"
        assert first.suffix == ".json"
        assert stat.S_IMODE(first.stat().st_mode) == 0o600

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            durable.write_aside(path, "quarantine", b"z", ".json")
        assert len(names(path.parent)) == 2
