"""Generic command channel: authenticated request and reply between processes of one host.

A :class:`ChannelServer` serves those methods of an object whose name ends in ``_rpc``, over a Unix socket or
loopback TCP, to every :class:`ChannelClient` that holds the same key. Nothing here knows what the methods do.
"""

from shmelim.rpc.address import Address
from shmelim.rpc.client import ChannelClient
from shmelim.rpc.codec import MSGPACK, Codec, MsgpackCodec
from shmelim.rpc.dispatch import Caller, current_caller
from shmelim.rpc.key import KEY_SIZE, load_key, load_or_create_key
from shmelim.rpc.protocol import DEFAULT_MAX_MESSAGE, PROTOCOL
from shmelim.rpc.proxy import Proxy
from shmelim.rpc.server import ChannelServer

__all__ = [
    "DEFAULT_MAX_MESSAGE",
    "KEY_SIZE",
    "MSGPACK",
    "PROTOCOL",
    "Address",
    "Caller",
    "ChannelClient",
    "ChannelServer",
    "Codec",
    "MsgpackCodec",
    "Proxy",
    "current_caller",
    "load_key",
    "load_or_create_key",
]
