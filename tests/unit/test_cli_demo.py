"""The demo's own detectors: what must be 0 in its report can be other than 0."""

from collections import Counter

import numpy as np
import pytest

from shmelim.cli.demo import report
from shmelim.cli.demo.records import (
    Cast,
    are_halves_mixed,
    are_mixed,
    is_whole,
    make_record,
    real_departed_hotkeys,
)
from shmelim.cli.demo.scenario import BEFORE, DEAD, Findings, Ledger
from shmelim.cli.demo.watcher import BATCH, Tally, Watcher
from shmelim.eliminations.files import format as files
from shmelim.eliminations.reading import Snapshot
from shmelim.eliminations.record import decode, prepare

HOTKEYS = list(files.read_departed(real_departed_hotkeys()).items)
CAST = Cast.of(HOTKEYS)


def test_the_cast_is_the_real_list_each_in_one_part_and_always_the_same():
    parts = [*CAST.steady, *CAST.even, *CAST.odd, *CAST.single, CAST.first, *CAST.never]
    assert len(HOTKEYS) == 367
    assert sorted(parts) == sorted(HOTKEYS)
    assert len(CAST.never) >= BATCH
    assert Cast.of(HOTKEYS[::-1]) == CAST


def test_records_are_made_alike_and_survive_storing():
    record = make_record(HOTKEYS[0], 3, 17)
    assert record == make_record(HOTKEYS[0], 3, 17)
    assert record != make_record(HOTKEYS[0], 3, 18)
    assert decode(prepare(record)[1]) == record
    assert is_whole(decode(prepare(record)[1]))


@pytest.mark.parametrize("field", ["dd", "reason", "price_info", "return_info", "stamp", "serial", "checksum"])
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


def test_records_of_two_syncs_are_mixed():
    assert not are_mixed([make_record(hotkey, 4, 9) for hotkey in HOTKEYS[:5]])
    assert are_mixed([make_record(HOTKEYS[0], 4, 9), make_record(HOTKEYS[1], 5, 10)])
    assert are_mixed([make_record(HOTKEYS[0], 4, 9), {"hotkey": "without a stamp"}])
    assert not are_mixed([])


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

    retries = 0

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
        return Snapshot(1, dict(self.records), {}, set())


@pytest.fixture
def watcher():
    return Watcher(FakeReader(), CAST)


def counts(tally):
    return tally.torn, tally.mixed, tally.wrong, tally.errors


def test_a_watcher_finds_nothing_where_nothing_is(watcher):
    watcher.phase = BEFORE
    watcher.round()
    tally = watcher.tally
    assert counts(tally) == (0, 0, 0, 0)
    assert tally.reads == tally.reads_in[BEFORE] > 1000
    assert tally.check_ns.total() * BATCH == tally.checks
    assert tally.snapshot_records == len(watcher.reader.records)


def test_a_watcher_finds_a_torn_record(watcher):
    hotkey = CAST.steady[0]
    watcher.reader.records[hotkey] = {**watcher.reader.records[hotkey], "dd": 0.5}
    watcher.round()
    assert watcher.tally.torn == 2  # once by itself, once in the snapshot
    assert counts(watcher.tally)[1:] == (0, 0, 0)


def test_a_watcher_finds_a_mixed_snapshot(watcher):
    hotkey = CAST.odd[0]
    watcher.reader.records[hotkey] = make_record(hotkey, 2, 2)
    watcher.round()
    assert counts(watcher.tally) == (0, 1, 0, 0)


def test_a_watcher_finds_a_mixed_batch(watcher):
    del watcher.reader.records[CAST.odd[0]]
    watcher.round()
    assert watcher.tally.mixed > 1


def test_a_watcher_finds_wrong_answers(watcher):
    watcher.reader.records[CAST.never[0]] = make_record(CAST.never[0], 1, 1)
    watcher.round()
    assert watcher.tally.wrong > 0
    before = watcher.tally.wrong
    del watcher.reader.records[CAST.never[0]], watcher.reader.records[CAST.steady[1]]
    watcher.round()
    assert watcher.tally.wrong > before


def test_a_watcher_survives_and_counts_errors_by_phase(watcher):
    def fail():
        raise OSError("gone")

    watcher.reader.snapshot = fail
    watcher.phase = DEAD
    watcher.round()
    assert (watcher.tally.errors, watcher.tally.errors_in[DEAD]) == (1, 1)
    assert watcher.tally.messages == ["snapshot: OSError: gone"]


def test_a_watcher_sees_what_it_waits_for_once(watcher):
    watcher.awaited = CAST.first
    watcher.look_out()
    assert watcher.seen_ns is None
    watcher.reader.records[CAST.first] = {}
    watcher.look_out()
    assert watcher.seen_ns > 0
    assert watcher.awaited is None


@pytest.fixture
def ledger():
    ledger = Ledger()
    ledger.replace([make_record(hotkey, 1, 1) for hotkey in HOTKEYS[:3]])
    return ledger


def test_a_ledger_misses_what_was_acknowledged(ledger):
    state = dict(ledger.records)
    assert ledger.missing_from(state) == 0
    assert ledger.missing_from({}) == 3
    assert ledger.missing_from({**state, HOTKEYS[0]: make_record(HOTKEYS[0], 1, 2)}) == 1
    assert ledger.missing_from({**state, HOTKEYS[5]: make_record(HOTKEYS[5], 1, 2)}) == 1
    ledger.drop(HOTKEYS[0])
    assert ledger.missing_from(state) == 1


def test_a_ledger_allows_both_endings_of_what_nobody_knows(ledger):
    record = make_record(HOTKEYS[4], 1, 2)
    before, after = dict(ledger.records), {**ledger.records, HOTKEYS[4]: record}
    ledger.doubt = (HOTKEYS[4], record)
    assert ledger.missing_from(before) == ledger.missing_from(after) == 0
    assert ledger.missing_from({**before, HOTKEYS[4]: make_record(HOTKEYS[4], 1, 3)}) == 1
    ledger.settle(after)
    assert ledger.missing_from(after) == 0
    assert ledger.missing_from(before) == 1


def test_a_ledger_misses_events_in_the_history(ledger):
    ledger.drop(HOTKEYS[0])
    told = {("put", hotkey, 1) for hotkey in HOTKEYS[:3]}
    assert ledger.missing_from_history(told) == 1
    assert ledger.missing_from_history({*told, ("remove", HOTKEYS[0], 1)}) == 0


def test_quantiles():
    counts = Counter({10: 50, 20: 49, 1000: 1})
    assert report.quantile(counts, 0.5) == 10
    assert report.quantile(counts, 0.99) == 20
    assert report.quantile(counts, 1.0) == 1000
    assert report.quantile(Counter(), 0.5) is None


def measured(**changes):
    found = Findings(
        tallies=[Tally(pid=1, seconds=2.0, checks=100, check_ns=Counter({900: 5}))],
        add_seconds=[0.5],
        sync_seconds=[0.1],
        sync_records=200,
        lost_while_dead=0,
        lost_after_restart=0,
        lost_at_the_end=0,
        lost_in_history=0,
        kill_to_first_ms=1.0,
        start_to_first_ms=1.0,
    )
    for field, value in changes.items():
        setattr(found, field, value)
    return found


def test_a_report_of_what_went_well():
    content = report.document(measured())
    assert content["ok"]
    assert content["not_measured"] == []
    assert content["reads"]["per_second"] == 50
    assert content["changes"]["adds_per_second"] == 2


@pytest.mark.parametrize("field", ["torn", "mixed", "wrong", "errors"])
def test_a_report_fails_for_anything_a_reader_saw(field):
    findings = measured()
    setattr(findings.tallies[0], field, 1)
    assert not report.document(findings)["ok"]


@pytest.mark.parametrize(
    "field", ["lost_while_dead", "lost_after_restart", "lost_at_the_end", "lost_in_history", "late"]
)
def test_a_report_fails_for_anything_lost(field):
    assert not report.document(measured(**{field: 1}))["ok"]


def test_a_report_says_what_was_not_measured_and_does_not_call_that_well(capsys):
    content = report.document(measured(lost_at_the_end=None, kill_to_first_ms=None, tallies=[]))
    assert not content["ok"]
    assert {"must_be_zero.acknowledged_changes_lost", "takeover.kill_to_first_change_ms", "reads.total"} <= set(
        content["not_measured"]
    )
    report.show(content)
    assert "acknowledged changes lost\tnot measured" in capsys.readouterr().out
