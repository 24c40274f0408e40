"""One object in a process of its own, kept alive: :class:`RPCServiceBase` and what checks its health."""

from shmelim.service.base import RPCServiceBase
from shmelim.service.health import HealthCheckDaemon
from shmelim.service.process import ServerReady, report_progress, serve_rpc
from shmelim.service.settings import ServiceSettings

__all__ = ["HealthCheckDaemon", "RPCServiceBase", "ServerReady", "ServiceSettings", "report_progress", "serve_rpc"]
