"""The hash that gives a key its place in the table: algorithm 2 of ``docs/memory-format.md``.

XXH3 is the quicker one for the keys that matter, of 48 bytes: its multiplications do not wait for one another.
Outside of 17 to 128 bytes it is another algorithm for every few lengths, and so XXH64 stands in for it there.
"""

from __future__ import annotations

from typing import Final

import xxhash

ALGORITHM: Final = 2

_XXH3_FROM: Final = 17
_XXH3_TO: Final = 128


def key_hash(key: bytes, seed: int) -> int:
    """Return the hash of ``key`` with a segment's seed."""
    if _XXH3_FROM <= len(key) <= _XXH3_TO:
        return xxhash.xxh3_64_intdigest(key, seed)
    return xxhash.xxh64_intdigest(key, seed)
