"""How values travel: msgpack, and what becomes of the values that msgpack does not know; pickle where it is asked for."""

from __future__ import annotations

import operator
import pickle
from enum import Enum
from numbers import Integral
from typing import Any, Protocol

import msgspec

from shmelim.errors import ProtocolError

_SET = 1  # the extension type of a set: its elements as a msgpack array
_DEEPEST = 100  # levels of nesting; msgspec's own limit is far above
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1

# What msgspec writes as it is. Integers and text are checked by msgspec itself, which is free; only when it
# objects is the culprit looked for.
_ATOMS = frozenset({str, int, float, bool, bytes, type(None), msgspec.Raw})
_SEQUENCES = frozenset({list, tuple})


class Codec(Protocol):
    """What a channel needs of a codec. Both methods must be thread-safe."""

    def dumps(self, value: Any) -> bytes:
        """Return `value` as bytes; raise :class:`UncarriedValueError` if it cannot be."""

    def loads(self, data: bytes) -> Any:
        """Return the value in `data`; raise ``ProtocolError`` if there is none."""


class UncarriedValueError(TypeError, ValueError):
    """A value that the codec cannot carry.

    Attributes
    ----------
    path : tuple
        Keys and indexes that lead from the encoded object to the value.
    reason : str
        What is wrong with it.

    """

    def __init__(self, path: tuple[Any, ...], reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return self.naming("value", self.path)

    def naming(self, root: str, path: tuple[Any, ...]) -> str:
        """Return the message with `root` and `path` as the value's place."""
        steps = "".join(f"[{step!r}]" for step in path)
        return f"{root}{steps} cannot be sent: {self.reason}"


class MsgpackCodec:
    """JSON-like values, bytes and sets, as msgpack. Thread-safe; nothing that a message says is ever run.

    Carried as they are: None, bool, int of 64 bits (signed or unsigned), float, str, bytes, list, dict, set, and
    ``msgspec.Raw``, which is taken for the msgpack that it says it is.
    Carried as the nearest of these: tuple and list subclasses (list; inside a set they stay hashable, as
    tuple), frozenset (set), Enum (its value), subclasses of the types above, bytearray and memoryview (bytes),
    numpy scalars (Python numbers). The keys of a dict may be None, bool, int, float, str, bytes and tuples of
    these. Everything else is refused.

    Examples
    --------
    >>> codec = MsgpackCodec()
    >>> codec.loads(codec.dumps({"who": {"a"}, "pair": (1, 2.5)}))
    {'who': {'a'}, 'pair': [1, 2.5]}
    >>> codec.dumps({"rows": [object()]})
    Traceback (most recent call last):
    shmelim.channel.codec.UncarriedValueError: value['rows'][0] cannot be sent: type builtins.object is not supported

    """

    def __init__(self) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ext_hook=self._load_extension).decode

    def dumps(self, value: Any) -> bytes:
        """Encode a value.

        Parameters
        ----------
        value
            What the class description allows. It is not changed, and must not change meanwhile.

        Returns
        -------
        bytes
            One msgpack value. About 1 µs for each container, and nothing for each plain value in it.

        Raises
        ------
        UncarriedValueError
            A ``TypeError`` and ``ValueError`` that says what and where: an unknown type, an integer beyond 64
            bits, text that is not UTF-8, or more than 100 levels of nesting (or a cycle).

        """
        return self._write(self._plain(value, 0))

    def loads(self, data: bytes | memoryview) -> Any:
        """Decode bytes from :meth:`dumps`; ``ProtocolError`` if they are something else."""
        try:
            return self._decode(data)
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            found = "a pickle" if is_pickle(data) else type(error).__name__
            raise ProtocolError(f"the message is not valid msgpack: {found}") from error

    def _write(self, plain: Any) -> bytes:
        try:
            return self._encode(plain)
        except (OverflowError, ValueError, TypeError):
            self._blame(plain)
            raise

    def _plain(self, value: Any, depth: int) -> Any:
        """Return `value`, or if something in it needs it, a copy that msgspec can write."""
        kind = type(value)
        if kind in _ATOMS:
            return value
        if depth >= _DEEPEST:
            raise UncarriedValueError((), f"it is nested more than {_DEEPEST} levels deep")
        if issubclass(kind, Enum):
            return self._plain(value.value, depth + 1)
        if issubclass(kind, dict):
            return self._plain_dict(value, depth)
        if issubclass(kind, (list, tuple)):
            return self._plain_items(value, depth)
        if issubclass(kind, (set, frozenset)):
            return msgspec.msgpack.Ext(_SET, self._write(self._plain_items(list(value), depth)))
        return _plain_atom(value)

    def _plain_dict(self, value: dict[Any, Any], depth: int) -> dict[Any, Any]:
        simple_keys = _ATOMS.issuperset(map(type, value))
        if simple_keys and _ATOMS.issuperset(map(type, value.values())):
            return value if type(value) is dict else dict(value)
        copy = {}
        key = None
        try:
            for key, item in value.items():
                plain = item if type(item) in _ATOMS else self._plain(item, depth + 1)
                copy[key if simple_keys else _plain_key(key)] = plain
        except UncarriedValueError as error:
            raise UncarriedValueError((key, *error.path), error.reason) from None
        return copy

    def _plain_items(self, value: list[Any] | tuple[Any, ...], depth: int) -> list[Any] | tuple[Any, ...]:
        if type(value) in _SEQUENCES and _ATOMS.issuperset(map(type, value)):
            return value
        copy: list[Any] = []
        try:
            for item in value:
                copy.append(item if type(item) in _ATOMS else self._plain(item, depth + 1))  # noqa: PERF401
        except UncarriedValueError as error:
            raise UncarriedValueError((len(copy), *error.path), error.reason) from None
        return copy

    def _blame(self, value: Any, path: tuple[Any, ...] = ()) -> None:
        """Raise for the integer or text in plain `value` that msgspec cannot write, if there is one."""
        kind = type(value)
        if kind is int:
            if not _INT_MIN <= value <= _INT_MAX:
                raise UncarriedValueError(path, "the integer has more than 64 bits")
        elif kind is str:
            try:
                value.encode()
            except UnicodeEncodeError:
                raise UncarriedValueError(path, "the text is not UTF-8 (it has lone surrogates)") from None
        elif kind is dict:
            for key, item in value.items():
                self._blame(key, (*path, key))
                self._blame(item, (*path, key))
        elif kind in _SEQUENCES:
            for index, item in enumerate(value):
                self._blame(item, (*path, index))

    def _load_extension(self, code: int, data: memoryview) -> Any:
        if code != _SET:
            raise ValueError(f"unknown extension type {code}")
        items = self._decode(data)
        if type(items) is not list:
            raise ValueError("a set without elements")
        try:
            return set(items)
        except TypeError:
            return {_hashable(item) for item in items}


class PickleCodec:
    """Whatever :mod:`pickle` carries, for a service that asks for it. Thread-safe.

    Unpickling runs what the message says, so that whoever holds the key can run any code in the server, and the
    server in its clients. No byte is unpickled before a peer has proven to hold the key. A service whose
    values are JSON-like should stay with msgpack, where the key opens nothing but the service's methods.

    Examples
    --------
    >>> codec = PickleCodec()
    >>> codec.loads(codec.dumps((1, 2j)))
    (1, 2j)

    """

    def dumps(self, value: Any) -> bytes:
        """Return `value` as bytes; ``UncarriedValueError`` if it cannot be pickled."""
        try:
            return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        except Exception as error:  # an object's own code may raise anything
            raise UncarriedValueError((), f"{type(error).__name__}: {error}") from None

    def loads(self, data: bytes) -> Any:
        """Return the value in `data`; ``ProtocolError`` if there is none."""
        try:
            return pickle.loads(data)  # noqa: S301  # see the class
        except Exception as error:
            raise ProtocolError(f"the message cannot be unpickled: {type(error).__name__}: {error}") from error


def is_pickle(data: bytes | memoryview) -> bool:
    """Whether bytes look like a pickle, by its first two bytes and its last; as msgpack they would be an error."""
    return bytes(data[:1]) == b"\x80" and bytes(data[1:2]) in b"\2\3\4\5" and bytes(data[-1:]) == b"."


def _plain_atom(value: Any) -> Any:
    """Return the plain value that stands for one of a subclass or of a number type."""
    if isinstance(value, str):
        return str.__str__(value)  # the text itself, whatever the subclass prints
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Integral):
        return operator.index(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    # A numpy scalar, known by its shape, since numpy is not imported here. An array must not become a number.
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "shape", None) == ():
        number = item()
        if type(number) in _ATOMS:
            return number
    raise UncarriedValueError((), f"type {type(value).__module__}.{type(value).__qualname__} is not supported")


def _plain_key(key: Any) -> Any:
    if type(key) in _ATOMS:
        return key
    if isinstance(key, Enum):
        return _plain_key(key.value)
    if isinstance(key, tuple):
        return tuple(_plain_key(item) for item in key)
    return _plain_atom(key)


def _hashable(value: Any) -> Any:
    """Return a set's element as it must have been: nothing but tuples and frozensets can have stood there."""
    if type(value) is list:
        return tuple(_hashable(item) for item in value)
    if type(value) is set:
        return frozenset(value)
    return value


MSGPACK = MsgpackCodec()
