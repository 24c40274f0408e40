"""Segments in /dev/shm: names, permissions, whom to trust, odd sizes, and memory that must be there."""

from __future__ import annotations

import errno
import os
import pickle
import stat
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import crashing
import pytest
from segments import segments_of

from shmelim.errors import (
    AlreadyServingError,
    CorruptSegmentError,
    NotServingError,
    SegmentError,
    SegmentFullError,
    UnsupportedPlatformError,
    UntrustedSegmentError,
)
from shmelim.shm import SharedNamespace, TableReader, TableWriter, shared
from shmelim.table import Writer

if TYPE_CHECKING:
    from collections.abc import Callable

SHM = Path("/dev/shm")
STRANGER = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")


def path(name: str, generation: int | None = None) -> Path:
    return SHM / (f"shmelim.{name}" if generation is None else f"shmelim.{name}.{generation}")


def mode_of(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def serve(name: str, mode: int = 0o600) -> TableWriter:
    writer = TableWriter(SharedNamespace(name, mode=mode), capacity=8, arena_size=4096)
    writer.load([(b"a", 1, b"record", None)])
    return writer


def grow(writer: TableWriter) -> None:
    """Put more than the first segment has slots for."""
    with writer.transaction() as transaction:
        for number in range(100):
            transaction.put(b"%d" % number, 2)


def as_user(uid: int, act: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        os.setgid(uid)
        os.setuid(uid)
        return act()

    return run


# ---------------------------------------------------------------------- permissions


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o777])
@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_mode_whatever_the_umask(table_name: str, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        serve(table_name, mode).close()
    finally:
        os.umask(before)
    assert mode_of(path(table_name)) == mode
    assert mode_of(path(table_name, 1)) == mode


def test_a_writer_of_another_mode_changes_the_root(table_name: str) -> None:
    serve(table_name, 0o640).close()
    serve(table_name, 0o600).close()
    assert mode_of(path(table_name)) == 0o600


def test_a_refused_writer_changes_nothing(table_name: str) -> None:
    writer = serve(table_name, 0o600)
    with pytest.raises(AlreadyServingError):
        serve(table_name, 0o640)
    assert mode_of(path(table_name)) == 0o600
    writer.close()


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o666, 0o400, 0o700, 0])
def test_other_modes_are_refused(mode: int) -> None:
    with pytest.raises(ValueError, match="mode"):
        SharedNamespace("x", mode=mode)


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o660, 0o666])
@pytest.mark.parametrize("generation", [None, 1])
def test_reader_refuses_what_others_may_write(table_name: str, mode: int, generation: int | None) -> None:
    serve(table_name).close()
    path(table_name, generation).chmod(mode)
    with pytest.raises(UntrustedSegmentError, match="lets others write") as caught:
        TableReader(SharedNamespace(table_name))
    assert isinstance(caught.value, PermissionError)


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_writer_refuses_a_root_that_others_may_write(table_name: str, mode: int) -> None:
    serve(table_name).close()
    path(table_name).chmod(mode)
    with pytest.raises(UntrustedSegmentError):
        TableWriter(SharedNamespace(table_name))
    assert mode_of(path(table_name)) == mode


@as_root
def test_another_users_table_is_not_trusted(table_name: str) -> None:
    """A table of an ordinary user's: root does not trust it unless told to, nor takes it over."""
    crashing.call(as_user(STRANGER, lambda: serve(table_name, 0o640).close()))
    with pytest.raises(UntrustedSegmentError, match=f"uid {STRANGER}"):
        TableReader(SharedNamespace(table_name))
    with pytest.raises(UntrustedSegmentError):
        TableWriter(SharedNamespace(table_name))
    assert TableReader(SharedNamespace(table_name, owner=STRANGER)).flags(b"a") == 1


def test_nothing_is_made_in_the_place_of_another_user(table_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMELIM_OWNER", str(os.geteuid() + 1))
    for write in (lambda: TableWriter(SharedNamespace(table_name)), lambda: Writer(table_name)):
        with pytest.raises(SegmentError, match=f"another user's is meant: uid {os.geteuid() + 1}"):
            write()
    assert not list(SHM.glob(f"shmelim*.{table_name}*"))


@as_root
def test_an_ordinary_user_trusts_root_and_must_be_let_in(table_name: str) -> None:
    def look() -> tuple[str, str]:
        try:
            answer = str(TableReader(SharedNamespace(table_name)).flags(b"a"))
        except UntrustedSegmentError as error:
            answer = str(error)
        with pytest.raises(UntrustedSegmentError):
            TableWriter(SharedNamespace(table_name))
        try:
            TableReader(SharedNamespace(table_name, owner=STRANGER))
        except UntrustedSegmentError as error:
            return answer, str(error)
        return answer, ""

    serve(table_name, 0o600).close()
    assert "may not open" in crashing.call(as_user(STRANGER, look))[0]

    def in_group() -> tuple[str, str]:
        os.setgroups([0])
        os.setuid(STRANGER)
        return look()

    serve(table_name, 0o640).close()
    answer, other_owner = crashing.call(in_group)
    assert answer == "1"
    assert "uid 0" in other_owner


def test_who_may_read_is_so_for_a_table_that_is_adopted_too(table_name: str) -> None:
    def write(mode: int, group: int) -> None:
        if os.geteuid() == 0:
            os.setegid(group)
        with TableWriter(SharedNamespace(table_name, mode=mode)) as writer:
            if not writer.adopt():
                writer.load([(b"a", 1, b"", None)])
            found = [path.stat() for path in SHM.glob(f"shmelim.{table_name}*[!k]")]
            assert {(one.st_mode & 0o777, one.st_gid) for one in found} == {(mode, os.getegid())}

    for mode, group in ((0o600, 0), (0o640, 0), (0o640, STRANGER), (0o600, 0)):
        crashing.call(partial(write, mode, group))


@as_root
@pytest.mark.parametrize("squat", [lambda path: path.touch(0o600), lambda path: path.mkdir(0o700)])
def test_squatters_on_the_next_generations_are_passed_by(
    table_name: str, squat: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody may put files into /dev/shm; they stop neither growth nor start, and the directory is not listed."""
    others = [path(table_name, generation) for generation in (2, 3, 4, 77)]

    def run() -> list[tuple[int, int]]:
        writer = serve(table_name)
        reader = TableReader(SharedNamespace(table_name))
        ready.value = 1
        while ready.value != 2:
            os.sched_yield()
        with monkeypatch.context() as patch:
            patch.delattr(os, "listdir")
            grow(writer)
        found = [(reader.info().generation, reader.flags(b"99"))]
        writer.close()
        writer = serve(table_name)
        return [*found, (reader.info().generation, reader.flags(b"a"))]

    ready = crashing.Counter()
    with crashing.Child(as_user(STRANGER, run)) as child:
        child.until(lambda: ready.value)
        for other in others:
            squat(other)
        ready.value = 2
        assert child.result() == [(8, 2), (9, 1)]
    for other in others:
        other.rmdir() if other.is_dir() else other.unlink()


@as_root
def test_squatters_on_all_generations_are_an_error_that_names_one(table_name: str) -> None:
    writer = serve(table_name)
    squatters = [path(table_name, 1 << step) for step in range(1, 16)]
    for squatter in squatters:
        squatter.touch(0o600)
        os.chown(squatter, STRANGER, STRANGER)
    with pytest.raises(UntrustedSegmentError, match=f"{squatters[-1]} is not .* belongs to uid {STRANGER}"):
        grow(writer)
    assert TableReader(SharedNamespace(table_name)).flags(b"a") == 1
    for squatter in squatters:
        squatter.unlink()
    grow(writer)
    writer.close()


@as_root
@pytest.mark.parametrize("rest", ["", ".lock"])
def test_a_squatter_on_the_names_of_root_and_lock_is_named(table_name: str, rest: str) -> None:
    squatter = Path(f"{path(table_name)}{rest}")
    for who, why in [(STRANGER + 1, "may not open it"), (0, "is not to be trusted")]:
        squatter.touch(0o600)
        os.chown(squatter, STRANGER, STRANGER)

        def start() -> str:
            with pytest.raises(UntrustedSegmentError) as caught:
                serve(table_name)
            return str(caught.value)

        said = crashing.call(as_user(who, start) if who else start)
        assert f"{squatter} " in said
        assert f"uid {STRANGER}" in said
        assert why in said
        Path(f"{path(table_name)}.lock").unlink(missing_ok=not rest)
    squatter.unlink(missing_ok=True)


def test_where_there_is_no_shared_memory_nobody_is_said_to_serve(
    table_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "_SHM_DIR", f"{tmp_path}/none")
    with pytest.raises(SegmentError, match=r"there is no .*/none.*mount a tmpfs") as caught:
        serve(table_name)
    assert not isinstance(caught.value, AlreadyServingError)


@pytest.mark.parametrize("owner", ["0", True, 0.0])
def test_an_owner_is_a_uid(table_name: str, owner: Any) -> None:
    with pytest.raises(TypeError, match="owner must be a whole number"):
        SharedNamespace(table_name, owner=owner)


def test_readers_cannot_write(table_name: str) -> None:
    writer = serve(table_name)
    namespace = SharedNamespace(table_name)
    for segment in (namespace.open_root(), namespace.open_data(1)):
        with pytest.raises(TypeError):
            segment.words[8] = 1
        with pytest.raises(TypeError):
            segment.memory[8:9] = b"x"
    writer.close()


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size", [1, 7, 8, 15, 16, 4095])
def test_truncated_root(table_name: str, size: int) -> None:
    serve(table_name).close()
    os.truncate(path(table_name), size)
    with pytest.raises(CorruptSegmentError):
        TableReader(SharedNamespace(table_name))
    writer = serve(table_name)
    assert TableReader(SharedNamespace(table_name)).flags(b"a") == 1
    assert path(table_name).stat().st_size == 4096
    writer.close()


def test_emptied_root(table_name: str) -> None:
    serve(table_name).close()
    os.truncate(path(table_name), 0)
    with pytest.raises(NotServingError):
        TableReader(SharedNamespace(table_name))
    serve(table_name).close()
    assert TableReader(SharedNamespace(table_name)).flags(b"a") == 1


@pytest.mark.parametrize("size", [4097, 8192, 12345])
def test_root_of_more_than_a_page(table_name: str, size: int) -> None:
    serve(table_name).close()
    os.truncate(path(table_name), size)
    assert TableReader(SharedNamespace(table_name)).flags(b"a") == 1
    serve(table_name).close()


@pytest.mark.parametrize("size", [0, 1, 63, 64, 4095, 4096, 4097, 8191, -1])
def test_truncated_data(table_name: str, size: int) -> None:
    serve(table_name).close()
    file = path(table_name, 1)
    os.truncate(file, size if size >= 0 else file.stat().st_size - 1)
    with pytest.raises((SegmentError, NotServingError)):
        TableReader(SharedNamespace(table_name))
    serve(table_name).close()
    assert TableReader(SharedNamespace(table_name)).flags(b"a") == 1


def test_data_removed_behind_the_readers_back(table_name: str) -> None:
    serve(table_name).close()
    attached = TableReader(SharedNamespace(table_name))
    path(table_name, 1).unlink()
    assert attached.flags(b"a") == 1
    with pytest.raises(NotServingError):
        TableReader(SharedNamespace(table_name))


@pytest.mark.parametrize(("offset", "data"), [(0, b"X"), (8, b"\xff"), (12, b"\xff")])
def test_a_foreign_root_is_replaced_by_a_writer(table_name: str, offset: int, data: bytes) -> None:
    serve(table_name).close()
    with path(table_name).open("r+b") as file:
        file.seek(offset)
        file.write(data)
    with pytest.raises(SegmentError):
        TableReader(SharedNamespace(table_name))
    writer = serve(table_name)
    assert TableReader(SharedNamespace(table_name)).flags(b"a") == 1
    with pytest.raises(AlreadyServingError):
        SharedNamespace(table_name).acquire()
    writer.close()
    assert len(segments_of(table_name)) == 2


# ---------------------------------------------------------------------- room


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENOMEM])
def test_no_room_for_growth(table_name: str, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    writer = serve(table_name)
    reader = TableReader(SharedNamespace(table_name))
    before = reader.snapshot(verify=True)

    def full(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(SegmentFullError, match="published state stands"):
            grow(writer)
        assert len(segments_of(table_name)) == 2
        assert reader.snapshot(verify=True) == before
        with writer.transaction() as small:
            small.put(b"b", 2)
        assert list(reader.snapshot(verify=True).entries) == [b"a", b"b"]
    grow(writer)
    assert len(reader.snapshot(verify=True).entries) == 102
    assert len(segments_of(table_name)) == 2
    writer.close()


def test_no_room_for_anything(table_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(SegmentFullError):
            TableWriter(SharedNamespace(table_name))
    serve(table_name).close()


def test_no_room_for_a_successor(table_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(table_name).close()
    reader = TableReader(SharedNamespace(table_name))

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        successor = TableWriter(SharedNamespace(table_name))
        with pytest.raises(SegmentFullError):
            successor.load([(b"b", 2, b"", None)])
    assert reader.flags(b"a") == 1
    assert TableReader(SharedNamespace(table_name)).flags(b"a") == 1
    successor.load([(b"b", 2, b"", None)])
    assert (reader.flags(b"a"), reader.flags(b"b")) == (0, 2)
    successor.close()


def test_a_segment_without_room_leaves_no_name(table_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SegmentFullError):
        SharedNamespace(table_name).create_data(1, 4096)
    assert segments_of(table_name) == []


def test_a_lock_on_a_root_that_lost_its_name_is_none(table_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking the root, it is removed, and another writer makes and locks a new one."""
    flock = shared.fcntl.flock
    others = []

    def overtaken(descriptor: int, operation: int) -> None:
        if not others:
            others.append(None)
            SharedNamespace(table_name).remove()
            others.append(serve(table_name))
        flock(descriptor, operation)

    serve(table_name).close()
    monkeypatch.setattr(shared.fcntl, "flock", overtaken)
    with pytest.raises(AlreadyServingError):
        TableWriter(SharedNamespace(table_name))
    others[1].close()
    serve(table_name).close()


@pytest.mark.parametrize("why", ["missing", errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_without_fallocate_memory_is_written_instead(
    table_name: str, monkeypatch: pytest.MonkeyPatch, why: str | int
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(why, "no")

    if why == "missing":
        monkeypatch.delattr(os, "posix_fallocate")
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    writer = serve(table_name)
    status = path(table_name, 1).stat()
    assert status.st_blocks * 512 >= status.st_size
    assert TableReader(SharedNamespace(table_name)).flags(b"a") == 1
    writer.close()


def test_without_fallocate_a_short_write_is_continued(table_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: min(len(data), 1000)], at))
    writer = serve(table_name)
    status = path(table_name, 1).stat()
    assert status.st_blocks * 512 >= status.st_size
    writer.close()


def test_other_failures_to_make_a_segment_are_errors_of_ours(
    table_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: int) -> None:
        raise OSError(errno.EIO, "broken")

    writer = serve(table_name)
    monkeypatch.setattr(os, "posix_fallocate", broken)
    with pytest.raises(SegmentError, match="broken"):
        grow(writer)
    assert len(segments_of(table_name)) == 2
    writer.close()


# ---------------------------------------------------------------------- the rest


def test_pickled_for_another_process(table_name: str) -> None:
    serve(table_name).close()
    copy = pickle.loads(pickle.dumps(SharedNamespace(table_name, mode=0o640, owner=STRANGER)))
    with pytest.raises(UntrustedSegmentError):
        TableReader(copy)
    assert TableReader(pickle.loads(pickle.dumps(SharedNamespace(table_name)))).flags(b"a") == 1


@pytest.mark.parametrize("machine", ["aarch64", "riscv64", "ppc64le", "i686", ""])
def test_weakly_ordered_machines_need_the_extension(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine=machine))
    monkeypatch.setattr(shared, "READ_PATH", "native")
    SharedNamespace("x")
    monkeypatch.setattr(shared, "READ_PATH", "pure")
    with pytest.raises(UnsupportedPlatformError):
        SharedNamespace("x")


def test_big_endian_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.sys, "byteorder", "big")
    monkeypatch.setattr(shared, "READ_PATH", "pure")
    with pytest.raises(UnsupportedPlatformError):
        SharedNamespace("x")


def test_tables_whose_names_begin_alike(new_name: Callable[[], str]) -> None:
    """Removing one table's segments leaves those of a table whose name continues it."""
    short = new_name()
    long = f"{short}-"
    first, second = serve(short), serve(long)
    SharedNamespace(short).remove()
    assert TableReader(SharedNamespace(long)).flags(b"a") == 1
    first.close()
    second.close()
    SharedNamespace(long).remove()
