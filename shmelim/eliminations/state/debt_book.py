"""The server's methods about debts: arguments are checked here, changes committed, questions answered.

They are documented where they are declared, in ``calls.py``.
"""

# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from shmelim.eliminations.debts.states import KINDS, SLASH
from shmelim.eliminations.record import check_hotkey, encode, normalise
from shmelim.eliminations.state import debt_changes
from shmelim.eliminations.state.changes import replacements as count_replacements
from shmelim.eliminations.state.committer import Committer
from shmelim.eliminations.store.store import Store
from shmelim.errors import StoreError
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

    def _ask(self, question: Callable[[Store], T]) -> T:
        """Ask the store beside who commits, who may be busy with a long sync; in memory, between commits."""
        if self.state_dir is None:
            return self._committer.read(question)
        with Store.read_only(self.state_dir) as store:
            return question(store)

    def eliminate_rpc(
        self,
        hotkey: str,
        record: Mapping[str, Any],
        owed: Iterable[str],
        replacements: int | None = None,
        slash_once_within_ms: float | None = None,
    ) -> str:
        check_hotkey(hotkey)  # which also refuses None: normalise would take the record's word for it
        if replacements is not None:
            _check_type("replacements", replacements, int, "a whole number or None")
        if slash_once_within_ms is not None:
            _check_type("slash_once_within_ms", slash_once_within_ms, (int, float), "a number of ms or None")
            if not slash_once_within_ms >= 0:  # infinity is fine, NaN is not
                raise ValueError(f"slash_once_within_ms must be at least 0, not {slash_once_within_ms!r}")
        plain = normalise(record, hotkey)
        eliminated_ms = plain["elimination_initiated_time_ms"]
        kinds = _check_kinds(owed)
        return self._committer.commit(
            debt_changes.eliminate, hotkey, encode(plain), eliminated_ms, kinds, replacements, slash_once_within_ms
        )

    def get_replacements_rpc(self) -> int:
        return self._committer.read(count_replacements)

    def get_debts_rpc(self, hotkey: str | None = None) -> list[dict[str, Any]]:
        if hotkey is not None:
            check_hotkey(hotkey)
        return [debt.as_dict() for debt in self._ask(lambda store: store.debts(hotkey))]

    def get_slashes_rpc(self, hotkey: str | None = None) -> list[dict[str, Any]]:
        if hotkey is not None:
            check_hotkey(hotkey)
        return [slash._asdict() for slash in self._ask(lambda store: store.slashes(hotkey))]

    def settle_debt_rpc(self, hotkey: str, kind: str, attempt: str | None = None) -> bool:
        _check(hotkey, kind, attempt)
        return self._committer.commit(debt_changes.settle, hotkey, kind, attempt)

    def fail_debt_rpc(
        self, hotkey: str, kind: str, error: str, attempt: str | None = None, in_doubt: bool = False
    ) -> bool:
        _check(hotkey, kind, attempt)
        _check_type("in_doubt", in_doubt, bool, "True or False")
        if in_doubt and attempt is None:
            raise ValueError("in_doubt is said of an attempt: attempt must not be None")
        _check_type("error", error, str, "text")
        short = error if len(error) <= _MAX_ERROR else f"{error[:_MAX_ERROR]} …"
        storable = short.encode("utf-8", "backslashreplace").decode()
        return self._committer.commit(debt_changes.fail, hotkey, kind, storable, attempt, in_doubt=in_doubt)

    def begin_slash_rpc(self, hotkey: str, attempt: str) -> bool:
        check_hotkey(hotkey)
        _check_attempt(attempt)
        if not self._committer.commit(debt_changes.begin_slash, hotkey, attempt):
            return False
        # After a power cut that took this with it, the slash would be owed, and made again.
        self._committer.sync()
        return True

    def doubt_slash_rpc(self, hotkey: str, attempt: str, error: str) -> bool:
        _check_attempt(attempt)
        return self.fail_debt_rpc(hotkey, SLASH, error, attempt, in_doubt=True)

    def resolve_slash_rpc(self, hotkey: str, made: bool) -> bool:
        check_hotkey(hotkey)
        _check_type("made", made, bool, "True or False")
        return self._committer.commit(debt_changes.resolve_slash, hotkey, made=made)

    def _debt_health(self, problems: Problems) -> dict[str, Any]:
        """Return what a health check says of debts; raise and clear what is wrong with them."""
        try:
            figures = self._ask(Store.debt_figures)
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
    _check_kinds([kind])
    if attempt is not None:
        _check_attempt(attempt)
        if kind != SLASH:
            raise ValueError(f"attempt goes with kind {SLASH!r}, not with {kind!r}")


def _check_kinds(owed: Iterable[str]) -> list[str]:
    """Return kinds of debts in their order, each once."""
    if isinstance(owed, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"owed must be a list of kinds of debts, not {type(owed).__name__}")
    given = list(owed)
    for kind in given:
        _check_type("the kind of a debt", kind, str, "text")
        if kind not in KINDS:
            raise ValueError(f"the kind of a debt must be one of {', '.join(KINDS)}, not {kind!r}")
    return [kind for kind in KINDS if kind in given]


def _check_attempt(attempt: str) -> None:
    _check_type("attempt", attempt, str, "text")
    if not (0 < len(attempt) <= _MAX_ATTEMPT and attempt.isascii() and attempt.isprintable()):
        raise ValueError(f"attempt must be 1 to {_MAX_ATTEMPT} printable ASCII characters")


def _check_type(name: str, value: object, wanted: type | tuple[type, ...], words: str) -> None:
    """Refuse a value of another type: a text that says "false" would count as true, and True as a number."""
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(f"{name} must be {words}, not {type(value).__name__}: {value!r:.60}")
