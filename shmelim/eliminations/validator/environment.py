"""What is the validator's own in the processing of eliminations, with working defaults."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Final

from shmelim.eliminations.debts.states import DECLINED, DOUBTFUL, MADE, NOT_MADE
from shmelim.eliminations.record import DAY_MS, SINCE_2020_MS, EliminationReason
from shmelim.eliminations.validator.addresses import is_ss58_address
from shmelim.eliminations.validator.collaborators import Collaborators
from shmelim.eliminations.validator.directories import MinerDirectories
from shmelim.eliminations.validator.drawdown import Drawdowns, ledger_drawdown_percentage
from shmelim.errors import SlashNotMadeError
from shmelim.system import clock as system_clock
from shmelim.system.arguments import flags, functions, number

DEVELOPMENT_HOTKEY: Final = "DEVELOPMENT"
_LATEST_MS: Final = 4_102_444_800_000  # 2100: a clock of microseconds is beyond it
# What figures may be at most; each is a number of at least 0.
_FIGURES: Final = {
    "max_drawdown_percentage": 100.0,
    "check_interval_ms": math.inf,
    "deletion_delay_ms": math.inf,
    "max_slashes_per_hour": math.inf,
    "guard_count": math.inf,
    "guard_share": 1.0,
    "plausible_since_ms": math.inf,
    "call_deadline_s": math.inf,
    "slash_deadline_s": math.inf,
    "slash_lease_s": 3600.0,
    "longest_sync_s": math.inf,
    "tick_pause_s": math.inf,
    "error_pause_s": math.inf,
}
_FUNCTIONS: Final = frozenset({"price_source", "drawdown", "slash_outcome", "is_hotkey", "clock"})
_REASONS: Final = frozenset(EliminationReason.__members__)


class ValidatorEnvironment:
    """The figures and rules that validators choose; pass what differs, or subclass.

    Any attribute may be set at any time, and is checked then too; the next tick uses it. Thread-safe, and can be
    pickled if what it was given can.

    Parameters
    ----------
    price_source, drawdown
        Stand in for the methods :meth:`price_source` and :meth:`drawdown`.
    max_drawdown_percentage
        The default drawdown rule eliminates from this percentage on, 0 to 100.
    scored_bucket
        The bucket of the challenge period whose miners the drawdown rule judges.
    check_interval_ms
        A tick runs when more than this many milliseconds have passed since the last one.
    deletion_delay_ms
        An elimination at least this many milliseconds old is deleted once its miner has left the metagraph.
    slash_proportions
        ``{reason: share of the collateral}``, each 0 to 1, by the names of
        :class:`~shmelim.EliminationReason`; for any other reason the contract decides.
    not_made_errors
        Exception classes of the contract's own that are raised only where certainly nothing was taken, as
        :class:`~shmelim.SlashNotMadeError` is: such a slash is tried again. One class, or a tuple of them.
    slash_outcome
        Stands in for the method :meth:`slash_outcome`.
    max_slashes_per_hour
        When so many were begun in an hour and more are owed, all are held until a person releases them.
    guard_count, guard_share
        How many eliminations, and what share of them, a change must take back for the guard to notice it.
    development_hotkey
        The hotkey that is not a zombie, though it is in no metagraph.
    miner_directory
        The directory that has one for each miner; hidden ones, links and names that no hotkey can have are left
        alone. None: there are no such directories, and no zombies.
    is_hotkey
        Whether a name may be a hotkey of this network, and its directory a miner's; by default a valid SS58
        address. Whoever was registered here once is one whatever this says.
    believe_empty_metagraph
        Whether a metagraph that lists nobody means that everybody left, as tests may want it.
    plausible_since_ms
        An earlier time is not believed to be that of an elimination, nor is one more than a day ahead of `clock`
        (ms since 1970, UTC).
    live_price_fetcher
        Used where the collaborators have none.
    clock
        Returns milliseconds since 1970, UTC; fractions are rounded. Default: the system's clock.
    call_deadline_s, slash_deadline_s
        Seconds for each call to one of the validator's own objects, and for one to the contract. What has not come
        back by then is a failure of that miner or step; it is left behind in its thread, and whatever it still
        returns counts only if it is the contract's. In direct mode there are no deadlines.
    slash_lease_s
        Seconds after which a slash is in doubt whose process was not heard of, at most 3600. Less than a few and a
        busy machine has them doubted; a late answer settles that. The manager's server takes it at its start.
    longest_sync_s
        Seconds for which ``sync_in_progress`` may be true before people are told; the loop pauses meanwhile.
    tick_pause_s, error_pause_s
        Seconds between two ticks of the loop, and after one that failed.

    Raises
    ------
    ValueError
        A figure cannot be: negative, NaN, a share above 1, a reason that does not exist, a clock that counts
        something else than milliseconds. The message names the field.
    TypeError
        A figure is not a number.

    Examples
    --------
    >>> environment = ValidatorEnvironment(max_drawdown_percentage=5.0, slash_proportions={"PLAGIARISM": 1.0})
    >>> environment.slash_proportion("PLAGIARISM"), environment.slash_proportion("ZOMBIE")
    (1.0, None)
    >>> from types import SimpleNamespace
    >>> environment.drawdown(SimpleNamespace(cps=[SimpleNamespace(mdd=0.99), SimpleNamespace(mdd=0.94)]))
    (True, 6.0)
    >>> environment.price_source("BTC/USD", {"BTC/USD": 65000.0}, 1_700_000_000_000)
    65000.0

    """

    def __init__(
        self,
        *,
        price_source: Callable[[Any, Mapping[str, Any], int], Any] | None = None,
        drawdown: Callable[[Any], tuple[bool, float]] | None = None,
        max_drawdown_percentage: float = 10.0,
        scored_bucket: Any = "MAINCOMP",
        check_interval_ms: int = 300_000,
        deletion_delay_ms: int = 172_800_000,
        slash_proportions: Mapping[str, float] | None = None,
        not_made_errors: type[BaseException] | tuple[type[BaseException], ...] = (),
        slash_outcome: Callable[[Any], str] | None = None,
        max_slashes_per_hour: float = 10,
        guard_count: float = 10,
        guard_share: float = 0.25,
        development_hotkey: str = DEVELOPMENT_HOTKEY,
        miner_directory: Path | str | None = None,
        is_hotkey: Callable[[str], bool] = is_ss58_address,
        believe_empty_metagraph: bool = False,
        plausible_since_ms: int = SINCE_2020_MS,
        live_price_fetcher: Any = None,
        clock: Callable[[], float] | None = None,
        call_deadline_s: float = 60.0,
        slash_deadline_s: float = 180.0,
        slash_lease_s: float = 30.0,
        longest_sync_s: float = 900.0,
        tick_pause_s: float = 1.0,
        error_pause_s: float = 10.0,
    ) -> None:
        self.max_drawdown_percentage = max_drawdown_percentage
        self.scored_bucket = scored_bucket
        self.check_interval_ms = check_interval_ms
        self.deletion_delay_ms = deletion_delay_ms
        self.slash_proportions = {} if slash_proportions is None else slash_proportions
        self.not_made_errors = not_made_errors
        self.max_slashes_per_hour = max_slashes_per_hour
        self.guard_count = guard_count
        self.guard_share = guard_share
        self.development_hotkey = development_hotkey
        self.is_hotkey = is_hotkey
        self.believe_empty_metagraph = believe_empty_metagraph
        self.plausible_since_ms = plausible_since_ms
        self.live_price_fetcher = live_price_fetcher
        self.call_deadline_s = call_deadline_s
        self.slash_deadline_s = slash_deadline_s
        self.slash_lease_s = slash_lease_s
        self.longest_sync_s = longest_sync_s
        self.tick_pause_s = tick_pause_s
        self.error_pause_s = error_pause_s
        self._slash_outcome = slash_outcome
        self._price_source = price_source
        self._drawdown = drawdown
        self._drawdowns = Drawdowns()
        self._clock = clock
        self._directories = None if miner_directory is None else MinerDirectories(miner_directory)
        self.now_ms()

    @classmethod
    def given(cls, environment: ValidatorEnvironment | None) -> ValidatorEnvironment:
        """Return what a caller gave for the environment, None for the defaults; ``TypeError`` if it is not one."""
        if environment is not None and not isinstance(environment, ValidatorEnvironment):
            raise TypeError(f"environment must be a ValidatorEnvironment or None, not {environment!r:.100}")
        return cls() if environment is None else environment

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIGURES:
            value = number(name, value, most=_FIGURES[name])
        elif name == "slash_proportions":
            if not isinstance(value, Mapping):
                raise TypeError(f"slash_proportions must be a dict of shares by reason, not {value!r:.100}")
            shares = dict(value)  # else nobody checks what its owner writes into it later
            for reason, share in shares.items():
                if reason not in _REASONS:
                    known = ", ".join(sorted(_REASONS))
                    raise ValueError(f"slash_proportions has {reason!r}, which is not a reason: {known}")
                shares[reason] = number(f"slash_proportions[{reason!r}]", share, most=1)
            value = shares
        elif name.removeprefix("_") in _FUNCTIONS:
            functions(**{name.removeprefix("_"): value})
        elif name == "believe_empty_metagraph":
            flags(believe_empty_metagraph=value)
        elif name == "not_made_errors":
            _check_errors(name, value)
        super().__setattr__(name, value)

    def gaps(self, collaborators: Collaborators, *, is_backtesting: bool = False) -> list[str]:
        """Return what this environment lacks or contradicts for these collaborators, and what that costs; by name.

        Asks none of them anything.
        """
        said = []
        challenge = collaborators.challengeperiod_manager
        if collaborators.position_manager is not None:
            if self.live_price_fetcher is None:
                said.append(
                    "live_price_fetcher is missing: what no record names a price for is closed without one"
                )
            if self._directories is None and not is_backtesting:
                said.append("miner_directory is missing: nobody is a zombie, and no directory is ever removed")
        if challenge is not None:
            known = _buckets(challenge)
            if known and self.scored_bucket not in known:
                names = ", ".join(sorted(map(str, known)))
                text = (
                    f"scored_bucket {self.scored_bucket!r} is unknown to the challenge period, which has {names}"
                )
                said.append(f"{text}: nobody's drawdown is judged")
            if inspect.getattr_static(challenge, "pop_elimination_reasons", None) is None:
                said.append(
                    "the challenge period has no pop_elimination_reasons(hotkeys): a reason that comes between"
                    " the last look and clear_elimination_reasons() can be lost"
                )
        return said

    def now_ms(self) -> int:
        """Return the time in milliseconds since 1970, UTC.

        ValueError and TypeError where `clock` has it in another unit, or not at all: nothing that takes its time
        from it goes on, or directories would be deleted years too early.
        """
        if self._clock is None:
            return system_clock.now_ms()
        if not SINCE_2020_MS <= (now := self._clock()) <= _LATEST_MS:  # NaN, too
            raise ValueError(f"clock must return milliseconds since 1970, UTC, not {now!r}")
        return round(now)

    @property
    def has_own_clock(self) -> bool:
        """Whether the time comes from a `clock` that was given, which may go as it likes."""
        return self._clock is not None

    def is_plausible(self, time_ms: int) -> bool:
        """Whether an elimination may have begun at a time, in ms since 1970, UTC."""
        return self.plausible_since_ms <= time_ms <= self.now_ms() + DAY_MS

    def price_source(self, trade_pair: Any, price_info: Mapping[str, Any], time_ms: int) -> Any:
        """Return the price at which a position is closed, as its ``generate_fake_flat_order`` wants it.

        `price_info` has the prices that led to the elimination, ``{"BTC/USD": price}`` or
        ``{"BTCUSD": (price, ms)}``, and `time_ms` is when it was (ms since 1970, UTC). None has the price fetched.
        By default the price itself, where `price_info` has the pair by its ``trade_pair``, its ``trade_pair_id``
        or its text; what is not a positive number there is not a price.
        """
        if self._price_source is not None:
            return self._price_source(trade_pair, price_info, time_ms)
        names = [getattr(trade_pair, attribute, None) for attribute in ("trade_pair", "trade_pair_id")]
        names.append(str(trade_pair))
        found = (price_info[name] for name in names if isinstance(name, str) and name in price_info)
        prices = (price[0] if isinstance(price, (list, tuple)) and price else price for price in found)
        return next(filter(_is_price, prices), None)

    def drawdown(self, ledger: Any) -> tuple[bool, float]:
        """Return whether a ledger's miner is to be eliminated, and the drawdown as a percentage.

        By default from `max_drawdown_percentage` on. The ledger has checkpoints ``cps``, each with the lowest
        point it saw as a factor ``mdd`` of the peak before: 0.9 is 10 % down. Of a ledger that seems unchanged
        only the end is read, and at least once in 12 looks the whole, and always before it eliminates anybody.

        A checkpoint whose ``mdd`` is not such a factor is left out, with a warning in the log; ValueError if that
        is true of all of them. AttributeError, TypeError: the ledger has no checkpoints.
        """
        if self._drawdown is not None:
            return self._drawdown(ledger)
        percentage = self._drawdowns.percentage(ledger)
        if percentage >= self.max_drawdown_percentage:
            # It may be remembered, and have been put right since: nobody is eliminated by what was not read now.
            percentage = ledger_drawdown_percentage(ledger)
        return percentage >= self.max_drawdown_percentage, percentage

    def slash_proportion(self, reason: str) -> float | None:
        """Return the share of the collateral that is taken for a reason, 0 to 1; None lets the contract decide."""
        return self.slash_proportions.get(reason)

    def slash_outcome(self, answer: Any) -> str:
        """Return what became of a slash: ``"made"``, ``"declined"``, ``"not made"`` or ``"in doubt"``.

        `answer` is what the contract returned, or the exception that it raised. *Declined*: it took nothing and
        never will. *Not made*: it is tried again. By default None and True are made, False is declined,
        :class:`~shmelim.SlashNotMadeError` and `not_made_errors` are not made, and all else is in doubt: a person
        decides.
        """
        if self._slash_outcome is not None:
            return self._slash_outcome(answer)
        if answer is None or answer is True:
            return MADE
        if answer is False:
            return DECLINED
        return NOT_MADE if isinstance(answer, (SlashNotMadeError, self.not_made_errors)) else DOUBTFUL

    def miner_hotkeys(self) -> list[str]:
        """Return the hotkeys that have a directory."""
        return [] if self._directories is None else self._directories.hotkeys()

    def remove_miner_directory(self, hotkey: str) -> None:
        """Remove a miner's directory, if there is one."""
        if self._directories is not None:
            self._directories.remove(hotkey)


def _is_price(value: Any) -> bool:
    is_number = isinstance(value, Real) and value is not True
    return is_number and 0 < value < math.inf  # NaN is not


def _buckets(challenge: Any) -> list[Any]:
    """Return the buckets that a challenge period has in its ``buckets``, by hotkey or listed, if it has them."""
    found = inspect.getattr_static(challenge, "buckets", None)
    if isinstance(found, Mapping):
        found = found.values()
    return list(found) if isinstance(found, Iterable) and not isinstance(found, (str, bytes)) else []


def _check_errors(name: str, value: Any) -> None:
    for error in value if isinstance(value, tuple) else (value,):
        if not (isinstance(error, type) and issubclass(error, BaseException)):
            raise TypeError(f"{name} must be an exception class or a tuple of them, not {error!r:.100}")
        if issubclass(SlashNotMadeError, error) and error is not SlashNotMadeError:
            # Every failure would be repeated, also after money moved.
            raise ValueError(
                f"{name} must be the contract's own: {error.__name__} is raised for other reasons, too"
            )
