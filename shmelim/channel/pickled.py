"""A codec for services whose arguments and results are objects of any kind."""

from __future__ import annotations

import pickle
from typing import Any

from shmelim.channel.codec import UncarriedValueError
from shmelim.errors import ProtocolError


class PickleCodec:
    """Whatever :mod:`pickle` carries, for a service that asks for it. Thread-safe.

    Unpickling runs what the message says, so that whoever holds the key can run any code in the server, and the
    server in its clients. No byte is unpickled before a peer has proven to hold the key. A service whose
    values are JSON-like should stay with msgpack, where the key opens nothing but the service's methods.
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
