"""What a hotkey of the network looks like: a valid SS58 address.

The format is that of Substrate's account addresses: base 58 of a prefix, 32 bytes, and a checksum, which is the
start of BLAKE2b-512 over ``SS58PRE`` and what it protects
(https://docs.substrate.io/reference/address-formats/).
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import Final

_DIGITS: Final = {
    char: value for value, char in enumerate("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz")
}
_CHECKSUM: Final = 2
# An account's bytes with the prefix of its network, of one byte or two, and the checksum.
_SIZES: Final = (1 + 32 + _CHECKSUM, 2 + 32 + _CHECKSUM)
_TWO_BYTES: Final = 64  # the first value of a prefix of two bytes
_LENGTHS: Final = range(46, 51)  # characters that such an address may have


@lru_cache(maxsize=4096)
def is_ss58_address(text: str) -> bool:
    """Return whether a text is the SS58 address of an account, with its checksum; some 15 µs, once for each text.

    >>> is_ss58_address("5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"), is_ss58_address("backup-2026")
    (True, False)
    """
    if len(text) not in _LENGTHS:
        return False
    number = 0
    for char in text:
        digit = _DIGITS.get(char)
        if digit is None:
            return False
        number = 58 * number + digit
    leading = len(text) - len(text.lstrip("1"))
    raw = bytes(leading) + number.to_bytes((number.bit_length() + 7) // 8, "big")
    if len(raw) not in _SIZES or (len(raw) == _SIZES[1]) != (raw[0] >= _TWO_BYTES):
        return False
    return blake2b(b"SS58PRE" + raw[:-_CHECKSUM]).digest()[:_CHECKSUM] == raw[-_CHECKSUM:]
