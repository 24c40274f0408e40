"""What the processing of eliminations needs of a validator: one protocol for each thing that it calls.

A validator's own classes need not know of these: they fit if they have these methods, and where they do not, an
adapter of a few lines stands between. First arguments are passed by position, those with defaults by name. What a
method raises is reported, stops no other rule, and is tried again in the next tick; only a slash is not.

Each protocol can be asked at run time whether an object has all its methods:
``isinstance(manager, PositionManager)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from shmelim.notify.problems import Notifier as Notifier  # noqa: PLC0414 - one of these protocols too


@runtime_checkable
class Metagraph(Protocol):
    """Which hotkeys are registered."""

    @property
    def hotkeys(self) -> Sequence[str]:
        """All registered hotkeys; None means that they are not known yet. What is not a hotkey is left out."""

    def has_hotkey(self, hotkey: str, /) -> bool:
        """Whether a hotkey is registered."""


@runtime_checkable
class Position(Protocol):
    """One miner's position in one trade pair."""

    @property
    def position_uuid(self) -> str:
        """Its identity among the positions of its miner."""

    @property
    def trade_pair(self) -> Any:
        """What is traded; its ``trade_pair_id``, such as ``BTCUSD``, is what its positions are locked by."""

    @property
    def is_closed_position(self) -> bool:
        """Whether it is closed."""

    @property
    def orders(self) -> Sequence[Any]:
        """Its orders, oldest first; each took effect at its ``processed_ms``, in ms since 1970, UTC."""

    def to_websocket_dict(self) -> Any:
        """Return what is put into the WebSocket queue."""

    @staticmethod
    def generate_fake_flat_order(
        position: Any, time_ms: int, live_price_fetcher: Any, price_source: Any, /
    ) -> Any:
        """Return the order that closes a position at that time.

        ``price_source`` is what :meth:`ValidatorEnvironment.price_source` made of the elimination's prices; None
        where it has none, and the price must be fetched.
        """

    def add_order(self, order: Any, live_price_fetcher: Any, /) -> Any:
        """Add an order in memory; it counts once the position is saved."""


@runtime_checkable
class PerfLedgerManager(Protocol):
    """The ledgers of the miners' performance."""

    @property
    def perf_ledger_hks_to_invalidate(self) -> Iterable[str]:
        """Hotkeys whose positions changed in the past, and whose ledger is not judged until it is built again."""

    def get_perf_ledger_eliminations(self) -> Iterable[Mapping[str, Any]]:
        """Return the elimination records of miners whose ledger shows that they were liquidated."""

    def filtered_ledger_for_scoring(
        self, *, portfolio_only: bool = True, hotkeys: list[str] | None = None
    ) -> Mapping[str, Any]:
        """Return ``{hotkey: ledger}`` for those of these hotkeys that have one."""


@runtime_checkable
class PositionManager(Protocol):
    """The miners' positions. The processing changes what the getters return, and then has it saved.

    A class may also have ``get_positions_for_hotkeys(hotkeys, only_open_positions=True)``, which returns
    ``{hotkey: positions}`` for many miners; those without any may be left out. The first refresh asks it once
    instead of asking for each miner.
    """

    @property
    def perf_ledger_manager(self) -> Any:
        """The ledgers: a :class:`PerfLedgerManager`, or None."""

    def get_miner_position_by_uuid(self, hotkey: str, position_uuid: str, /) -> Any:
        """Return a position as it is now, or None."""

    def get_positions_for_one_hotkey(self, hotkey: str, /, only_open_positions: bool = False) -> Iterable[Any]:
        """Return a miner's positions."""

    def save_miner_position(self, position: Any, /, delete_open_position_if_exists: bool = True) -> Any:
        """Store a position as it is."""

    def delete_position(self, position: Any, /) -> Any:
        """Delete a position; it is not an error if it is gone."""


@runtime_checkable
class ChallengePeriodManager(Protocol):
    """The miners that are on probation, and why some of them failed.

    A class may also have ``pop_elimination_reasons(hotkeys)``, which forgets the reasons of these hotkeys alone.
    It is then called instead of ``clear_elimination_reasons``, which would also clear a reason that came after the
    last look. And ``buckets``, its buckets by hotkey or as a list, so that an environment whose ``scored_bucket``
    is none of them is noticed at construction.
    """

    def has_elimination_reasons(self) -> bool:
        """Whether anybody waits to be eliminated. Asked every second."""

    def get_all_elimination_reasons(self) -> Mapping[str, Sequence[Any]]:
        """Return ``{hotkey: (reason, drawdown)}`` of those who wait. Asked again before they are cleared."""

    def clear_elimination_reasons(self) -> Any:
        """Forget all reasons, which are recorded by then."""

    def get_hotkeys_by_bucket(self, bucket: Any, /) -> Iterable[str]:
        """Return the hotkeys in a bucket."""

    def has_miner(self, hotkey: str, /) -> bool:
        """Whether a miner has an entry."""

    def remove_miner(self, hotkey: str, /) -> Any:
        """Remove a miner's entry."""

    def _write_challengeperiod_from_memory_to_disk(self) -> Any:
        """Store the entries."""


@runtime_checkable
class ContractManager(Protocol):
    """The contract that holds the miners' collateral."""

    def slash_miner_collateral_proportion(self, hotkey: str, /, slash_proportion: float | None = None) -> Any:
        """Take a share of a miner's collateral, 0 to 1; None: as much as the contract says.

        Called once for an elimination, and again only if it raises :class:`~shmelim.errors.SlashNotMadeError`,
        which says that certainly nothing was taken. It returns None or True once the slash is made. After any
        other exception or answer nobody knows whether money moved, and a person must find out. It is not awaited.
        """


@runtime_checkable
class PositionLocks(Protocol):
    """The locks under which positions change."""

    def get_lock(self, hotkey: str, trade_pair_id: str, /) -> AbstractContextManager[Any]:
        """Return the lock of a miner's positions in a trade pair."""


@runtime_checkable
class LimitOrderManager(Protocol):
    """The miners' limit orders."""

    def delete_all_limit_orders_for_hotkey(self, hotkey: str, /) -> Any:
        """Delete a miner's limit orders; having none is not an error."""


@runtime_checkable
class WebSocketQueue(Protocol):
    """Takes changed positions to those who watch."""

    def put(self, message: Any, /) -> Any:
        """Put a message into the queue."""


@runtime_checkable
class SharedValue(Protocol):
    """A value that other processes change, such as ``multiprocessing.Value``."""

    @property
    def value(self) -> Any:
        """The value now."""


@dataclass(eq=False)
class Collaborators:
    """The collaborators as they are now.

    Any of them may be replaced at any time, from any thread; whoever uses one looks here each time. None means
    that the validator has no such thing: what needs it, a step of the tick or a part of what an elimination owes,
    is left out.
    """

    metagraph: Metagraph | None = None  # without it nobody departs, is a zombie, or is deleted
    position_manager: PositionManager | None = None  # without it: no positions to close, no ledgers to judge by
    challengeperiod_manager: ChallengePeriodManager | None = None  # without it nobody fails probation or is scored
    contract_manager: ContractManager | None = None  # without it nobody is slashed
    position_locks: PositionLocks | None = None  # without them positions are closed without a lock
    limit_order_manager: LimitOrderManager | None = None  # without it there are no limit orders to delete
    live_price_fetcher: Any = None  # handed on to positions that are closed; None: the environment's
    shared_queue_websockets: WebSocketQueue | None = None  # gets the positions that were closed
    slack_notifier: Notifier | None = None  # is told what failed, once until it works again
    shutdown_dict: Any = None  # whatever is true once the validator ends, or an event that is set then
    sync_in_progress: SharedValue | None = None  # true while positions are being replaced
    sync_epoch: SharedValue | None = None  # another number after each time that they were

    def as_arguments(self) -> dict[str, Any]:
        """Return what ``EliminationManager`` is constructed with, by name: all but ``live_price_fetcher``."""
        return {name: value for name, value in vars(self).items() if name != "live_price_fetcher"}
