"""A server process: takes the locks, recovers, publishes, answers, and ends cleanly on SIGTERM and SIGINT."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from shmelim.channel import Address, ChannelServer, check_free, load_or_create_key
from shmelim.eliminations.files.mirror import FILES_MODE, FilesMode
from shmelim.eliminations.holding import Progress, check_choices, writer_of
from shmelim.eliminations.runtime import (
    SERVICE_NAME,
    Announcement,
    RuntimeDirectory,
    ServerInfo,
    default_state_directory,
)
from shmelim.eliminations.server import EliminationManagerServer
from shmelim.eliminations.state.guard import Guard, GuardMode
from shmelim.eliminations.state.leases import LEASE_S
from shmelim.eliminations.store.schema import FILE_NAME, Durability
from shmelim.errors import AlreadyServingError, ChannelError, StoreError
from shmelim.service import ServerReady, report_progress
from shmelim.service.process import Ending, run_server
from shmelim.shm import Namespace, SharedNamespace
from shmelim.system.supervisor import notify_supervisor
from shmelim.system.text import get_logger

# Of the options, what says where the name is; the server is made with all others.
_NOT_THE_SERVERS: Final = {"name", "state_dir", "port", "group_readable", "runtime_base", "in_memory"}
_SWITCH_INTERVAL: Final = 0.0005  # seconds
_COLLECTED_AFTER: Final = 50_000  # objects made

_log = get_logger("shmelim.serve")


@dataclass(frozen=True)
class ServeOptions:
    """How to serve a name; what is not explained is as for :class:`EliminationManagerServer`."""

    name: str  # 1 to 16 of a-z 0-9 _ -
    state_dir: Path | None = None  # None: the user's state directory of that name
    port: int | None = None  # on 127.0.0.1, for the command channel; None: a socket in the runtime directory
    group_readable: bool = False  # let the group of this process read the segments (mode 0640)
    runtime_base: Path | None = None  # where runtime directories are; None: the user's
    in_memory: bool = False  # keep no state on disk at all: it ends with the server
    durability: Durability = "power"
    files: FilesMode | None = None  # None: "lagged" where clients call, "current" in direct mode
    files_mode: int = FILES_MODE
    files_dir: Path | None = None  # in direct mode
    default_departed: Path | None = None
    imports: tuple[Path, ...] = ()
    adopt_published: bool = False
    replace_published: bool = False
    must_exist: bool = False
    registry: Path | bool | None = True
    sync_guard: GuardMode | Guard = "tell"
    epoch: str = ""  # of the manager that starts the server
    slash_lease_s: float = LEASE_S

    def __post_init__(self) -> None:
        names = ("group_readable", "adopt_published", "replace_published", "must_exist")
        yes_or_no = {name: getattr(self, name) for name in names}
        files = "current" if self.files is None else self.files
        check_choices(self.durability, files, self.files_mode, **yes_or_no)
        if not isinstance(self.sync_guard, Guard):
            Guard(self.sync_guard)


def open_server(
    options: ServeOptions, on_progress: Progress | None = None, namespace: Namespace | None = None
) -> EliminationManagerServer:
    """Take the locks, recover and publish in shared memory, or elsewhere; raises as the server does.

    Files that the start needs are missed before it makes anything.
    """
    state_dir = None if options.in_memory else options.state_dir or default_state_directory(options.name)
    needed = list(options.imports)
    if options.default_departed is not None and (state_dir is None or not (state_dir / FILE_NAME).exists()):
        needed.append(options.default_departed)
    for path in needed:
        if not path.exists():
            raise StoreError(f"{path} does not exist", hint="name a JSON file of eliminations or departed hotkeys")
    said = {name: value for name, value in vars(options).items() if name not in _NOT_THE_SERVERS}
    said["files"] = options.files or ("lagged" if namespace is None else "current")
    return EliminationManagerServer(
        namespace or SharedNamespace(options.name, mode=0o640 if options.group_readable else 0o600),
        state_dir,
        **said,
        on_progress=on_progress or report_progress,  # to who waits for this process, if anybody does
    )


def _share_interpreter() -> None:
    """Let a change not wait for the threads that compare lists or write files, nor for the garbage collector.

    Each of its statements lets go of the interpreter, and gets it back after at most one such interval. Records
    make many objects and no cycles, which the collector would look for again and again.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL)
    gc.set_threshold(_COLLECTED_AFTER)


def announce(
    options: ServeOptions, server: EliminationManagerServer, address: str | tuple[str, int]
) -> Announcement:
    """Leave word for clients of where the server is that this process runs, as long as it does."""
    runtime = RuntimeDirectory(options.name, options.runtime_base)
    state_dir = None if server.state_dir is None else str(server.state_dir.resolve())
    info = ServerInfo(address, state_dir, os.getpid())
    server.say_where(runtime.path.absolute())
    return Announcement(runtime, info, load_or_create_key(runtime.create().key), server.problems).start()


def start_elimination_manager_server(
    address: Address, authkey: bytes, server_ready: ServerReady, options: ServeOptions
) -> None:
    """Serve eliminations in this process until SIGTERM or its owner's end: a target for a ``Process``.

    ``address``, ``authkey`` and ``server_ready`` are what ``_start_server_process`` got; ``options`` say what to
    serve, but for its `port`. ``SystemExit`` where there is no server, and the owner was told why.
    """
    _share_interpreter()
    run_server((open_server, (options,), {}, partial(announce, options)), address, authkey, server_ready)


class Service:
    """A served name: locks, state and command channel, for the length of a ``with`` block.

    Entering raises ``AlreadyServingError`` where the name or the state directory is in use, and ``StoreError``,
    ``SegmentError`` or ``ChannelError`` where state, shared memory or channel are not to be had. Address, key and
    directory are looked at before anything is published.
    """

    def __init__(self, options: ServeOptions, on_progress: Progress | None = None) -> None:
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
            writer = writer_of(self.options.name)
            if writer is None or not (writer.alive is not False or writer.hangs):
                raise
            raise AlreadyServingError(  # which says more than that its address is taken
                f"{self.options.name!r} is already served by process {writer.pid}",
                hint="stop that process, or serve under another name",
            ) from None

    def __exit__(self, *_: object) -> None:
        self._closing.close()


def run(
    options: ServeOptions, on_ready: Callable[[Service], Any] | None = None, on_progress: Progress | None = None
) -> None:
    """Serve in the foreground until SIGTERM or SIGINT; raises what :class:`Service` raises.

    Must run in the main thread, which owns signals. A signal that comes during recovery ends it there; nothing is
    lost by that. ``on_ready`` is called once readers and clients are served; systemd is told, too.
    """
    _share_interpreter()
    with Ending(None, in_foreground=True) as ending, Service(options, on_progress) as service:
        ending.defer()
        _log.info("serving %r", options.name)
        if on_ready is not None:
            on_ready(service)
        notify_supervisor("READY=1", f"STATUS=serving {options.name}", f"MAINPID={os.getpid()}")
        ending.wait()
        notify_supervisor("STOPPING=1")
        _log.info("stopping %r", options.name)
