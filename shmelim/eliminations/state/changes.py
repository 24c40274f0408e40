"""The changes that can be made to the state: functions of a step of a transaction on the store, with their events.

What they are given is checked before (bad input never reaches a transaction). Turns of the state run them, and
publish the rows that the store then says were written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from shmelim.eliminations.comparing import Comparison
from shmelim.eliminations.debts.states import ANY_RULE, LIMIT_ORDERS, OWED, POSITIONS, SLASH, Debt, rule_of
from shmelim.eliminations.moments import Moment
from shmelim.eliminations.record import DAY_MS, EliminationReason, decode
from shmelim.eliminations.rows import Row
from shmelim.eliminations.store.history import Change as EventOf
from shmelim.eliminations.store.history import Origin, Packing
from shmelim.eliminations.store.store import Store
from shmelim.system import clock

# A loss of more hotkeys than this, and of at least this share of those seen before, is not believed.
_ANOMALY_COUNT: Final = 10
_ANOMALY_SHARE: Final = 0.25
_ANOMALY: Final = "anomaly"
_BELIEVED: Final = "believed"  # how many hotkeys there were before the loss that is not believed
_LOSSES: Final = "losses"  # of the last day: [when, who, of how many]
_REPLACEMENTS: Final = "replacements"
_REASONS: Final = frozenset(reason.value for reason in EliminationReason)
_APART: Final = 1000  # events, from which on it pays to have a thread pack them
_NO_NOTES: Final[Mapping[str, str]] = {}
_INTERVAL: Final = "tick_interval_ms"
_UNPROVED: Final = "unproved"  # hotkeys that only such a look has shown
_LOOKED: Final = "looked"  # whether a metagraph was ever seen
ENDED: Final = "attempts_ended"
"""Name of the value in the store that lists attempts which took nothing and whose debts are gone."""
_MOST_ENDED: Final = 100
# By hotkey: the number of a return that stays counted though it was none, and that from which on all are one.
_UNDONE: Final = "returns_undone"


@dataclass(slots=True)
class Step:
    """One change inside a transaction: the store, who asked for it, and which commit a version showed."""

    store: Store
    origin: Origin | None
    commit_of: Callable[[int], int | None] = lambda _version: None  # it is not known, or not any more
    recorded: int = 0  # events so far

    def record(self, events: Iterable[EventOf], packing: Packing | None = None) -> None:
        """Write events."""
        if listed := list(events):
            self.store.add_events(listed, self.origin, packing=packing)
            self.recorded += len(listed)

    def set_meta(self, key: str, value: Any) -> None:
        """Keep a value in the store."""
        self.store.set_meta(key, value)


# Looks at a change that was made: what it is, how many it took back, how many it added. May refuse it by an error.
Judge: TypeAlias = Callable[[Step, str, int, int], None]


def no_judge(_step: Step, _what: str, _gone: int, _new: int) -> None:
    """Let every change pass."""


def note_interval(step: Step, interval_ms: float) -> float:
    """Note that somebody ticks under this state, and how often, for the server that comes next."""
    step.set_meta(_INTERVAL, interval_ms)
    return interval_ms


def noted_interval(store: Store) -> float | None:
    """Return how often somebody ticks under this state, in ms; None where nobody ever did."""
    found: float | None = store.meta(_INTERVAL)
    return found


def take_epoch(step: Step, epoch: str) -> int:
    """Note that a manager's epoch has begun, unless it had; returns the number of the last one ("" is none)."""
    number, known = step.store.meta("epoch", (0, ""))
    if epoch in ("", known):
        return int(number)
    step.set_meta("epoch", (number + 1, epoch))
    return int(number) + 1


def add(step: Step, hotkey: str, record: bytes, note: str | None = None) -> bool:
    """Add or replace one record; returns True for a hotkey that was not eliminated before."""
    old = step.store.put_elimination(hotkey, record)
    if old != record:
        event = EventOf("add" if old is None else "update", hotkey, old, note)
        step.record([event])
        if step.store.ever_owed(hotkey):
            _follow_debts(step, [event], {hotkey: record}, note or "add")
    return old is None


def remove(
    step: Step,
    hotkeys: Iterable[str],
    times_ms: Mapping[str, int] | None = None,
    reason: str | None = None,
    judge: Judge = no_judge,
) -> list[str]:
    """Remove records; returns the hotkeys that had one.

    With `times_ms`, only those whose elimination was initiated when it says: another one came since.
    """
    if times_ms is not None:
        rows = step.store.get_many(hotkeys)
        times = {
            hotkey: decode(row.record)["elimination_initiated_time_ms"]
            for hotkey, row in rows.items()
            if row.record is not None
        }
        hotkeys = [hotkey for hotkey in hotkeys if hotkey in times and times[hotkey] == times_ms.get(hotkey)]
    old = step.store.remove_eliminations(hotkeys)
    step.record(EventOf("remove", hotkey, record, note=reason) for hotkey, record in old.items())
    judge(step, "delete_eliminations", len(old), 0)
    if times_ms is None:
        _rest_debts(step, old, reason or "remove")
    else:
        _cancel_debts(step, old, reason or "deleted")
    return list(old)


def replace_all(
    step: Step, records: dict[str, bytes], reason: str = "sync", keep: Iterable[str] = (), judge: Judge = no_judge
) -> list[str]:
    """Make exactly these records the eliminations; returns the hotkeys that are no longer eliminated.

    A hotkey that stays keeps its place in the order. Those in ``keep`` stay whatever the records say.
    """
    kept = {*records, *keep}
    gone = [hotkey for hotkey, _ in step.store.eliminated() if hotkey not in kept]
    return _replace(step, records, gone, reason, judge=judge)


def sync(step: Step, comparison: Comparison, reason: str = "sync", judge: Judge = no_judge) -> list[str]:
    """Do the same with a list that was compared with a version of the table that the turn may have left behind."""
    since = _replaced_since(step, comparison.version)
    rows = _rows_of(step, comparison)
    if since is None:
        comparison.renew()
    changed, gone = dict(comparison.changed), dict.fromkeys(comparison.gone)
    for hotkey in {*(since or ()), *step.store.written}:
        row, wanted = step.store.get(hotkey), comparison.wanted(hotkey)
        changed.pop(hotkey, None)
        gone.pop(hotkey, None)
        if wanted is not None:
            changed[hotkey] = wanted
        elif row is not None and row.record is not None:
            gone[hotkey] = None
    return _replace(step, changed, gone, reason, comparison.notes, judge, rows=rows)


def sync_difference(
    step: Step,
    version: int,
    comparison: Comparison,
    gone: Iterable[str],
    reason: str = "sync",
    judge: Judge = no_judge,
) -> list[str] | None:
    """Do the same with what a client found to differ from a version; None where that is not known any more."""
    since = _replaced_since(step, version)
    if since is None:
        return None
    changed, removed = dict(comparison.changed), dict.fromkeys(gone)
    # What others have changed since: as the list has it, which is as it stood, but for what the client sent.
    for hotkey, record in since.items():
        wanted = comparison.wanted(hotkey) or (None if hotkey in removed else record)
        changed.pop(hotkey, None)
        if wanted is None:
            removed[hotkey] = None
        else:
            changed[hotkey] = wanted
    rows = None if since else _rows_of(step, comparison)
    return _replace(step, changed, removed, reason, comparison.notes, judge, rows=rows)


def _rows_of(step: Step, comparison: Comparison) -> Mapping[str, Row] | None:
    """Return what stands where the records of a comparison differ; None where anything changed since."""
    commit, store = step.commit_of(comparison.version), step.store
    return comparison.rows if commit is not None and _is_last(commit, store) else None


def _is_last(commit: int, store: Store) -> bool:
    return commit + 1 >= store.next_commit and not store.written


def _replaced_since(step: Step, version: int) -> dict[str, bytes | None] | None:
    """Return the records that changed since a version, as it showed them; None where nobody knows any more."""
    commit, store = step.commit_of(version), step.store
    if commit is None or commit < store.pruned.commit:
        return None
    return {} if _is_last(commit, store) else store.replaced_since(commit)


def _replace(
    step: Step,
    records: Mapping[str, bytes],
    gone: Iterable[str],
    reason: str,
    notes: Mapping[str, str] = _NO_NOTES,
    judge: Judge = no_judge,
    *,
    rows: Mapping[str, Row] | None = None,
    is_undone: bool = False,
) -> list[str]:
    """Change many records; where that undoes others, no debt is made, nor left due for what is undone."""
    removed = step.store.remove_eliminations(gone)
    rows = step.store.get_many(records) if rows is None else rows
    events = [EventOf("remove", hotkey, record, reason) for hotkey, record in removed.items()]
    events += _events_of(records, rows, reason, notes)
    packing = Packing(events) if len(events) >= _APART else None
    step.store.put_eliminations(records.items(), rows)
    if events:
        step.record(events, packing)
        _rest_debts(step, removed, reason)
        added = _follow_debts(step, events, records, reason, is_undone=is_undone)
        judge(step, reason, len(removed), len(added))
        step.set_meta(_REPLACEMENTS, replacements(step.store) + 1)
    return list(removed)


def state_at(store: Store, moment: Moment) -> dict[str, bytes]:
    """Return the eliminations at a moment; errors as of :func:`_event_of`.

    Those that are still eliminated come first, in their order; then the others.
    """
    with store.one_moment():  # else what is told of the event may be forgotten between two questions
        state: dict[str, bytes | None] = dict(store.eliminated())
        state.update(store.replaced_after(_event_of(store, moment)))
    return {hotkey: record for hotkey, record in state.items() if record is not None}


def rollback(step: Step, moment: Moment) -> int:
    """Make the eliminations what they were at a moment; returns how many that changes. Errors as there."""
    then = step.store.replaced_after(_event_of(step.store, moment))
    rows = step.store.get_many(then)
    now = {hotkey: row.record for hotkey, row in rows.items()}
    changed = {hotkey: record for hotkey, record in then.items() if record != now.get(hotkey)}
    records = {hotkey: record for hotkey, record in changed.items() if record is not None}
    gone = [hotkey for hotkey in changed if hotkey not in records]
    _replace(step, records, gone, f"rolled back to {moment}", is_undone=True)
    return len(changed)


def prunable(store: Store, moment: Moment) -> int:
    """Return how many events there are up to a moment; errors as of :func:`_event_of`."""
    with store.one_moment():
        return _event_of(store, moment) - store.pruned.event


def prune(step: Step, moment: Moment) -> int:
    """Forget the events up to a moment; returns how many. Errors as there."""
    event = _event_of(step.store, moment)
    count = event - step.store.pruned.event
    if count:
        step.store.prune(event)
        step.record([EventOf("prune", note=f"the history up to event {event}")])
    return count


def _event_of(store: Store, moment: Moment) -> int:
    """Return the last event up to a moment; ValueError: it is not there yet, or the history begins later."""
    number, last = moment.event, store.counts().events
    if moment.at_ms is not None:
        number = store.event_at(moment.at_ms)
    pruned = store.pruned
    if moment.at_ms is not None and moment.at_ms >= pruned.at_ms > 0:
        number = max(number or 0, pruned.event)
    if pruned.event and (number is None or number < pruned.event):
        raise ValueError(f"nothing is known of {moment}: the history up to event {pruned.event} was pruned")
    if number is None:
        first = store.events(before_id=2, limit=1)
        begins = f"at {Moment(None, first[0].at_ms)}" if first else "with the first change"
        raise ValueError(f"nothing is known of {moment}: the history begins {begins}")
    if number > last:
        raise ValueError(f"there is no {moment} yet: the last one is {last}")
    return number


def replacements(store: Store) -> int:
    """Return how often the whole list was replaced by one that differs."""
    return int(store.meta(_REPLACEMENTS, 0))


def _rest_debts(step: Step, hotkeys: Collection[str], reason: str) -> None:
    """Have what these hotkeys owe rest, who are no longer eliminated: it is due again when they are."""
    # Few owe anything, even where a million are removed.
    owing = step.store.debtors() if hotkeys else ()
    for hotkey in hotkeys:
        if hotkey not in owing:
            continue
        resting = [debt for debt in step.store.debts(hotkey) if debt.due]
        for debt in resting:
            step.store.put_debt(debt._replace(due=False))
        if resting:
            step.record([EventOf("rest", hotkey, note=f"{_kinds(resting)}: {reason}")])


def _cancel_debts(step: Step, hotkeys: Iterable[str], reason: str) -> None:
    """Cancel what hotkeys owe whose positions are deleted; a slash does not belong to the row, and stays."""
    owing = step.store.debtors()
    for hotkey in hotkeys:
        if hotkey not in owing:
            continue
        cancelled = [debt for debt in step.store.debts(hotkey) if debt.kind != SLASH]
        for debt in cancelled:
            step.store.remove_debt(debt)
        if cancelled:
            step.record([EventOf("cancel", hotkey, note=f"{_kinds(cancelled)}: {reason}")])


def _follow_debts(
    step: Step, events: Iterable[EventOf], records: Mapping[str, bytes], why: str, *, is_undone: bool = False
) -> dict[str, bytes]:
    """Have due what these records owe, and rest what those owe whose place they took; returns those that are new.

    One that takes a place and never had a slash of its own leaves the one that is owed, unless that `is_undone`.
    """
    added, exchanged = {}, {}
    owing = step.store.debtors()
    for event in events:
        hotkey = event.hotkey
        if event.action == "add" and hotkey is not None:
            added[hotkey] = records[hotkey]
        elif event.action == "update" and hotkey in owing and event.old is not None:
            encoded = records[hotkey]
            record = decode(encoded)
            reason = record["reason"]
            has_own = _meant(step, _resting(step, hotkey), encoded) or _is_slashed(step, record)
            if (has_own and reason in _REASONS) or (is_undone and decode(event.old)["reason"] != reason):
                exchanged[hotkey] = encoded
    _rest_debts(step, exchanged, why)
    _wake_debts(step, added | exchanged, owing, owes=not is_undone)
    return added


def _wake_debts(step: Step, records: Mapping[str, bytes], owing: set[str], *, owes: bool) -> None:
    """Make due again what rested of hotkeys who are eliminated again; and owed, what may be repeated."""
    for hotkey in owing & records.keys():
        if not (resting := _resting(step, hotkey)):
            continue
        slashes = _meant(step, resting, records[hotkey])
        woken = [debt for debt in resting if debt.kind != SLASH or debt in slashes]
        for debt in woken:
            step.store.put_debt(debt._replace(due=True))
        if woken:
            step.record([EventOf("wake", hotkey, note=f"{_kinds(woken)}: eliminated again")])
    if owes:
        owe_again(step, records)


def _resting(step: Step, hotkey: str) -> list[Debt]:
    return [debt for debt in step.store.debts(hotkey) if not debt.due]


def _meant(step: Step, resting: Iterable[Debt], encoded: bytes) -> list[Debt]:
    """Return the slashes that an elimination owes, of what rests of its hotkey.

    That of the same reason, else those of its rule. Only where the reason is in words of somebody's own may it
    stand for any, and the last one is meant.
    """
    record = decode(encoded)
    hotkey, reason, began_ms = record["hotkey"], record["reason"], record["elimination_initiated_time_ms"]
    same = registrations(step, hotkey)
    # Who has returned since owes what that very elimination owed, unless he was slashed for it then.
    slashed = {(slash.rule, slash.eliminated_ms) for slash in step.store.slashes(hotkey)}
    own = [debt for debt in resting if debt.eliminated_ms == began_ms and (debt.rule, began_ms) not in slashed]
    slashes = [debt for debt in resting if debt.kind == SLASH and (debt.registration in same or debt in own)]
    slashes = [debt for debt in slashes if debt.reason == reason] or _of_rule(slashes, reason)
    numbers = [debt.registration for debt in slashes if debt in own]
    return [debt for debt in slashes if debt.registration == max(numbers)] if numbers else slashes


def _is_slashed(step: Step, record: Mapping[str, Any]) -> bool:
    """Tell whether a miner was slashed for an elimination, or for another one by which this one owed nothing."""
    same, began_ms = registrations(step, record["hotkey"]), record["elimination_initiated_time_ms"]
    return any(
        slash.rule == rule_of(record["reason"]) and (slash.registration in same or slash.eliminated_ms == began_ms)
        for slash in step.store.slashes(record["hotkey"])
    )


def _of_rule(slashes: list[Debt], reason: str) -> list[Debt]:
    if reason in _REASONS:
        return [debt for debt in slashes if debt.rule and debt.rule == rule_of(reason)]
    return slashes[-1:]


def owe_again(step: Step, records: Mapping[str, bytes]) -> None:
    """Have hotkeys owe once more what was settled and may be repeated, if the rules eliminated them once.

    Between an elimination that was taken back and one that brings him back a miner may have traded, and since the
    moment of a backup that is restored.
    """
    for hotkey, notes in step.store.notes("owe", records).items():
        known = {debt.kind for debt in step.store.debts(hotkey)}
        kinds = [kind for kind in (LIMIT_ORDERS, POSITIONS) if kind in notes and kind not in known]
        for kind in kinds:
            step.store.put_debt(
                Debt(
                    hotkey, kind, ANY_RULE, 0, OWED, step.store.next_debt_ordinal(), due=True,
                    since_ms=clock.now_ms(),
                    eliminated_ms=decode(records[hotkey])["elimination_initiated_time_ms"],
                )
            )  # fmt: skip
        if kinds:
            step.record([EventOf("owe", hotkey, note=f"{', '.join(kinds)}: eliminated again")])


def _kinds(debts: Iterable[Debt]) -> str:
    return ", ".join(debt.kind for debt in debts)


def merge(step: Step, records: Mapping[str, bytes], reason: str, notes: Mapping[str, str] = _NO_NOTES) -> int:
    """Add or replace many records and leave the others; returns how many of them changed."""
    rows = step.store.get_many(records)
    changed = _events_of(records, rows, reason, notes)
    step.store.put_eliminations(records.items(), rows)
    step.record(changed)
    _follow_debts(step, changed, records, reason)
    return len(changed)


def _events_of(
    records: Mapping[str, bytes], rows: Mapping[str, Row], reason: str, notes: Mapping[str, str]
) -> list[EventOf]:
    """Return the events of those of these records that differ from what stands in the rows."""
    old = {hotkey: row[2] for hotkey, row in rows.items()}
    said = {hotkey: f"{reason}; {note}" for hotkey, note in notes.items()}
    return [
        EventOf._make(("add" if before is None else "update", hotkey, before, said.get(hotkey, reason)))
        for hotkey, record in records.items()
        if (before := old.get(hotkey)) != record
    ]


def lost_hotkeys(before: set[str], now: set[str], size: int | None = None) -> tuple[list[str], bool]:
    """Return the hotkeys missing since the last look that was believed, sorted, and whether that is an anomaly.

    `size` is the number of hotkeys at that look; by default that of `before`, which may hold newcomers: they make
    a loss no smaller.
    """
    lost = sorted(before - now)
    return lost, _are_too_many(len(lost), len(before) if size is None else size)


def _are_too_many(lost: int, size: int) -> bool:
    """Tell whether a loss of so many, of so many, is not believed."""
    return lost > _ANOMALY_COUNT and lost >= _ANOMALY_SHARE * size


def update_metagraph(
    step: Step, hotkeys: list[str], now_ms: int | None = None, believe_empty: bool = False
) -> list[str]:
    """Make these hotkeys the registered ones; returns those whose departure it recorded.

    `now_ms` is the time of the look (ms since 1970, UTC). That nobody is registered is believed only if the caller
    says so.
    """
    seen, now = set(hotkeys), clock.now_ms() if now_ms is None else now_ms
    # Who was first seen in a look that was not believed may be as wrong as that.
    before = step.store.registered()
    unproved = before.intersection(step.store.meta(_UNPROVED, []))
    before -= unproved
    size = step.store.meta(_BELIEVED, None)
    lost, anomalous = lost_hotkeys(before, seen, size)
    recent = [loss for loss in step.store.meta(_LOSSES, []) if 0 <= now - loss[0] < DAY_MS]
    if lost and recent:
        # What is lost in small steps, and has not come back, is lost as well.
        total = len(set(lost).union(*(hotkeys for _, hotkeys, _ in recent)) - seen)
        anomalous = anomalous or _are_too_many(total, max(len(before), *(number for _, _, number in recent)))
    if not seen:
        anomalous = bool(lost) and not believe_empty
    # After an anomalous loss the lost ones stay registered, so that the next look compares with them too.
    changed = step.store.set_registered(seen | before if anomalous else seen)
    _uncount_returns(step, unproved - seen)
    newcomers = sorted(seen - before) if anomalous else []
    if newcomers or unproved:
        step.set_meta(_UNPROVED, newcomers)
    if before or step.store.meta(_LOOKED, default=False):
        _count_returns(step, changed & seen)
    elif seen:
        # Whoever departed may be registered since before the first look: that is not seen to be a return.
        step.set_meta(_LOOKED, value=True)
    listed = lost if anomalous else []
    if listed != missing(step.store):
        # One event for each anomaly, however often it is looked at.
        _set_missing(step, listed, len(before) if size is None else size)
        if anomalous:
            text = f"{len(lost)} of {len(before)} hotkeys missing at once: not recorded"
            step.record([EventOf("anomaly", note=text)])
    if anomalous:
        return []
    if lost:
        step.set_meta(_LOSSES, [*recent, [now, lost, len(before)]])
    return record_departures(step, dict.fromkeys(lost, now), "metagraph")


def _count_returns(step: Step, registered: Iterable[str]) -> None:
    """Count another registration of those who departed; what rests for an earlier one goes on resting."""
    rows = step.store.get_many(registered)
    for hotkey in (hotkey for hotkey, row in rows.items() if row.departed_ordinal is not None):
        step.store.put_registration(hotkey, step.store.registration(hotkey) + 1)


def _uncount_returns(step: Step, hotkeys: Iterable[str]) -> None:
    """Take back the last return of those whom only a look that was not believed had shown."""
    for hotkey, row in step.store.get_many(hotkeys).items():
        if row.departed_ordinal is not None:
            _count_returns_down(step, hotkey, max(0, step.store.registration(hotkey) - 1))


def missing(store: Store) -> list[str]:
    """Return the hotkeys that the metagraph showed no more at the last look, and whose loss was not believed."""
    return list(store.meta(_ANOMALY, []))


def _set_missing(step: Step, hotkeys: list[str], size: int) -> None:
    step.set_meta(_ANOMALY, hotkeys)
    step.set_meta(_BELIEVED, size if hotkeys else None)


def accept_loss(step: Step, hotkeys: Iterable[str]) -> list[str]:
    """Believe that these hotkeys are lost, as far as they are missing; returns those that were."""
    named = set(hotkeys)
    listed = missing(step.store)
    accepted = [hotkey for hotkey in listed if hotkey in named]
    if not accepted:
        return []
    step.store.set_registered(step.store.registered() - set(accepted))
    step.set_meta(_LOSSES, [])  # somebody has looked
    record_departures(step, dict.fromkeys(accepted, clock.now_ms()), "accepted")
    left = [hotkey for hotkey in listed if hotkey not in named]
    _set_missing(step, left, step.store.meta(_BELIEVED, None) or len(step.store.registered()))
    return accepted


def record_departures(step: Step, detected: Mapping[str, int], reason: str) -> list[str]:
    """Record when hotkeys departed, once and for ever; returns those that are new."""
    new = [hotkey for hotkey, at_ms in detected.items() if step.store.put_departed(hotkey, at_ms)]
    step.record(EventOf("depart", hotkey, note=reason) for hotkey in new)
    return new


def clear_departed(step: Step) -> None:
    """Forget all departures."""
    departed = [hotkey for hotkey, _ in step.store.departed()]
    step.store.clear_departed(departed)
    step.record(EventOf("forget", hotkey, note="departures cleared") for hotkey in departed)


def registrations(step: Step, hotkey: str) -> range:
    """Return the numbers of the registration of now: several where a return was none that stays counted."""
    number = step.store.registration(hotkey)
    last, least = step.store.meta(_UNDONE, {}).get(hotkey, (None, 0))
    return range(least if last == number else number, number + 1)


def owe_once(step: Step, debt: Debt) -> None:
    """Of a slash that is owed again leave no second one; undo the returns that waited for its attempt."""
    hotkey, number = debt.hotkey, debt.registration
    last, least = step.store.meta(_UNDONE, {}).get(hotkey, (-1, 0))
    if not least <= number <= last:
        _make_one(step, hotkey, number, number)
    elif last == step.store.registration(hotkey):
        _count_returns_down(step, hotkey, least)
    else:  # he has come back since
        _make_one(step, hotkey, least, last)


def _count_returns_down(step: Step, hotkey: str, least: int) -> None:
    """Undo the returns after so many, as far as that can be done now."""
    number, waiting = step.store.registration(hotkey), step.store.meta(_UNDONE, {})
    last, earlier = waiting.get(hotkey, (-1, 0))
    if earlier <= least <= last:
        least = earlier
    if least >= number:
        return
    left = _make_one(step, hotkey, least, number)
    step.store.put_registration(hotkey, left)
    others = {one: known for one, known in waiting.items() if one != hotkey}
    if (now := others | ({hotkey: [left, least]} if left > least else {})) != waiting:
        step.set_meta(_UNDONE, now)


def _make_one(step: Step, hotkey: str, least: int, last: int) -> int:
    """Make one registration of several: no rule owes a slash twice in it, nor one that was made.

    Returns its number: the last since which a slash was made or begun, or the least.
    """
    several = range(least, last + 1)
    made = [slash for slash in step.store.slashes(hotkey) if slash.registration in several]
    debts = [debt for debt in step.store.debts(hotkey) if debt.kind == SLASH and debt.registration in several]
    begun = [debt for debt in debts if debt.state != OWED]
    number = max([least, *(slash.registration for slash in made), *(debt.registration for debt in begun)])
    rules, standing = {slash.rule for slash in made}, {debt.rule: debt for debt in begun}
    for debt in sorted((debt for debt in debts if debt.state == OWED), key=lambda debt: debt.registration):
        step.store.remove_debt(debt)
        before = standing.get(debt.rule) or standing.get(ANY_RULE)
        if before is None and not rules & {debt.rule, ANY_RULE}:
            both = debt._replace(registration=min(debt.registration, number))
        else:
            why = "slashed for it before" if before is None else "owed since before"
            step.record([EventOf("cancel", hotkey, note=f"{debt.kind} ({debt.rule}): {why}")])
            if debt.attempt is not None:  # it took nothing, which the journal may never come to hear
                step.set_meta(ENDED, [*step.store.meta(ENDED, []), debt.attempt][-_MOST_ENDED:])
            if before is None:
                continue
            # It stands for both, whether it rested or was begun; also for late answers.
            both = before._replace(attempt=before.attempt or debt.attempt)
            both = both._replace(due=True, eliminated_ms=debt.eliminated_ms) if debt.due else both
        standing[both.rule] = both
        step.store.put_debt(both)
    return number


def undo_departures(step: Step, hotkeys: Iterable[str]) -> list[str]:
    """Forget departures that were none, and the returns that were counted after them; returns whose there were.

    What is owed since such a return is owed as if there had been none: not again, where it was slashed before. A
    return stays counted where a slash was made since, and where one was begun, until it is known that it took
    nothing; it is one with the registration before all the same.
    """
    rows = step.store.get_many(hotkeys)
    undone = {hotkey: row for hotkey, row in rows.items() if row.departed_ordinal is not None}
    step.store.clear_departed(undone)
    for hotkey in undone:
        _count_returns_down(step, hotkey, 0)
    step.record(EventOf("forget", hotkey, note="the departure was none") for hotkey in undone)
    return list(undone)
