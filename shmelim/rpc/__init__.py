"""Generic command channel: authenticated request and reply between processes of one host.

A :class:`ChannelServer` serves those methods of an object whose name ends in ``_rpc``, over a Unix socket or
loopback TCP, to every :class:`ChannelClient` that holds the same key. :class:`RPCServiceBase` puts such a server
into a process and keeps it alive. Nothing here knows what the methods do.
"""

from shmelim.rpc.alerts.slack import SlackNotifier
from shmelim.rpc.channel.address import Address
from shmelim.rpc.channel.client import ChannelClient
from shmelim.rpc.channel.codec import MSGPACK, Codec, MsgpackCodec
from shmelim.rpc.channel.dispatch import Caller, current_caller
from shmelim.rpc.channel.key import KEY_SIZE, load_key, load_or_create_key
from shmelim.rpc.channel.pickled import PickleCodec
from shmelim.rpc.channel.protocol import DEFAULT_MAX_MESSAGE, PROTOCOL
from shmelim.rpc.channel.proxy import Proxy
from shmelim.rpc.channel.server import ChannelServer
from shmelim.rpc.service.base import RPCServiceBase
from shmelim.rpc.service.health import HealthCheckDaemon
from shmelim.rpc.service.launch import ServerReady
from shmelim.rpc.service.serving import serve_rpc
from shmelim.rpc.service.settings import ServiceSettings

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
