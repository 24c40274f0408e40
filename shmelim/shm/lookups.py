"""Lookups by text: the base of a class that gives the table's keys, flags and records a meaning.

This is the reference, in pure Python. ``fast.py`` has the same over the compiled read path, which also takes the
place of the methods that are marked with :func:`flag_test`, :func:`flag_choice` and :func:`decoded`: their bodies
are what they do here, and say what they do there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, NoReturn, TypeAlias, TypeVar

from shmelim.shm.facts import WriterInfo
from shmelim.shm.reader import LOADING_NUMPY, TableReader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")
Keys: TypeAlias = "Sequence[str | None] | NDArray[np.bytes_]"
Method = TypeVar("Method", bound=Callable[..., Any])

KEYS: Final = 0
VALUES: Final = 1
ITEMS: Final = 2
HEADS: Final = 3
"""Forms of :meth:`Lookups._collect`: keys; records without their heads; both; keys with heads."""


class Mark(NamedTuple):
    """What a marked method does.

    It tests for all flags of ``mask``, or returns the one of ``choices`` that they select, or what ``decode``
    makes of the record's body.
    """

    mask: int
    choices: tuple[Any, ...] | None = None
    decode: Callable[[bytes], Any] | None = None


def flag_test(mask: int) -> Callable[[Method], Method]:
    """Mark a method of one text that tells whether its flags have all of ``mask``."""
    return partial(_marked, Mark(mask))


def flag_choice(choices: tuple[Any, ...]) -> Callable[[Method], Method]:
    """Mark a method of one text that returns what its flags select from ``choices``, of which there are 256."""
    return partial(_marked, Mark(0, choices))


def decoded(decode: Callable[[bytes], Any]) -> Callable[[Method], Method]:
    """Mark a method of one text that returns what ``decode`` makes of its record's body, or None without one.

    Where ``decode`` raises, the method's own body is asked, which says what is wrong. A class has one ``decode``.
    """
    return partial(_marked, Mark(0, decode=decode))


def _marked(mark: Mark, method: Method) -> Method:
    method.__mark__ = mark  # type: ignore[attr-defined]
    return method


class Attached:
    """What any reader of a table in ``_table`` can say of it and of its writer."""

    __slots__ = ()

    _table: TableReader

    @property
    def version(self) -> int:
        """A number that grows with every publish, and never goes back, whoever writes. One load.

        Where a table's names were removed, it goes on with the clock.
        """
        return self._table.version

    @property
    def writer(self) -> WriterInfo:
        """The writer's ``pid``, ``state``, ``alive``, ``heartbeat_age`` in s, and ``started_ms`` since 1970 (UTC).

        It counts as dead 3 s after its last heartbeat, or once it said that it stopped. Some microseconds.
        """
        return self._table.writer()

    @property
    def retries(self) -> int:
        """How often a read of this reader started over because a publish overtook it."""
        return self._table.retries

    def wait_for_change(self, timeout: float | None = None, since: int | None = None) -> bool:
        """Wait up to ``timeout`` seconds (None: for ever) for a publish; False if none came in time.

        It is waited for asleep in the kernel. ``since`` is the :attr:`version` that counts as known; None means
        the one at the call.
        """
        return self._table.wait_for_change(timeout, since)


class Lookups(Attached):
    """Lookups by text in ``_table``, which is set once, before anything is looked up.

    The first ``_head`` bytes of each record are its head, the rest is its body; ``_member`` are the flags that
    make a key a member (``in``).
    """

    __slots__ = ()

    _head: ClassVar[int] = 0
    _member: ClassVar[int] = 1

    @staticmethod
    def _refuse(key: object, /) -> NoReturn:
        """Raise the error for a key that is not a text."""
        raise TypeError(f"a key must be text, not {type(key).__name__}: {key!r:.60}")

    def _key(self, key: str | None) -> bytes:
        """Return the bytes of a key that is looked up; what cannot be a key becomes one that is in no table."""
        if key is None:
            return b""
        if not isinstance(key, str):
            self._refuse(key)
        try:
            return str.encode(key)
        except UnicodeEncodeError:
            return b""

    def __contains__(self, key: Any) -> bool:
        return self._flags(key) & self._member == self._member

    def _flags(self, key: Any) -> int:
        """Return the flags of a text, 0 if it is absent."""
        return self._table.flags(self._key(key))

    def _record(self, key: str | None) -> bytes | None:
        """Return a copy of the body of a text's record; None if there is none."""
        found = self._table.get(self._key(key))
        if found is None or (self._head and len(found.data) <= self._head):
            return None
        return found.data[self._head :]

    def _read(self, key: str | None, decode: Callable[[memoryview], T]) -> T | None:
        """Run ``decode`` on the body of a text's record where it stands; None if there is none."""

        def look(record: memoryview) -> T | None:
            if self._head and len(record) <= self._head:
                return None
            with record[self._head :] as body:
                return decode(body)

        return self._table.read(self._key(key), look)

    def _fill(self, keys: Keys, answers: NDArray[Any], mask: int, /) -> bool:
        """Write an answer for each key, all as of one version; False if publishes overtook it every time.

        The answer is whether the key has all flags of ``mask``, or all its flags where ``mask`` is 0.
        """
        self._fill_in_any_case(keys, answers, mask)
        return True

    def _fill_in_any_case(self, keys: Keys, answers: NDArray[Any], mask: int) -> None:
        """Do the same, however fast publishes come."""
        with LOADING_NUMPY:
            import numpy as np  # noqa: PLC0415

        listed = keys.tolist() if isinstance(keys, np.ndarray) else [self._key(key) for key in keys]
        if len(listed) != len(answers):
            raise RuntimeError("the list of keys changed its size")
        flags = self._table.flags_of(listed)
        answers[:] = flags if mask == 0 else flags & mask == mask

    def _collect(self, mask: int, form: int) -> tuple[int, bytes] | None:  # noqa: ARG002  # the signature of the other path
        """Return version and msgpack of all entries with the flags of ``mask``, in the order of their ordinals.

        None where the path has nothing quicker than a snapshot, or publishes overtook it every time.
        """
        return None


class PlainLookups(Lookups):
    """:class:`Lookups` where nothing is compiled, laid out as the compiled ones are.

    A client, which has other bases, is laid out as a reader is then, and so can become one that refuses.
    """

    __slots__ = ("_table",)
