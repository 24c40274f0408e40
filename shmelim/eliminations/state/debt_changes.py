"""The steps of a debt: each is one step of a transaction, with its events, and does nothing where it does not fit.

A debt that fails with every tick must not flood a history that is never shortened: of the failures of one debt
the 1st, 2nd, 4th, 8th, … are told, and so are the beginnings of these attempts. What puts a slash in doubt,
settles or resolves it is always told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from shmelim.eliminations.debts.states import (
    ATTEMPTING,
    BY_CONTRACT,
    BY_HAND,
    IN_DOUBT,
    OWED,
    SLASH,
    Debt,
    Slash,
    attempt_is_alive,
)
from shmelim.eliminations.state.changes import Step, replacements
from shmelim.eliminations.store.history import Change as EventOf
from shmelim.system import clock

# A record's time may be any whole number of 64 bits; SQLite's are signed.
_LARGEST_MS: Final = (1 << 63) - 1


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
    step.record([EventOf("add", hotkey, None, record)])
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
    step.tell([EventOf("settle", hotkey, note=f"{_named(debt)}{failures}")])
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
        step.tell([EventOf("doubt", hotkey, note=f"{_named(debt)}: {error}")])
        return True
    if _is_told(debt.attempts):
        step.tell([EventOf("fail", hotkey, note=f"{_named(debt)}: {error} (failure {debt.attempts})")])
    _owe_again(step, debt)
    return True


def begin_slash(step: Step, hotkey: str, attempt: str) -> bool:
    """Make an owed slash the one that this attempt makes; False where it is not owed, or another's.

    May be repeated while the attempt stands. An attempt that failed never comes back, so that a request which is
    overtaken by its repetition begins nothing.
    """
    debt = step.store.debt(hotkey, SLASH)
    if debt is None or debt.state == IN_DOUBT:
        return False
    if debt.state == ATTEMPTING or debt.attempt == attempt:
        return debt.state == ATTEMPTING and debt.attempt == attempt
    debt = debt._replace(state=ATTEMPTING, attempt=attempt)
    step.store.put_debt(debt)
    step.wrote = True
    if _is_told(debt.attempts + 1):
        step.tell([EventOf("begin", hotkey, note=_named(debt))])
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
    step.tell([EventOf("resolve", hotkey, note=f"{_named(debt)}: {'made' if made else 'not made'}")])
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
        step.tell([EventOf("owe", hotkey, note=", ".join(said))])


def _was_made(step: Step, hotkey: str, eliminated_ms: int, within_ms: float | None) -> bool:
    """Tell whether a slash was made for an elimination less than so far away."""
    made = step.store.slashes(hotkey)
    return within_ms is not None and any(abs(eliminated_ms - slash.eliminated_ms) < within_ms for slash in made)


def _owe_again(step: Step, debt: Debt) -> None:
    """Make a debt owed, unless its elimination was taken back since."""
    step.wrote = True
    if debt.due:
        step.store.put_debt(debt._replace(state=OWED, in_doubt_since_ms=None))
    else:
        step.store.remove_debt(debt)
        step.tell([EventOf("cancel", debt.hotkey, note=f"{debt.kind}: its elimination was taken back")])


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
