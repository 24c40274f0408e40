"""One object in a process of its own, kept alive: :class:`RPCServiceBase` and what checks its health."""

from shmelim.service.base import RPCServiceBase
from shmelim.service.health import HealthCheckDaemon
from shmelim.service.launch import ServerReady
from shmelim.service.serving import serve_rpc
from shmelim.service.settings import ServiceSettings

__all__ = ["HealthCheckDaemon", "RPCServiceBase", "ServerReady", "ServiceSettings", "serve_rpc"]
