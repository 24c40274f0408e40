"""Having the store and the journal say the same of slashes, when a server starts."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from shmelim.eliminations.debts.journal import Cause, Entry, Journal, Said, begun, entry_of, said
from shmelim.eliminations.debts.states import BY_CONTRACT, BY_HAND, IN_DOUBT, NOT_MADE, OWED, SLASH, Debt, Slash
from shmelim.eliminations.state.changes import ENDED, Step
from shmelim.eliminations.state.debt_book import hold_money, named_cause
from shmelim.eliminations.store.history import Change as EventOf
from shmelim.eliminations.store.store import Store
from shmelim.system import clock

_UNREADABLE: Final = "slash_journal_unreadable"  # how many lines of it were known to be


def open_journal(directory: Path, store: Store) -> Journal:
    """Return the journal of a directory, once it and the store know of each other's slashes.

    StoreError if it cannot be read or written. Lines that cannot be read hold money.
    """
    journal = Journal(directory)
    entries, unreadable = journal.read()
    with store.transaction():
        step = Step(store, None)
        if unreadable > store.meta(_UNREADABLE, 0):
            step.set_meta(_UNREADABLE, unreadable)
            hold_money(step, f"{unreadable} lines of {journal.path} cannot be read")
        missing = catch_up(step, entries)
    journal.append(missing)
    return journal


def catch_up(step: Step, entries: Iterable[Entry]) -> list[Entry]:
    """Have the store know what the journal says of slashes; return the lines that the journal lacks.

    What the journal says was made or declined is on record then; what it says was begun, and nobody knows how it
    ended, is in doubt. Where both know of an attempt the store knows more.
    """
    known, store = said(entries), step.store
    missing = _ends_that_it_lacks(store, known)
    for (hotkey, rule, registration), found in known.items():
        if found.outcome is None and not found.begun:
            continue  # nothing came of it; its registration may have been none, as a departure that is undone
        if store.registration(hotkey) < (number := _number_of(store, hotkey, registration)):
            store.put_registration(hotkey, number)
        cause = hotkey, rule, registration
        debts = [debt for debt in store.debts(hotkey) if debt.kind == SLASH]
        debt = next((debt for debt in debts if (hotkey, debt.rule, debt.registration) == cause), None)
        if any(slash[:3] == cause for slash in store.slashes(hotkey)):
            continue
        if found.outcome is not None:
            _put_on_record(step, found.outcome, found.begun, debt)
        else:
            _doubt_what_was_begun(step, found, debt)
    for slash in store.slashes():
        there = known.get(slash[:3])
        if there is None or there.outcome is None:
            attempt = _attempt_of(slash, there)
            missing.append(
                entry_of(slash.outcome, slash, slash.made_ms, attempt=attempt, by=slash.by, answer=slash.answer)
            )
    for debt in store.debts():
        there = known.get((debt.hotkey, debt.rule, debt.registration))
        if debt.kind == SLASH and debt.state != OWED and (there is None or debt.attempt not in there.begun):
            missing.append(begun(debt))
    return missing


def _ends_that_it_lacks(store: Store, known: Mapping[Cause, Said]) -> list[Entry]:
    """Return the lines of attempts that took nothing, as the store knows; they are begun no more."""
    ended = {*store.meta(ENDED, []), *(debt.attempt for debt in store.debts() if debt.state == OWED)}
    lines = [found.begun.pop(attempt) for found in known.values() for attempt in ended & found.begun.keys()]
    return [msgspec.structs.replace(line, what=NOT_MADE, at_ms=clock.now_ms()) for line in lines]


def _attempt_of(slash: Slash, found: Said | None) -> str | None:
    """Return the attempt that a slash on record was, as far as the journal knows; else that seems to stand."""
    attempts = {} if found is None else found.begun
    return next((attempt for attempt, entry in attempts.items() if entry.at_ms <= slash.made_ms), None)


def _number_of(store: Store, hotkey: str, registration: int) -> int:
    """Return how often a hotkey has come back, as the store would have counted it, where the journal knows more.

    If it is away, as an earlier state of the store has it, that its return is seen counts it once more.
    """
    row = store.get(hotkey)
    is_away = row is not None and row.departed_ordinal is not None and not row.registered
    return registration - is_away


def _put_on_record(step: Step, entry: Entry, still_begun: Container[str | None], debt: Debt | None) -> None:
    by = BY_HAND if entry.by == BY_HAND else BY_CONTRACT
    terms = entry.reason, entry.share, entry.answer
    slash = Slash(*entry.cause, entry.at_ms, entry.eliminated_ms, by, entry.what, *terms)
    step.store.put_slash(slash)
    if debt is not None and (debt.state == OWED or debt.attempt not in still_begun):
        step.store.remove_debt(debt)  # an attempt that an earlier state doubts has ended, too
    step.record([EventOf("recover", entry.hotkey, note=f"{named_cause(slash)}: {entry.what}, says the journal")])


def _doubt_what_was_begun(step: Step, found: Said, debt: Debt | None) -> None:
    """Put in doubt what was begun of which the store knows nothing."""
    for attempt, entry in found.begun.items():
        if debt is None or debt.state == OWED:
            debt = _doubtful(step, attempt, entry)
            step.store.put_debt(debt)
            step.record([EventOf("doubt", entry.hotkey, note=f"{named_cause(debt)}: {debt.error}")])


def _doubtful(step: Step, attempt: str, entry: Entry) -> Debt:
    row = step.store.get(entry.hotkey)
    return Debt(
        entry.hotkey,
        SLASH,
        entry.rule,
        entry.registration,
        IN_DOUBT,
        step.store.next_debt_ordinal(),
        due=row is not None and row.record is not None,
        since_ms=entry.at_ms,
        eliminated_ms=entry.eliminated_ms,
        error="the journal says that it was begun, and the store knows nothing of it",
        attempt=attempt,
        in_doubt_since_ms=clock.now_ms(),
        reason=entry.reason,
        share=entry.share,
        share_asked=entry.share is not None,
    )
