"""A /dev/shm that is really full: a small tmpfs in a mount namespace of the test's own."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import crashing
import pytest

from shmelim.errors import SegmentError, SegmentFullError
from shmelim.shm import SharedNamespace, TableReader, TableWriter

if TYPE_CHECKING:
    from collections.abc import Callable

SHM = Path("/dev/shm")
NAME = "full"
CLONE_NEWNS = 0x20000


def mounts_allowed() -> bool:
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], check=False).returncode == 0


pytestmark = pytest.mark.skipif(not mounts_allowed(), reason="needs the right to mount")


def in_small_shm(run: Callable[[], Any], size: str = "256k") -> Any:
    """Run something in a child whose /dev/shm is a new tmpfs of that size."""

    def child() -> Any:
        assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", "/dev/shm"], check=True)
        return run()

    return crashing.call(child)


def fill_up() -> None:
    with (SHM / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass
    assert os.statvfs(SHM).f_bavail == 0


def make_room() -> None:
    (SHM / "filler").unlink()


def segments() -> dict[str, int]:
    found = {path.name: path.stat().st_size for path in SHM.iterdir() if path.name != "filler"}
    found.pop(f"shmelim.{NAME}.lock", None)
    # The page on which a reader counts its checks lives as long as the reader, not as the table.
    return {name: size for name, size in found.items() if not name.startswith("shmelim-readers.")}


def serve() -> TableWriter:
    writer = TableWriter(SharedNamespace(NAME), capacity=8, arena_size=4096)
    writer.load([(b"a", 1, b"A", None), (b"b", 2, bytes(500), None)])
    return writer


def grow(writer: TableWriter) -> None:
    with writer.transaction() as transaction:
        for number in range(100):
            transaction.put(b"%d" % number, 9, bytes(100))


@pytest.fixture(params=["posix_fallocate", "written"])
def _reserving(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "written":
        monkeypatch.delattr(os, "posix_fallocate")


@pytest.mark.usefixtures("_reserving")
@pytest.mark.parametrize("left", [0, 4096, 20_000])
def test_growth_fails_and_the_old_state_lives_on(left: int) -> None:
    def run() -> None:
        writer = serve()
        reader = TableReader(SharedNamespace(NAME))
        before = reader.snapshot(verify=True)
        held = segments()
        fill_up()
        os.truncate(SHM / "filler", (SHM / "filler").stat().st_size - left)
        for attempt in range(3):
            with pytest.raises(SegmentFullError):
                grow(writer)
            with pytest.raises(SegmentFullError):
                writer.load([(b"big", 1, bytes(250_000), None)])
            assert segments() == held
            if attempt == 0:
                assert reader.snapshot(verify=True) == before
            # What is reserved stays usable: into the arena, compacted, settled.
            for flags in range(20):
                with writer.transaction() as transaction:
                    transaction.put(b"b", flags, bytes([flags]) * 500)
                assert reader.get(b"b").data == bytes([flags]) * 500
        make_room()
        grow(writer)
        assert len(reader.snapshot(verify=True).entries) == 102
        assert len(segments()) == 2
        writer.close()

    in_small_shm(run)


@pytest.mark.usefixtures("_reserving")
def test_no_room_for_the_first_page() -> None:
    def run() -> None:
        fill_up()
        for _ in range(3):
            with pytest.raises(SegmentFullError):
                TableWriter(SharedNamespace(NAME))
        assert not any(segments().values())
        make_room()
        writer = serve()
        assert TableReader(SharedNamespace(NAME)).flags(b"a") == 1
        writer.close()

    in_small_shm(run)


@pytest.mark.usefixtures("_reserving")
def test_no_room_for_the_first_table() -> None:
    def run() -> None:
        writer = TableWriter(SharedNamespace(NAME), capacity=1024)
        with pytest.raises(SegmentFullError):
            writer.load([(b"a", 1, bytes(300_000), None)])
        assert list(segments().values()) == [4096]
        writer.close()
        serve().close()
        assert TableReader(SharedNamespace(NAME)).flags(b"a") == 1

    in_small_shm(run)


@pytest.mark.usefixtures("_reserving")
def test_successor_without_room_leaves_the_predecessors_state() -> None:
    def run() -> None:
        serve().close()
        reader = TableReader(SharedNamespace(NAME))
        fill_up()
        successor = TableWriter(SharedNamespace(NAME))
        with pytest.raises(SegmentFullError):
            successor.load([(b"c", 3, b"", None)])
        assert reader.flags(b"a") == 1
        assert TableReader(SharedNamespace(NAME)).flags(b"a") == 1
        make_room()
        successor.close()
        with TableWriter(SharedNamespace(NAME), capacity=8, arena_size=4096) as other:
            other.load([(b"c", 3, b"", None)])
        assert (reader.flags(b"a"), reader.flags(b"c")) == (0, 3)

    in_small_shm(run)


def test_a_limit_on_the_size_of_files_is_named(table_name: str) -> None:
    def run() -> str:
        with TableWriter(SharedNamespace(table_name), capacity=8, arena_size=4096) as writer:
            writer.load([(b"a", 1, b"", None)])
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
            with pytest.raises(SegmentError, match="File too large") as caught:
                writer.load([(b"a", 1, bytes(200_000), None)])
            assert TableReader(SharedNamespace(table_name)).flags(b"a") == 1
            return str(caught.value.hint)

    assert "ulimit -f" in crashing.call(run)
