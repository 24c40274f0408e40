"""A server process seen from inside: serves one object until it is told to end."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
from typing import TYPE_CHECKING, Any

from shmelim.channel.server import ChannelServer
from shmelim.errors import ShmelimError
from shmelim.service.ending import Ending
from shmelim.service.launch import ServerOptions, ServerReady
from shmelim.service.titles import server_title
from shmelim.system.logs import log_without_waiting
from shmelim.system.processes import ProcessIdentity, set_title

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from multiprocessing.synchronize import Event

    from shmelim.channel.address import Address, Location

_logger = logging.getLogger("shmelim.service")


def serve_rpc(server: object, address: Address, authkey: bytes, server_ready: ServerReady | Event) -> None:
    """Serve an object in this process until SIGTERM or the end of the process' owner.

    Sets the process title, handles signals, serves, says that it is ready, waits for the end, and lets running
    calls finish. To be called from the process' main thread.

    Parameters
    ----------
    server
        The object; its methods whose name ends in ``_rpc`` can be called.
    address, authkey, server_ready
        What ``_start_server_process`` got. A plain ``multiprocessing.Event`` will do as `server_ready`; the
        service is then named after the object's type.

    Raises
    ------
    ChannelError
        The address is taken or cannot be used. The owner is told.

    """
    options = _options(server, server_ready)
    set_title(server_title(options.service_name))
    with Ending(options.owner) as ending:
        _serve(server, address, authkey, server_ready, options, ending)


def run_server(
    factory: Callable[..., object],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    address: Address,
    authkey: bytes,
    server_ready: ServerReady,
    on_listening: Callable[[Any, Location], object] | None = None,
) -> None:
    """Make an object and serve it; what a server process runs that was started by ``_spawn_server``.

    Parameters
    ----------
    factory, args, kwargs
        ``factory(*args, **kwargs)`` makes the object. If that has a method ``close``, it is called in the end.
    address, authkey, server_ready
        As for :func:`serve_rpc`.
    on_listening
        Called with the object and its address before the owner is told that the server is ready.

    Raises
    ------
    SystemExit
        There is no server, and the owner was told why.

    """
    options = server_ready.options
    set_title(server_title(options.service_name))
    # First of all, so that no signal reaches a handler that was inherited from the owner.
    with Ending(options.owner) as ending, log_without_waiting(), contextlib.ExitStack() as stack:
        try:
            server = factory(*args, **kwargs)
            close = getattr(server, "close", None)
            if callable(close):
                stack.callback(close)
            _serve(server, address, authkey, server_ready, options, ending, on_listening)
        except Exception as error:
            # An error of ours explains itself, and the owner raises it.
            trace = None if isinstance(error, ShmelimError) else error
            _logger.error("%s: the server process failed: %s", options.service_name, error, exc_info=trace)  # noqa: TRY400
            server_ready.fail(error)
            raise SystemExit(1) from None


@log_without_waiting()
def _serve(
    server: object,
    address: Address,
    authkey: bytes,
    server_ready: ServerReady | Event,
    options: ServerOptions,
    ending: Ending,
    on_listening: Callable[[Any, Location], object] | None = None,
) -> None:
    channel = ChannelServer(
        server,
        address,
        authkey,
        service_name=options.service_name,
        max_message=options.max_message,
        codec=options.codec_in_use,
    )
    try:
        channel.start()
    except Exception as error:
        if isinstance(server_ready, ServerReady):
            server_ready.fail(error)
        raise
    try:
        if on_listening is not None:
            on_listening(server, channel.address)
        ending.defer()
        if isinstance(server_ready, ServerReady):
            server_ready.set(channel.address)
        else:
            server_ready.set()
        _logger.info("%s: ending because of %s", options.service_name, ending.wait())
    finally:
        channel.close(options.drain)


def _options(server: object, server_ready: ServerReady | Event) -> ServerOptions:
    if isinstance(server_ready, ServerReady):
        return server_ready.options
    parent = multiprocessing.parent_process()
    owner = None if parent is None or parent.pid is None else ProcessIdentity.of(parent.pid)
    return ServerOptions(type(server).__name__, owner)
