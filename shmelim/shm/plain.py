"""Plain values, which are those of JSON: told from others in Python's objects, and in msgpack without decoding it.

The reference; the extension's functions take its place where that is in use. Pure; thread-safe.
"""

from __future__ import annotations

import re
from enum import IntFlag
from math import isfinite
from typing import Any, Final, TypeAlias

import msgspec

DEEPEST: Final = 64
"""Levels of containers that a plain value has at most."""

MOST: Final = 1000
"""Containers that a plain value has at most."""

_ATOMS: Final = frozenset({str, int, float, bool, type(None)})
_TEXT: Final = frozenset({str})

_may_be_special: Final = re.compile(rb"\xcb(?:[\x7f\xff][\xf0-\xff]|\x80\0\0\0\0\0\0\0)").search

_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder().decode


class Kind(IntFlag):
    """Kinds of values in msgpack."""

    NOTHING = 1
    BOOLEAN = 2
    INTEGER = 4
    NUMBER = 8  # a float
    TEXT = 16
    LIST = 32
    MAP = 64


Fields: TypeAlias = tuple[tuple[bytes, int], ...]
"""Names in UTF-8, each with the kinds that its value may be of."""

_KINDS: Final = {
    type(None): Kind.NOTHING,
    bool: Kind.BOOLEAN,
    int: Kind.INTEGER,
    float: Kind.NUMBER,
    str: Kind.TEXT,
    list: Kind.LIST,
    dict: Kind.MAP,
}


def is_plain(value: object) -> bool:
    """Tell whether a value is a dict of nothing but JSON's own types, tuples included; no subclasses."""
    return type(value) is dict and _containers(value) is not None


def scan(packed: bytes, required: Fields, optional: Fields) -> tuple[Any, ...] | None:
    """Return the values of these fields, texts and integers, of a plain map that msgspec might have written.

    None for all else: other bytes, or more of them than it takes; a field that is not there (but an optional one),
    or is of another kind; a name that stands there twice; a float that is not finite.
    """
    try:
        found = _decode(packed)
        if not is_plain(found) or _encode(found) != packed:
            return None
    except (ValueError, TypeError, RecursionError):
        return None
    values = [found.get(name.decode()) for name, _ in required]
    kinds = [(_KINDS[type(value)], kinds) for value, (_, kinds) in zip(values, required, strict=True)]
    kinds += [(_KINDS[type(found[name])], kinds) for name, kinds in _named(optional) if name in found]
    is_whole = all(name in found for name, _ in _named(required)) and all(kind & kinds for kind, kinds in kinds)
    return tuple(values) if is_whole and _is_finite(found) else None


def may_mean_the_same(one: bytes, other: bytes) -> bool:
    """Tell whether plain values that msgspec wrote may mean the same, though they are not the same bytes.

    In another order of keys the same bytes stand elsewhere. Else only a NaN, which is None, and -0.0, which is
    0.0, are written in two ways.
    """
    if len(one) == len(other) and sum(one) == sum(other):
        return True
    return _may_be_special(one) is not None or _may_be_special(other) is not None


def _named(fields: Fields) -> list[tuple[str, int]]:
    return [(name.decode(), kinds) for name, kinds in fields]


def _containers(value: Any) -> list[Any] | None:
    """Return the containers of a plain value; None of another."""
    level, found = [value], [value]
    for _ in range(DEEPEST):
        deeper: list[Any] = []
        for container in level:
            kind, values = type(container), container
            if kind is dict:
                if not _TEXT.issuperset(map(type, container)):
                    return None
                values = container.values()
            elif kind is not list and kind is not tuple:
                return None
            deeper += [value for value in values if type(value) not in _ATOMS]
            if len(found) + len(deeper) > MOST:
                return None
        if not deeper:
            return found
        found += deeper
        level = deeper
    return None


def _is_finite(value: Any) -> bool:
    return all(
        isfinite(each)
        for container in _containers(value) or ()
        for each in (container.values() if type(container) is dict else container)
        if type(each) is float
    )
