"""The server's methods about debts: arguments are checked here, changes committed, questions answered.

They are documented where they are declared, in ``calls.py``.
"""

# ruff: noqa: D102

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from shmelim.eliminations.debts.states import KINDS, SLASH
from shmelim.eliminations.record import check_hotkey, encode, normalise
from shmelim.eliminations.state import debt_changes
from shmelim.eliminations.state.changes import replacements as count_replacements
from shmelim.eliminations.store.offline import read_debt_figures, read_debts, read_slashes
from shmelim.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from shmelim.eliminations.state.committer import Committer
    from shmelim.eliminations.store.store import Store
    from shmelim.system.problems import Problems

T = TypeVar("T")

_MAX_ATTEMPT: Final = 255
_MAX_ERROR: Final = 500
MOST_SHOWN: Final = 20
"""Hotkeys in doubt that a health check names."""


class DebtMethods:
    """A server's remote methods about debts."""

    # Of the server.
    _committer: Committer
    state_dir: Path | None

    def eliminate_rpc(
        self,
        hotkey: str,
        record: Mapping[str, Any],
        owed: Iterable[str],
        replacements: int | None = None,
        slash_once_within_ms: float | None = None,
    ) -> str:
        check_hotkey(hotkey)  # which also refuses None: normalise would take the record's word for it
        if replacements is not None and (isinstance(replacements, bool) or not isinstance(replacements, int)):
            raise TypeError(f"replacements must be a whole number or None, not {replacements!r}")
        if slash_once_within_ms is not None:
            _check_span("slash_once_within_ms", slash_once_within_ms)
        plain = normalise(record, hotkey)
        eliminated_ms = plain["elimination_initiated_time_ms"]
        kinds = _check_kinds(owed)
        return self._committer.commit(
            debt_changes.eliminate, hotkey, encode(plain), eliminated_ms, kinds, replacements, slash_once_within_ms
        )

    def get_replacements_rpc(self) -> int:
        return self._committer.read(count_replacements)

    def get_debts_rpc(self, hotkey: str | None = None) -> list[dict[str, Any]]:
        found = self._ask(hotkey, lambda store: store.debts(hotkey), read_debts)
        return [debt.as_dict() for debt in found]

    def get_slashes_rpc(self, hotkey: str | None = None) -> list[dict[str, Any]]:
        found = self._ask(hotkey, lambda store: store.slashes(hotkey), read_slashes)
        return [slash.as_dict() for slash in found]

    def _ask(
        self,
        hotkey: str | None,
        store: Callable[[Store], list[T]],
        directory: Callable[[Path, str | None], list[T]],
    ) -> list[T]:
        """Ask the directory, which waits for no commit; the store where it is in memory."""
        if hotkey is not None:
            check_hotkey(hotkey)
        return self._committer.read(store) if self.state_dir is None else directory(self.state_dir, hotkey)

    def settle_debt_rpc(self, hotkey: str, kind: str, attempt: str | None = None) -> bool:
        _check(hotkey, kind, attempt)
        return self._committer.commit(debt_changes.settle, hotkey, kind, attempt)

    def fail_debt_rpc(
        self, hotkey: str, kind: str, error: str, attempt: str | None = None, in_doubt: bool = False
    ) -> bool:
        _check(hotkey, kind, attempt)
        _check_truth("in_doubt", in_doubt)
        if in_doubt and attempt is None:
            raise ValueError("in_doubt is said of an attempt: attempt must not be None")
        text = _checked_error(error)
        return self._committer.commit(debt_changes.fail, hotkey, kind, text, attempt, in_doubt=in_doubt)

    def begin_slash_rpc(self, hotkey: str, attempt: str) -> bool:
        check_hotkey(hotkey)
        _check_attempt(attempt)
        if not self._committer.commit(debt_changes.begin_slash, hotkey, attempt):
            return False
        # After a power cut that took this with it, the slash would be owed, and made again.
        self._committer.sync()
        return True

    def doubt_slash_rpc(self, hotkey: str, attempt: str, error: str) -> bool:
        check_hotkey(hotkey)
        _check_attempt(attempt)
        return self._committer.commit(
            debt_changes.fail, hotkey, SLASH, _checked_error(error), attempt, in_doubt=True
        )

    def resolve_slash_rpc(self, hotkey: str, made: bool) -> bool:
        check_hotkey(hotkey)
        _check_truth("made", made)
        return self._committer.commit(debt_changes.resolve_slash, hotkey, made=made)

    def _debt_health(self, problems: Problems) -> dict[str, Any]:
        """Return what a health check says of debts; raise and clear what is wrong with them."""
        try:
            if self.state_dir is None:
                figures = self._committer.read(lambda store: store.debt_figures())
            else:
                figures = read_debt_figures(self.state_dir)
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
