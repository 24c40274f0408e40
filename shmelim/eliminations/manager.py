"""What a validator holds: reads from shared memory, changes through the server, processing where it is called."""

from __future__ import annotations

import functools
import logging
import warnings
import weakref
from collections.abc import Container, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, NoReturn, cast

from shmelim.channel import Address
from shmelim.channel.address import Location
from shmelim.eliminations.calls import Calls, ProcessingCalls
from shmelim.eliminations.epochs import new_epoch
from shmelim.eliminations.files.mirror import FILES_MODE, FilesMode
from shmelim.eliminations.holding import living_writer
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.reading import Reading
from shmelim.eliminations.rows import Status
from shmelim.eliminations.rules import Context, EliminationProcessor, processed
from shmelim.eliminations.rules.loop import run_loop
from shmelim.eliminations.rules.membership import is_zombie
from shmelim.eliminations.runtime import SERVICE_NAME, RuntimeDirectory, default_state_directory
from shmelim.eliminations.serve import ServeOptions, announce, open_server
from shmelim.eliminations.server import EliminationManagerServer
from shmelim.eliminations.state.guard import Guard, GuardMode
from shmelim.eliminations.store.schema import Durability
from shmelim.eliminations.validator.collaborators import (
    ChallengePeriodManager,
    Collaborators,
    ContractManager,
    LimitOrderManager,
    Metagraph,
    PositionLocks,
    PositionManager,
    SharedValue,
    WebSocketQueue,
)
from shmelim.eliminations.validator.environment import ValidatorEnvironment
from shmelim.errors import AlreadyServingError, ChannelError
from shmelim.notify import SlackNotifier
from shmelim.service import RPCServiceBase, ServerReady, ServiceSettings
from shmelim.shm import PrivateNamespace, check_name
from shmelim.system.coroutines import truth
from shmelim.system.logs import LimitedLog
from shmelim.system.places import place, place_or_none, places
from shmelim.system.text import get_logger

_log = get_logger("shmelim.manager")
_limited = LimitedLog(_log)

DEFAULT_NAME: Final = "shmelim"
DEFAULT_PORT: Final = 50004

# Long enough for the recovery of a large state: its server is not ready before.
_READY_TIMEOUT: Final = 60.0
_OUTBOX: Final = "alerts"  # in the state directory
# Of these the guard may have something to say.
_GUARDED: Final = {
    "sync_eliminations_rpc",
    "sync_difference_rpc",
    "sync_uploaded_rpc",
    "delete_eliminations_rpc",
    "clear_eliminations_rpc",
}
_DEPARTED: Final = int(Status.DEPARTED)
_REGISTERED: Final = int(Status.REGISTERED)
# Who has a state directory in direct mode, in this process.
_in_direct_mode: weakref.WeakValueDictionary[Path, EliminationManager] = weakref.WeakValueDictionary()


class _Alerted:
    """A manager's notifier: a new one gets an outbox; reading it costs nothing."""

    def __set__(self, manager: EliminationManager, notifier: Any) -> None:
        vars(manager)["slack_notifier"] = notifier
        manager._keep_alerts()  # noqa: SLF001


class EliminationManager(Reading, Calls, RPCServiceBase):
    """The eliminations of a validator: reads, changes, and the rules by which miners are eliminated.

    In RPC mode it starts the server process and owns it; reads come from shared memory without asking that
    process, changes go to it. Copies in child processes, forked or given to a process that is being started,
    read and change alike, and follow a restart of the server by themselves. In direct mode the server object
    lives in this process: no process, no port, nothing in ``/dev/shm``, and unless a `state_dir` is given
    nothing on disk. A second manager of a state directory in direct mode takes it over, and the first one's calls
    fail from then on.

    Every collaborator can be replaced at any time by assigning the attribute of its name; the next call uses the
    new one. None of them is called by the constructor, but for the metagraph's list of hotkeys.

    A check costs what it costs an :class:`EliminationReader`, some 30 ns; a change a commit, and in RPC mode 0.1
    ms for the channel; their errors are those of :class:`~shmelim.eliminations.calls.Calls`. Thread-safe. After a
    fork the child's copy is a client: it never starts, restarts or ends the server. Can be pickled to a process
    that is being started only, together with its collaborators, and not in direct mode. Processing belongs into
    one process at a time. A context manager, which shuts it down.

    Parameters
    ----------
    metagraph, position_manager, challengeperiod_manager, contract_manager, position_locks, limit_order_manager
        The validator's own objects, as :mod:`shmelim.eliminations.validator.collaborators` describes; each may
        be None.
    running_unit_tests
        Direct mode.
    shutdown_dict
        What ends :meth:`run_update_loop` once it is truthy.
    use_ipc
        Ignored, with a DeprecationWarning: reads are shared by all processes anyway.
    is_backtesting
        Keep the state in memory: nothing is read from disk or written to it.
    shared_queue_websockets
        A queue that gets every position that is closed; None: nobody is told.
    sync_in_progress, sync_epoch
        Processing pauses while the former's ``value`` is true; the latter's moves with every sync of the
        validator's positions.
    slack_notifier
        Who is told of failures: ``send_message(text, level=...)``. A :class:`~shmelim.SlackNotifier` without an
        outbox gets one in the state directory.
    environment
        What is the validator's own: intervals, rules, prices, directories; None: the defaults.
    name
        The name under which readers find the state.
    port, address
        TCP port on 127.0.0.1 for changes; 0: any; None: a Unix socket in the name's runtime directory. Or the path
        of a Unix socket, or ``(host, port)``.
    state_dir
        Where the state is kept; None: the user's state directory of that name (in direct mode: in memory).
    runtime_base
        Where runtime directories are; None: the user's.
    durability, files_mode, default_departed, imports, adopt_published, replace_published, must_exist, registry
        As for :class:`~shmelim.eliminations.server.EliminationManagerServer`.
    sync_guard
        The same, in RPC mode, with the environment's ``guard_count`` and ``guard_share``.
    files
        The same; None: ``"current"`` in direct mode, ``"lagged"`` in RPC mode.
    files_dir
        In direct mode only: a directory whose JSON files are the state, as for that server.
    group_readable
        Let the group of this process read the shared memory.
    enable_health_check, health_check_interval_s, max_consecutive_failures, enable_auto_restart, settings
        As for :class:`~shmelim.service.base.RPCServiceBase`.

    Raises
    ------
    AlreadyServingError
        The name, or the state directory, is in use.
    ChannelError
        Another process is at the address.
    TimeoutError
        The server was not ready in time: within `ready_timeout`, here 60 s, since a large state takes a while.
    StateConflictError
        The name is known for another state than that of the state directory, or for a later one.
    StoreError, SegmentError
        State or shared memory cannot be had.

    Examples
    --------
    In direct mode:

    >>> from shmelim import EliminationManager
    >>> manager = EliminationManager(None, None, None, running_unit_tests=True)
    >>> manager.append_elimination_row("5C4…", 0.11, "MAX_TOTAL_DRAWDOWN", t_ms=1_700_000_000_000)
    True
    >>> manager.is_hotkey_eliminated("5C4…")
    True
    >>> manager.get_elimination("5C4…")["reason"]
    'MAX_TOTAL_DRAWDOWN'
    >>> manager.sync_eliminations([])
    ['5C4…']
    >>> manager.shutdown()

    """

    # CPython 3.11 does not specialise calls of an object's methods once it has more than some 25 attributes in its
    # dict, and a check then takes half as long again. So what nobody patches stands in slots.
    __slots__ = ("_RPCServiceBase__core", "_live_price_fetcher", "_options", "_processor", "_reader", "_timeout")

    metagraph: Metagraph | None = None
    position_manager: PositionManager | None = None
    challengeperiod_manager: ChallengePeriodManager | None = None
    contract_manager: ContractManager | None = None
    position_locks: PositionLocks | None = None
    limit_order_manager: LimitOrderManager | None = None
    shutdown_dict: Any = None
    shared_queue_websockets: WebSocketQueue | None = None
    sync_in_progress: SharedValue | None = None
    sync_epoch: SharedValue | None = None
    is_backtesting: bool = False
    service_name: str = SERVICE_NAME
    port: int | None = None
    running_unit_tests: bool = False
    enable_health_check: bool = False

    _outbox: Path | None = None  # where alerts wait; known once there is a server
    slack_notifier: Any = _Alerted()
    """Who is told what failed; may be assigned at any time."""

    def __init__(
        self,
        metagraph: Metagraph | None,
        position_manager: PositionManager | None,
        challengeperiod_manager: ChallengePeriodManager | None,
        running_unit_tests: bool = False,
        shutdown_dict: Any = None,
        use_ipc: bool = False,
        is_backtesting: bool = False,
        shared_queue_websockets: WebSocketQueue | None = None,
        contract_manager: ContractManager | None = None,
        position_locks: PositionLocks | None = None,
        sync_in_progress: SharedValue | None = None,
        slack_notifier: Any = None,
        sync_epoch: SharedValue | None = None,
        limit_order_manager: LimitOrderManager | None = None,
        *,
        environment: ValidatorEnvironment | None = None,
        name: str = DEFAULT_NAME,
        port: int | None = DEFAULT_PORT,
        address: Address | None = None,
        state_dir: Path | str | None = None,
        runtime_base: Path | str | None = None,
        durability: Durability = "power",
        files: FilesMode | None = None,
        files_mode: int = FILES_MODE,
        files_dir: Path | str | None = None,
        default_departed: Path | str | None = None,
        imports: Sequence[Path | str] = (),
        adopt_published: bool = False,
        replace_published: bool = False,
        must_exist: bool = False,
        registry: Path | str | bool | None = True,
        sync_guard: GuardMode = "tell",
        group_readable: bool = False,
        enable_health_check: bool = True,
        health_check_interval_s: float = 60,
        max_consecutive_failures: int = 3,
        enable_auto_restart: bool = True,
        **settings: Any,
    ) -> None:
        if use_ipc:
            warnings.warn(
                "use_ipc is ignored and can be left out: every process reads the same shared memory",
                DeprecationWarning,
                stacklevel=2,
            )
        check_name(name)
        if files_dir is not None and not running_unit_tests:
            raise ValueError("files_dir is for direct mode (running_unit_tests=True); name a state_dir instead")
        runtime = None if running_unit_tests else RuntimeDirectory(name, runtime_base)
        if runtime is None:
            address = None
        elif address is not None:
            port = None if port == DEFAULT_PORT else port
        elif port is None:
            address = runtime.address()
        defaults: dict[str, Any] = {"ready_timeout": _READY_TIMEOUT}
        epoch = "" if runtime is None else new_epoch()
        super().__init__(
            SERVICE_NAME,
            port,
            running_unit_tests,
            enable_health_check,
            health_check_interval_s,
            max_consecutive_failures,
            enable_auto_restart,
            slack_notifier,
            address=address,
            key_path=None if runtime is None else runtime.key,
            **defaults | settings | {"epoch": epoch},
        )
        self.metagraph = metagraph
        self.position_manager = position_manager
        self.challengeperiod_manager = challengeperiod_manager
        self.contract_manager = contract_manager
        self.position_locks = position_locks
        self.limit_order_manager = limit_order_manager
        self.shutdown_dict = shutdown_dict
        self.shared_queue_websockets = shared_queue_websockets
        self.sync_in_progress = sync_in_progress
        self.sync_epoch = sync_epoch
        self.is_backtesting = is_backtesting
        self._environment = ValidatorEnvironment.given(environment)
        self._options = ServeOptions(
            name=name,
            state_dir=place_or_none("state_dir", state_dir),
            group_readable=group_readable,
            runtime_base=place_or_none("runtime_base", runtime_base),
            in_memory=is_backtesting or (running_unit_tests and state_dir is None),
            durability=durability,
            files=files,
            files_mode=files_mode,
            files_dir=None if is_backtesting else place_or_none("files_dir", files_dir),
            default_departed=place_or_none("default_departed", default_departed),
            imports=tuple(places("imports", imports)),
            adopt_published=adopt_published,
            replace_published=replace_published,
            must_exist=must_exist,
            epoch=epoch,
            sync_guard=Guard(sync_guard, self.environment.guard_count, self.environment.guard_share),
            slash_lease_s=self.environment.slash_lease_s,
            registry=registry if registry is None or isinstance(registry, bool) else place("registry", registry),
        )
        self._timeout = settings.get("call_timeout", ServiceSettings.call_timeout)
        self._live_price_fetcher = self.environment.live_price_fetcher
        if runtime is not None:
            runtime.create()
        self._start()
        try:
            server = self._server_proxy
            self._reader = server.reader if running_unit_tests else EliminationReader(name)
            self._table = self._reader._table  # noqa: SLF001  # what the reads of both look into
            self._processor = self._make_processor()
            self._processor.glance(is_first=True)
            if not (self._options.in_memory or self._options.files_dir):
                self._outbox = (self._options.state_dir or default_state_directory(name)) / _OUTBOX
            self._keep_alerts()
            collaborators = self._processor.context.collaborators
            for gap in self.environment.gaps(collaborators, is_backtesting=is_backtesting):
                _log.warning("%s", gap)
        except BaseException:
            self.shutdown()
            raise

    @property
    def environment(self) -> ValidatorEnvironment:
        """What the rules need to know of this validator; its attributes may be changed at any time, it may not."""
        return self._environment

    def _keep_alerts(self) -> None:
        """Have what Slack cannot be told wait in the state directory, for the next process if need be."""
        if self._outbox is None or not isinstance(self.slack_notifier, SlackNotifier):
            return
        try:
            self.slack_notifier.use_outbox(self._outbox)
        except OSError as error:
            _log.warning("alerts that cannot be delivered are lost when this process ends: %s", error)

    # ------------------------------------------------------------------ the two modes

    def _start(self) -> None:
        """Make the server; who is refused because one of that name lives is told what to use instead."""
        try:
            self._initialize_service()
        except (AlreadyServingError, ChannelError) as error:
            name = self._options.name
            if self.running_unit_tests or living_writer(name) is None:
                raise
            hint = (
                f"{name!r} is served: to read it, use EliminationReader({name!r}); to change it, EliminationClient"
            )
            raise type(error)(error.message, hint=hint) from error

    def _create_direct_server(self) -> EliminationManagerServer:
        directory = None if self._options.in_memory else cast("Path", self._options.state_dir).resolve()
        earlier = None if directory is None else _in_direct_mode.get(directory)
        if earlier is not None:
            earlier.shutdown(f"a later manager of this process has taken {directory} over")
        server = open_server(self._options, namespace=PrivateNamespace())
        if directory is not None:
            _in_direct_mode[directory] = self
        server.live_price_fetcher = self._live_price_fetcher
        return server

    def _start_server_process(self, address: Location, authkey: bytes, server_ready: ServerReady) -> BaseProcess:
        return self._spawn_server(
            open_server,
            self._options,
            address=address,
            authkey=authkey,
            server_ready=server_ready,
            on_listening=functools.partial(announce, self._options),
        )

    def _check_startable(self) -> None:
        RuntimeDirectory(self._options.name, self._options.runtime_base).create()

    def _make_processor(self) -> EliminationProcessor:
        collaborators = cast("Collaborators", weakref.proxy(self))  # which it does not keep alive
        processor = EliminationProcessor(
            Context(collaborators, self.environment, self._reader, ProcessingCalls(self), self.is_backtesting)
        )
        if self.running_unit_tests:
            self._server_proxy._processor = processor  # noqa: SLF001
        return processor

    def _call(self, method: str, args: tuple[Any, ...] = (), kwargs: Any = None, **options: Any) -> Any:
        if method not in _GUARDED or self.running_unit_tests:
            return self._call_server(method, args, kwargs, **options)
        before = len(self._reader)
        answer = self._call_server(method, args, kwargs, **options)
        moved = max(abs(len(self._reader) - before), len(answer or ()))
        if moved >= self.environment.guard_count:
            self._tell_problems()  # there may be a notice, which should not wait for the next check
        return answer

    def _follow(self) -> None:
        if self.running_unit_tests:
            self._server_proxy._follow()  # noqa: SLF001

    def _size(self) -> int:
        return len(self._reader)

    def _published(self) -> EliminationReader | None:
        return None if self.running_unit_tests else self._reader

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        for name in ("_processor", "_table"):  # made anew there
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._table = self._reader._table  # noqa: SLF001
        self._processor = self._make_processor()

    # ------------------------------------------------------------------ names and places

    @property
    def name(self) -> str:
        """The name under which readers find the state."""
        return self._options.name

    @property
    def reader(self) -> EliminationReader:
        """The reader behind the reading methods; for versions, batches, and waiting for a change."""
        return self._reader

    @property
    def live_price_fetcher(self) -> Any:
        """What positions are closed with. May be replaced; deleting it brings the environment's back."""
        server = self._server_proxy
        return (
            server.live_price_fetcher if isinstance(server, EliminationManagerServer) else self._live_price_fetcher
        )

    @live_price_fetcher.setter
    def live_price_fetcher(self, fetcher: Any) -> None:
        self._live_price_fetcher = fetcher
        if isinstance(self._server_proxy, EliminationManagerServer):
            self._server_proxy.live_price_fetcher = fetcher

    @live_price_fetcher.deleter
    def live_price_fetcher(self) -> None:
        self.live_price_fetcher = self.environment.live_price_fetcher

    # ------------------------------------------------------------------ what is no longer

    def get_eliminations_lock(self) -> NoReturn:
        """Raise NotImplementedError: there is no lock to be held, and none is needed."""
        raise NotImplementedError(
            "there is no eliminations lock: every call is atomic by itself, and readers wait for nobody. "
            "Leave the `with` out; to change several eliminations in one step, use sync_eliminations() or "
            "delete_eliminations(), and to read several as of one moment, use snapshot() or are_eliminated()"
        )

    # ------------------------------------------------------------------ processing, in this process

    process_eliminations = processed(EliminationProcessor.process_eliminations)
    handle_departed = processed(EliminationProcessor.handle_departed)
    settle_debts = processed(EliminationProcessor.settle_debts)
    handle_first_refresh = processed(EliminationProcessor.handle_first_refresh)
    handle_perf_ledger_eliminations = processed(EliminationProcessor.handle_perf_ledger_eliminations)
    handle_challenge_period_eliminations = processed(EliminationProcessor.handle_challenge_period_eliminations)
    handle_mdd_eliminations = processed(EliminationProcessor.handle_mdd_eliminations)
    handle_zombies = processed(EliminationProcessor.handle_zombies)
    handle_eliminated_miner = processed(EliminationProcessor.handle_eliminated_miner)
    delete_expired = processed(EliminationProcessor.delete_expired)
    refresh_allowed = processed(EliminationProcessor.refresh_allowed)
    set_last_update_time = processed(EliminationProcessor.set_last_update_time)
    get_last_update_time_ms = processed(EliminationProcessor.get_last_update_time_ms)
    run_update_loop = processed(run_loop)

    first_refresh_ran = property(
        Calls.get_first_refresh_ran,
        Calls.set_first_refresh_ran,
        doc="Whether the first refresh was made since the server started; can be set.",
    )

    def is_hotkey_re_registered(self, hotkey: str | None) -> bool:
        """Tell whether a hotkey that once left the metagraph is in it now.

        The metagraph is asked, for hotkeys that departed only; where it is missing or fails, the table answers.
        """
        flags = self._flags(hotkey)
        if hotkey is None or not flags & _DEPARTED:
            return False
        try:
            if self.metagraph is not None:
                return truth(self.metagraph.has_hotkey(hotkey), "has_hotkey")
        except Exception as error:
            text = "the metagraph does not say whether %s is registered: %s"
            _limited(logging.WARNING, "metagraph", text, hotkey, error)
        return flags & _REGISTERED != 0

    def is_zombie_hotkey(self, hotkey: str | None, all_hotkeys_set: Container[str]) -> bool:
        """Tell whether a hotkey is missing among all hotkeys of the metagraph, the development one excepted."""
        return is_zombie(hotkey, all_hotkeys_set, self.environment.development_hotkey)
