"""What stands under a name may be anything and anybody's; who opens it owns nothing afterwards."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import crashing
import pytest
from waiting import until

from shmelim.errors import NotServingError, SegmentError, UntrustedSegmentError
from shmelim.shm import SharedNamespace, TableReader, TableWriter, mapping
from shmelim.table import Reader, Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be other users")


def serve(name: str, flags: int = 1) -> TableWriter:
    writer = TableWriter(SharedNamespace(name), capacity=8, arena_size=4096)
    writer.load([(b"a", flags, b"record", None)])
    return writer


def grow(writer: TableWriter, flags: int = 2) -> None:
    with writer.transaction() as transaction:
        transaction.put(b"a", flags, bytes(10_000 * writer._generation))


def path(name: str, rest: str = "") -> Path:
    return Path("/dev/shm") / f"shmelim.{name}{rest}"


def descriptors() -> set[str]:
    return {f"{file.name} {file.readlink()}" for file in Path("/proc/self/fd").iterdir() if _open(int(file.name))}


def _open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


# ---------------------------------------------------------------------- what stands there


def a_socket(where: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(where))


KINDS: dict[str, Callable[[Path], object]] = {
    "a FIFO": lambda where: os.mkfifo(where, 0o600),
    "a directory": lambda where: where.mkdir(0o700),
    "a socket": a_socket,
    "a symbolic link": lambda where: where.symlink_to("/dev/null"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def remove(where: Path) -> None:
    where.rmdir() if where.is_dir() and not where.is_symlink() else where.unlink()


@pytest.mark.parametrize("rest", ["", ".1"])
def test_a_reader_names_path_and_kind_of_what_is_not_a_file(table_name: str, kind: str, rest: str) -> None:
    serve(table_name).close()
    where = path(table_name, rest)
    where.unlink()
    KINDS[kind](where)
    with pytest.raises(SegmentError, match=f"{where} is {kind} of uid {os.geteuid()}, not a file"):
        TableReader(SharedNamespace(table_name))
    remove(where)


@pytest.mark.parametrize("rest", ["", ".lock"])
def test_so_does_a_writer(table_name: str, kind: str, rest: str) -> None:
    where = path(table_name, rest)
    KINDS[kind](where)
    with pytest.raises(SegmentError, match=f"{where} is {kind} of uid {os.geteuid()}, not a file"):
        TableWriter(SharedNamespace(table_name))
    remove(where)


def test_an_attached_reader_stays_where_it_is(table_name: str, kind: str) -> None:
    serve(table_name).close()
    reader = TableReader(SharedNamespace(table_name))
    path(table_name).unlink()
    KINDS[kind](path(table_name))
    for _ in range(10):
        assert reader.flags(b"a") == 1
    assert reader.writer().state == "stopped"
    remove(path(table_name))


@as_root
def test_who_may_not_open_a_segment_hears_whose_it_is_and_who_asked(table_name: str) -> None:
    serve(table_name).close()

    def attach() -> str:
        os.setgid(4711)
        os.setuid(4711)
        with pytest.raises(UntrustedSegmentError) as caught:
            TableReader(SharedNamespace(table_name))
        return str(caught.value)

    said = crashing.call(attach)
    assert f"{path(table_name)} " in said
    assert "uid 4711" in said
    assert "belongs to uid 0 and has mode 0o600" in said
    assert "--owner" not in said  # to name him would change nothing
    assert "run it as that user" in said


@as_root
def test_an_owner_whose_mode_keeps_him_out_is_not_told_that_it_is_anothers(table_name: str) -> None:
    def attach() -> str:
        os.setgid(4711)
        os.setuid(4711)
        serve(table_name).close()
        path(table_name).chmod(0)
        with pytest.raises(UntrustedSegmentError) as caught:
            TableReader(SharedNamespace(table_name))
        return str(caught.value)

    assert "uid 4711) may not open it, which belongs to uid 4711 and has mode 0o0" in crashing.call(attach)


def test_a_uid_that_is_anybodys_is_trusted_by_nobody(table_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(table_name).close()
    files = {"/proc/sys/fs/overflowuid": b"%d\n" % os.geteuid(), "/proc/self/uid_map": b"0 1000 1\n"}
    monkeypatch.setattr(mapping, "_read", files.__getitem__)
    with pytest.raises(UntrustedSegmentError, match="any user whom this user namespace does not know"):
        TableReader(SharedNamespace(table_name, owner=os.geteuid()))
    files["/proc/self/uid_map"] = b"         0          0 4294967295\n"
    assert TableReader(SharedNamespace(table_name)).flags(b"a") == 1


@as_root
def test_a_group_reader_with_a_lock_on_the_root_keeps_nobody_out(table_name: str) -> None:
    import fcntl

    serve(table_name).close()
    with path(table_name).open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        serve(table_name, 2).close()
    assert TableReader(SharedNamespace(table_name)).flags(b"a") == 2


def test_the_lock_is_a_file_of_its_own_that_readers_never_open(table_name: str) -> None:
    writer = serve(table_name)
    lock = path(table_name, ".lock")
    assert stat.S_IMODE(lock.stat().st_mode) == 0o600
    with lock.open("rb") as file:
        before = os.fstat(file.fileno()).st_atime_ns
    lock.rename(path(table_name, ".hidden"))
    assert TableReader(SharedNamespace(table_name)).flags(b"a") == 1
    path(table_name, ".hidden").rename(lock)
    assert lock.stat().st_atime_ns == before
    writer.close()


# ---------------------------------------------------------------------- descriptors


class Interrupt(BaseException):
    pass


def interrupt() -> None:
    raise Interrupt


def interrupted(stop: int, act: Callable[[], T]) -> T | None:
    """Do something with an exception in the line of that number; return None if it came."""
    crashing.at_line(stop, interrupt, ())
    try:
        return act()
    except Interrupt:
        return None
    finally:
        sys.settrace(None)


@pytest.mark.parametrize("first", [True, False], ids=["a first start", "a later start"])
def test_an_interrupted_start_leaves_neither_lock_nor_descriptor(table_name: str, *, first: bool) -> None:
    if not first:
        serve(table_name).close()
    gc.collect()
    before = descriptors()
    stop = 0
    while True:
        stop += 1
        if first:
            SharedNamespace(table_name).remove()
        writer = interrupted(stop, lambda: TableWriter(SharedNamespace(table_name)))
        if writer is not None:
            break
        assert descriptors() == before, stop
    assert stop > 30
    writer.close()
    del writer
    assert descriptors() == before
    serve(table_name, 2).close()


def test_interrupted_attaches_leave_no_descriptor(table_name: str) -> None:
    writer = serve(table_name)
    reader = TableReader(SharedNamespace(table_name))
    gc.collect()
    before = descriptors()
    stop = 0
    while True:
        stop += 1
        grow(writer, stop % 256)
        between = len(descriptors())
        found = interrupted(stop, lambda: reader.flags(b"a"))
        if found is not None:
            assert found == stop % 256
            break
        assert len(descriptors()) == between, stop
    assert stop > 20
    writer.close()
    del writer
    assert len(descriptors()) <= len(before)


def test_a_reader_owns_no_descriptor(table_name: str) -> None:
    """A program that becomes a daemon closes all of them; the numbers are somebody else's afterwards."""
    writer = serve(table_name)

    program = (
        f"import sys; sys.path[:0] = {sys.path!r}\nimport test_shm_opening as test\ntest.main({table_name!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[0, 1, 0]\n", done.stderr
    writer.close()


def test_a_tables_writer_owns_none_and_keeps_others_out_all_the_same(table_name: str) -> None:
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}\nimport test_shm_opening as test\ntest.write({table_name!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "[0, True, 500, True, 0]\n", done.stderr


def write(name: str) -> None:
    """Write, close all descriptors, open others, grow, end: say what was owned, kept, written and lost."""
    gc.collect()
    before = descriptors()
    writer = Writer(name)
    owned = len(descriptors() - before)
    os.closerange(3, 256)
    taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(64)]
    kept = _is_written(name)
    for number in range(500):
        writer.put(f"{number}", b"x" * 1000)
    count = len(Reader(name))
    writer.close(unlink=True)
    del writer
    gc.collect()
    print([owned, kept, count, not _is_written(name), sum(not _open(number) for number in taken)])


def _is_written(name: str) -> bool:
    program = f"from shmelim.table import Writer; Writer({name!r}).close(unlink=True)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    return "has a writer already" in done.stderr


def main(name: str) -> None:
    """Attach, close all descriptors, open others, forget the reader: say what was owned, read, and lost."""
    TableReader(SharedNamespace(name))  # whatever is loaded for the first one
    gc.collect()
    before = descriptors()
    reader = TableReader(SharedNamespace(name))
    owned = len(descriptors() - before)
    os.closerange(3, 256)
    taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(64)]
    read = reader.flags(b"a")
    del reader
    gc.collect()
    print([owned, read, sum(not _open(number) for number in taken)])


@pytest.fixture
def no_descriptors_left() -> Iterator[Callable[[], Any]]:
    """Use up all descriptors while a block runs."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    @contextlib.contextmanager
    def used_up() -> Iterator[None]:
        taken = [os.open("/dev/null", os.O_RDONLY)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 1, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for number in taken:
                os.close(number)

    yield used_up
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_at_the_limit_of_descriptors_the_error_says_so(table_name: str, no_descriptors_left: Any) -> None:
    writer = serve(table_name)
    reader = TableReader(SharedNamespace(table_name))
    with no_descriptors_left():
        for call in (lambda: TableReader(SharedNamespace(table_name)), lambda: grow(writer)):
            with pytest.raises(SegmentError, match="this process has as many files open as it may"):
                call()
        assert reader.flags(b"a") == 1
    grow(writer)
    with no_descriptors_left(), pytest.raises(SegmentError, match="as many files open"):
        reader.flags(b"a")
    assert reader.flags(b"a") == 2
    writer.close()


# ---------------------------------------------------------------------- reads in the middle of an attach


def test_a_read_in_a_trace_function_while_its_thread_attaches(table_name: str) -> None:
    writer = serve(table_name)
    reader = TableReader(SharedNamespace(table_name))
    grow(writer)
    found = []

    def trace(*_: object) -> Any:
        found.append(reader.flags(b"a"))
        return trace

    sys.settrace(trace)
    try:
        outer = reader.flags(b"a")
    finally:
        sys.settrace(None)
    assert outer == 2
    assert found
    assert set(found) == {2}
    writer.close()


def nested(name: str, act: Callable[[Callable[[], None]], None]) -> list[int]:
    """Have ``act`` called in the middle of an attach with what reads in it; return what all reads found."""
    found: list[int] = []

    class Interrupted(SharedNamespace):
        armed = False

        def open_data(self, generation: int, *, writable: bool = False) -> Any:
            if self.armed:
                self.armed = False
                act(lambda: found.append(reader.flags(b"a")))
            return super().open_data(generation, writable=writable)

    writer = serve(name)
    namespace = Interrupted(name)
    reader = TableReader(namespace)
    grow(writer)
    namespace.armed = True
    found.append(reader.flags(b"a"))
    writer.close()
    return found


def test_a_read_in_a_signal_handler_while_its_thread_attaches(table_name: str) -> None:
    def act(read: Callable[[], None]) -> None:
        before = signal.signal(signal.SIGUSR1, lambda *_: read())
        signal.raise_signal(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, before)

    assert crashing.call(lambda: nested(table_name, act)) == [2, 2]


def test_a_read_in_a_finalizer_while_its_thread_attaches(table_name: str) -> None:
    def act(read: Callable[[], None]) -> None:
        class Last:
            def __del__(self) -> None:
                read()

        cycle = [Last()]
        cycle.append(cycle)  # type: ignore[arg-type]
        del cycle
        gc.collect()

    assert crashing.call(lambda: nested(table_name, act)) == [2, 2]


def test_a_read_that_another_thread_overtakes_stays_with_what_that_found(table_name: str) -> None:
    """The slower one of two attaches must not take the reader back."""

    def act(read: Callable[[], None]) -> None:
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()

    assert nested(table_name, act) == [2, 2]


# ---------------------------------------------------------------------- what is left behind


def test_the_pages_of_a_large_segment_are_given_back_by_another_thread(table_name: str) -> None:
    writer = serve(table_name)
    with writer.transaction() as transaction:
        transaction.put(b"large", 1, bytes(8 << 20))
    reader = TableReader(SharedNamespace(table_name))
    assert len(reader.get(b"large").data) == 8 << 20
    ended, threads = threading.Event(), []
    old = reader._view.segment

    class Watched:
        def __init__(self, memory: Any) -> None:
            self._memory = memory

        def discard(self) -> None:
            threads.append(threading.get_ident())
            self._memory.discard()
            ended.set()

        def __len__(self) -> int:
            return len(self._memory)

    old.memory = Watched(old.memory)  # type: ignore[assignment]
    writer.load([(b"a", 3, b"", None)])
    assert reader.flags(b"a") == 3
    assert ended.wait(60)
    assert threads != [threading.get_ident()]
    writer.close()


def test_a_mapping_ends_with_the_last_view_of_it(table_name: str) -> None:
    writer = serve(table_name)
    reader = TableReader(SharedNamespace(table_name))
    kept = reader._view.segment.window[:8]
    name = f"{path(table_name, '.1')} (deleted)"
    grow(writer)
    assert reader.flags(b"a") == 2
    writer.close()
    assert bytes(kept) == b"SHMELDAT"
    assert name in Path("/proc/self/maps").read_text()
    del kept, writer
    gc.collect()
    until(lambda: name not in Path("/proc/self/maps").read_text(), "the unmapping")


def test_a_name_that_is_not_there_is_not_served(table_name: str) -> None:
    with pytest.raises(NotServingError, match="nothing is served"):
        TableReader(SharedNamespace(table_name))


def test_a_lock_that_cannot_be_mapped_is_not_taken_for_another_writers(
    table_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_the_limit(*_: object) -> None:
        raise OSError(errno.EAGAIN, "as mlockall() has it")

    monkeypatch.setattr("shmelim.shm.shared.map_writable", at_the_limit)
    with pytest.raises(SegmentError, match=r"cannot map .*lock.*ulimit -l"):
        Writer(table_name)


@pytest.mark.parametrize("extension", [mapping.extension, None])
def test_a_large_piece_is_written_to_a_mapping_at_once(extension: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extension, byte by byte: a record of 1 MB held everybody up for 35 ms."""
    monkeypatch.setattr(mapping, "extension", extension)
    size = 16 << 20
    with os.fdopen(os.memfd_create("large"), "r+b") as file:
        file.truncate(size)
        memory = mapping.map_writable(file.fileno(), size)
    memory[:] = bytes(size)
    before = time.thread_time()
    memory[1:] = b"x" * (size - 1)
    assert time.thread_time() - before < 0.2
    assert memory[:2] + memory[-1:] == b"\0xx"
    with pytest.raises(ValueError):
        memory[:2] = b"abc"


def test_a_limit_on_memory_is_named(table_name: str) -> None:
    writer = TableWriter(SharedNamespace(table_name), capacity=8, arena_size=64 << 20)
    writer.load([(b"a", 1, b"record", None)])

    def attached_with_little_room() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (16 << 20), resource.RLIM_INFINITY))
        with pytest.raises(SegmentError, match=r"Cannot allocate memory \(raise .*ulimit -v"):
            TableReader(SharedNamespace(table_name)).get(b"a")

    crashing.call(attached_with_little_room)
    locked = OSError(errno.EAGAIN, "as mlockall() has it")
    assert "ulimit -l" in str(mapping.open_error("/dev/shm/there-is-none", locked))
    writer.close()
