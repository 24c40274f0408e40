"""Reading a table in any process, without asking anybody."""

from __future__ import annotations

import math
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, ValuesView
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, Final, Self, TypedDict, TypeVar, Unpack, overload

import msgspec

from shmelim.errors import CorruptSegmentError, NotServingError, SegmentFormatError
from shmelim.shm import ITEMS, LOADING_NUMPY, Attached, Lookups, Namespace, SharedNamespace, TableInfo, TableReader
from shmelim.system.arguments import functions
from shmelim.table.naming import MSGPACK, RAW, TableNamespace, check_key_type, is_an_elimination_servers, kind
from shmelim.table.snapshot import Changes, K, Snapshot, V

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")

_ATTEMPTS: Final = 16  # to read many values one by one between two publishes
_PRESENT: Final = 1

_from_msgpack: Final = msgspec.msgpack.Decoder().decode
_raw_values: Final = msgspec.msgpack.Decoder(dict[str, msgspec.Raw]).decode


class _TextKeys(Lookups):
    """Lookups by text."""

    def __init__(self, table: TableReader) -> None:
        self._table = table

    record = Lookups._record  # noqa: SLF001
    read = Lookups._read  # noqa: SLF001
    to_bytes = Lookups._key  # noqa: SLF001
    to_key = staticmethod(bytes.decode)

    def collect(self) -> tuple[int, dict[str, Any]] | None:
        """Return version and records of a table whose values are msgpack, where that is quick; else None."""
        found = self._collect(_PRESENT, ITEMS)
        if found is None:
            return None
        values = _raw_values(found[1])
        # As they come everywhere else: to be decoded by what takes bytes, and compared with them.
        return found[0], dict(zip(values, map(bytes, values.values()), strict=True))


class _ByteKeys:
    """The same by bytes."""

    to_bytes = to_key = staticmethod(bytes)

    def __init__(self, table: TableReader) -> None:
        self._table = table
        self.read = table.read

    def record(self, key: bytes) -> bytes | None:
        found = self._table.get(key)
        return None if found is None else found.data

    def __contains__(self, key: Any) -> bool:
        return self._table.flags(key) != 0

    def collect(self) -> None:
        return None


class _Attaching(TypedDict, total=False):
    """What every way to attach takes besides."""

    wait: float | None
    owner: int | None


class Reader(Attached, Mapping[K, V]):
    """The current values of a table, read from shared memory: a read-only mapping in the order its keys came.

    Every method answers from what is published when it is called, also while the writer is dead, and needs no
    system call (after the first read of a grown table, which maps the new segment; and but for a look at the name,
    once a second at most, while the writer is not known to live). Values are the caller's own. A key of another
    type than the table's raises TypeError.

    A lookup costs about 0.2 µs and what decoding takes; ``len`` is one load. Iteration, :meth:`items` and
    :meth:`values` are those of a :meth:`snapshot`.

    Thread-safe: threads may share one reader. Fork-safe: it works on in a child. Pickles as its name: it attaches
    again where it is unpickled.

    Parameters
    ----------
    name
        As the writer's.
    keys
        ``str`` or ``bytes``, as the writer's.
    decode
        What makes a value of its bytes. By default msgpack is decoded; ``bytes`` gives them as they are, and
        ``msgspec.msgpack.Decoder(SomeType).decode`` gives values of a type of one's own.
    wait
        Seconds to wait for a writer's first publish; None fails at once.
    owner
        The uid whose segments are trusted; None trusts this user's and root's.

    Raises
    ------
    NotServingError
        There is no table of that name.
    SegmentFormatError
        Its keys are of the other type, or its values need another ``decode``; or it is of another release.
    ValueError, TypeError
        The name is not a legal one; ``keys`` is not such a type.
    CorruptSegmentError, UntrustedSegmentError
        What stands in shared memory cannot be read. A read, too, raises the first where bytes contradict each
        other, and another ``SegmentError`` where the table has moved to a segment that cannot be mapped.
    UnsupportedPlatformError
        The compiled read path is missing, and this machine needs it.

    Examples
    --------
    In another process than the writer's, it is ``Reader("prices")``.

    >>> from shmelim.table import Writer
    >>> writer = Writer(None)
    >>> _ = writer.replace_all({"BTC/USD": 97_250.5, "ETH/USD": 3_400.0})
    >>> prices = writer.reader()
    >>> prices["BTC/USD"], prices.get("XRP/USD"), "ETH/USD" in prices, len(prices)
    (97250.5, None, True, 2)
    >>> prices.numbers(["BTC/USD", "XRP/USD"])
    array([97250.5,     nan])
    >>> before = prices.snapshot()
    >>> with writer.transaction() as transaction:
    ...     transaction.put("BTC/USD", 97_251.0)
    ...     transaction.remove("ETH/USD")
    >>> prices.changes(before)[1:]
    ({'BTC/USD': 97251.0}, ['ETH/USD'])
    >>> prices.writer.alive
    True
    >>> writer.close()
    >>> prices.writer.alive, prices["BTC/USD"]
    (False, 97251.0)

    """

    _keys: Any
    _table: Any

    @overload
    def __init__(self: Reader[str, Any], name: str, **options: Unpack[_Attaching]) -> None: ...
    @overload
    def __init__(self: Reader[K, Any], name: str, *, keys: type[K], **options: Unpack[_Attaching]) -> None: ...
    @overload
    def __init__(
        self: Reader[str, V], name: str, *, decode: Callable[[bytes], V], **options: Unpack[_Attaching]
    ) -> None: ...
    @overload
    def __init__(
        self, name: str, *, keys: type[K], decode: Callable[[bytes], V], **options: Unpack[_Attaching]
    ) -> None: ...
    def __init__(
        self,
        name: str,
        *,
        keys: Any = str,
        decode: Any = None,
        wait: float | None = None,
        owner: int | None = None,
    ) -> None:
        self._owner = owner
        self._attach(TableNamespace(name, owner=owner), keys, decode, wait)

    @classmethod
    def over(cls, namespace: Namespace, *, keys: type[K], decode: Callable[[bytes], V] | None = None) -> Self:
        """Read the table in a namespace that this process already has; for :meth:`Writer.reader`."""
        reader = cls.__new__(cls)
        reader._owner = None  # noqa: SLF001
        reader._attach(namespace, keys, decode, None)  # noqa: SLF001
        return reader

    def _attach(self, namespace: Namespace, keys: type, decode: Any, wait: float | None) -> None:
        check_key_type(keys)
        functions(decode=decode)
        self.name = namespace.name
        self._private = not isinstance(namespace, SharedNamespace)
        self._key_type = keys
        self._decode: Callable[[Any], V] = decode or _from_msgpack
        # Of each table that takes this one's place, too. Not a method: that would keep a dropped reader's table.
        check = partial(_check_kind, self.name, keys, self._decode)
        try:
            self._table = TableReader.attached(namespace, wait, check=check)
        except NotServingError as error:
            raise _nothing_there(namespace.name) from error
        self._keys = (_TextKeys if keys is str else _ByteKeys)(self._table)
        self._record: Callable[[Any], bytes | None] = self._keys.record

    def __reduce__(self) -> tuple[Any, ...]:
        if self._private:
            raise TypeError("a reader over private memory cannot be pickled: no other process has that memory")
        decode = None if self._decode is _from_msgpack else self._decode
        return partial(type(self), keys=self._key_type, decode=decode, owner=self._owner), (self.name,)

    # ------------------------------------------------------------------ one value

    def __getitem__(self, key: K) -> V:
        record = self._record(key)
        if record is None:
            raise KeyError(key)
        try:
            return self._decode(record)
        except ValueError as error:
            self._explain(error)
            raise

    @overload
    def get(self, key: K, /) -> V | None: ...
    @overload
    def get(self, key: K, /, default: V | T) -> V | T: ...
    def get(self, key: K, /, default: Any = None) -> Any:
        """Return the value of a key as of this moment, or the default; what ``decode`` raises is raised."""
        record = self._record(key)
        if record is None:
            return default
        try:
            return self._decode(record)
        except ValueError as error:
            self._explain(error)
            raise

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def read(self, key: K, decode: Callable[[memoryview], T]) -> T | None:
        """Return what ``decode`` makes of a value's bytes where they stand, uncopied; None if the key is absent.

        It is called with a read-only view, perhaps several times, and perhaps over bytes that are being
        overwritten: only a call during which nothing was published counts, and so does what that raises. It must
        copy what it keeps. After three times it gets a copy, so that this ends however fast publishes come.
        """
        found: T | None = self._keys.read(key, decode)
        return found

    def _explain(self, error: Exception) -> None:
        """Raise a better error than the decoder's, if there is one."""
        if self._decode is _from_msgpack:
            raise CorruptSegmentError(f"a value of the table {self.name!r} cannot be decoded: {error}") from error

    # ------------------------------------------------------------------ many at once

    def _records(self, keys: Iterable[K]) -> list[bytes | None]:
        """Return the bytes of many values as of one version, however fast publishes come."""
        listed = self._listed(keys)
        for _ in range(_ATTEMPTS):
            version = self._table.version
            found = list(map(self._record, listed))
            if self._table.version == version:
                return found
        entries = self._table.snapshot().entries
        wanted = [entries.get(self._keys.to_bytes(key)) for key in listed]
        return [None if entry is None else entry.record for entry in wanted]

    def _listed(self, keys: Iterable[K]) -> list[K]:
        if isinstance(keys, (str, bytes, bytearray, memoryview)):
            raise TypeError(f"keys must be a list of keys, not one {type(keys).__name__}")
        return list(keys)

    def many(self, keys: Iterable[K], default: T | None = None) -> list[V | T | None]:
        """Return the values of many keys, in their order and as of one version; the default for what is not there.

        Costs a lookup each; where publishes overtake that again and again, a snapshot.
        """
        decode = self._decode
        try:
            return [default if record is None else decode(record) for record in self._records(keys)]
        except ValueError as error:
            self._explain(error)
            raise

    def numbers(self, keys: Iterable[K]) -> NDArray[np.float64]:
        """Return the values of many keys as an array ``(n,)`` of float64, in their order and as of one version.

        NaN stands for what is not there; TypeError for a value that is not a number. About 0.3 µs a key; the first
        call in a process loads numpy.
        """
        with LOADING_NUMPY:
            import numpy as np  # noqa: PLC0415

        listed = self._listed(keys)
        values = self.many(listed, math.nan)
        if not set(map(type, values)) <= {float, int}:
            for key, value in zip(listed, values, strict=True):
                if not isinstance(value, Real):
                    raise TypeError(
                        f"the value of {key!r} in the table {self.name!r} is not a number: {value!r:.60}"
                    )
        return np.array(values, np.float64)

    def contains_many(self, keys: Iterable[K]) -> NDArray[np.bool_]:
        """Tell of many keys whether they are in the table, in their order and as of one version: ``(n,)`` bools.

        About 0.1 µs a key; the first call in a process loads numpy.
        """
        listed = self._listed(keys)
        if self._key_type is str:
            listed = [self._keys.to_bytes(key) for key in listed]
        found: NDArray[np.bool_] = self._table.flags_of(listed) != 0
        return found

    def snapshot(self) -> Snapshot[K, V]:
        """Return everything as of one version, the caller's own; this ends however fast publishes come.

        About 0.4 µs a value where keys are text, values msgpack and the read path compiled; elsewhere about 1 µs
        for each put since the table was last compacted, which is at most four for each value. SegmentError where
        the whole table was replaced again during each of a thousand attempts.
        """
        keys = self._keys
        try:
            is_msgpack = self._table.identity().store_id.endswith(MSGPACK.encode())
            found = keys.collect() if is_msgpack else None
            if found is None:
                version, entries = self._table.snapshot()
                found = (version, {keys.to_key(key): entry.record for key, entry in entries.items()})
        except ValueError as error:
            raise CorruptSegmentError(f"a key of the table {self.name!r} cannot be decoded: {error}") from error
        return Snapshot(found[0], found[1], self._decode)

    def changes(self, since: Snapshot[K, V]) -> Changes[K, V]:
        """Return what differs now from an earlier :meth:`snapshot`, or from the ``snapshot`` of earlier changes.

        It is known by comparing bytes, since the table keeps no history: what was put and taken back meanwhile, or
        put again as it was, is not a change. Costs one load if nothing was published since; else a snapshot, and
        about 0.1 µs a key.
        """
        if not isinstance(since, Snapshot):
            raise TypeError(f"changes are told from a snapshot, not from {since!r:.60}: a table keeps no history")
        if since.version == self.version:
            return Changes(since, {}, [])
        return self.snapshot().differences(since)

    def items(self) -> ItemsView[K, V]:
        """Return keys and values as of one version: a view of a :meth:`snapshot`."""
        return self.snapshot().items()

    def values(self) -> ValuesView[V]:
        """Return the values as of one version: a view of a :meth:`snapshot`."""
        return self.snapshot().values()

    def __iter__(self) -> Iterator[K]:
        return iter(self.snapshot())

    def __len__(self) -> int:
        count: int = self._table.count_flag(0)
        return count

    # ------------------------------------------------------------------ the table

    @property
    def usage(self) -> TableInfo:
        """How full the table is: ``entries``, ``capacity`` in slots, sizes in bytes; as of one version."""
        info: TableInfo = self._table.info()
        return info

    def close(self) -> None:
        """Let go of the table: every later read raises ``ReaderClosedError``. Idempotent.

        Its memory is given back once no thread is in the middle of a read any more.
        """
        self._table.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of the table {self.name!r}>"


def _check_kind(name: str, keys: type, decode: Any, found: bytes) -> None:
    """Raise unless keys and values of a table that says this of them are what a reader takes them for."""
    if found[:-5] != kind(keys, RAW)[:-5]:
        other = "str" if keys is bytes else "bytes"
        raise SegmentFormatError(
            f"the keys of the table {name!r} are not {keys.__name__}", hint=f"attach with keys={other}"
        )
    if decode is _from_msgpack and found != kind(keys, MSGPACK):
        raise SegmentFormatError(
            f"the values of the table {name!r} are not the msgpack that a writer makes by itself",
            hint="attach with the decode= that its encode= calls for; bytes gives them as they are",
        )


def _nothing_there(name: str) -> NotServingError:
    message = f"there is no table {name!r}: no shmelim.table.Writer has published it"
    if is_an_elimination_servers(name):
        return NotServingError(
            f"{message}; an elimination server has that name", hint=f"that one is EliminationReader({name!r})"
        )
    return NotServingError(message, hint="start its writer, or attach with wait=seconds")
