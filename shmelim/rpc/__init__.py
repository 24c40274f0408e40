"""Generic command channel: authenticated request and reply between processes of one host.

A :class:`ChannelServer` serves those methods of an object whose name ends in ``_rpc``, over a Unix socket or
loopback TCP, to every :class:`ChannelClient` that holds the same key. :class:`RPCServiceBase` puts such a server
into a process and keeps it alive. Nothing here knows what the methods do.
"""

from shmelim.rpc.address import Address
from shmelim.rpc.client import ChannelClient
from shmelim.rpc.codec import MSGPACK, Codec, MsgpackCodec
from shmelim.rpc.dispatch import Caller, current_caller
from shmelim.rpc.health import HealthCheckDaemon
from shmelim.rpc.key import KEY_SIZE, load_key, load_or_create_key
from shmelim.rpc.launch import ServerReady
from shmelim.rpc.notify import SlackNotifier
from shmelim.rpc.pickled import PickleCodec
from shmelim.rpc.protocol import DEFAULT_MAX_MESSAGE, PROTOCOL
from shmelim.rpc.proxy import Proxy
from shmelim.rpc.server import ChannelServer
from shmelim.rpc.service import RPCServiceBase
from shmelim.rpc.serving import serve_rpc
from shmelim.rpc.settings import ServiceSettings

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
    "HealthCheckDaemon",
    "MsgpackCodec",
    "PickleCodec",
    "Proxy",
    "RPCServiceBase",
    "ServerReady",
    "ServiceSettings",
    "SlackNotifier",
    "current_caller",
    "load_key",
    "load_or_create_key",
    "serve_rpc",
]
