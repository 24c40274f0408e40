"""Writing a table: the one process of its name that may."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, Generic, NoReturn, Self, TypedDict, Unpack, cast, overload

import msgspec

from shmelim.errors import (
    AlreadyServingError,
    CorruptSegmentError,
    NotServingError,
    SegmentFormatError,
    ShmelimError,
)
from shmelim.shm import PrivateNamespace, TableReader, TableWriter
from shmelim.shm.layout import MAX_KEY, MAX_RECORD
from shmelim.system import forks
from shmelim.system.arguments import flags, functions, whole
from shmelim.system.text import get_logger
from shmelim.table.naming import MSGPACK, OTHER, RAW, TableNamespace, check_key_type, kind
from shmelim.table.reader import Reader
from shmelim.table.snapshot import K, V

_MOST_KEYS: Final = 1 << 32
_BEAT: Final = 1.0  # seconds between two heartbeats
_PRESENT: Final = 1
_SINCE: Final = 1_577_836_800_000_000_000  # 2020, in ns since 1970
_STEP: Final = 4_000
"""A new table's version begins with the clock in steps of so many ns: nobody publishes more often in the mean."""

_to_msgpack: Final = msgspec.msgpack.Encoder().encode
_log = get_logger("shmelim.table")


class _Making(TypedDict, total=False):
    """What every way to make a writer takes besides."""

    keep: bool
    capacity: int
    mode: int


class Writer(Generic[K, V]):
    """The one writer of a table in shared memory, whose values outlive it.

    When a method returns, every later read in every process sees what it did; readers see all of a transaction or
    none of it. A writer that is killed at any moment leaves what it published last, and the next one takes over
    without any reader reopening anything. Nothing is on disk: a reboot empties the table.

    A put costs some 4 µs, a key in a transaction some 0.3 µs, and what encoding takes. The table grows as it must,
    and never asks for a size: it takes two copies, each of 128 to 256 bytes a key and one and a half times what
    keys and values take, and 0.7 MB at least. Threads may share a writer: each call, and each transaction, is
    published whole. A forked child cannot use it. Not for signal handlers: one that interrupts a publish gets an
    error.

    A thread renews the heartbeat each second, by which readers know that the writer lives, and makes names again
    that were lost from ``/dev/shm``.

    Parameters
    ----------
    name
        1 to 16 of ``a-z 0-9 _ -``, of which a host's tables share a space that they share with nothing else;
        None makes a table in private memory, for tests: only :meth:`reader` leads to it.
    keys
        ``str`` or ``bytes``; keys have 1 to 255 bytes (of UTF-8).
    encode
        What makes bytes of a value, at most 4 GiB. By default msgpack, of what ``msgspec`` can encode; ``bytes``
        takes bytes as they are.
    keep
        Whether to go on with what a predecessor left; by default the table starts empty.
    capacity
        How many keys it is made for; with more, it grows.
    mode
        Permissions of the segments: 0o600, or 0o640 to let a group read.

    Raises
    ------
    AlreadyServingError
        Another writer of that name lives, in this process or another.
    SegmentFormatError
        ``keep``, and what is there has other keys or another encoding, or is of another release.
    CorruptSegmentError
        ``keep``, and what is there is damaged.
    SegmentFullError
        No shared memory is left, now or at a later publish; what was published stays as it is.
    ValueError, TypeError
        The name, the mode or the type of keys is not a legal one.
    UntrustedSegmentError, UnsupportedPlatformError
        Another user has the name in ``/dev/shm``; this machine has none, or needs the compiled path.

    Examples
    --------
    >>> from shmelim.table import Reader
    >>> with Writer("docs-prices") as prices:
    ...     _ = prices.put("BTC/USD", 97_250.5)
    ...     with prices.transaction() as transaction:
    ...         transaction.put("ETH/USD", 3_400.0)
    ...         transaction.remove("BTC/USD")
    >>> with Writer("docs-prices", keep=True) as successor:
    ...     print(dict(Reader("docs-prices")))
    ...     successor.close(unlink=True)
    {'ETH/USD': 3400.0}

    """

    @overload
    def __init__(self: Writer[str, Any], name: str | None, **options: Unpack[_Making]) -> None: ...
    @overload
    def __init__(self: Writer[K, Any], name: str | None, *, keys: type[K], **options: Unpack[_Making]) -> None: ...
    @overload
    def __init__(
        self: Writer[str, V], name: str | None, *, encode: Callable[[V], bytes], **options: Unpack[_Making]
    ) -> None: ...
    @overload
    def __init__(
        self, name: str | None, *, keys: type[K], encode: Callable[[V], bytes], **options: Unpack[_Making]
    ) -> None: ...
    def __init__(
        self,
        name: str | None,
        *,
        keys: Any = str,
        encode: Any = None,
        keep: bool = False,
        capacity: int = 512,
        mode: int = 0o600,
    ) -> None:
        check_key_type(keys)
        functions(encode=encode)
        flags(keep=keep)
        slots = 2 * max(whole("capacity", capacity, least=0, most=_MOST_KEYS), 1)
        self.name = name
        self._keys = keys
        self._text = keys is str
        self._encode: Callable[[V], bytes] = _as_it_is if encode is bytes else encode or _to_msgpack
        values = RAW if encode is bytes else OTHER if encode else MSGPACK
        self._namespace = PrivateNamespace() if name is None else TableNamespace(name, mode=mode)
        # Held while the table is changed; re-entrant, so that a signal handler gets an error and does not hang.
        self._lock = threading.RLock()
        self._publishing = False
        try:
            first = (time.time_ns() - _SINCE) // _STEP
            self._table = TableWriter(
                self._namespace, capacity=slots, store_id=kind(keys, values), first_sequence=first
            )
        except AlreadyServingError as error:
            raise self._has_another_writer() from error
        try:
            if not (keep and self._adopted()):
                self._table.load([])
        except BaseException:
            self._table.close()
            raise
        stop = threading.Event()
        self._end = weakref.finalize(self, _close, self._table, stop)
        forks.register(self)
        threading.Thread(
            target=_beat, args=(self._table, self._lock, stop), name=f"shmelim-table-{name}", daemon=True
        ).start()

    def _adopted(self) -> bool:
        """Go on with what is published, if something is."""
        try:
            identity = TableReader(self._namespace).identity()
        except NotServingError:
            return False
        except CorruptSegmentError as error:
            raise self._is_damaged(f": {error.message}") from error
        found = identity.store_id
        if found != self._table.store_id:
            raise SegmentFormatError(
                f"the table {self.name!r} has other keys or another encoding than this writer: it is a "
                f"{found.decode('ascii', 'replace')!r}, this would be a {self._table.store_id.decode()!r}",
                hint="give this writer the same keys= and encode=, or start empty with keep=False",
            )
        if not identity.entries:
            return False  # older headers have no checksum: without entries nothing tells whether the seed is right
        if not self._table.adopt():
            raise self._is_damaged()
        return True

    def _is_damaged(self, how: str = "") -> CorruptSegmentError:
        text = f"what a predecessor left in the table {self.name!r} is damaged{how}"
        return CorruptSegmentError(text, hint="start with keep=False")

    def _has_another_writer(self) -> AlreadyServingError:
        try:
            who = f", process {TableReader(self._namespace).writer().pid}"
        except (ShmelimError, OSError):
            who = ""
        return AlreadyServingError(
            f"the table {self.name!r} has a writer already{who}",
            hint="a table has one: end that one first, or write another name; shmelim.table.Reader reads it",
        )

    def after_fork_in_child(self) -> None:
        """Let a call in the child fail where it would wait for a thread that is not there."""
        self._lock = threading.RLock()
        self._publishing = False

    # ------------------------------------------------------------------ changes

    def put(self, key: K, value: V) -> int:
        """Give a key a value; return the new version, which readers see from now on.

        A known key keeps its place in the order.

        Raises
        ------
        TypeError, ValueError
            The key is of another type, or has not 1 to 255 bytes; the value cannot be encoded. Nothing has
            happened.
        SegmentFullError
            No room to grow. Nothing has happened.
        AlreadyServingError
            The names of this writer were removed, and another one has the name by now.
        ShmelimError
            The writer is closed, or its process forked this one.

        """
        return self._publish([self._change(key, value)])

    def remove(self, key: K) -> int:
        """Remove a key; absent, it stays so. Returns and raises as :meth:`put`."""
        return self._publish([(self._key(key), None, b"", None)])

    def replace_all(self, values: Mapping[K, V] | Iterable[tuple[K, V]]) -> int:
        """Put these values in the place of all others, in one transaction; return the new version.

        They are a mapping, or pairs; of pairs with the same key, the last one counts. Costs some 0.5 µs a value.
        Readers see the old values or the new ones, and never an empty table. Raises as :meth:`put`.
        """
        pairs = values.items() if isinstance(values, Mapping) else values
        change = self._change
        return self._publish([change(key, value) for key, value in pairs], replace=True)

    def transaction(self) -> Transaction[K, V]:
        """Begin a transaction. Others may go on writing meanwhile, and several may be open."""
        return Transaction(self)

    def _change(self, key: Any, value: V) -> tuple[bytes, int | None, bytes, int | None]:
        # What is usual in as few steps as can be: this is most of what a put in a transaction costs.
        packed = key.encode() if self._text and type(key) is str else self._key(key)
        record = self._encode(value)
        if not 0 < len(packed) <= MAX_KEY or type(record) is not bytes or len(record) > MAX_RECORD:
            packed, record = self._key(key), _checked(key, record)
        return packed, _PRESENT, record, None

    def _key(self, key: Any) -> bytes:
        if not isinstance(key, self._keys):
            raise TypeError(f"keys of the table {self.name!r} must be {self._keys.__name__}, not {key!r:.60}")
        packed = str.encode(key) if self._text else bytes(key)
        if not 0 < len(packed) <= MAX_KEY:
            raise ValueError(f"key {key!r:.60} of {len(packed)} bytes must be 1 to {MAX_KEY} bytes long")
        return packed

    def _publish(self, changes: list[Any], *, replace: bool = False) -> int:
        with self._lock:
            if self._publishing:
                raise ShmelimError(
                    f"a publish of the table {self.name!r} was interrupted by this one",
                    hint="leave it to another thread to write what a signal handler has to say",
                )
            self._publishing = True
            try:
                return self._table.apply(changes, replace=replace)
            finally:
                self._publishing = False

    # ------------------------------------------------------------------ the table

    @property
    def version(self) -> int:
        """The version that was published last. One load."""
        return self._table.version

    def reader(self, decode: Callable[[bytes], V] | None = None) -> Reader[K, V]:
        """Return a reader of this table in this process, which may be of private memory.

        ``decode`` is as :class:`Reader`'s; needed where there is an ``encode`` other than ``bytes``.
        """
        if decode is None and self._encode is _as_it_is:
            decode = cast("Callable[[bytes], V]", bytes)
        return cast("Reader[K, V]", Reader.over(self._namespace, keys=self._keys, decode=decode))

    def close(self, *, unlink: bool = False) -> None:
        """End writing; what is published stays readable. Idempotent, and done by itself at the process' end.

        ``unlink`` removes the table's names, too: nobody can attach any more; who has, keeps the last values.
        """
        if self._end.alive:
            with self._lock:
                if unlink and isinstance(self._namespace, TableNamespace):
                    with contextlib.suppress(ShmelimError):  # another writer's, or the process' that forked this
                        self._table.renew()
                        self._namespace.remove()  # while nobody else can have made them
                self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of the table {self.name!r}>"


class Transaction(Generic[K, V]):
    """Changes of a table that become visible together, or not at all. Made by :meth:`Writer.transaction`.

    At the end of the ``with`` block they are published, in the order in which they were made; if the block raises,
    none of them is. One thread uses it.

    Attributes
    ----------
    version : int | None
        What was published, once it is.

    Examples
    --------
    >>> writer = Writer(None)
    >>> with writer.transaction() as transaction:
    ...     transaction.put("a", 1)
    ...     transaction.put("b", 2)
    >>> transaction.version == writer.version, dict(writer.reader())
    (True, {'a': 1, 'b': 2})
    >>> writer.close()

    """

    def __init__(self, writer: Writer[K, V]) -> None:
        self._writer = writer
        self._change = writer._change  # noqa: SLF001
        self._changes: list[Any] | None = []
        self.version: int | None = None

    def put(self, key: K, value: V) -> None:
        """Give a key a value; errors as of :meth:`Writer.put`, and the transaction is as before."""
        if self._changes is None:
            self._refuse()
        self._changes.append(self._change(key, value))

    def remove(self, key: K) -> None:
        """Remove a key; absent, it stays so. Errors as of :meth:`put`."""
        if self._changes is None:
            self._refuse()
        self._changes.append((self._writer._key(key), None, b"", None))  # noqa: SLF001

    def __enter__(self) -> Self:
        if self._changes is None:
            self._refuse()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        changes, self._changes = self._changes, None
        if kind is None and changes:
            self.version = self._writer._publish(changes)  # noqa: SLF001

    @staticmethod
    def _refuse() -> NoReturn:
        raise ShmelimError("this transaction has ended", hint="begin another one")


def _as_it_is(value: Any) -> bytes:
    return cast("bytes", value)


def _checked(key: object, record: object) -> bytes:
    """Return what an encoder made as bytes of their own; TypeError or ValueError where it made something else."""
    if not isinstance(record, (bytes, bytearray, memoryview)):
        raise TypeError(f"the value of {key!r:.60} must be encoded as bytes, not {type(record).__name__}")
    own = memoryview(record).tobytes()
    if len(own) > MAX_RECORD:
        raise ValueError(f"the value of {key!r:.60} takes {len(own):,} bytes, more than {MAX_RECORD:,}")
    return own


def _close(table: TableWriter, stop: threading.Event) -> None:
    stop.set()
    table.close()


def _beat(table: TableWriter, lock: Any, stop: threading.Event) -> None:
    """Say each second that the writer lives, and make lost names again; does not refer to the writer's object."""
    told = ""
    while not stop.wait(_BEAT):
        try:
            if not table.beat():
                with lock:
                    if not stop.is_set():
                        table.renew()
            told = ""
        except (ShmelimError, OSError) as error:
            if told != str(error):
                told = str(error)
                _log.error("names of a table were lost, and could not be made again: %s", error)
