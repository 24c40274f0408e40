"""Debts: the server's methods about them, and the changes of the state that these commit.

The methods check arguments, and are documented where they are declared, in ``calls.py``. A change is a step of a
transaction, with its events, and does nothing where it does not fit.

A debt that fails with every tick must not flood a history that is never shortened: of the failures of one debt
the 1st, 2nd, 4th, 8th, … are told, and so are the beginnings of these attempts. What puts a slash in doubt,
settles or resolves it is always told.
"""

# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from shmelim.eliminations.debts.states import (
    ATTEMPTING,
    BY_CONTRACT,
    BY_HAND,
    IN_DOUBT,
    KINDS,
    OWED,
    SLASH,
    Debt,
    Slash,
    attempt_is_alive,
)
from shmelim.eliminations.record import check_hotkey, decode, prepare
from shmelim.eliminations.state.changes import Step, replacements
from shmelim.eliminations.state.thread import State
from shmelim.eliminations.store.history import Change as EventOf
from shmelim.eliminations.store.store import Store
from shmelim.errors import StoreError
from shmelim.system import clock
from shmelim.system.problems import Problems

T = TypeVar("T")

MOST_SHOWN: Final = 20
"""Hotkeys in doubt that a health check names."""

HELD: Final = "money_held"
"""Name of the problem that no slash is begun, and of the value in the store that says since when, and why."""

_MAX_ATTEMPT: Final = 255
_MAX_ERROR: Final = 500
# A record's time may be any whole number of 64 bits; SQLite's are signed.
_LARGEST_MS: Final = (1 << 63) - 1


class DebtMethods:
    """A server's remote methods about debts."""

    # Of the server.
    _state: State
    state_dir: Path | None
    problems: Problems

    def _ask(self, question: Callable[[Store], T]) -> T:
        """Ask the store beside who commits, who may be busy with a long sync; in memory, between commits."""
        if self.state_dir is None:
            return self._state.read(question)
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
        check_hotkey(hotkey)  # which also refuses None: prepare would take the record's word for it
        if replacements is not None:
            _check_type("replacements", replacements, int, "a whole number or None")
        if slash_once_within_ms is not None:
            _check_type("slash_once_within_ms", slash_once_within_ms, (int, float), "a number of ms or None")
            if not slash_once_within_ms >= 0:  # infinity is fine, NaN is not
                raise ValueError(f"slash_once_within_ms must be at least 0, not {slash_once_within_ms!r}")
        _, encoded = prepare(record, hotkey)
        eliminated_ms = decode(encoded)["elimination_initiated_time_ms"]
        kinds = _check_kinds(owed)
        return self._state.commit(
            eliminate, hotkey, encoded, eliminated_ms, kinds, replacements, slash_once_within_ms
        )

    def get_replacements_rpc(self) -> int:
        return self._state.read(replacements)

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
        return self._state.commit(settle, hotkey, kind, attempt)

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
        return self._state.commit(fail, hotkey, kind, storable, attempt, in_doubt=in_doubt)

    def begin_slash_rpc(self, hotkey: str, attempt: str) -> bool:
        check_hotkey(hotkey)
        _check_attempt(attempt)
        if not self._state.commit(begin_slash, hotkey, attempt):
            return False
        # After a power cut that took this with it, the slash would be owed, and made again.
        self._state.sync()
        return True

    def doubt_slash_rpc(self, hotkey: str, attempt: str, error: str) -> bool:
        _check_attempt(attempt)
        return self.fail_debt_rpc(hotkey, SLASH, error, attempt, in_doubt=True)

    def resolve_slash_rpc(self, hotkey: str, made: bool) -> bool:
        check_hotkey(hotkey)
        _check_type("made", made, bool, "True or False")
        return self._state.commit(resolve_slash, hotkey, made=made)

    def release_money_rpc(self) -> bool:
        released = self._state.commit(release_money)
        self._tell_held(self._state.read(held_money))
        return released

    def _tell_held(self, held: Mapping[str, Any] | None) -> None:
        """Raise or clear the problem that money is held."""
        if held is None:
            self.problems.clear(HELD)
            return
        remedy = (
            "compare `shmelim debts` and `shmelim slash list` with what you know was slashed; then"
            " `shmelim slash release` lets slashes go on"
        )
        text = f"no slash is begun until a person says so: {held['why']}"
        self.problems.report(HELD, text, remedy=remedy, since_ms=held["since_ms"])

    def _debt_health(self, problems: Problems) -> dict[str, Any]:
        """Return what a health check says of debts; raise and clear what is wrong with them."""
        try:
            figures, held = self._ask(lambda store: (store.debt_figures(), held_money(store)))
        except StoreError as error:
            problems.report("debts_unreadable", f"what is owed cannot be read: {error}")
            return {"num_debts": None, "slashes_in_doubt": None}
        problems.clear("debts_unreadable")
        self._tell_held(held)
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


# ---------------------------------------------------------------------- the changes


def eliminate(
    step: Step,
    hotkey: str,
    record: bytes,
    eliminated_ms: int,
    kinds: Sequence[str],
    expected: int | None = None,
    slash_once_within_ms: float | None = None,
) -> str:
    """Eliminate a hotkey that is not eliminated yet, and record what that owes; as ``ProcessingCalls.eliminate``.

    ``expected`` is the number of replacements on which the decision rests.
    """
    if expected is not None and expected != replacements(step.store):
        return "superseded"
    known = step.store.get(hotkey)
    if known is not None and known.record is not None:
        return "already"
    step.store.put_elimination(hotkey, record)
    step.record([EventOf("add", hotkey)])
    _owe(step, hotkey, kinds, min(eliminated_ms, _LARGEST_MS), slash_once_within_ms)
    return "added"


def settle(step: Step, hotkey: str, kind: str, attempt: str | None = None) -> bool:
    """Remove a debt whose effect is made, a slash only by the attempt that stands; False where there is none.

    That a slash was made is recorded with it.
    """
    debt = _find(step, hotkey, kind, attempt)
    if debt is None or (kind == SLASH and attempt is None):
        return False
    step.store.remove_debt(debt)
    if kind == SLASH:
        step.store.put_slash(Slash(hotkey, clock.now_ms(), debt.eliminated_ms, BY_CONTRACT))
    failures = f", after {debt.attempts} failures" if debt.attempts else ""
    step.record([EventOf("settle", hotkey, note=f"{_named(debt)}{failures}")])
    return True


def fail(
    step: Step, hotkey: str, kind: str, error: str, attempt: str | None = None, *, in_doubt: bool = False
) -> bool:
    """Note that a debt could not be settled; False where there is none, or another attempt stands.

    A slash that was attempted is owed again, or is ``in_doubt`` where nobody knows whether it was made.
    """
    debt = _find(step, hotkey, kind, attempt)
    if debt is None:
        return False
    debt = debt._replace(attempts=debt.attempts + 1, error=error)
    if in_doubt:
        step.store.put_debt(debt._replace(state=IN_DOUBT, in_doubt_since_ms=clock.now_ms()))
        step.record([EventOf("doubt", hotkey, note=f"{_named(debt)}: {error}")])
        return True
    if _is_told(debt.attempts):
        step.record([EventOf("fail", hotkey, note=f"{_named(debt)}: {error} (failure {debt.attempts})")])
    _owe_again(step, debt)
    return True


def begin_slash(step: Step, hotkey: str, attempt: str) -> bool:
    """Make an owed slash the one that this attempt makes; False where it is not owed, or another's, or is held.

    May be repeated while the attempt stands. An attempt that failed never comes back, so that a request which is
    overtaken by its repetition begins nothing.
    """
    debt = step.store.debt(hotkey, SLASH)
    if debt is None or debt.state == IN_DOUBT:
        return False
    if debt.state == ATTEMPTING or debt.attempt == attempt:
        return debt.state == ATTEMPTING and debt.attempt == attempt
    if held_money(step.store) is not None:
        return False
    debt = debt._replace(state=ATTEMPTING, attempt=attempt)
    step.store.put_debt(debt)
    if _is_told(debt.attempts + 1):
        step.record([EventOf("begin", hotkey, note=_named(debt))])
    return True


def held_money(store: Store) -> dict[str, Any] | None:
    """Return since when no slash is begun, and why; None where slashes go on."""
    held: dict[str, Any] | None = store.meta(HELD)
    return held


def hold_money(step: Step, why: str) -> None:
    """Let no slash be begun until a person releases them; what held them first stays the reason."""
    if held_money(step.store) is None:
        step.set_meta(HELD, {"since_ms": clock.now_ms(), "why": why})
        step.record([EventOf("hold", note=f"no slash is begun until a person says so: {why}")])


def release_money(step: Step) -> bool:
    """Let slashes go on; False where they were not held."""
    if held_money(step.store) is None:
        return False
    step.set_meta(HELD, None)
    step.record([EventOf("release", note="slashes go on")])
    return True


def resolve_slash(step: Step, hotkey: str, *, made: bool) -> bool:
    """Settle by hand a slash that was begun, or make it owed again; False where there is none.

    One that a running process may be making at this moment is never owed again.
    """
    debt = step.store.debt(hotkey, SLASH)
    if debt is None or debt.state == OWED or debt.attempt is None:
        return False
    if not made and debt.state == ATTEMPTING and attempt_is_alive(debt.attempt):
        return False
    step.record([EventOf("resolve", hotkey, note=f"{_named(debt)}: {'made' if made else 'not made'}")])
    if made:
        step.store.remove_debt(debt)
        step.store.put_slash(Slash(hotkey, clock.now_ms(), debt.eliminated_ms, BY_HAND))
    else:
        _owe_again(step, debt)
    return True


def _owe(step: Step, hotkey: str, kinds: Sequence[str], eliminated_ms: int, once_within_ms: float | None) -> None:
    ordinal, now = step.store.next_debt_ordinal(), clock.now_ms()
    said = []
    for kind in kinds:
        if kind == SLASH and _was_made(step, hotkey, eliminated_ms, once_within_ms):
            # The elimination that owed it was taken back; the money was not.
            said.append(f"{kind} (made before)")
            continue
        standing = step.store.debt(hotkey, kind)
        if standing is None:
            debt = Debt(hotkey, kind, OWED, ordinal, due=True, since_ms=now, eliminated_ms=eliminated_ms)
            step.store.put_debt(debt)
            said.append(kind)
        else:
            # A slash that was begun for an earlier elimination: never a second one.
            step.store.put_debt(standing._replace(ordinal=ordinal, due=True, eliminated_ms=eliminated_ms))
            said.append(f"{kind} (begun before, {standing.state})")
    if said:
        step.record([EventOf("owe", hotkey, note=", ".join(said))])


def _was_made(step: Step, hotkey: str, eliminated_ms: int, within_ms: float | None) -> bool:
    """Tell whether a slash was made for an elimination less than so far away."""
    made = step.store.slashes(hotkey)
    return within_ms is not None and any(abs(eliminated_ms - slash.eliminated_ms) < within_ms for slash in made)


def _owe_again(step: Step, debt: Debt) -> None:
    """Make a debt owed, unless its elimination was taken back since."""
    if debt.due:
        step.store.put_debt(debt._replace(state=OWED, in_doubt_since_ms=None))
    else:
        step.store.remove_debt(debt)
        step.record([EventOf("cancel", debt.hotkey, note=f"{debt.kind}: its elimination was taken back")])


def _find(step: Step, hotkey: str, kind: str, attempt: str | None) -> Debt | None:
    """Return a debt that is owed, or the one that this attempt is about."""
    debt = step.store.debt(hotkey, kind)
    if debt is None:
        return None
    wanted = (OWED, debt.attempt) if attempt is None else (ATTEMPTING, attempt)
    return debt if (debt.state, debt.attempt) == wanted else None


def _named(debt: Debt) -> str:
    return debt.kind if debt.state == OWED else f"{debt.kind}, attempt {debt.attempt}"


def _is_told(number: int) -> bool:
    """Tell whether this failure of a debt is written into the history."""
    return number & (number - 1) == 0
