"""A service's way to its server, in each process that has it: calls, health checks, the first connection."""

from __future__ import annotations

import logging
import multiprocessing.context
import time
from typing import TYPE_CHECKING, Any

from shmelim.channel.client import ChannelClient
from shmelim.errors import AuthenticationFailedError, ChannelError, NotServingError, ProtocolError

if TYPE_CHECKING:
    from shmelim.channel.address import Location
    from shmelim.service.key import ServiceKey
    from shmelim.service.settings import ServiceSettings

_LOOK_AGAIN = 0.02  # seconds

_logger = logging.getLogger("shmelim.service")


class ServiceClient:
    """The connections of one process to a service's server. Thread-safe, and safe over a fork.

    Nothing is connected before the first call. Pickled to a process that is being started, it has no connections
    there, either.

    Parameters
    ----------
    location
        Where the server is.
    key
        Its key.
    settings
        How calls are made, and how often is tried to connect.

    Attributes
    ----------
    proxy : Proxy
        The server's remote methods.
    call : callable
        One call with a deadline of its own: :meth:`ChannelClient.call`.

    """

    def __init__(self, location: Location, key: ServiceKey, settings: ServiceSettings) -> None:
        self._arguments = location, key, settings
        self._closed = False  # never goes back
        self._connect_tries, self._connect_delay = settings.connect_tries, settings.connect_delay
        self._calls = ChannelClient(
            location,
            key.for_client,
            timeout=settings.call_timeout,
            connect_wait=settings.connect_wait,
            max_message=settings.max_message,
            codec=settings.codec_in_use,
        )
        # Its calls are short, and tell of a missing server at once.
        self._checks = ChannelClient(
            location, key.for_client, timeout=settings.health_check_timeout, codec=settings.codec_in_use
        )
        self.proxy = self._calls.proxy(idempotent=settings.idempotent)
        self.call = self._calls.call

    def __reduce__(self) -> tuple[Any, ...]:
        multiprocessing.context.assert_spawning(self)
        return type(self), self._arguments

    def reach(self, service_name: str) -> None:
        """Connect to a server that says it is ready.

        Parameters
        ----------
        service_name
            For messages.

        Raises
        ------
        NotServingError, ChannelError
            All tries were in vain; or one showed that another server is there, and will be.

        """
        for left in reversed(range(self._connect_tries)):
            try:
                self._calls.connect()
            except (AuthenticationFailedError, ProtocolError):
                raise
            except (NotServingError, ChannelError) as error:
                _logger.warning("%s: cannot connect, %d tries left: %s", service_name, left, error)
                pause_ends = time.monotonic() + self._connect_delay
                while left and not self._closed and time.monotonic() < pause_ends:
                    time.sleep(min(self._connect_delay, _LOOK_AGAIN))
                if not left or self._closed:
                    raise
            else:
                return

    def health(self) -> Any:
        """Return what the server says of itself; raises as :meth:`ChannelClient.call`."""
        return self._checks.call("health_check_rpc", idempotent=True)

    def retire(self, why: str) -> None:
        """Take no more calls, and say why; those under way are left alone. Idempotent."""
        self._closed = True
        self._calls.retire(why)
        self._checks.retire(why)

    def close(self, why: str) -> None:
        """Close every connection; idempotent. Calls under way end with an error."""
        self._closed = True
        self._calls.close(why)
        self._checks.close(why)
