"""Command channel: authenticated request and reply between processes of one host, each call under a deadline.

A :class:`ChannelServer` serves those methods of an object whose name ends in ``_rpc``, or is listed, over a Unix
socket or loopback TCP, to every :class:`ChannelClient` that holds the same key. What the methods do is their
affair.
"""

from shmelim.channel.address import Address, check_free
from shmelim.channel.client import ChannelClient, Proxy
from shmelim.channel.codec import MSGPACK, Codec, MsgpackCodec, PickleCodec
from shmelim.channel.dispatch import Caller, current_caller
from shmelim.channel.key import KEY_SIZE, load_key, load_or_create_key, restore_key
from shmelim.channel.protocol import DEFAULT_MAX_MESSAGE, PROTOCOL
from shmelim.channel.server import ChannelServer

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
    "PickleCodec",
    "Proxy",
    "check_free",
    "current_caller",
    "load_key",
    "load_or_create_key",
    "restore_key",
]
