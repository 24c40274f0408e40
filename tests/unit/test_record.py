"""What a record may hold, rule by rule."""

import collections
import datetime as dt
import enum
import math
import types
from datetime import datetime
from decimal import Decimal

import msgspec
import numpy as np
import pytest
from serving import row as row_of

from shmelim.eliminations import record as rec
from shmelim.eliminations.record import EliminationReason
from shmelim.shm import is_plain

HOTKEY = "5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs"


def row(**changes):
    return rec.generate_row(HOTKEY, 10.5, "ZOMBIE", 1_746_396_435_687, {"BTC/USD": 1.5}, {"a": 1}) | changes


class TestCheckHotkey:
    def test_returns_utf8(self):
        assert rec.check_hotkey("é") == b"\xc3\xa9"

    def test_255_bytes_are_the_most(self):
        assert len(rec.check_hotkey("é" * 127 + "x")) == 255
        with pytest.raises(ValueError, match="256 bytes"):
            rec.check_hotkey("é" * 128)

    @pytest.mark.parametrize("hotkey", ["", "a\ud800", "x" * 256])
    def test_unfit_text_is_a_value_error(self, hotkey):
        with pytest.raises(ValueError):
            rec.check_hotkey(hotkey)

    @pytest.mark.parametrize("hotkey", [None, b"abc", 5, ["a"]])
    def test_other_types_are_a_type_error(self, hotkey):
        with pytest.raises(TypeError, match=type(hotkey).__name__):
            rec.check_hotkey(hotkey)

    def test_message_names_it_but_not_all_of_it(self):
        with pytest.raises(ValueError, match="'xxxx") as caught:
            rec.check_hotkey("x" * 100_000)
        assert len(str(caught.value)) < 200


class TestRequiredFields:
    def test_a_hotkey_is_required_and_its_lack_is_named_with_whose_record_it_should_be(self):
        data = row()
        del data["hotkey"]
        with pytest.raises(ValueError, match=f"{HOTKEY}.* lacks the required field 'hotkey'"):
            rec.normalise(data, HOTKEY)

    @pytest.mark.parametrize("lacking", [{}, {"reason": None, "elimination_initiated_time_ms": None}])
    def test_nothing_else_is_required(self, lacking):
        assert rec.normalise({"hotkey": "h"} | lacking) == {"hotkey": "h"}

    def test_what_is_lacking_is_filled_in_and_noted(self):
        checked = rec.check_record({"hotkey": "h", "dd": 0.5})
        assert checked.lacks == ("reason", "elimination_initiated_time_ms")
        record, note = rec.complete(checked, None)
        found = rec.decode(record)
        assert found.items() >= {"hotkey": "h", "dd": 0.5, "reason": "UNKNOWN"}.items()
        assert found["elimination_initiated_time_ms"] > rec.SINCE_2020_MS
        assert note == "filled in: reason, elimination_initiated_time_ms"

    def test_what_is_lacking_is_kept_as_it_is_stored(self):
        stored = rec.encode(row(reason="ZOMBIE", dd=0.1))
        record, _ = rec.complete(rec.check_record({"hotkey": HOTKEY, "dd": 0.5}), stored)
        kept = {"reason": "ZOMBIE", "elimination_initiated_time_ms": row()["elimination_initiated_time_ms"]}
        assert rec.decode(record) == {"hotkey": HOTKEY, "dd": 0.5} | kept

    def test_a_whole_record_is_not_touched(self):
        checked = rec.check_record(row())
        assert rec.complete(checked, rec.encode(row(reason="ZOMBIE"))) == (checked.record, None)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf")])
    def test_what_is_not_finite_is_none_and_noted_wherever_it_stands(self, value):
        checked = rec.check_record(row(dd=value, return_info={"x": [value, 1.5]}))
        found = rec.decode(checked.record)
        assert (found["dd"], found["return_info"]) == (None, {"x": [None, 1.5]})
        assert checked.note == "not finite, and None: 'dd', 'return_info'"

    def test_what_stands_for_a_record_is_looked_at_in_its_place(self):
        class Proxy:
            """Hands over what it stands for, and has no other method."""

            def _getvalue(self):
                return row(dd=float("nan"))

        checked = rec.check_record(Proxy())
        assert rec.decode(checked.record) == row(dd=None)
        assert checked.note == "not finite, and None: 'dd'"

    @pytest.mark.parametrize("value", ["\u00cb\x7f\u00f0", 1.7976931348623157e308, [-5e-324]])
    def test_what_only_looks_like_it_is_stored_as_it_is(self, value):
        checked = rec.check_record(row(own=value))
        assert (rec.decode(checked.record)["own"], checked.note) == (value, None)

    @pytest.mark.parametrize("time_ms", [0, 1_700_000_000, rec.SINCE_2020_MS - 1, 1_700_000_000_000_000])
    def test_a_time_that_is_not_plausible_is_kept_and_noted(self, time_ms):
        checked = rec.check_record(row(elimination_initiated_time_ms=time_ms))
        assert rec.decode(checked.record)["elimination_initiated_time_ms"] == time_ms
        assert checked.note == "elimination_initiated_time_ms is not plausible"

    def test_mismatch_with_the_argument(self):
        with pytest.raises(ValueError, match="other"):
            rec.normalise(row(), "other")
        assert rec.normalise(row(), HOTKEY) == row()

    @pytest.mark.parametrize("hotkey", ["", "\ud800", "x" * 256])
    def test_unfit_hotkey(self, hotkey):
        with pytest.raises(ValueError, match="hotkey"):
            rec.normalise(row(hotkey=hotkey))
        with pytest.raises(ValueError, match="hotkey"):
            rec.normalise(row(), hotkey)

    def test_hotkey_argument_must_be_text(self):
        with pytest.raises(TypeError, match="bytes"):
            rec.normalise(row(), b"abc")

    @pytest.mark.parametrize(
        ("field", "value"),
        [(field, value) for field in ("hotkey", "reason") for value in (5, ["x"], {})] + [("hotkey", None)],
    )
    def test_text_fields_are_text(self, field, value):
        with pytest.raises(TypeError, match=rf"record\['{field}'\]"):
            rec.normalise(row(**{field: value}))


class TestNamedFields:
    @pytest.mark.parametrize("reason", list(EliminationReason))
    def test_reason_becomes_plain_text(self, reason):
        got = rec.normalise(row(reason=reason))["reason"]
        assert type(got) is str
        assert got == reason.name == reason.value

    def test_plain_enum_with_text(self):
        other = enum.Enum("other", {"A": "text of it"})
        assert rec.normalise(row(reason=other.A))["reason"] == "text of it"

    @pytest.mark.parametrize("value", [5, 5.0, np.int64(5), np.uint8(5), np.float64(5), np.float32(5)])
    def test_whole_times_become_int(self, value):
        got = rec.normalise(row(elimination_initiated_time_ms=value))["elimination_initiated_time_ms"]
        assert type(got) is int
        assert got == 5

    @pytest.mark.parametrize("value", [5.5, 1e300, True, np.bool_(1), "5", [5]])
    def test_other_times_are_refused(self, value):
        with pytest.raises(TypeError, match="elimination_initiated_time_ms"):
            rec.normalise(row(elimination_initiated_time_ms=value))

    @pytest.mark.parametrize("value", [None, math.nan, math.inf])
    def test_a_time_that_is_none_is_missing(self, value):
        assert "elimination_initiated_time_ms" not in rec.normalise(row(elimination_initiated_time_ms=value))

    @pytest.mark.parametrize("value", [None, 3, -0.5, np.float32(0.5), np.int8(3)])
    def test_dd_is_a_number_or_none(self, value):
        got = rec.normalise(row(dd=value))["dd"]
        assert type(got) in {int, float, type(None)}
        assert got is value or got == value

    @pytest.mark.parametrize("value", [True, "10%", [1], {}])
    def test_other_dd_is_refused(self, value):
        with pytest.raises(TypeError, match=r"record\['dd'\]"):
            rec.normalise(row(dd=value))

    @pytest.mark.parametrize("field", ["price_info", "return_info"])
    def test_infos_are_dicts_or_none(self, field):
        assert rec.normalise(row(**{field: None}))[field] is None
        assert rec.normalise(row(**{field: types.MappingProxyType({"a": 1})}))[field] == {"a": 1}
        for wrong in ([1], "x", 5, True):
            with pytest.raises(TypeError, match=field):
                rec.normalise(row(**{field: wrong}))


class TestValues:
    def test_result_is_new_and_in_order(self):
        data = row(zulu=[1, {"b": 2}], alpha=None)
        got = rec.normalise(data)
        assert got == data
        assert list(got) == list(data)
        got["zulu"][1]["b"] = got["price_info"]["x"] = 9
        assert data == row(zulu=[1, {"b": 2}], alpha=None)

    @pytest.mark.parametrize(
        ("value", "plain"),
        [
            (np.float64(1.5), 1.5),
            (np.float32(0.1), float(np.float32(0.1))),
            (np.int64(-5), -5),
            (np.uint64(2**64 - 1), 2**64 - 1),
            (np.bool_(1), True),
            (np.str_("text"), "text"),
            ((1, (2, [3])), [1, [2, [3]]]),
            (collections.OrderedDict(a=(1,)), {"a": [1]}),
            ({np.str_("key"): 1}, {"key": 1}),
            (enum.IntEnum("number", {"ONE": 1}).ONE, 1),
            (-(2**63), -(2**63)),
            (math.inf, None),
            (np.float64("nan"), None),
            ("é" * 100, "é" * 100),
        ],
    )
    def test_becomes_plain(self, value, plain):
        got = rec.normalise(row(x=value, y=[value]))
        assert got["x"] == plain
        assert got["y"] == [plain]
        assert type(got["x"]) is type(plain)
        assert rec.decode(rec.encode(got)) == got
        if isinstance(plain, dict):
            assert all(type(key) is str for key in got["x"])

    @pytest.mark.parametrize(
        "value",
        [
            {1, 2},
            b"bytes",
            bytearray(b"x"),
            dt.datetime.now(dt.UTC),
            object(),
            1j,
            np.array([1.0]),
            np.array(1.0),
            np.timedelta64(5, "s"),
            np.datetime64("2026-01-01"),
            2**64,
            -(2**63) - 1,
            "a\ud800",
            "long enough for the other path " * 9 + "\ud800",
        ],
    )
    def test_what_has_no_form_is_named_by_its_path(self, value):
        with pytest.raises(TypeError, match=r"record\['price_info'\]\['BTC/USD'\]"):
            rec.normalise(row(price_info={"BTC/USD": value}))
        with pytest.raises(TypeError, match=r"record\['x'\]\[1\]\[0\]\['y'\]"):
            rec.normalise(row(x=[0.5, ({"y": value},)]))

    @pytest.mark.parametrize("key", [5, None, b"k", ("a",), "\ud800"])
    def test_keys_are_text(self, key):
        with pytest.raises(TypeError, match=r"record\['price_info'\]"):
            rec.normalise(row(price_info={key: 1}))
        with pytest.raises(TypeError, match="record cannot be stored"):
            rec.normalise({**row(), key: 1})

    @pytest.mark.parametrize("data", [None, [], "text", [("hotkey", "h")]])
    def test_record_is_a_mapping(self, data):
        with pytest.raises(TypeError, match="must be a dict"):
            rec.normalise(data)

    def test_a_repr_that_fails_does_not_hide_the_error(self):
        class Rude:
            def __repr__(self):
                raise RuntimeError

        with pytest.raises(TypeError, match="Rude"):
            rec.normalise(row(price_info={Rude(): 1}))


class TestSizes:
    @staticmethod
    def nested(levels, make):
        value = 1
        for _ in range(levels):
            value = make(value)
        return value

    @pytest.mark.parametrize("make", [lambda v: [v], lambda v: {"a": v}])
    def test_64_levels_are_the_most(self, make):
        deepest = row(x=self.nested(63, make))
        assert rec.decode(rec.encode(rec.normalise(deepest))) == deepest
        with pytest.raises(ValueError, match="64 levels"):
            rec.normalise(row(x=self.nested(64, make)))

    def test_cycles_are_refused(self):
        data = row()
        data["self"] = data
        with pytest.raises(ValueError, match="contain itself"):
            rec.normalise(data)

    @pytest.mark.parametrize("leaf", [1.0, "x" * 1000, None])
    def test_few_objects_that_spell_out_many_are_refused_at_once(self, leaf):
        value = [leaf] * 4
        for _ in range(50):
            value = [value, value]
        with pytest.raises(ValueError, match="1048576"):
            rec.normalise(row(x=value))

    def test_one_mebibyte_is_the_most(self):
        room = rec.MAX_RECORD_BYTES - len(rec.encode(rec.normalise(row(x="x" * 70_000)))) + 70_000
        assert len(rec.encode(rec.normalise(row(x="x" * room)))) == rec.MAX_RECORD_BYTES
        with pytest.raises(ValueError, match=f"{HOTKEY}.* {rec.MAX_RECORD_BYTES + 1} bytes"):
            rec.encode(rec.normalise(row(x="x" * (room + 1))))


class TestCodec:
    @pytest.mark.parametrize(
        "odd",
        [
            {"x": {"deep": [1, (2.5, None), {"y": True}]}},
            {"x": EliminationReason.LIQUIDATED},
            {"x": b"bytes"},
            {"x": {1, 2}},
            {"x": datetime(2026, 1, 1)},  # noqa: DTZ001
            {"x": Decimal(1)},
            {"x": 1 << 63, "y": (1 << 64) - 1, "z": -(1 << 63)},
            {"x": 1 << 64},
            {"x": "\ud800"},
            {"x": {1: 2}},
            {"x": {"\ud800": 2}},
            {"x": [[]] * 2000},
            {"x": "x" * (1 << 20)},
            {"x": [0] * (1 << 20)},
            {"dd": True},
            {"dd": None, "price_info": None},
            {"price_info": []},
            {"elimination_initiated_time_ms": 5.0},
            {"elimination_initiated_time_ms": True},
            {"hotkey": ""},
            {"hotkey": "x" * 256},
            {"hotkey": None},
            {"reason": None},
        ],
        ids=lambda odd: f"{odd}"[:40].encode("ascii", "backslashreplace").decode(),
    )
    @pytest.mark.parametrize("hotkey", [None, HOTKEY, "another"])
    def test_prepare_takes_and_refuses_what_both_steps_do(self, odd, hotkey):
        """However it goes about it: records that are plain take a shorter way."""

        def outcome(function):
            try:
                return function(row() | odd, hotkey)
            except (TypeError, ValueError) as error:
                return type(error), str(error)

        def both_steps(data, hotkey):
            record = rec.normalise(data, hotkey)
            return record["hotkey"], rec.encode(record)

        assert outcome(lambda data, hotkey: rec.check_record(data, hotkey)[:2]) == outcome(both_steps)

    @pytest.mark.parametrize("levels", [rec.MAX_NESTING - 2, rec.MAX_NESTING - 1, rec.MAX_NESTING, 200])
    def test_the_limit_of_nesting_is_the_same_on_the_shorter_way(self, levels):
        value = 1
        for _ in range(levels):
            value = [value]
        try:
            rec.normalise(row(x=value))
        except ValueError:
            with pytest.raises(ValueError, match="nested"):
                rec.prepare(row(x=value))
        else:
            assert is_plain(row(x=value))
            assert rec.decode(rec.prepare(row(x=value))[1])["x"] == value

    def test_prepare_is_both_steps(self):
        hotkey, encoded = rec.prepare(row(reason=EliminationReason.LIQUIDATED), HOTKEY)
        assert type(hotkey) is str
        assert hotkey == HOTKEY
        assert rec.decode(encoded) == row(reason="LIQUIDATED")

    def test_bytes_are_msgpack_that_others_read(self):
        assert msgspec.msgpack.decode(rec.encode(row())) == row()

    def test_decode_takes_views_and_shares_nothing(self):
        buffer = bytearray(rec.encode(row()))
        got = rec.decode(memoryview(buffer))
        buffer[:] = bytes(len(buffer))
        assert got == row()

    @pytest.mark.parametrize(
        "wrong", [b"", b"\xc1", b"\x01", b"\x81\x01\x01", b"\x81\xa1\xff\x01", b"\x81\xa1a\xd9"]
    )
    def test_other_bytes_are_a_value_error(self, wrong):
        with pytest.raises(ValueError):
            rec.decode(wrong)


class TestGenerateRow:
    def test_keys_and_order(self):
        got = rec.generate_row("h", None, EliminationReason.ZOMBIE, 5)
        assert list(got.items()) == [
            ("hotkey", "h"),
            ("dd", None),
            ("reason", "ZOMBIE"),
            ("elimination_initiated_time_ms", 5),
            ("price_info", {}),
            ("return_info", {}),
        ]
        assert type(got["reason"]) is str

    def test_now_is_in_ms_utc(self):
        before = dt.datetime.now(dt.UTC).timestamp() * 1000 - 1
        got = rec.generate_row("h", 1.0, "r")["elimination_initiated_time_ms"]
        assert before <= got <= dt.datetime.now(dt.UTC).timestamp() * 1000 + 1

    def test_zero_is_a_time(self):
        assert rec.generate_row("h", 1.0, "r", 0)["elimination_initiated_time_ms"] == 0

    def test_the_callers_dicts_are_copied(self):
        prices = {"a": 1}
        rec.generate_row("h", 1.0, "r", 1, prices)["price_info"]["b"] = 2
        assert prices == {"a": 1}


def test_reasons_are_the_six_of_the_field():
    assert {reason.name: reason.value for reason in EliminationReason} == {
        name: name
        for name in (
            "ZOMBIE",
            "PLAGIARISM",
            "MAX_TOTAL_DRAWDOWN",
            "FAILED_CHALLENGE_PERIOD_TIME",
            "FAILED_CHALLENGE_PERIOD_DRAWDOWN",
            "LIQUIDATED",
        )
    }
    assert rec.DEPARTED_HOTKEYS_KEY == "departed_hotkeys"


class TestLists:
    def test_lists_of_records(self):
        assert list(rec.check_listed(row_of(hotkey) for hotkey in "ba")) == [row_of("b"), row_of("a")]
        for wrong in ("text", b"bytes", {"a": row_of("a")}, 5, None):
            with pytest.raises(TypeError):
                rec.check_listed(wrong)

    def test_lists_of_hotkeys(self):
        assert rec.check_hotkeys(["b", "a", "b"]) == ["b", "a"]
        assert set(rec.check_hotkeys({"b", "a"})) == {"a", "b"}
        for wrong in ("text", b"bytes", 5, None, [5], [None]):
            with pytest.raises(TypeError):
                rec.check_hotkeys(wrong)
        for wrong in ([""], ["x" * 256], ["\ud800"]):
            with pytest.raises(ValueError, match="hotkey"):
                rec.check_hotkeys(wrong)
