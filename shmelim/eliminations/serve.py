"""A server process: takes the locks, recovers, publishes, answers, and ends cleanly on SIGTERM and SIGINT."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Self

from shmelim.channel import ChannelServer, load_or_create_key
from shmelim.eliminations.runtime import RuntimeDirectory, ServerInfo, default_state_directory
from shmelim.eliminations.server import EliminationManagerServer
from shmelim.service.serving import Ending, report_progress, run_server
from shmelim.shm import SharedNamespace

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from shmelim.channel import Address
    from shmelim.eliminations.files.mirror import FilesMode
    from shmelim.eliminations.store.schema import Durability
    from shmelim.service import ServerReady

SERVICE_NAME: Final = "EliminationManagerServer"

_log = logging.getLogger("shmelim.serve")


@dataclass(frozen=True)
class ServeOptions:
    """How to serve a name.

    Attributes
    ----------
    name
        1 to 16 of ``a-z 0-9 _ -``.
    state_dir
        Where the state is; None: the user's state directory of that name.
    port
        A TCP port on 127.0.0.1 for the command channel; None: a Unix socket in the runtime directory.
    group_readable
        Let the group of this process read the segments (mode 0640).
    runtime_base
        Where runtime directories are; None: the user's.
    in_memory
        Keep no state on disk at all: it ends with the server.
    durability, files, default_departed, imports
        As for :class:`EliminationManagerServer`.

    """

    name: str
    state_dir: Path | None = None
    port: int | None = None
    group_readable: bool = False
    runtime_base: Path | None = None
    in_memory: bool = False
    durability: Durability = "power"
    files: FilesMode = "current"
    default_departed: Path | None = None
    imports: tuple[Path, ...] = field(default=())


def open_server(
    options: ServeOptions, on_progress: Callable[[str, int, int | None], Any] | None = None
) -> EliminationManagerServer:
    """Take the locks, recover and publish; raises as :class:`EliminationManagerServer` does."""
    return EliminationManagerServer(
        SharedNamespace(options.name, mode=0o640 if options.group_readable else 0o600),
        None if options.in_memory else options.state_dir or default_state_directory(options.name),
        durability=options.durability,
        files=options.files,
        default_departed=options.default_departed,
        imports=options.imports,
        on_progress=on_progress or report_progress,
    )


def announce(options: ServeOptions, server: EliminationManagerServer, address: str | tuple[str, int]) -> None:
    """Leave word for clients of where the server is that this process runs."""
    state_dir = None if server.state_dir is None else str(server.state_dir.resolve())
    runtime = RuntimeDirectory(options.name, options.runtime_base)
    runtime.announce(ServerInfo(address, state_dir, os.getpid()))


def start_elimination_manager_server(
    address: Address, authkey: bytes, server_ready: ServerReady, options: ServeOptions
) -> None:
    """Serve eliminations in this process until SIGTERM or its owner's end: a target for a ``Process``.

    Parameters
    ----------
    address, authkey, server_ready
        What ``_start_server_process`` got.
    options
        What to serve; its `port` does not count.

    Raises
    ------
    SystemExit
        There is no server, and the owner was told why.

    """
    run_server(open_server, (options,), {}, address, authkey, server_ready, partial(announce, options))


class Service:
    """A served name: locks, state and command channel, for the length of a ``with`` block.

    Parameters
    ----------
    options
        What to serve.
    on_progress
        As for :class:`EliminationManagerServer`.

    Raises
    ------
    AlreadyServingError
        The name, or the state directory, is in use.
    StoreError, SegmentError, ChannelError
        State, shared memory or channel cannot be had.

    """

    def __init__(
        self, options: ServeOptions, on_progress: Callable[[str, int, int | None], Any] | None = None
    ) -> None:
        self.options = options
        self._on_progress = on_progress
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._runtime = RuntimeDirectory(self.options.name, self.options.runtime_base).create()
        with contextlib.ExitStack() as stack:
            self.server = stack.enter_context(open_server(self.options, self._on_progress))
            self._open_channel()
            stack.callback(self.channel.close)
            self._closing = stack.pop_all()
        return self

    def _open_channel(self) -> None:
        port, runtime = self.options.port, self._runtime
        address = str(runtime.socket) if port is None else ("127.0.0.1", port)
        key = load_or_create_key(runtime.key)
        self.channel = ChannelServer(self.server, address, key, service_name=SERVICE_NAME).start()
        try:
            announce(self.options, self.server, self.channel.address)
        except BaseException:
            self.channel.close()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The channel ends first, so that no change is accepted that would not be saved.
        self._closing.close()


def run(
    options: ServeOptions,
    on_ready: Callable[[Service], Any] | None = None,
    on_progress: Callable[[str, int, int | None], Any] | None = None,
) -> None:
    """Serve in the foreground until SIGTERM or SIGINT.

    Parameters
    ----------
    options
        What to serve.
    on_ready
        Called once readers and clients are served.
    on_progress
        As for :class:`EliminationManagerServer`.

    Raises
    ------
    What :class:`Service` raises.

    Notes
    -----
    Must run in the main thread, which owns signals. A signal that comes during recovery ends it there; nothing
    is lost by that.

    """
    with Ending(None, in_foreground=True) as ending, Service(options, on_progress) as service:
        ending.defer()
        _log.info("serving %r", options.name)
        if on_ready is not None:
            on_ready(service)
        ending.wait()
        _log.info("stopping %r", options.name)
