"""What the server says and does about debts: arguments are checked here, steps committed, questions answered."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from shmelim.eliminations.debts.states import KINDS, SLASH
from shmelim.eliminations.debts.tables import Figures
from shmelim.eliminations.record import check_hotkey, encode, normalise
from shmelim.eliminations.state import debt_changes
from shmelim.eliminations.state.changes import replacements
from shmelim.eliminations.store.offline import read_debt_figures, read_debts, read_slashes
from shmelim.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from shmelim.eliminations.state.changes import Step
    from shmelim.eliminations.state.committer import Committer
    from shmelim.eliminations.store.history import Origin
    from shmelim.system.problems import Problems

T = TypeVar("T")

_MAX_ATTEMPT: Final = 255
_MAX_ERROR: Final = 500
MOST_SHOWN: Final = 20
"""Hotkeys in doubt that a health check names."""


class DebtBook:
    """The debts of a server's state.

    Parameters
    ----------
    committer
        Carries out the changes.
    origin
        Tells who asks for a change.
    state_dir
        Where the store is; None: in memory.

    Notes
    -----
    Thread-safe: it holds nothing itself. Questions do not wait for a commit that is under way, unless the store is
    in memory.

    """

    def __init__(self, committer: Committer, origin: Callable[[], Origin], state_dir: Path | None) -> None:
        self._committer = committer
        self._origin = origin
        self._state_dir = state_dir

    def eliminate(
        self,
        hotkey: str,
        record: Mapping[str, Any],
        owed: Iterable[str],
        expected: int | None,
        slash_once_within_ms: float | None,
    ) -> str:
        """Eliminate a hotkey with what that owes."""
        check_hotkey(hotkey)  # which also refuses None: normalise would take the record's word for it
        if expected is not None and (isinstance(expected, bool) or not isinstance(expected, int)):
            raise TypeError(f"replacements must be a whole number or None, not {expected!r}")
        if slash_once_within_ms is not None:
            _check_span("slash_once_within_ms", slash_once_within_ms)
        plain = normalise(record, hotkey)
        return self._commit(
            debt_changes.eliminate(
                plain["hotkey"],
                encode(plain),
                plain["elimination_initiated_time_ms"],
                _check_kinds(owed),
                expected,
                slash_once_within_ms,
            )
        )

    def replacements(self) -> int:
        """Return how often the whole list was replaced."""
        return self._committer.read(replacements)

    def debts(self, hotkey: str | None) -> list[dict[str, Any]]:
        """Return what is owed."""
        if hotkey is not None:
            check_hotkey(hotkey)
        if self._state_dir is None:
            found = self._committer.read(lambda store: store.debts(hotkey))
        else:
            found = read_debts(self._state_dir, hotkey)
        return [debt.as_dict() for debt in found]

    def slashes(self, hotkey: str | None) -> list[dict[str, Any]]:
        """Return the last slash that was made of each."""
        if hotkey is not None:
            check_hotkey(hotkey)
        if self._state_dir is None:
            found = self._committer.read(lambda store: store.slashes(hotkey))
        else:
            found = read_slashes(self._state_dir, hotkey)
        return [slash.as_dict() for slash in found]

    def settle(self, hotkey: str, kind: str, attempt: str | None) -> bool:
        """Remove a debt whose effect is made."""
        _check(hotkey, kind, attempt)
        return self._commit(debt_changes.settle(hotkey, kind, attempt))

    def fail(self, hotkey: str, kind: str, error: str, attempt: str | None, *, in_doubt: bool) -> bool:
        """Note that a debt could not be settled."""
        _check(hotkey, kind, attempt)
        _check_truth("in_doubt", in_doubt)
        if in_doubt and attempt is None:
            raise ValueError("in_doubt is said of an attempt: attempt must not be None")
        return self._commit(debt_changes.fail(hotkey, kind, _checked_error(error), attempt, in_doubt=in_doubt))

    def begin_slash(self, hotkey: str, attempt: str) -> bool:
        """Let an attempt have a slash that is owed."""
        check_hotkey(hotkey)
        _check_attempt(attempt)
        if not self._commit(debt_changes.begin_slash(hotkey, attempt)):
            return False
        # After a power cut that took this with it, the slash would be owed, and made again.
        self._committer.sync()
        return True

    def doubt_slash(self, hotkey: str, attempt: str, error: str) -> bool:
        """Put the slash of an attempt in doubt."""
        check_hotkey(hotkey)
        _check_attempt(attempt)
        return self._commit(debt_changes.fail(hotkey, SLASH, _checked_error(error), attempt, in_doubt=True))

    def resolve_slash(self, hotkey: str, made: bool) -> bool:
        """Settle by hand what an attempt left."""
        check_hotkey(hotkey)
        _check_truth("made", made)
        return self._commit(debt_changes.resolve_slash(hotkey, made=made))

    def health(self, problems: Problems) -> dict[str, Any]:
        """Return what a health check says of debts; raise and clear what is wrong with them."""
        try:
            figures = self._figures()
        except StoreError as error:
            problems.report("debts_unreadable", f"what is owed cannot be read: {error}")
            return {"num_debts": None, "slashes_in_doubt": None}
        problems.clear("debts_unreadable")
        shown = figures.in_doubt[:MOST_SHOWN]
        if shown:
            more = f" and {len(figures.in_doubt) - len(shown)} more" if len(figures.in_doubt) > len(shown) else ""
            problems.report(
                "slashes_in_doubt",
                f"nobody knows whether these slashes were made: {', '.join(shown)}{more}",
                remedy="see `shmelim debts`, look at the contract, and settle them with `shmelim slash resolve`",
            )
        else:
            problems.clear("slashes_in_doubt")
        return {"num_debts": figures.debts, "slashes_in_doubt": shown}

    def _figures(self) -> Figures:
        if self._state_dir is None:
            return self._committer.read(lambda store: store.debt_figures())
        return read_debt_figures(self._state_dir)

    def _commit(self, change: Callable[[Step], T]) -> T:
        return self._committer.commit(change, self._origin())


def _check(hotkey: str, kind: str, attempt: str | None) -> None:
    check_hotkey(hotkey)
    _check_kind(kind)
    if attempt is not None:
        _check_attempt(attempt)
        if kind != SLASH:
            raise ValueError(f"attempt goes with kind {SLASH!r}, not with {kind!r}")


def _check_kind(kind: str) -> None:
    if not isinstance(kind, str):
        raise TypeError(f"the kind of a debt must be text, not {type(kind).__name__}")
    if kind not in KINDS:
        raise ValueError(f"the kind of a debt must be one of {', '.join(KINDS)}, not {kind!r}")


def _check_kinds(owed: Iterable[str]) -> list[str]:
    """Return kinds in their order, each once."""
    if isinstance(owed, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"owed must be a list of kinds of debts, not {type(owed).__name__}")
    given = list(owed)
    for kind in given:
        _check_kind(kind)
    return [kind for kind in KINDS if kind in given]


def _check_attempt(attempt: str) -> None:
    if not isinstance(attempt, str):
        raise TypeError(f"attempt must be text, not {type(attempt).__name__}")
    if not (0 < len(attempt) <= _MAX_ATTEMPT and attempt.isascii() and attempt.isprintable()):
        raise ValueError(f"attempt must be 1 to {_MAX_ATTEMPT} printable ASCII characters")


def _check_truth(name: str, value: bool) -> None:
    # A text that says "false" would count as true.
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")


def _check_span(name: str, value: float) -> None:
    # Infinity is fine, NaN is not.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number of milliseconds or None, not {value!r}")
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, not {value!r}")


def _checked_error(error: str) -> str:
    """Return an error's text such that a store takes it, and short."""
    if not isinstance(error, str):
        raise TypeError(f"error must be text, not {type(error).__name__}")
    short = error if len(error) <= _MAX_ERROR else f"{error[:_MAX_ERROR]} …"
    return short.encode("utf-8", "backslashreplace").decode()
