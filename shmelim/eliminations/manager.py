"""What a validator holds: reads from shared memory, changes through the server, processing where it is called."""

from __future__ import annotations

import functools
import logging
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from shmelim.eliminations.changing import Changing
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.reading import Reading
from shmelim.eliminations.rules import EliminationProcessor
from shmelim.eliminations.rules.loop import run_loop
from shmelim.eliminations.rules.membership import listed_by, valid_hotkeys
from shmelim.eliminations.runtime import RuntimeDirectory
from shmelim.eliminations.serve import SERVICE_NAME, ServeOptions, announce, open_server
from shmelim.eliminations.server import EliminationManagerServer
from shmelim.eliminations.validator.environment import ValidatorEnvironment
from shmelim.errors import ChannelError
from shmelim.service import RPCServiceBase, ServiceSettings
from shmelim.shm import check_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from multiprocessing.process import BaseProcess

    from shmelim.channel import Address
    from shmelim.channel.address import Location
    from shmelim.eliminations.files.mirror import FilesMode
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
    from shmelim.service import ServerReady

_log = logging.getLogger("shmelim.manager")

DEFAULT_NAME: Final = "shmelim"
DEFAULT_PORT: Final = 50004

# Long enough for the recovery of a large state: its server is not ready before.
_READY_TIMEOUT: Final = 60.0
# What may be carried out twice without harm, and so is repeated when a connection breaks.
_IDEMPOTENT: Final = frozenset(
    {
        "begin_slash_rpc",
        "get_debts_rpc",
        "get_first_refresh_ran_rpc",
        "get_replacements_rpc",
        "get_slashes_rpc",
        "set_first_refresh_ran_rpc",
        "update_metagraph_rpc",
    }
)


class EliminationManager(Reading, Changing, RPCServiceBase):
    """The eliminations of a validator: reads, changes, and the rules by which miners are eliminated.

    In RPC mode it starts the server process and owns it; reads come from shared memory without asking that
    process, changes go to it. Copies in child processes, forked or given to a process that is being started,
    read and change alike, and follow a restart of the server by themselves. In direct mode the server object
    lives in this process: no process, no port, nothing in ``/dev/shm``, and unless a `state_dir` is given
    nothing on disk.

    Every collaborator can be replaced at any time by assigning the attribute of its name; the next call uses the
    new one. None of them is called by the constructor, but for the metagraph's list of hotkeys.

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
    sync_in_progress
        Processing pauses while its ``value`` is true.
    slack_notifier
        Who is told of failures: ``send_message(text, level=...)``.
    sync_epoch
        A counter in ``value``, which moves with every sync of the validator's positions.
    environment
        What is the validator's own: intervals, rules, prices, directories; None: the defaults.
    name
        The name under which readers find the state.
    port
        TCP port on 127.0.0.1 for changes; 0: any; None: a Unix socket in the name's runtime directory.
    address
        Path of a Unix socket, or ``(host, port)``, instead of `port`.
    state_dir
        Where the state is kept; None: the user's state directory of that name (in direct mode: in memory).
    runtime_base
        Where runtime directories are; None: the user's.
    durability, files, default_departed, imports
        As for :class:`~shmelim.eliminations.server.EliminationManagerServer`.
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
    StoreError, SegmentError
        State or shared memory cannot be had.

    Notes
    -----
    Thread-safe. After a fork the child's copy is a client: it never starts, restarts or ends the server.
    Can be pickled to a process that is being started only, together with its collaborators, and not in direct
    mode. Processing belongs into one process at a time.

    """

    # CPython 3.11 does not specialise calls of an object's methods once it has more than some 25 attributes in its
    # dict, and a check then takes half as long again. So what nobody patches stands in slots.
    __slots__ = (
        "_RPCServiceBase__core",
        "_live_price_fetcher",
        "_options",
        "_processor",
        "_reader",
        "_timeout",
    )

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
    # Set by the base, and named here for mocks.
    slack_notifier: Any = None
    environment: Any = None
    service_name: str = SERVICE_NAME
    port: int | None = None
    running_unit_tests: bool = False
    enable_health_check: bool = False

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
        files: FilesMode = "current",
        default_departed: Path | str | None = None,
        imports: Sequence[Path | str] = (),
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
        runtime = None if running_unit_tests else RuntimeDirectory(name, runtime_base).create()
        if runtime is None:
            address = None
        elif address is not None:
            port = None if port == DEFAULT_PORT else port
        elif port is None:
            address = str(runtime.socket)
        defaults: dict[str, Any] = {"ready_timeout": _READY_TIMEOUT, "idempotent": _IDEMPOTENT}
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
            **defaults | settings,
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
        self.environment = ValidatorEnvironment() if environment is None else environment
        self._options = ServeOptions(
            name=name,
            state_dir=None if state_dir is None else _absolute(state_dir),
            group_readable=group_readable,
            runtime_base=None if runtime_base is None else _absolute(runtime_base),
            in_memory=is_backtesting or (running_unit_tests and state_dir is None),
            durability=durability,
            files=files,
            default_departed=None if default_departed is None else _absolute(default_departed),
            imports=tuple(_absolute(path) for path in imports),
        )
        self._timeout = settings.get("call_timeout", ServiceSettings.call_timeout)
        self._live_price_fetcher = self.environment.live_price_fetcher
        self._initialize_service()
        try:
            self._reader = self._open_reader()
            self._table = self._reader._table  # noqa: SLF001  # what the reads of both look into
            self._processor = self._make_processor()
            self._look_at_metagraph()
        except BaseException:
            self.shutdown()
            raise

    # ------------------------------------------------------------------ the two modes

    def _create_direct_server(self) -> EliminationManagerServer:
        options = self._options
        server = EliminationManagerServer(
            None,
            None if options.in_memory else options.state_dir,
            durability=options.durability,
            files=options.files,
            default_departed=options.default_departed,
            imports=options.imports,
        )
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

    def _open_reader(self) -> EliminationReader:
        if self.running_unit_tests:
            return cast("EliminationManagerServer", self._server_proxy).reader
        return EliminationReader(self._options.name)

    def _make_processor(self) -> EliminationProcessor:
        processor = EliminationProcessor(
            cast("Collaborators", _CollaboratorsOf(self)),
            self.environment,
            self._reader,
            functools.partial(_server_of, weakref.ref(self)),
            always=self.running_unit_tests,
            is_backtesting=self.is_backtesting,
        )
        if self.running_unit_tests:
            cast("EliminationManagerServer", self._server_proxy).processor = processor
        return processor

    def _look_at_metagraph(self) -> None:
        """Tell the server who is registered, if that is known yet."""
        hotkeys: Any = None if self.metagraph is None else self.metagraph.hotkeys
        if hotkeys is None:
            return
        try:
            listed, _ = valid_hotkeys(listed_by(hotkeys))  # a tick tells of those that are none
        except TypeError as error:
            _log.warning("the metagraph has no list of hotkeys yet: %s", error)
            return
        if listed:
            self.update_metagraph(listed)

    def _call(self, method: str, *args: Any, idempotent: bool = False, timeout: float | None = None) -> Any:
        return self._call_server(method, *args, timeout=timeout, idempotent=idempotent or method in _IDEMPOTENT)

    def _size(self) -> int:
        return len(self._reader)

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
        return server.live_price_fetcher if self._has_server(server) else self._live_price_fetcher

    @live_price_fetcher.setter
    def live_price_fetcher(self, fetcher: Any) -> None:
        self._live_price_fetcher = fetcher
        if self._has_server(self._server_proxy):
            self._server_proxy.live_price_fetcher = fetcher

    @live_price_fetcher.deleter
    def live_price_fetcher(self) -> None:
        self.live_price_fetcher = self.environment.live_price_fetcher

    def _has_server(self, server: Any) -> bool:
        return isinstance(server, EliminationManagerServer)

    # ------------------------------------------------------------------ what is no longer

    def get_eliminations_lock(self) -> NoReturn:
        """Raise NotImplementedError: there is no lock to be held, and none is needed."""
        raise NotImplementedError(
            "there is no eliminations lock: every call is atomic by itself, and readers wait for nobody. "
            "Leave the `with` out; to change several eliminations in one step, use sync_eliminations() or "
            "delete_eliminations(), and to read several as of one moment, use snapshot() or are_eliminated()"
        )

    # ------------------------------------------------------------------ processing

    def process_eliminations(
        self, position_locks: PositionLocks | None = None, iteration_epoch: int | None = None
    ) -> None:
        """Run one tick of the processing rules, if it is time for one.

        Parameters
        ----------
        position_locks
            Instead of the attribute of that name.
        iteration_epoch
            Value of ``sync_epoch`` from which on the positions were read; None: its value now.

        """
        self._processor.process_eliminations(position_locks, iteration_epoch)

    def handle_perf_ledger_eliminations(
        self, position_locks: PositionLocks | None = None, iteration_epoch: int | None = None
    ) -> None:
        """Eliminate whom the perf ledgers name."""
        self._processor.handle_perf_ledger_eliminations(position_locks, iteration_epoch)

    def handle_challenge_period_eliminations(
        self, position_locks: PositionLocks | None = None, iteration_epoch: int | None = None
    ) -> None:
        """Eliminate who failed the challenge period."""
        self._processor.handle_challenge_period_eliminations(position_locks, iteration_epoch)

    def handle_mdd_eliminations(
        self, position_locks: PositionLocks | None = None, iteration_epoch: int | None = None
    ) -> None:
        """Eliminate whose drawdown is too large."""
        self._processor.handle_mdd_eliminations(position_locks, iteration_epoch)

    def handle_first_refresh(
        self, position_locks: PositionLocks | None = None, iteration_epoch: int | None = None
    ) -> None:
        """Close what miners hold who were eliminated already; once for each server, and not in backtests."""
        self._processor.handle_first_refresh(position_locks, iteration_epoch)

    def handle_departed(self) -> list[str]:
        """Tell the server who is registered, if that changed; returns those whose departure was recorded."""
        return self._processor.handle_departed()

    def settle_debts(
        self, position_locks: PositionLocks | None = None, iteration_epoch: int | None = None
    ) -> None:
        """Settle what eliminations owe."""
        self._processor.settle_debts(position_locks, iteration_epoch)

    def handle_zombies(
        self, position_locks: PositionLocks | None = None, iteration_epoch: int | None = None
    ) -> None:
        """Eliminate who has a directory and is not in the metagraph."""
        self._processor.handle_zombies(position_locks, iteration_epoch)

    def delete_expired(
        self, position_locks: PositionLocks | None = None, iteration_epoch: int | None = None
    ) -> None:
        """Delete what is left of those who were eliminated long ago and have left the metagraph."""
        self._processor.delete_expired(position_locks, iteration_epoch)

    def run_update_loop(self) -> None:
        """Run a tick each second until ``shutdown_dict`` is truthy; survives every error, and tells of it."""
        run_loop(self._processor)

    @property
    def first_refresh_ran(self) -> bool:
        """Whether the first refresh was made since the server started."""
        return bool(self._call("get_first_refresh_ran_rpc"))

    @first_refresh_ran.setter
    def first_refresh_ran(self, value: bool) -> None:
        self._call("set_first_refresh_ran_rpc", bool(value))

    def is_zombie_hotkey(self, hotkey: str, all_hotkeys_set: Iterable[str]) -> bool:
        """Tell whether a hotkey is missing among all hotkeys of the metagraph, the development one excepted."""
        return hotkey != self.environment.development_hotkey and hotkey not in all_hotkeys_set

    def refresh_allowed(self, refresh_interval_ms: int) -> bool:
        """Tell whether more than an interval has passed since the last tick; in direct mode always."""
        return self._processor.refresh_allowed(refresh_interval_ms)

    def set_last_update_time(self, skip_message: bool = False) -> None:
        """Say that a tick has run just now."""
        self._processor.set_last_update_time(skip_message)

    def get_last_update_time_ms(self) -> int:
        """Return when the last tick ran, ms since 1970; 0: never."""
        return self._processor.get_last_update_time_ms()


def _server_of(reference: weakref.ref[EliminationManager]) -> Any:
    """Return a manager's server; does not keep the manager alive."""
    manager = reference()
    if manager is None:
        raise ChannelError("the manager is gone")
    return manager._server_proxy  # noqa: SLF001


class _CollaboratorsOf:
    """A manager's collaborators as they are at each look; does not keep the manager alive."""

    def __init__(self, manager: EliminationManager) -> None:
        self._manager = weakref.ref(manager)

    def __getattr__(self, name: str) -> Any:
        manager = self._manager()
        if manager is None:
            raise ChannelError(f"the manager is gone, and its {name} with it")
        return getattr(manager, name)


def _absolute(path: Path | str) -> Path:
    return Path(path).absolute()
