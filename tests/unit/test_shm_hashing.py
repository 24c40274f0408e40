"""The hash of keys: which of two functions it is, by length. test_native.py holds the compiled one against it."""

from __future__ import annotations

import random

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from shmelim.shm.layout import key_hash

SEEDS = st.integers(0, (1 << 64) - 1)


@pytest.mark.parametrize("length", range(301))
def test_the_function_of_every_length(length: int) -> None:
    chance = random.Random(length)
    key, seed = chance.randbytes(length), chance.getrandbits(64)
    function = xxhash.xxh3_64_intdigest if 17 <= length <= 128 else xxhash.xxh64_intdigest
    assert key_hash(key, seed) == function(key, seed)


@given(key=st.binary(min_size=17, max_size=128), seed=SEEDS)
def test_xxh3_between(key: bytes, seed: int) -> None:
    assert key_hash(key, seed) == xxhash.xxh3_64(key, seed).intdigest()


@given(key=st.one_of(st.binary(max_size=16), st.binary(min_size=129, max_size=300)), seed=SEEDS)
def test_xxh64_outside(key: bytes, seed: int) -> None:
    assert key_hash(key, seed) == xxhash.xxh64(key, seed).intdigest()


def test_values_that_may_never_change() -> None:
    """Readers and writers of different releases must agree on them."""
    found = [key_hash(bytes(range(length)), 1 << 63 | 5) for length in (0, 1, 16, 17, 48, 64, 96, 128, 129, 255)]
    assert found == [
        0x62EA3B7B096560F4,
        0xA2B4B9C5499563CF,
        0x47435E92C322E789,
        0xD94ACA3D3233193E,
        0x9F8E1671D99B7882,
        0x5EA171340C548E84,
        0xBA9E831A78DD7197,
        0x9D372FE79B630D57,
        0x009EF5E58F36C2A4,
        0x86B72DC7E015F022,
    ]
