"""The demo's own detectors: what must be 0 in its report can be other than 0."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from shmelim.cli.demo.reader import BATCH, Watcher, are_halves_mixed, cast, is_whole, make_record
from shmelim.cli.demo.scenario import Ledger, Scenario
from shmelim.eliminations.reading import Snapshot
from shmelim.eliminations.record import decode, encode, prepare
from shmelim.eliminations.store.store import Store

CAST = cast()
HOTKEYS = [*CAST.steady, *CAST.even, *CAST.odd, *CAST.single, CAST.first, *CAST.never]


def test_the_cast_is_the_real_list_each_in_one_part_and_always_the_same():
    assert len(HOTKEYS) == len(set(HOTKEYS)) == 367
    assert min(len(CAST.steady), len(CAST.never)) >= BATCH // 2
    assert len(CAST.even) == len(CAST.odd)
    assert cast() == CAST


def test_records_are_made_alike_and_survive_storing():
    record = make_record(HOTKEYS[0], 3, 17)
    assert record == make_record(HOTKEYS[0], 3, 17)
    assert record != make_record(HOTKEYS[0], 3, 18)
    assert decode(prepare(record)[1]) == record
    assert is_whole(decode(prepare(record)[1]))


@pytest.mark.parametrize("field", ["dd", "reason", "price_info", "stamp", "serial", "checksum"])
def test_a_record_made_of_two_is_torn(field):
    old, new = make_record(HOTKEYS[1], 1, 1), make_record(HOTKEYS[1], 2, 2)
    if old[field] == new[field]:
        new[field] = "another"
    assert not is_whole({**old, field: new[field]})


@pytest.mark.parametrize("field", ["hotkey", "checksum"])
def test_a_record_without_a_field_is_torn(field):
    record = make_record(HOTKEYS[1], 1, 1)
    del record[field]
    assert not is_whole(record)


@pytest.mark.parametrize(
    ("even", "odd", "mixed"),
    [
        ([True, True], [False, False], False),
        ([False, False], [True, True], False),
        ([True, False], [False, False], True),
        ([True, True], [False, True], True),
        ([True, True], [True, True], True),
        ([False, False], [False, False], True),
    ],
)
def test_answers_of_two_syncs_are_mixed(even, odd, mixed):
    assert are_halves_mixed(even, odd) is mixed


class FakeReader:
    """Answers as a correct reader would, until a test makes it lie."""

    version = 1

    def __init__(self):
        eliminated = [*CAST.steady, *CAST.odd]
        self.records = {hotkey: make_record(hotkey, 1, 1) for hotkey in eliminated}

    def is_hotkey_eliminated(self, hotkey):
        return hotkey in self.records

    def get_elimination(self, hotkey):
        return self.records.get(hotkey)

    def are_eliminated(self, hotkeys):
        return np.array([hotkey in self.records for hotkey in hotkeys])

    def snapshot(self):
        return Snapshot(self.version, dict(self.records), {}, set())


@pytest.fixture
def watcher():
    return Watcher(FakeReader(), CAST)


def counts(watcher):
    return tuple(watcher.counts[what] for what in ("torn", "mixed", "wrong", "failed"))


def test_a_watcher_finds_nothing_where_nothing_is(watcher):
    watcher.round()
    assert counts(watcher) == (0, 0, 0, 0)
    assert watcher.counts["reads"] > 100
    assert watcher.counts["checks"] > 1000
    assert watcher.counts["checking_ns"] > 0
    assert watcher.counts["snapshots"] > 0


def test_a_watcher_finds_a_torn_record(watcher):
    hotkey = CAST.steady[0]
    watcher.reader.records[hotkey] = {**watcher.reader.records[hotkey], "dd": 0.5}
    watcher.round()
    assert counts(watcher) == (2, 0, 0, 0)  # once by itself, once in the snapshot


def test_a_watcher_finds_a_mixed_snapshot(watcher):
    hotkey = CAST.odd[0]
    watcher.reader.records[hotkey] = make_record(hotkey, 2, 2)
    watcher.round()
    assert counts(watcher) == (0, 1, 0, 0)


def test_a_watcher_finds_a_mixed_batch(watcher):
    del watcher.reader.records[CAST.odd[0]]
    watcher.round()
    assert counts(watcher)[1] == 4  # each of a round's batches, and not the snapshot


def test_a_watcher_finds_wrong_answers(watcher):
    watcher.reader.records[CAST.never[0]] = make_record(CAST.never[0], 1, 1)
    watcher.round()
    assert watcher.counts["wrong"] > 0
    before = watcher.counts["wrong"]
    del watcher.reader.records[CAST.never[0]], watcher.reader.records[CAST.steady[1]]
    watcher.round()
    assert watcher.counts["wrong"] > before


def test_a_watcher_finds_a_snapshot_that_lacks_somebody(watcher):
    whole = watcher.reader.snapshot()
    del whole.eliminations[CAST.steady[0]]
    watcher.reader.snapshot = lambda: whole
    watcher.round()
    assert counts(watcher) == (0, 0, 1, 0)


def test_a_watcher_sees_a_version_go_back(watcher):
    watcher.round()
    watcher.reader.version = 0
    watcher.round()
    assert watcher.counts["backwards"] == 1


def test_a_watcher_survives_and_counts_errors(watcher):
    def fail():
        raise OSError("gone")

    watcher.reader.snapshot = fail
    watcher.round()
    assert counts(watcher) == (0, 0, 0, 1)
    assert watcher.errors == ["snapshot: OSError: gone"]


@pytest.fixture
def ledger():
    ledger = Ledger()
    ledger.put(*(make_record(hotkey, 1, 1) for hotkey in HOTKEYS[:3]))
    return ledger


def test_a_ledger_misses_what_was_acknowledged(ledger):
    state = dict(ledger.records)
    assert ledger.lost(state) == 0
    assert ledger.lost({}) == 3
    assert ledger.lost({**state, HOTKEYS[0]: make_record(HOTKEYS[0], 1, 2)}) == 1
    assert ledger.lost({**state, HOTKEYS[5]: make_record(HOTKEYS[5], 1, 2)}) == 1
    ledger.drop(HOTKEYS[0])
    assert ledger.lost(state) == 1


def test_a_ledger_allows_both_outcomes_of_what_is_in_doubt(ledger):
    record = make_record(HOTKEYS[4], 1, 2)
    before, after = dict(ledger.records), {**ledger.records, HOTKEYS[4]: record}
    ledger.doubt[HOTKEYS[4]] = record
    assert ledger.lost(before) == ledger.lost(after) == 0
    assert ledger.lost({**before, HOTKEYS[4]: make_record(HOTKEYS[4], 1, 3)}) == 1
    elsewhere = {**before, HOTKEYS[5]: record}
    assert ledger.lost(elsewhere) == 1
    ledger.settle(after)
    assert ledger.lost(after) == 0
    assert ledger.lost(before) == 1


def test_changes_that_the_history_lacks_are_counted(monkeypatch, tmp_path):
    first, second, third = (encode(make_record(hotkey, 1, 1)) for hotkey in HOTKEYS[:3])
    played = Scenario(SimpleNamespace(home=tmp_path), 1.0, 1)
    played._ledger.put(*(make_record(hotkey, 1, 1) for hotkey in HOTKEYS[:3]))
    played._ledger.drop(HOTKEYS[0])

    def lacking(*told):
        events = [SimpleNamespace(hotkey=hotkey, old=old, new=new) for hotkey, old, new in told]
        monkeypatch.setattr(
            Store, "read_only", lambda _: nullcontext(SimpleNamespace(events=lambda limit: events))
        )
        return played._lost_in_history()

    puts = [(HOTKEYS[0], None, first), (HOTKEYS[1], None, second), (HOTKEYS[2], b"", third)]
    assert lacking(*puts, (HOTKEYS[0], first, None)) == 0
    assert lacking(*puts) == 1
    assert lacking(*puts, (HOTKEYS[1], second, None)) == 1
    assert lacking((None, None, None)) == 4
