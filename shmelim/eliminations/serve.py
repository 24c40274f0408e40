"""A server process: takes the locks, recovers, publishes, answers, and ends cleanly on SIGTERM and SIGINT."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, get_args

from shmelim.channel import Address, ChannelServer, check_free, load_or_create_key
from shmelim.eliminations.files.mirror import FILES_MODES, FilesMode
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.runtime import Announcement, RuntimeDirectory, ServerInfo, default_state_directory
from shmelim.eliminations.server import EliminationManagerServer
from shmelim.eliminations.store.schema import FILE_NAME, Durability
from shmelim.errors import AlreadyServingError, ChannelError, NotServingError, SegmentError, StoreError
from shmelim.service import ServerReady, report_progress
from shmelim.service.serving import Ending, run_server
from shmelim.shm import Namespace, SharedNamespace

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

    def __post_init__(self) -> None:
        for what, value, known in (
            ("durability", self.durability, get_args(Durability)),
            ("files", self.files, FILES_MODES),
        ):
            if value not in known:
                raise ValueError(f"{what} must be one of {', '.join(known)}, not {value!r}")


def open_server(
    options: ServeOptions,
    on_progress: Callable[[str, int, int | None], Any] | None = None,
    namespace: Namespace | None = None,
) -> EliminationManagerServer:
    """Take the locks, recover and publish in shared memory, or elsewhere; raises as the server does."""
    state_dir = None if options.in_memory else options.state_dir or default_state_directory(options.name)
    _check_files(options, state_dir)
    return EliminationManagerServer(
        namespace or SharedNamespace(options.name, mode=0o640 if options.group_readable else 0o600),
        state_dir,
        durability=options.durability,
        files=options.files,
        default_departed=options.default_departed,
        imports=options.imports,
        on_progress=on_progress or report_progress,  # to who waits for this process, if anybody does
    )


def _check_files(options: ServeOptions, state_dir: Path | None) -> None:
    """Miss the files that a start needs before it makes anything."""
    needed = list(options.imports)
    if options.default_departed is not None and (state_dir is None or not (state_dir / FILE_NAME).exists()):
        needed.append(options.default_departed)
    for path in needed:
        if not path.exists():
            raise StoreError(f"{path} does not exist", hint="name a JSON file of eliminations or departed hotkeys")


def announce(
    options: ServeOptions, server: EliminationManagerServer, address: str | tuple[str, int]
) -> Announcement:
    """Leave word for clients of where the server is that this process runs, as long as it does."""
    runtime = RuntimeDirectory(options.name, options.runtime_base)
    state_dir = None if server.state_dir is None else str(server.state_dir.resolve())
    info = ServerInfo(address, state_dir, os.getpid())
    return Announcement(runtime, info, load_or_create_key(runtime.create().key)).start()


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
    ValueError, StoreError, SegmentError, ChannelError
        Options, state, shared memory or channel are not to be had. Address, key and directory are looked at before
        anything is published.

    """

    def __init__(
        self, options: ServeOptions, on_progress: Callable[[str, int, int | None], Any] | None = None
    ) -> None:
        self.options = options
        self._on_progress = on_progress
        self._runtime = RuntimeDirectory(options.name, options.runtime_base)
        self._address = self._runtime.address(options.port)
        self._closing = contextlib.ExitStack()

    def __enter__(self) -> Self:
        key = load_or_create_key(self._runtime.create().key)
        self._check_free()
        with contextlib.ExitStack() as stack:
            self.server = stack.enter_context(open_server(self.options, self._on_progress))
            # Ends before the server, so that no change is accepted that would not be saved.
            self.channel = stack.enter_context(
                ChannelServer(self.server, self._address, key, service_name=SERVICE_NAME)
            )
            stack.callback(announce(self.options, self.server, self.channel.address).stop)
            self._closing = stack.pop_all()
        return self

    def _check_free(self) -> None:
        try:
            check_free(self._address)
        except ChannelError:
            with contextlib.suppress(NotServingError, SegmentError):
                writer = EliminationReader(self.options.name).writer
                if writer.alive:  # which says more than that its address is taken
                    raise AlreadyServingError(
                        f"{self.options.name!r} is already served by process {writer.pid}",
                        hint="stop that process, or serve under another name",
                    ) from None
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
