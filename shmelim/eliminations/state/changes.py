"""The changes that can be made to the state: functions of a step of a transaction on the store, with their events.

What they are given is checked before (bad input never reaches a transaction). The committer runs them, and
publishes every hotkey that they *touched*.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from shmelim.eliminations.debts.states import OWED
from shmelim.eliminations.record import check_hotkey, decode, prepare
from shmelim.eliminations.state.departures import lost_hotkeys
from shmelim.eliminations.store.history import Change as EventOf
from shmelim.system import clock
from shmelim.system.containers import plain_container

if TYPE_CHECKING:
    from shmelim.eliminations.rows import Row
    from shmelim.eliminations.store.history import Origin
    from shmelim.eliminations.store.store import Store

_ANOMALY: Final = "anomaly"
_BELIEVED: Final = "believed"  # how many hotkeys there were before the loss that is not believed
_REPLACEMENTS: Final = "replacements"


@dataclass(slots=True)
class Step:
    """One change inside a transaction: the store, who asked for it, and what it did.

    ``touched`` are the hotkeys whose row may be another now; ``wrote`` tells whether anything must be committed.
    """

    store: Store
    origin: Origin | None
    touched: dict[str, None] = field(default_factory=dict)
    wrote: bool = False

    def record(self, events: Iterable[EventOf]) -> None:
        """Write events, and touch the hotkeys that they speak of."""
        listed = list(events)
        if listed:
            self.tell(listed)
        for event in listed:
            if event.hotkey is not None:
                self.touched[event.hotkey] = None

    def tell(self, events: Iterable[EventOf]) -> None:
        """Write events of what nobody publishes."""
        self.store.add_events(events, self.origin)
        self.wrote = True

    def set_meta(self, key: str, value: Any) -> None:
        """Keep a value in the store."""
        self.store.set_meta(key, value)
        self.wrote = True


def prepare_all(records: Iterable[Mapping[str, Any]], first: int = 0) -> dict[str, bytes]:
    """Check and encode a list of records; of a hotkey that is listed twice the last record counts.

    ValueError and TypeError name the place of one that cannot be stored; ``first`` is that of the first.
    """
    prepared: dict[str, bytes] = {}
    for index, record in enumerate(check_listed(records), first):
        try:
            hotkey, encoded = prepare(record)
        except (ValueError, TypeError) as error:
            raise type(error)(f"elimination {index} of the list: {error}") from None
        prepared[hotkey] = encoded
    return prepared


def check_listed(records: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """Return records, those of a proxy as a list; TypeError for what can be iterated over and yet lists none."""
    if not isinstance(records, Iterable):
        records = plain_container(records) or records  # type: ignore[unreachable]  # a proxy may stand for one
    if isinstance(records, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(records, Iterable):
        raise TypeError(f"eliminations must be a list of records, not {type(records).__name__}")
    return records


def check_hotkeys(hotkeys: Iterable[str]) -> list[str]:
    """Return hotkeys as a list without repetitions; ValueError or TypeError for one that cannot be a key."""
    if isinstance(hotkeys, (str, bytes, bytearray, memoryview)) or not isinstance(hotkeys, Iterable):
        raise TypeError(f"hotkeys must be a list or set of hotkeys, not {type(hotkeys).__name__}")
    listed = list(dict.fromkeys(hotkeys))
    for hotkey in listed:
        check_hotkey(hotkey)
    return listed


def add(step: Step, hotkey: str, record: bytes) -> bool:
    """Add or replace one record; returns True for a hotkey that was not eliminated before."""
    old = step.store.put_elimination(hotkey, record)
    if old != record:
        step.record([EventOf("add" if old is None else "update", hotkey, old, record)])
    return old is None


def remove(step: Step, hotkeys: list[str], times_ms: Mapping[str, int] | None = None) -> list[str]:
    """Remove records; returns the hotkeys that had one.

    With `times_ms`, only those whose elimination was initiated when it says: another one came since.
    """

    def is_still(row: Row) -> bool:
        time_ms = None if row.record is None else decode(row.record)["elimination_initiated_time_ms"]
        return times_ms is not None and time_ms == times_ms.get(row.hotkey)

    listed = hotkeys
    if times_ms is not None:
        found = step.store.get_many(hotkeys)
        listed = [hotkey for hotkey in hotkeys if hotkey in found and is_still(found[hotkey])]
    old = step.store.remove_eliminations(listed)
    step.record(EventOf("remove", hotkey, record) for hotkey, record in old.items())
    _cancel_debts(step, old, "remove")
    return list(old)


def clear(step: Step, reason: str = "clear") -> int:
    """Remove all records; returns how many there were."""
    old = dict(step.store.eliminated())
    if old:
        step.store.clear_eliminations()
        step.record(EventOf("remove", hotkey, record, note=reason) for hotkey, record in old.items())
        _cancel_debts(step, old, reason)
    step.set_meta(_REPLACEMENTS, replacements(step.store) + 1)
    return len(old)


def replace_all(
    step: Step, records: dict[str, bytes], reason: str = "sync", keep: Iterable[str] = ()
) -> list[str]:
    """Make exactly these records the eliminations; returns the hotkeys that are no longer eliminated.

    A hotkey that stays keeps its place in the order. Those in ``keep`` stay whatever the records say.
    """
    kept = set(keep)
    gone = [hotkey for hotkey, _ in step.store.eliminated() if hotkey not in records and hotkey not in kept]
    removed = step.store.remove_eliminations(gone)
    step.record(EventOf("remove", hotkey, record, note=reason) for hotkey, record in removed.items())
    _cancel_debts(step, removed, reason)
    merge(step, records, reason)
    step.set_meta(_REPLACEMENTS, replacements(step.store) + 1)
    return gone


def replacements(store: Store) -> int:
    """Return how often the whole list was replaced, whether or not that changed anything in it."""
    return int(store.meta(_REPLACEMENTS, 0))


def _cancel_debts(step: Step, hotkeys: Iterable[str], reason: str) -> None:
    """Cancel what these hotkeys owe, which are no longer eliminated.

    A slash that was begun stays, as money may have moved; it only ceases to be due.
    """
    # Few owe anything, even where a million are removed.
    owing = step.store.debtors()
    for hotkey in hotkeys:
        if hotkey not in owing:
            continue
        cancelled = []
        for debt in step.store.debts(hotkey):
            if debt.state == OWED:
                step.store.remove_debt(debt)
                cancelled.append(debt.kind)
            else:
                step.store.put_debt(debt._replace(due=False))
        if cancelled:
            step.tell([EventOf("cancel", hotkey, note=f"{', '.join(cancelled)}: {reason}")])


def merge(step: Step, records: dict[str, bytes], reason: str) -> int:
    """Add or replace many records and leave the others; returns how many of them changed."""
    old = step.store.put_eliminations(records.items())
    changed = [
        EventOf("update" if hotkey in old else "add", hotkey, old.get(hotkey), record, reason)
        for hotkey, record in records.items()
        if old.get(hotkey) != record
    ]
    step.record(changed)
    return len(changed)


def update_metagraph(step: Step, hotkeys: list[str], at_ms: int | None = None) -> list[str]:
    """Make these hotkeys the registered ones; returns those whose departure it recorded."""
    seen = set(hotkeys)
    before = step.store.registered()
    size = step.store.meta(_BELIEVED, None)
    lost, anomalous = lost_hotkeys(before, seen, size)
    # After an anomalous loss the lost ones stay registered, so that the next look compares with them too.
    changed = step.store.set_registered(seen | before if anomalous else seen)
    step.touched.update(dict.fromkeys(changed))
    step.wrote = step.wrote or bool(changed)
    listed = lost if anomalous else []
    if listed != missing(step.store):
        # One event for each anomaly, however often it is looked at.
        _set_missing(step, listed, len(before) if size is None else size)
        if anomalous:
            text = f"{len(lost)} of {len(before)} hotkeys missing at once: not recorded"
            step.record([EventOf("anomaly", note=text)])
    if anomalous:
        return []
    return record_departures(step, dict.fromkeys(lost, at_ms or clock.now_ms()), "metagraph")


def missing(store: Store) -> list[str]:
    """Return the hotkeys that the metagraph showed no more at the last look, and whose loss was not believed."""
    return list(store.meta(_ANOMALY, []))


def _set_missing(step: Step, hotkeys: list[str], size: int) -> None:
    step.set_meta(_ANOMALY, hotkeys)
    step.set_meta(_BELIEVED, size if hotkeys else None)


def accept_loss(step: Step, hotkeys: Iterable[str], at_ms: int | None = None) -> list[str]:
    """Believe that these hotkeys are lost, as far as they are missing; returns those that were."""
    named = set(hotkeys)
    listed = missing(step.store)
    accepted = [hotkey for hotkey in listed if hotkey in named]
    if not accepted:
        return []
    step.touched.update(dict.fromkeys(step.store.set_registered(step.store.registered() - set(accepted))))
    record_departures(step, dict.fromkeys(accepted, at_ms or clock.now_ms()), "accepted")
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
    step.store.clear_departed()
    step.record(EventOf("forget", hotkey, note="departures cleared") for hotkey in departed)
