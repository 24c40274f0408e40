"""Reads that publishes overtake, at every single access to shared memory, without threads or chance.

The reader's segments are interposed: at the n-th touch of shared memory the writer publishes, in the same thread,
and then the read goes on. For every n, the answer must be that of one of the states that were published between
the read's begin and end. The same exploration with the version word (and the epochs) frozen for the length of a
read, which is a reader without its recheck, must find wrong answers; else it would prove nothing.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Any

import pytest

from shmelim.errors import ShmelimError
from shmelim.shm import SharedNamespace, TableWriter, layout
from shmelim.shm import writer as writer_module
from shmelim.shm.image import Image
from shmelim.shm.layout import EPOCH, VERSION
from shmelim.shm.reader import TableReader  # the reference: the other path cannot be interposed
from shmelim.shm.segment import Segment
from shmelim.shm.view import View

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONG = b"k" * 60
KEYS = [b"a", b"b", b"c", LONG + b"1", LONG + b"2", b"absent", LONG + b"absent"]


class Memory(mmap.mmap):
    """Tells its namespace before it is sliced."""

    touch: Callable[[], None]

    def __getitem__(self, item: Any) -> Any:
        self.touch()
        return super().__getitem__(item)


class Words:
    """A segment's words, of which some can be frozen at the value that a read saw first."""

    def __init__(self, words: memoryview, touch: Callable[[], None], seen: dict[Any, int] | None) -> None:
        self._words = words
        self._touch = touch
        self._seen = seen
        self.freezable: set[int] = set()

    def __getitem__(self, item: Any) -> Any:
        self._touch()
        if self._seen is not None and not isinstance(item, slice) and item in self.freezable:
            return self._seen.setdefault((id(self), item), self._words[item])
        return self._words[item]


class Interposed(SharedNamespace):
    """A namespace whose readers run something at the n-th touch of shared memory."""

    def __init__(self, name: str, *, frozen: bool) -> None:
        super().__init__(name)
        self.seen: dict[Any, int] | None = {} if frozen else None
        self._left = 0
        self._act: Callable[[], None] | None = None

    def arm(self, touches: int, act: Callable[[], None]) -> None:
        self._left, self._act = touches, act
        if self.seen is not None:
            self.seen.clear()

    def disarm(self) -> None:
        self._act = None

    def _touch(self) -> None:
        self._left -= 1
        if self._left == 0 and self._act is not None:
            act, self._act = self._act, None
            act()

    def _interpose(self, name: str, generation: int | None) -> Segment:
        descriptor = os.open(f"/dev/shm{name}", os.O_RDONLY)
        try:
            status = os.fstat(descriptor)
            memory = Memory(descriptor, status.st_size, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(descriptor)
        memory.touch = lambda: None
        segment = Segment(name, memory, (status.st_dev, status.st_ino))
        words = Words(segment.words, self._touch, self.seen)
        if generation is None:
            words.freezable = {VERSION}
        else:
            root = super().open_root()
            view = View(segment, root.words[VERSION], root)
            words.freezable = {word + EPOCH for word in view.header_word}
        segment.words = words  # type: ignore[assignment]
        memory.touch = self._touch
        return segment

    def open_root(self, *, writable: bool = False) -> Segment:
        return super().open_root(writable=True) if writable else self._interpose(self.root_name, None)

    def open_data(self, generation: int) -> Segment:
        return self._interpose(self.data_name(generation), generation)


OPERATIONS: dict[str, Callable[[TableReader], Any]] = {
    "flags": lambda reader: reader.flags(b"b"),
    "flags of a long key": lambda reader: reader.flags(LONG + b"2"),
    "get": lambda reader: reader.get(b"c"),
    "get a long key": lambda reader: reader.get(LONG + b"2"),
    "read": lambda reader: reader.read(b"c", bytes),
    "flags_of": lambda reader: reader.flags_of(KEYS).tolist(),
    "snapshot": lambda reader: _in_order(reader.snapshot()),
    "info": lambda reader: reader.info(),
    "count_flag": lambda reader: reader.count_flag(0),
}


def _in_order(snapshot: Any) -> tuple[int, list[Any]]:
    return snapshot.version, list(snapshot.entries.items())


def touching(writer: TableWriter) -> None:
    """Change the flags and the record of a key, remove the first of a cluster."""
    with writer.transaction() as transaction:
        flags = 5 if writer.version & 1 else 6
        transaction.put(b"c", flags, b"%d" % flags * 40)
        transaction.remove(KEYS[0] if writer.entries > 4 else KEYS[1])
        transaction.put(LONG + b"2", flags, b"other" * flags)


def moving(writer: TableWriter) -> None:
    """Remove one of a cluster's keys and put it back: the others move."""
    with writer.transaction() as transaction:
        transaction.remove(b"a")
        transaction.remove(LONG + b"1")
    with writer.transaction() as transaction:
        transaction.put(LONG + b"1", 9, b"back" * 4)
        transaction.put(b"a", 8, b"back" * 9)


def compacting(writer: TableWriter) -> None:
    """Fill the arena of the smallest size until it must be compacted."""
    for number in range(3):
        with writer.transaction() as transaction:
            transaction.put(b"a", number, bytes([number]) * 1000)
            transaction.put(b"b", 16 + number, bytes([number]) * 100)


def growing(writer: TableWriter) -> None:
    """Move to a larger segment."""
    with writer.transaction() as transaction:
        for number in range(20):
            transaction.put(b"new-%d" % number, 7, b"x" * 200)
    with writer.transaction() as transaction:
        transaction.put(b"c", 1, b"after growth")


def replacing(writer: TableWriter) -> None:
    """Replace everything."""
    for round_ in range(2):
        with writer.transaction(replace=True) as transaction:
            for key in reversed(KEYS[:5]):
                transaction.put(key, 32 + round_, bytes([round_]) * 33)


def waiting(writer: TableWriter) -> None:
    """Publish once, and leave the next transaction staged: what it staged must not be seen."""
    touching(writer)
    transaction = writer.transaction()
    for key in KEYS[1:5]:
        transaction.put(key, 128, b"unpublished" * 3)
    transaction.put(b"new", 1)
    transaction.remove(b"a")
    transaction.stage()


def waiting_to_compact(writer: TableWriter) -> None:
    """Publish once, and leave a compaction staged: it writes over the copy that was current before."""
    with writer.transaction() as transaction:
        for number in range(3):
            transaction.put(b"a", 64 + number, bytes([number]) * 1000)
        transaction.remove(b"b")
    used = _used(writer)
    transaction = writer.transaction()
    transaction.put(b"c", 65, b"x" * 900)
    transaction.stage()
    assert _used(writer, staged=True) < used + 900


def waiting_to_replace(writer: TableWriter) -> None:
    """Publish once, and leave a replacement of everything staged."""
    with writer.transaction() as transaction:
        transaction.remove(b"b")
    transaction = writer.transaction(replace=True)
    for key in reversed(KEYS[:5]):
        transaction.put(key, 32, b"replaced" * 5)
    transaction.stage()


def _used(writer: TableWriter, *, staged: bool = False) -> int:
    return writer._images[writer.version + staged & 1].used


CHANGES = [touching, moving, compacting, growing, replacing, waiting, waiting_to_compact, waiting_to_replace]


def weaken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all keys belong to two slots; the compiled image has a hash of its own."""
    strong = layout.key_hash
    monkeypatch.setattr(layout, "key_hash", lambda key, seed: strong(key, seed) & 1)
    monkeypatch.setattr(writer_module, "Image", Image)


@pytest.fixture(params=["colliding", "strong"])
def _hash(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "colliding":
        weaken(monkeypatch)


def explore(name: str, *, frozen: bool) -> Iterator[tuple[str, str, int, Any, list[Any]]]:
    """Yield operation, change, touch, the answer, and the answers that are right."""
    for operation, run in OPERATIONS.items():
        for change in CHANGES:
            SharedNamespace(name).remove()
            with TableWriter(SharedNamespace(name), capacity=16, arena_size=4096) as writer:
                right, touch = [None, None], 0
                while len(right) > 1:
                    touch += 1
                    answer, right = overtake(writer, Interposed(name, frozen=frozen), run, change, touch)
                    yield operation, change.__name__, touch, answer, right


def overtake(
    writer: TableWriter,
    namespace: Interposed,
    run: Callable[[TableReader], Any],
    change: Callable[[TableWriter], None],
    touch: int,
) -> tuple[Any, list[Any]]:
    """Run an operation that a change overtakes at one touch; return its answer and all that are right."""
    writer.load((key, number + 1, b"r%d" % number * 9, None) for number, key in enumerate(KEYS[:5]))
    reader = TableReader(namespace)
    plain = TableReader(SharedNamespace(namespace.name))
    right = [run(plain)]

    def act() -> None:
        publish = writer._publish

        def publishing(staged: Any) -> int:
            version = publish(staged)
            right.append(run(plain))
            return version

        writer._publish = publishing
        change(writer)
        del writer._publish

    namespace.arm(touch, act)
    try:
        answer = run(reader)
    except ShmelimError as error:
        answer = error
    namespace.disarm()
    if writer._open is not None:
        writer._open.abort()
    return answer, right


@pytest.mark.usefixtures("_hash")
def test_every_answer_is_that_of_a_published_state(table_name: str) -> None:
    count = 0
    for operation, change, touch, answer, right in explore(table_name, frozen=False):
        assert answer in right, (operation, change, touch, answer, right)
        count += len(right) > 1
    assert count > 200


def test_without_the_recheck_every_operation_goes_wrong(table_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weaken(monkeypatch)
    wrong = set()
    answers = explore(table_name, frozen=True)
    for operation, _change, _touch, answer, right in answers:
        if answer not in right:
            wrong.add(operation)
    assert wrong == set(OPERATIONS)
