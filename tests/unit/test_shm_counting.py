"""Readers are counted exactly, whoever dies when; and what cannot be counted is read all the same."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from serving import row
from waiting import PATIENCE

from shmelim import EliminationReader
from shmelim.eliminations.record import encode
from shmelim.eliminations.rows import Row, row_entry
from shmelim.shm import Counts, PrivateNamespace, SharedNamespace, TableReader, TableWriter, counting, readings_of
from shmelim.shm.layout import PAGE, sealed

if TYPE_CHECKING:
    from collections.abc import Iterator

A, B = "a" * 48, "b" * 48
NOTHING = Counts(0, 0, 0, 0, 0, 0)

READING = """
import sys, time
from shmelim import EliminationReader
reader = EliminationReader(sys.argv[1])
for number in range(int(sys.argv[2])):
    reader.is_hotkey_eliminated("a" * 48)
    reader.is_hotkey_eliminated("x")
print("done", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def namespace(table_name: str) -> Iterator[SharedNamespace]:
    """The namespace of a table in which ``A`` is eliminated, and ``B`` is not."""
    with published(SharedNamespace(table_name)) as namespace:
        yield namespace


@contextmanager
def published(namespace: SharedNamespace) -> Iterator[SharedNamespace]:
    with TableWriter(namespace) as writer, ExitStack() as stack:
        stack.callback(namespace.remove)
        writer.load(
            [
                row_entry(Row(A, 1, encode(row(A)), None, None, registered=False)),
                row_entry(Row(B, None, None, None, None, registered=True)),
            ]
        )
        yield namespace


@pytest.fixture
def reader(namespace: SharedNamespace) -> EliminationReader:
    """A reader of that table."""
    return EliminationReader(namespace.name)


def pages(namespace: SharedNamespace) -> list[Path]:
    return sorted(Path("/dev/shm").glob(f"shmelim-readers.{namespace.name}.*"))


def own(namespace: SharedNamespace) -> Counts:
    """What this process counted."""
    (found,) = (one for one in readings_of(namespace).processes if one.pid == os.getpid())
    return found.counts


def in_child(run: object, *, killed: bool = False) -> int:
    """Run something in a fork, which ends at once then, or is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            run()  # type: ignore[operator]
        except BaseException:
            os._exit(1)
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---------------------------------------------------------------------- what is counted


def test_each_read_is_counted_as_what_it_is(namespace: SharedNamespace, reader: EliminationReader) -> None:
    assert pages(namespace) == []
    for hotkey in (A, A, B, "x" * 48, "short", None):
        reader.is_hotkey_eliminated(hotkey)
    assert own(namespace) == Counts(checks=6, hits=2, batches=0, records=0, snapshots=0, retries=0)
    for hotkey in (A, B):
        reader.is_hotkey_re_registered(hotkey)
        reader.status(hotkey)
        assert (hotkey in reader) is (hotkey == A)
    assert own(namespace)[:2] == (12, 5)
    reader.are_eliminated([A, B, "x"])
    reader.statuses([])
    assert own(namespace).batches == 2
    reader.get_elimination(A)
    reader.get_elimination("x")
    reader.read(A, len)
    reader.get_departed_hotkey_info(B)
    assert own(namespace).records == 4
    reader.get_eliminated_hotkeys()
    reader.get_eliminations_dict()
    assert own(namespace) == Counts(checks=12, hits=5, batches=2, records=4, snapshots=2, retries=0)
    with pytest.raises(TypeError):
        reader.is_hotkey_eliminated(5)  # type: ignore[arg-type]
    assert own(namespace).checks == 12
    (found,) = readings_of(namespace).processes
    assert (found.pid, found.uid) == (os.getpid(), os.geteuid())
    assert "pytest" in found.title
    assert abs(found.since_ms / 1000 - time.time()) < PATIENCE
    assert [path.stat().st_mode & 0o777 for path in pages(namespace)] == [0o600]


def test_what_is_overtaken_is_counted_as_retries(namespace: SharedNamespace) -> None:
    table = TableReader(namespace)
    table.flags(A.encode())
    with TableWriter(PrivateNamespace()) as other:
        assert other.entries == 0
    before = own(namespace).retries
    calls = []

    def decode(view: memoryview) -> int:
        calls.append(len(view))
        if len(calls) < 3:
            # Some other version, and this one again: what was read in between does not count.
            words = table._view.root.words
            writable = SharedNamespace(namespace.name).open_root(writable=True).words
            writable[8] += 2
            assert words[8] == writable[8]
        return len(view)

    assert table.read(A.encode(), decode) == calls[-1]
    assert len(calls) == 3
    assert own(namespace).retries == before + 2 == table.retries


def test_readers_of_one_process_share_a_page_and_threads_lose_nothing(
    namespace: SharedNamespace, reader: EliminationReader
) -> None:
    other = EliminationReader(namespace.name)
    each = 20_000 if "native" in type(reader._table).__name__.lower() else 0

    def look(one: EliminationReader) -> None:
        for _ in range(each):
            one.is_hotkey_eliminated(A)

    threads = [threading.Thread(target=look, args=(one,)) for one in (reader, other, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    reader.is_hotkey_eliminated(A)
    assert len(pages(namespace)) == 1
    assert own(namespace).hits == 3 * each + 1


# ---------------------------------------------------------------------- processes that come and go


def test_ten_processes_of_which_three_are_killed_are_counted_exactly(namespace: SharedNamespace) -> None:
    command = [sys.executable, "-c", READING, namespace.name]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    running = [subprocess.Popen([*command, str(100 + n)], **pipes) for n in range(10)]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == b"done\n"
        expected = {process.pid: (2 * (100 + n), 100 + n) for n, process in enumerate(running)}
        total = tuple(map(sum, zip(*expected.values(), strict=True)))
        found = readings_of(namespace)
        assert {one.pid: one.counts[:2] for one in found.processes} == expected
        assert found.total[:2] == total
        for process in running[:3]:
            process.kill()
            process.wait(PATIENCE)
        found = readings_of(namespace)
        assert {one.pid for one in found.processes} == {process.pid for process in running[3:]}
        assert found.total[:2] == total
    finally:
        for process in running:
            process.communicate(timeout=PATIENCE)
    found = readings_of(namespace)
    assert found.processes == []
    assert found.total[:2] == total
    assert [path.name.split(".")[-1] for path in pages(namespace)] == [f"ended-{os.geteuid()}"]


@pytest.mark.parametrize("killed", [False, True])
def test_a_forked_child_counts_for_itself(
    namespace: SharedNamespace, reader: EliminationReader, *, killed: bool
) -> None:
    reader.is_hotkey_eliminated(A)

    def look() -> None:
        for _ in range(7):
            reader.is_hotkey_eliminated(A)
        assert own(namespace).hits == 7
        assert {one.pid for one in readings_of(namespace).processes} == {os.getpid(), os.getppid()}

    assert in_child(look, killed=killed) == (-signal.SIGKILL if killed else 0)
    assert own(namespace).hits == 1
    assert readings_of(namespace).total.hits == 8
    reader.is_hotkey_eliminated(A)
    assert own(namespace).hits == 2


def test_a_child_does_not_keep_its_dead_parents_page_alive(
    namespace: SharedNamespace, reader: EliminationReader
) -> None:
    """The child of a child reads on; the one between them, whose page it was, is gone."""
    told, ended = os.pipe(), os.pipe()

    def between() -> None:
        reader.is_hotkey_eliminated(A)
        if os.fork() == 0:
            os.write(told[1], b"x")
            os.read(ended[0], 1)
            os._exit(0)

    assert in_child(between) == 0
    os.read(told[0], 1)
    found = readings_of(namespace)
    os.write(ended[1], b"x")
    for descriptor in (*told, *ended):
        os.close(descriptor)
    assert found.processes == []
    assert found.total.hits == 1


def test_a_page_goes_with_the_last_reader_and_its_counts_stay(
    namespace: SharedNamespace, reader: EliminationReader
) -> None:
    other = EliminationReader(namespace.name)
    reader.is_hotkey_eliminated(A)
    other.is_hotkey_eliminated(A)
    reader.close()
    assert own(namespace).hits == 2
    del other
    gc.collect()
    found = readings_of(namespace)
    assert found.processes == []
    assert found.total.hits == 2
    again = EliminationReader(namespace.name)
    again.is_hotkey_eliminated(A)
    assert own(namespace).hits == 1
    assert readings_of(namespace).total.hits == 3
    again.close()
    namespace.remove()
    assert pages(namespace) == []


def test_names_that_were_removed_are_made_again_with_the_table(
    namespace: SharedNamespace, reader: EliminationReader
) -> None:
    reader.is_hotkey_eliminated(A)
    for path in pages(namespace):
        path.unlink()
    assert readings_of(namespace).processes == []
    reader._table._seeks_page = True  # as after a move to another root
    reader._table._find_page()
    assert own(namespace).hits == 1
    reader.is_hotkey_eliminated(A)
    assert own(namespace).hits == 2


# ---------------------------------------------------------------------- deaths half-way, and strangers


def test_a_death_between_adding_a_page_and_removing_it_adds_it_once(
    namespace: SharedNamespace, reader: EliminationReader, tmp_path: Path
) -> None:
    in_child(lambda: reader.is_hotkey_eliminated(A), killed=True)
    (page,) = pages(namespace)
    content = page.read_bytes()
    assert readings_of(namespace).total.hits == 1
    assert not page.exists()
    page.write_bytes(content)  # as if it had not come to its removal
    page.chmod(0o600)
    assert readings_of(namespace).total.hits == 1
    page.write_bytes(content)
    page.chmod(0o600)
    in_child(lambda: reader.is_hotkey_eliminated(A), killed=True)
    assert readings_of(namespace).total.hits == 2
    assert readings_of(namespace).total.hits == 2
    assert tmp_path.exists()


def test_ended_counts_that_were_written_half_are_those_of_before(
    namespace: SharedNamespace, reader: EliminationReader
) -> None:
    in_child(lambda: reader.is_hotkey_eliminated(A), killed=True)
    assert readings_of(namespace).total.hits == 1
    (ended,) = pages(namespace)
    before = ended.read_bytes()
    in_child(lambda: reader.is_hotkey_eliminated(A), killed=True)
    assert readings_of(namespace).total.hits == 2
    after = ended.read_bytes()
    seen = set()
    for torn in {after[:cut] + before[cut:] for cut in range(PAGE)}:
        ended.write_bytes(torn)
        seen.add(readings_of(namespace).total.hits)
    assert seen == {1, 2}


def test_what_strangers_put_there_is_not_looked_at(namespace: SharedNamespace, reader: EliminationReader) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    reader.is_hotkey_eliminated(A)
    (page,) = pages(namespace)
    prefix = namespace.readers_prefix
    content = page.read_bytes()
    fields = counting._ENDED.pack(1, 0, *[1000] * 6)
    strangers = {
        f"{1:016x}": content,  # a copy under another name
        f"{8:016x}": content[:16] + (8).to_bytes(8, "little") + content[24:],
        "ended-54321": sealed(fields, counting._SEED).ljust(PAGE, b"\0"),
        f"{2:016x}": b"",
        f"{3:016x}": bytes(PAGE),
        f"{4:016x}": content[:100],
        "ended-12345": bytes(PAGE),
        "ended-x": content,
    }
    for rest, bytes_ in strangers.items():
        path = Path(prefix + rest)
        path.write_bytes(bytes_)
        path.chmod(0o600)
        os.chown(path, 12345, 12345)
    Path(f"{prefix}{5:016x}").symlink_to("/etc/passwd")
    os.mkfifo(f"{prefix}{6:016x}")
    Path(f"{prefix}{7:016x}").mkdir()
    try:
        assert readings_of(namespace).total.checks == 1
        in_child(lambda: reader.is_hotkey_eliminated(A), killed=True)
        assert readings_of(namespace).total.checks == 2
        assert page.exists()
        for rest in strangers:
            assert Path(prefix + rest).exists(), "what is another user's is not touched"
        page.chmod(0o622)
        assert readings_of(namespace).total.checks == 1, "others may write to it"
    finally:
        Path(f"{prefix}{7:016x}").rmdir()
        for path in pages(namespace):
            path.unlink()


@pytest.mark.parametrize("like", ["ended-", "t-ended-"])
def test_a_name_like_that_of_the_counts_of_ended_readers_is_a_name_like_another(like: str) -> None:
    with published(SharedNamespace(like + os.urandom(4).hex())) as namespace:
        reader = EliminationReader(namespace.name)
        assert reader.is_hotkey_eliminated(A)
        assert [process.pid for process in readings_of(namespace).processes] == [os.getpid()]
        in_child(lambda: reader.is_hotkey_eliminated(A), killed=True)
        found = readings_of(namespace)
        assert ([process.pid for process in found.processes], found.total.hits) == ([os.getpid()], 2)


def test_a_group_that_may_read_the_table_may_see_who_reads(
    namespace: SharedNamespace, reader: EliminationReader
) -> None:
    root = Path("/dev/shm") / namespace.root_name[1:]
    root.chmod(0o640)
    reader.is_hotkey_eliminated(A)
    (page,) = pages(namespace)
    assert page.stat().st_mode & 0o777 == 0o640
    assert page.stat().st_gid == root.stat().st_gid


def test_where_no_page_can_be_made_nothing_is_counted_and_nothing_else_differs(
    namespace: SharedNamespace, reader: EliminationReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "MOST_PAGES", 0)
    assert reader.is_hotkey_eliminated(A) is True
    assert reader.is_hotkey_eliminated(B) is False
    assert pages(namespace) == []
    assert readings_of(namespace) == ([], NOTHING)
    monkeypatch.setattr(SharedNamespace, "readers_prefix", "/nowhere/at.all.")
    other = EliminationReader(namespace.name)
    assert other.is_hotkey_eliminated(A) is True
    monkeypatch.undo()
    assert pages(namespace) == []


LAST_WORDS = """
import sys
from shmelim import EliminationReader
class Last:
    def __init__(self, reader):
        self.reader = reader
    def __del__(self):
        print(self.reader.is_hotkey_eliminated("a" * 48))
last = Last(EliminationReader(sys.argv[1]))
"""


def test_the_first_read_may_come_while_the_interpreter_ends(namespace: SharedNamespace) -> None:
    """When most names are gone, which the counting needs."""
    command = [sys.executable, "-c", LAST_WORDS, namespace.name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.stdout, "Traceback" in done.stderr) == ("True\n", False)  # of a slower path it may say something


def test_private_memory_is_not_counted() -> None:
    namespace = PrivateNamespace()
    with TableWriter(namespace) as writer:
        writer.load([(b"a", 1, b"", None)])
        assert TableReader(namespace).flags(b"a") == 1
    assert readings_of(namespace) == ([], NOTHING)


def test_a_reader_owns_no_descriptor_for_its_page(namespace: SharedNamespace, reader: EliminationReader) -> None:
    reader.is_hotkey_eliminated(A)
    (page,) = pages(namespace)
    opened = [path.stat().st_ino for path in Path("/proc/self/fd").iterdir() if path.exists()]
    assert page.stat().st_ino not in opened
