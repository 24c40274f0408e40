"""How much is read, and by which processes: each counts in a page of its own, at which others look.

A page is a file beside the table's segments, made by a process's first read of a name. Its process lives for as
long as a lock (``flock``) is held on it, which the mapping does, so that the kernel tells when the process is
gone, however it went. What it left is then added to the counts of *ended* readers, a file for each user, by
whoever comes by: the process itself where it ends in order, the next reader, or who looks. Where no page can be
made, nothing is counted, and nothing else is different.

A page has one writer, its process. The ended counts are written under a lock; of two copies with stamp and
checksum the newer whole one counts, and it names the page that was added last, so that a death before that
page's removal neither loses it nor adds it twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, Protocol, Self

from shmelim.errors import ShmelimError
from shmelim.shm.layout import PAGE, WORD, sealed, unsealed
from shmelim.shm.mapping import READ, WRITE, is_anybody, map_writable, open_file
from shmelim.shm.segment import Namespace, Segment
from shmelim.shm.shared import reserve

MISSES, HITS, BATCHES, RECORDS, SNAPSHOTS, RETRIES = range(6)
"""The counts, as words of a page from :data:`FIRST` on; a hit is a check of a key that has the first flag."""
COUNTS: Final = 6
FIRST: Final = 64

MOST_PAGES: Final = 512
"""Pages of one name: a process that finds so many makes none."""

_MAGIC: Final = int.from_bytes(b"SHMELRDR", "little")
_FORMAT: Final = 1
_HEADER: Final = struct.Struct("<6Q")  # magic, format, id, pid, since_ms, bytes of the title
_COUNTS: Final = struct.Struct(f"<{COUNTS}Q")
_TITLE: Final = 128
_TITLE_SIZE: Final = 384
_ENDED: Final = struct.Struct(f"<{2 + COUNTS}Q")  # stamp, id of the page that was added last, the counts
_ENDED_NAME: Final = "ended-"
_ENDED_COPIES: Final = (0, 256)
_SEED: Final = 0x454E444544  # a copy of zeros is not a whole one
_ATTEMPTS: Final = 16
_LONGEST: Final = 0.1  # seconds that a first read waits for another thread's


class Counts(NamedTuple):
    """What was read.

    ``checks`` are of one key each, ``hits`` those among them that found it with the first flag; ``batches`` are of
    many keys. ``records`` are single ones, ``snapshots`` copies of all keys or records. ``retries`` are reads that
    started over because a publish overtook them.
    """

    checks: int
    hits: int
    batches: int
    records: int
    snapshots: int
    retries: int

    @classmethod
    def of(cls, words: Any) -> Self:
        """Return the counts that the words of a page say."""
        return cls(words[MISSES] + words[HITS], words[HITS], *words[BATCHES:COUNTS])


class ReadingProcess(NamedTuple):
    """A process that reads a name: its pid in its own pid namespace, its user, its command line, and what it read.

    ``since_ms`` is when it read first, in ms since 1970 (UTC). The title is a stranger's text, to be escaped.
    """

    id: int
    pid: int
    uid: int
    title: str
    since_ms: int
    counts: Counts


class Readings(NamedTuple):
    """Who reads a name now, the longest first; and what was read in all, by processes that ended since, too."""

    processes: list[ReadingProcess]
    total: Counts


# ---------------------------------------------------------------------- a process's own page


class Counting(Protocol):
    """A table that counts in a page; see ``reader.py``."""

    _page: ReadingPage | None
    _seeks_page: bool

    def _count_in(self, page: Any, first: int, /) -> None:
        """Count in these words from now on."""


class ReadingPage:
    """The page in which this process counts its reads of one name; ended with the last table that counts in it."""

    def __init__(self, prefix: str, root: str) -> None:
        """Make it; OSError or ShmelimError where that cannot be."""
        number = int.from_bytes(os.urandom(WORD), "little") or 1
        path = f"{prefix}{number:016x}"
        title = _title()
        # It gets its name when it is locked and written: nobody takes it for one that was left.
        with open_file(os.path.dirname(prefix), os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC) as file:  # noqa: PTH120
            descriptor = file.fileno()
            _share(descriptor, root)
            reserve(descriptor, PAGE)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            now_ms = time.time_ns() // 1_000_000
            header = _HEADER.pack(_MAGIC, _FORMAT, number, os.getpid(), now_ms, len(title))
            os.pwrite(descriptor, header, 0)
            os.pwrite(descriptor, title, _TITLE)
            words = Segment(path, map_writable(descriptor, PAGE)).words
            # The directory goes for nothing beside a path that is whole; with one, the link in /proc is followed.
            os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor)
        self.path = path
        self._tables: weakref.WeakSet[Counting] = weakref.WeakSet()
        self.words = words
        self._number, self._prefix, self._root = number, prefix, root

    def take(self, table: Counting) -> None:
        """Have a table count in it."""
        if table._page is self:  # noqa: SLF001
            return
        self._tables.add(table)
        table._count_in(self.words, FIRST)  # noqa: SLF001
        table._page = self  # noqa: SLF001  # which keeps it

    def __del__(self) -> None:
        """Add it to the ended ones; where that cannot be, as while the interpreter ends, others will do it."""
        with contextlib.suppress(Exception):
            if self.path:
                counts = self.words[FIRST : FIRST + COUNTS].tolist()
                _add(self.path, self._number, counts, self._prefix, self._root)

    def replace(self, lost: Self) -> None:
        """Go on from a page whose name was removed."""
        for at in range(FIRST, FIRST + COUNTS):
            self.words[at] += lost.words[at]
        for table in list(lost._tables):
            self.take(table)

    def after_fork_in_child(self) -> None:
        """Let go of what is the parent's; the child's tables look for a page of its own with their next read."""
        self.path = ""
        for table in list(self._tables):
            table._count_in(None, 0)  # noqa: SLF001
            table._page, table._seeks_page = None, True  # noqa: SLF001
        # Unmapped with the last reference: until then the child, too, would hold the parent's lock.
        del self.words


# By prefix. Written by who has _making, and by a child, which is alone.
_pages: weakref.WeakValueDictionary[str, ReadingPage] = weakref.WeakValueDictionary()
_making = threading.RLock()  # re-entrant for a signal handler that forks


def find_page(table: Counting, namespace: Namespace) -> None:
    """Have a table count in this process's page of its name, which is made if need be; never raises.

    It takes some 0.1 ms, once. Where another thread is at it for too long, the table looks again a second later.
    """
    prefix = namespace.readers_prefix
    assert prefix is not None
    if not _making.acquire(timeout=_LONGEST):
        return
    try:
        page = _pages.get(prefix)
        table._seeks_page = False  # noqa: SLF001
        lost = page if page is not None and not os.path.lexists(page.path) else None
        if page is None or lost is not None:
            root = _root_of(prefix)
            with contextlib.suppress(Exception):  # the interpreter may be ending, too
                if _sweep(prefix, root) < MOST_PAGES:
                    page = _pages[prefix] = ReadingPage(prefix, root)
                    if lost is not None:
                        page.replace(lost)
        if page is not None:
            page.take(table)
    finally:
        _making.release()


def _in_child() -> None:
    pages = list(_pages.values())
    _pages.clear()
    for page in pages:
        page.after_fork_in_child()
    _making.release()


os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_in_child)


def _root_of(prefix: str) -> str:
    return prefix.replace("-readers", "", 1).removesuffix(".")


def _title() -> bytes:
    try:
        with open("/proc/self/cmdline", "rb", buffering=0) as file:  # noqa: PTH123  # pathlib is for writers
            return file.read(_TITLE_SIZE).rstrip(b"\0").replace(b"\0", b" ")
    except OSError:
        return b""


def _share(descriptor: int, root: str) -> None:
    """Let the group read a page if it may read the table; a stranger cannot give a file that group."""
    os.fchmod(descriptor, 0o600)
    with contextlib.suppress(OSError):
        status = os.lstat(root)
        if status.st_mode & stat.S_IRGRP:
            os.fchown(descriptor, -1, status.st_gid)
            os.fchmod(descriptor, 0o640)


# ---------------------------------------------------------------------- what processes leave


def _add(path: str, number: int, counts: list[int], prefix: str, root: str) -> None:
    """Add a page's counts to those of this user's ended readers, and remove the page.

    Where the table is gone, nobody asks for its counts any more, and they go, too.
    """
    ended = f"{prefix}{_ENDED_NAME}{os.geteuid()}"
    if not os.path.lexists(root):
        for each in (path, ended):
            _unlink(each)
        return
    with open_file(ended, WRITE | os.O_CREAT) as file:
        descriptor = file.fileno()
        if not _is_ours(os.fstat(descriptor)):
            return
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_size < PAGE:
            _share(descriptor, root)
            reserve(descriptor, PAGE)
        raw = os.pread(descriptor, PAGE, 0)
        copies = [_ended_copy(raw, at) or (0, 0, *[0] * COUNTS) for at in _ENDED_COPIES]
        stamp, last, *totals = max(copies)
        if last:
            _unlink(f"{prefix}{last:016x}")
        if last != number and os.path.lexists(path):
            sums = [total + one & (1 << 64) - 1 for total, one in zip(totals, counts, strict=True)]
            fields = _ENDED.pack(stamp + 1, number, *sums)
            at = _ENDED_COPIES[copies[0][0] > copies[1][0]]
            os.pwrite(descriptor, sealed(fields, _SEED), at)
        _unlink(path)


def _ended_copy(raw: bytes, at: int) -> tuple[int, ...] | None:
    return unsealed(raw[at : at + _ENDED.size + WORD], _ENDED, _SEED)


def _is_ours(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _sweep(prefix: str, root: str) -> int:
    """Add what this user's dead processes left to the ended; return how many pages of the name are left."""
    left = 0
    for path in _pages_at(prefix):
        left += 1
        with contextlib.suppress(OSError, ShmelimError), open_file(path, WRITE) as file:
            status = os.fstat(file.fileno())
            if not _is_ours(status):
                continue
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)  # else it lives
            page = _page_at(path, {os.geteuid()}, None)
            if page is not None:
                _add(path, page[1].id, list(page[2]), prefix, root)
            else:
                _unlink(path)
            left -= 1
    return left


def _pages_at(prefix: str) -> list[str]:
    return [path for path in _paths(prefix) if not path.startswith(prefix + _ENDED_NAME)]


def _paths(prefix: str) -> list[str]:
    """Return all files of a name's readers, those with the counts of ended ones, too."""
    directory, _, start = prefix.rpartition("/")
    found = [name for name in os.listdir(directory) if name.startswith(start)]  # noqa: PTH208
    return [f"{directory}/{name}" for name in sorted(found)]


def _unlink(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108


# ---------------------------------------------------------------------- looking


def readings_of(namespace: Namespace) -> Readings:
    """Return who reads a name, and how much; nothing where it has no pages.

    Counted are pages of this user, of root, of the owner of the table and, where a group may read that, of the
    group's members; what dead processes of this user left is tidied up.
    """
    prefix = namespace.readers_prefix
    if prefix is None:
        return Readings([], Counts(*[0] * COUNTS))
    root = _root_of(prefix)
    with contextlib.suppress(OSError):
        _sweep(prefix, root)
    for _ in range(_ATTEMPTS):
        found = _look(prefix, root)
        if found is not None:
            return found
    raise ShmelimError(
        f"readers of {namespace.name!r} end so fast that they cannot be counted", hint="try again in a moment"
    )


def _look(prefix: str, root: str) -> Readings | None:
    """Look at all pages; None where one was added to the ended meanwhile."""
    trusted, group = {os.geteuid(), 0}, None
    with contextlib.suppress(OSError):
        status = os.lstat(root)
        trusted.add(status.st_uid)
        group = status.st_gid if status.st_mode & stat.S_IRGRP else None
    before = dict(_ended(prefix, trusted, group))
    added = {copy[1] for copy in before.values()}
    totals = [sum(column) for column in zip([0] * COUNTS, *(copy[2:] for copy in before.values()), strict=True)]
    processes = []
    for path in _pages_at(prefix)[: 2 * MOST_PAGES]:
        found = None
        with contextlib.suppress(OSError, ValueError):
            found = _page_at(path, trusted, group)
        if found is None or found[1].id in added:
            continue
        lives, process, counts = found
        totals = [total + one for total, one in zip(totals, counts, strict=True)]
        if lives:
            processes.append(process)
    if dict(_ended(prefix, trusted, group)) != before:
        return None
    return Readings(sorted(processes, key=lambda one: (one.since_ms, one.id)), Counts.of(totals))


def _ended(prefix: str, trusted: set[int], group: int | None) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the counts of ended readers of each user who is believed."""
    for path in _paths(prefix + _ENDED_NAME):
        with contextlib.suppress(OSError), open_file(path, READ) as file:
            if _is_believed(os.fstat(file.fileno()), trusted, group):
                raw = os.pread(file.fileno(), PAGE, 0)
                copies = [copy for at in _ENDED_COPIES if (copy := _ended_copy(raw, at)) is not None]
                if copies:
                    yield path, max(copies)


def _page_at(
    path: str, trusted: set[int], group: int | None
) -> tuple[bool, ReadingProcess, tuple[int, ...]] | None:
    """Return whether the process of a page lives, who it is, and its counts; None for what is not a page.

    It is read, not mapped: whoever owns it could cut it off, which a mapping does not survive.
    """
    with open_file(path, READ) as file:
        status = os.fstat(file.fileno())
        if not _is_believed(status, trusted, group):
            return None
        # First, as what lives now may end, and have counted more by then.
        lives = _is_locked(file.fileno())
        raw = os.pread(file.fileno(), PAGE, 0)
    if len(raw) < PAGE:
        return None
    magic, format_number, number, pid, since_ms, size = _HEADER.unpack_from(raw)
    if (magic, format_number) != (_MAGIC, _FORMAT) or not path.endswith(f".{number:016x}") or size > _TITLE_SIZE:
        return None
    title = raw[_TITLE : _TITLE + size].decode(errors="replace")
    counts = _COUNTS.unpack_from(raw, FIRST * WORD)
    return lives, ReadingProcess(number, pid, status.st_uid, title, since_ms, Counts.of(counts)), counts


def _is_believed(status: os.stat_result, trusted: set[int], group: int | None) -> bool:
    if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o022 or is_anybody(status.st_uid):
        return False
    return status.st_uid in trusted or (group is not None and status.st_gid == group)


def _is_locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
