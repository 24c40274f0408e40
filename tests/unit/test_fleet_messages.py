"""What stands in an engine is a stranger's: it is of the right shape and size, or nothing of it counts."""

from __future__ import annotations

import contextlib
import itertools
import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from memory_engine import MemoryEngine

from shmelim.errors import FleetDataError
from shmelim.fleet import messages
from shmelim.fleet.cuts import Cut, Facts, Whole
from shmelim.fleet.engine import HIGHEST, EngineError, Id, LogAheadError
from shmelim.fleet.follower import Follower
from shmelim.fleet.messages import (
    FORMAT,
    Head,
    Message,
    Report,
    Row,
    Snapshot,
    pack,
    pack_chunk,
    parts_of,
    row_digest,
    unpack_chunk,
    unpack_head,
    unpack_message,
    unpack_report,
)
from shmelim.fleet.publisher import Publisher

ROW = Row(b"5Gx", 1, b"record", 7)
HEAD = Head(
    FORMAT, b"o" * 16, "host", b"s" * 16, 5, 9, 1, Id(2, 3), Snapshot("ab", 5, 8, 1, Id(2, 1), 1, 1, 20, 2**64 - 1)
)
MESSAGE = Message(FORMAT, 2, 5, 8, 9, 1, rows=[ROW], gone=[b"5Fa"], digest=2**64 - 1)
REPORT = Report(FORMAT, "host", 1, 2, 5, 9, lost=True, age=-1, rows=3, digest=2**64 - 1)
KINDS = [(HEAD, unpack_head), (MESSAGE, unpack_message), (REPORT, unpack_report)]


@pytest.mark.parametrize(("thing", "unpack"), KINDS)
def test_what_was_packed_is_unpacked(thing, unpack):
    assert unpack(pack(thing)) == thing


@pytest.mark.parametrize(("thing", "unpack"), KINDS)
def test_every_byte_that_is_missing_or_another_is_an_error_or_another_value(thing, unpack):
    whole = pack(thing)
    for end in range(len(whole)):
        with pytest.raises(FleetDataError):
            unpack(whole[:end])
    for at in range(len(whole)):
        for flip in (1, 0x80, 0xFF):
            damaged = whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]
            with contextlib.suppress(FleetDataError):
                assert unpack(damaged) != thing


@given(st.binary(max_size=200))
def test_any_bytes_are_an_error_or_a_message(raw):
    for unpack in (unpack_head, unpack_message, unpack_report, unpack_chunk):
        try:
            found = unpack(raw)
        except FleetDataError:
            continue
        assert isinstance(found, (Head, Message, Report, list))


@pytest.mark.parametrize(
    "fields",
    [
        {"format": 2},
        {"seq": -1},
        {"seq": 2**63},
        {"prev": 10},
        {"part": 1},
        {"parts": 0},
        {"parts": 1 << 20},
        {"rows": [(b"", 1, b"", 0)]},
        {"rows": [(b"k" * 256, 1, b"", 0)]},
        {"rows": [(b"k", 256, b"", 0)]},
        {"rows": [(b"k", 1, b"", -1)]},
        {"rows": [(b"k", 1, b"")]},
        {"rows": [("text", 1, b"", 0)]},
        {"gone": [b""]},
        {"gone": [b"\xff:origin"]},
        {"rows": [(b"\xff:origin", 1, b"", 0)]},
        {"rows": [(b"5G\xe2", 1, b"", 0), (b"\x82\xac", 1, b"", 0)]},
        {"digest": "0"},
    ],
)
def test_what_no_publisher_says_is_refused(fields):
    values = {name: getattr(MESSAGE, name) for name in Message.__struct_fields__} | fields
    with pytest.raises(FleetDataError):
        unpack_message(msgspec.msgpack.encode(list(values.values())))


def test_what_is_too_large_is_refused_before_it_is_unpacked(monkeypatch):
    monkeypatch.setattr(messages, "MAX_BYTES", 1000)
    with pytest.raises(FleetDataError, match="may have 1,000"):
        unpack_message(b"x" * 1001)
    with pytest.raises(FleetDataError, match="larger than 1,000"):
        unpack_chunk(zlib.compress(bytes(10_000_000)))
    with pytest.raises(FleetDataError, match="cut off"):
        unpack_chunk(pack_chunk([ROW])[:-1])
    with pytest.raises(FleetDataError):
        unpack_chunk(pack_chunk([ROW]) + b"more")
    assert unpack_chunk(pack_chunk([ROW])) == [ROW]


def test_parts_hold_about_as_much_as_they_may_and_every_row(monkeypatch):
    monkeypatch.setattr(messages, "PART", 100)
    rows = [Row(b"%d" % n, 1, bytes(size), n) for n, size in enumerate([0, 30, 500, 40, 40, 0])]
    gone = [bytes(size) for size in (1, 90, 10, 200, 3)]
    parts = list(parts_of(rows, gone))
    assert [row for part in parts for row in part.rows] == rows
    assert [key for part in parts for key in part.gone] == gone
    for part in parts:
        sizes = [len(row.key) + len(row.record) + 16 for row in part.rows] + [len(key) + 16 for key in part.gone]
        assert len(sizes) == 1 or sum(sizes) <= 100
    assert list(parts_of([])) == []
    assert list(parts_of([], [b"x"])) == [([], [b"x"])]


@given(st.permutations([Row(b"%d" % n, n % 3, b"r" * n, n) for n in range(6)]))
def test_a_digest_knows_no_order_but_every_field(rows):
    assert sum(row_digest(*row) for row in rows) == sum(row_digest(*row) for row in sorted(rows))
    others = {row_digest(*ROW._replace(**{field: value})) for field, value in [
        ("key", b"5Gy"), ("flags", 2), ("record", b"recore"), ("ordinal", 8),
    ]}  # fmt: skip
    assert len(others | {row_digest(*ROW)}) == 5
    # What moves from the key to the record is another entry.
    assert row_digest(b"ab", 1, b"c", 1) != row_digest(b"a", 1, b"bc", 1)


class NoTable:
    applied, digest = None, 0

    def __len__(self):
        return 0


class OneTable(NoTable):
    def replace(self, applied, rows):
        self.applied, self.rows = applied, list(rows)

    def confirm(self, position):
        self.position = position


class NoOutbox:
    def facts(self):
        return Facts(b"s" * 16, (1 << 24,), 0, 1)

    def cut(self, _after, *, digest_rows=0):
        return Cut(self.facts(), [], [])

    @contextlib.contextmanager
    def whole(self):
        yield Whole(self.facts(), iter([]))


class OneRow(NoOutbox):
    @contextlib.contextmanager
    def whole(self):
        yield Whole(self.facts(), iter([ROW]))


def test_a_stranger_under_the_name_stops_nobody_and_is_said():
    engine = MemoryEngine()
    assert engine.commit(None, b"\xc1 not ours", (Id(1, 0), b"not ours either"))
    follower = Follower(engine, NoTable(), who="one")
    follower.turn()
    assert "the head" in follower.problems["engine_data"]
    with pytest.raises(FleetDataError, match="another program"):
        Publisher(engine, NoOutbox()).turn()
    assert engine.look().head == b"\xc1 not ours"


def publish(engine, turns=4, **options):
    """Publish nothing for some turns, each of which beats."""
    seconds = itertools.count()
    publisher = Publisher(engine, NoOutbox(), monotonic=lambda: next(seconds), **options)
    for _ in range(turns):
        publisher.turn()
    return publisher


@pytest.mark.parametrize("number", [(1 << 62) - 1, 1 << 62, (1 << 62) + 1, HIGHEST - 1, HIGHEST, (1 << 64) - 1])
@pytest.mark.parametrize("field", ["term", "line"])
def test_whatever_one_follower_reports_the_others_can_follow_and_report(field, number):
    engine = MemoryEngine()
    publish(engine)
    values = {name: getattr(REPORT, name) for name in Report.__struct_fields__} | {field: number}
    for _ in range(3):
        engine.report("one", msgspec.msgpack.encode(list(values.values())), 1000)
        publish(engine)
    head = unpack_head(engine.state.head)
    assert all(unpack_message(raw) for _, raw in engine.state.log)
    theirs = msgspec.structs.replace(REPORT, term=head.term, line=head.line)
    assert unpack_report(pack(theirs)) == theirs
    engine.report("one", pack(theirs), 1000)  # which is lost, and heard
    publish(engine)
    assert unpack_head(engine.state.head).line > head.line


@pytest.mark.parametrize("field", [name for name in Report.__struct_fields__ if name != "host"])
@pytest.mark.parametrize("number", [-2, -(1 << 63), 1e300, 1.5, float("nan"), float("inf"), "1", None, b"1"])
def test_a_report_of_what_is_no_such_number_is_refused(field, number):
    values = {name: getattr(REPORT, name) for name in Report.__struct_fields__} | {field: number}
    with pytest.raises(FleetDataError):
        unpack_report(msgspec.msgpack.encode(list(values.values())))


def test_numbers_that_went_up_by_a_lie_are_found_again_after_everything_was_lost():
    engine = MemoryEngine()
    honest = msgspec.structs.replace(REPORT, term=(1 << 62) + 9, line=(1 << 62) + 7, lost=False)
    engine.report("one", pack(honest), 1000)
    head = publish(engine, turns=9).head
    assert head.term > honest.term
    assert honest.line < head.line < (1 << 62) + (1 << 50), "as of this moment, and far from the last number"


@pytest.mark.parametrize("fields", [{"line": HIGHEST}, {"last": Id(HIGHEST, 0)}, {"last": Id((1 << 64) - 1, 0)}])
def test_a_head_that_nothing_is_above_is_said_and_stays(fields):
    engine = MemoryEngine()
    engine.state.head = head = pack(msgspec.structs.replace(HEAD, **fields))
    with pytest.raises(FleetDataError):
        publish(engine)
    assert engine.state.head == head


@pytest.mark.parametrize("emptied", [False, True])
@pytest.mark.parametrize("head", [None, b"\xc1 of another release"])
def test_a_log_without_its_head_is_gone_on_with_at_once(head, emptied):
    engine = MemoryEngine()
    for _ in range(3):
        publish(engine)
    newest = engine.state.log[-1][0]
    engine.state.head = head
    if emptied:
        engine.state.log.clear()
    publisher = publish(engine, turns=1, take_over=True)
    assert publisher.head.term == newest.term + 1


def test_an_entry_of_somebody_else_is_gone_on_above_in_the_same_line():
    engine = MemoryEngine()
    publisher = publish(engine)
    line, foreign = publisher.head.line, Id(1_700_000_000_000, 0)
    engine.append(foreign, b"does it work?")
    with pytest.raises(LogAheadError):
        publisher.turn()
    publisher.turn()
    assert (publisher.head.term, publisher.head.line) == (foreign.term + 1, line)


def test_a_snapshot_that_fails_again_and_again_uses_up_neither_terms_nor_lines():
    engine = MemoryEngine()

    def fail(what):
        if what == "put":
            raise EngineError("full")

    engine.before = fail
    publisher = Publisher(engine, OneRow())
    for _ in range(5):
        with pytest.raises(EngineError):
            publisher.turn()
    first = publisher.head
    assert (first.term, first.snapshot) == (1, None)
    engine.before = lambda _what: None
    publisher.turn()
    assert (publisher.head.line, publisher.head.snapshot.rows) == (first.line, 1)


def test_what_is_held_is_not_read_again_and_again():
    engine = MemoryEngine()
    seconds, cuts = itertools.count(), []

    class Counted(NoOutbox):
        top = 0

        def facts(self):
            return super().facts()._replace(top=self.top)

        def cut(self, after, *, digest_rows=0):
            cuts.append(after)
            return Cut(self.facts(), [ROW], [])

    outbox = Counted()
    publisher = Publisher(engine, outbox, monotonic=lambda: next(seconds))
    for _ in range(3):
        publisher.turn()
    engine.hold(b"look first")
    for _ in range(3):
        publisher.turn()
    del cuts[:]
    outbox.top = 5
    for _ in range(9):
        publisher.turn()
    assert (cuts, publisher.held, publisher.behind) == ([], "look first", 5)
    engine.hold(None)
    publisher.turn()
    assert (publisher.held, publisher.behind, publisher.head.seq) == (None, 0, 5)
    sent = [message for _, raw in engine.state.log if (message := unpack_message(raw)).rows]
    assert [(message.seq, message.rows) for message in sent] == [(5, [ROW])]


def test_a_reason_to_hold_is_cut_off_where_nobody_reads_on():
    engine = MemoryEngine()
    engine.hold("é".encode() * 100_000)
    assert 100 < len(engine.look().held) <= 1001


def test_a_line_whose_snapshot_failed_is_not_gone_on_with_from_another_store(monkeypatch):
    engine = MemoryEngine()
    publisher = Publisher(engine, NoOutbox())
    publisher.turn()
    failed = msgspec.structs.replace(publisher.head, snapshot=None)
    publisher.head, publisher._raw = failed, pack(failed)
    engine.state.head = publisher._raw
    monkeypatch.setattr(NoOutbox, "facts", lambda _self: Facts(b"t" * 16, (1 << 24,), 0, 1))
    publisher.turn()
    assert publisher.head.line > failed.line
    assert publisher.head.store_id == b"t" * 16


def test_a_message_under_another_term_is_not_believed():
    engine = MemoryEngine()
    publish(engine)
    follower = Follower(engine, OneTable(), who="one")
    for _ in range(2):
        follower.turn()
    about = {name: getattr(MESSAGE, name) for name in Message.__struct_fields__}
    about |= {"line": unpack_head(engine.state.head).line, "term": HIGHEST}
    engine.append(Id(1, 999), msgspec.msgpack.encode(list(about.values())))
    follower.turn()
    assert str(HIGHEST) in follower.problems["engine_data"]
    follower.turn()
    assert follower._term == 1


def test_a_snapshot_that_is_newer_than_the_head_has_to_be_the_stores_too():
    engine = MemoryEngine()
    head = msgspec.structs.replace(HEAD, seq=0, run=1 << 24, last=Id(2, 3))
    ahead = msgspec.structs.replace(HEAD.snapshot, seq=3, run=1 << 24, after=Id(2, 3))
    engine.state.head = pack(msgspec.structs.replace(head, snapshot=ahead))
    engine.state.log = [(head.last, pack(MESSAGE))]
    # This store was restored: the head's change 0 is its own, and the snapshot's change 3 never was.
    publisher = publish(engine)
    assert publisher.head.line > head.line
    assert publisher.head.snapshot.seq == 0
