"""How values travel: as msgpack, and what becomes of values that it does not know; or as pickle, on request."""

from __future__ import annotations

import operator
import pickle
from enum import Enum
from numbers import Integral
from typing import Any, Protocol

import msgspec

from shmelim.errors import ProtocolError
from shmelim.system.containers import plain_container

_SET = 1  # the extension type of a set: its elements as a msgpack array
_DEEPEST = 100  # levels of nesting; msgspec's own limit is far above

# What msgspec writes as it is. Integers and text are checked by msgspec itself, which is free.
_ATOMS = frozenset({str, int, float, bool, bytes, type(None), msgspec.Raw})
_COLLECTIONS = (list, tuple, set, frozenset)


class Codec(Protocol):
    """What a channel needs of a codec. Both methods must be thread-safe."""

    def dumps(self, value: Any) -> bytes:
        """Return `value` as bytes; raise :class:`UncarriedValueError` if it cannot be."""

    def loads(self, data: bytes) -> Any:
        """Return the value in `data`; raise ``ProtocolError`` if there is none."""


class UncarriedValueError(TypeError, ValueError):
    """A value that the codec cannot carry."""

    def __init__(self, path: tuple[Any, ...], reason: str) -> None:
        super().__init__(path, reason)
        self.path = path  # keys and indexes that lead from the encoded object to the value
        self.reason = reason  # what is wrong with it

    def __str__(self) -> str:
        return self.naming("value", self.path)

    def naming(self, root: str, path: tuple[Any, ...]) -> str:
        """Return the message with `root` and `path` as the value's place."""
        steps = "".join(f"[{step!r:.100}]" for step in path)
        return f"{root}{steps} cannot be sent: {self.reason}"


class MsgpackCodec:
    """JSON-like values, bytes and sets, as msgpack. Thread-safe; nothing that a message says is ever run.

    Carried as they are: None, bool, int of 64 bits (signed or unsigned), float, str, bytes, list, dict, set, and
    ``msgspec.Raw``, which is taken for the msgpack that it says it is. Carried as the nearest of these: tuple and
    list subclasses (list; inside a set they stay hashable, as tuple), every other mapping and sequence and the
    proxies of ``multiprocessing`` for them, frozenset (set), Enum (its value), subclasses of the types above,
    bytearray and memoryview (bytes), numpy scalars (Python numbers). The keys of a dict may be None, bool, int,
    float, str, bytes and tuples of these. Everything else is refused.

    Examples
    --------
    >>> codec = MsgpackCodec()
    >>> codec.loads(codec.dumps({"who": {"a"}, "pair": (1, 2.5)}))
    {'who': {'a'}, 'pair': [1, 2.5]}
    >>> codec.dumps({"rows": [1j]})
    Traceback (most recent call last):
    shmelim.channel.codec.UncarriedValueError: value['rows'][0] cannot be sent: type builtins.complex is not
    supported

    """

    def __init__(self) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(ext_hook=self._load_extension).decode

    def dumps(self, value: Any) -> bytes:
        """Return a value as msgpack: about 0.3 µs for each container, and nothing for each plain value in it.

        `value` must not change meanwhile. ``UncarriedValueError`` says what cannot be carried and where it is: an
        unknown type, an integer beyond 64 bits, text that is not UTF-8, more than 100 levels of nesting (a cycle).
        """
        try:
            return self._encode(value if _is_plain(value) else self._plain(value, 0))
        except (OverflowError, TypeError, ValueError) as error:
            raise UncarriedValueError(self._place_of_culprit(value, 0), _reason(error)) from None

    def loads(self, data: bytes | memoryview) -> Any:
        """Decode bytes from :meth:`dumps`; ``ProtocolError`` if they are something else."""
        try:
            return self._decode(data)
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            found = "a pickle" if is_pickle(data) else type(error).__name__
            raise ProtocolError(f"the message is not valid msgpack: {found}") from error

    def _plain(self, value: Any, depth: int) -> Any:
        """Return a copy of `value` that msgspec writes as it is meant."""
        if type(value) in _ATOMS:
            return value
        if depth >= _DEEPEST:
            raise UncarriedValueError((), f"it is nested more than {_DEEPEST} levels deep")
        if isinstance(value, Enum):
            return self._plain(value.value, depth + 1)
        if isinstance(value, dict):
            return {_plain_key(key): self._plain(item, depth + 1) for key, item in value.items()}
        if isinstance(value, _COLLECTIONS):
            items = list(value)
            if not _ATOMS.issuperset(map(type, items)):
                items = [self._plain(item, depth + 1) for item in items]
            is_set = isinstance(value, (set, frozenset))
            return msgspec.msgpack.Ext(_SET, self._encode(items)) if is_set else items
        container = plain_container(value)
        return _plain_atom(value) if container is None else self._plain(container, depth)

    def _place_of_culprit(self, value: Any, depth: int) -> tuple[Any, ...]:
        """Return the keys and indexes that lead to what cannot be carried; slow, which an error may be."""
        collection = value if isinstance(value, _COLLECTIONS) else ()
        for step, item in value.items() if isinstance(value, dict) else enumerate(collection):
            try:
                self._encode(self._plain(item, depth + 1))
            except (OverflowError, TypeError, ValueError):
                return (step, *self._place_of_culprit(item, depth + 1)) if depth < _DEEPEST else ()
        return ()

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


def _is_plain(value: Any) -> bool:
    """Whether msgspec writes `value` as it is meant: nothing in it but atoms, lists, tuples and dicts."""
    rest = [(value, 0)]
    while rest:
        value, depth = rest.pop()
        kind = type(value)
        if kind is dict:
            if not _ATOMS.issuperset(map(type, value)):
                return False
            value = value.values()
        elif kind is not list and kind is not tuple:
            return kind in _ATOMS  # which comes here only by itself
        if not _ATOMS.issuperset(map(type, value)):
            depth += 1
            if depth == _DEEPEST:
                return False
            for item in value:
                if type(item) not in _ATOMS:
                    rest.append((item, depth))  # noqa: PERF401  # a comprehension would be one more call
    return True


def _reason(error: Exception) -> str:
    if isinstance(error, UncarriedValueError):
        return error.reason
    if isinstance(error, OverflowError):
        return "the integer has more than 64 bits"
    if isinstance(error, UnicodeEncodeError):
        return "the text is not UTF-8 (it has lone surrogates)"
    return f"{type(error).__name__}: {error}"


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
