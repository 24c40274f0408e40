"""The two read paths side by side in one process: the compiled one, and its reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from shmelim.shm.layout import key_hash
from shmelim.shm.lookups import Lookups, decoded, flag_choice, flag_test
from shmelim.shm.reader import TableReader

if TYPE_CHECKING:
    from shmelim.shm import Namespace

native = pytest.importorskip("shmelim.shm._native", reason="the compiled read path is not built")

from shmelim.shm.fast import NativeLookups, NativeTableReader  # noqa: E402  # it needs the extension

__all__ = ["HEAD", "Native", "NativeTableReader", "Reference", "TableReader", "colliding", "native"]

HEAD = 4
NAMES = tuple(f"flags {number}" for number in range(256))
PRIMES = (0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5)
MASK = (1 << 64) - 1
SECRET = bytes.fromhex("ded46de9839097db")  # the word of XXH3's secret that meets the last word but one


class Reference(Lookups):
    """Lookups in pure Python."""

    _head = HEAD
    _member = 1

    def __init__(self, namespace: Namespace) -> None:
        self._table = TableReader(namespace)

    @flag_test(1)
    def first(self, hotkey: str) -> bool:
        """Tell whether the first flag is set."""
        return self._flags(hotkey) & 1 == 1

    @flag_test(6)
    def both(self, hotkey: str) -> bool:
        """Tell whether the second and the third flag are set."""
        return self._flags(hotkey) & 6 == 6

    @flag_choice(NAMES)
    def named(self, hotkey: str) -> str:
        """Return the name of the flags."""
        return NAMES[self._flags(hotkey)]

    @decoded(msgspec.msgpack.decode)
    def value(self, hotkey: str) -> object:
        """Return what is in the record."""
        body = self._record(hotkey)
        try:
            return None if body is None else msgspec.msgpack.decode(body)
        except msgspec.DecodeError as error:
            raise LookupError(f"{len(body)} bytes: {error}") from error


class Native(NativeLookups):
    """The same, compiled."""

    _head = HEAD
    _member = 1

    def __init__(self, namespace: Namespace) -> None:
        self._table = NativeTableReader(namespace)

    first = Reference.first
    both = Reference.both
    named = Reference.named
    value = Reference.value


def _rotate(word: int, count: int) -> int:
    return (word << count | word >> 64 - count) & MASK


def _round(lane: int) -> int:
    return _rotate(lane * PRIMES[1] & MASK, 31) * PRIMES[0] & MASK


def _unround(word: int) -> int:
    return _rotate(word * pow(PRIMES[0], -1, 1 << 64) & MASK, 33) * pow(PRIMES[1], -1, 1 << 64) & MASK


def _step(state: int, word: int) -> int:
    return (_rotate(state ^ _round(word), 27) * PRIMES[0] + PRIMES[3]) & MASK


def _begin(prefix: bytes, size: int, seed: int) -> int:
    """Return the state before the last two words of a key of ``size`` bytes, of which these come first."""
    if size < 32:
        assert size == 16
        return (seed + PRIMES[4] + size) & MASK
    lanes = [seed + PRIMES[0] + PRIMES[1], seed + PRIMES[1], seed, seed - PRIMES[0]]
    words = [int.from_bytes(prefix[at : at + 8], "little") for at in range(0, len(prefix), 8)]
    for n, word in enumerate(words[: len(words) // 4 * 4]):
        lanes[n % 4] = _rotate((lanes[n % 4] + word * PRIMES[1]) & MASK, 31) * PRIMES[0] & MASK
    state = sum(_rotate(lane, by) for lane, by in zip(lanes, (1, 7, 12, 18), strict=True)) & MASK
    for lane in lanes:
        state = ((state ^ _round(lane)) * PRIMES[0] + PRIMES[3]) & MASK
    state = (state + size) & MASK
    for word in words[len(words) // 4 * 4 :]:
        state = _step(state, word)
    return state


def _with_a_zero_factor(prefix: bytes, count: int, seed: int) -> list[bytes]:
    """Return keys whose last 16 bytes add a product to XXH3's sum in which one factor is 0, and the other any."""
    size = len(prefix) + 16
    assert 48 <= size <= 128, "where nothing else of the sum depends on the last 16 bytes"
    zero = (int.from_bytes(SECRET, "little") + seed) & MASK
    return [prefix + zero.to_bytes(8, "little") + b"%08d" % number for number in range(count)]


def _with_a_way_back(prefix: bytes, count: int, seed: int) -> list[bytes]:
    """Return keys with one XXH64.

    The words that follow the stripes enter it one by one, each by way of a function that can be inverted: for any
    last word but one, there is a last word that leads to the same hash.
    """
    size = len(prefix) + 16
    state = _begin(prefix, size, seed)
    goal = _step(state, 1) ^ _round(1)
    return [
        prefix + word.to_bytes(8, "little") + _unround(_step(state, word) ^ goal).to_bytes(8, "little")
        for word in range(1, count + 1)
    ]


def colliding(prefix: bytes, count: int, seed: int) -> list[bytes]:
    """Return keys that begin alike, are 16 bytes longer than that, and have one and the same hash."""
    make = _with_a_zero_factor if 17 <= len(prefix) + 16 <= 128 else _with_a_way_back
    keys = make(prefix, count, seed)
    assert len({key_hash(key, seed) for key in keys}) == 1
    assert len(set(keys)) == count
    return keys


def outcome(run: Any, *arguments: Any) -> Any:
    """Return what a call returns, or the type and the words of what it raises."""
    try:
        return run(*arguments)
    except Exception as error:
        return type(error), str(error)
