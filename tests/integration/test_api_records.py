"""One elimination and its hotkey, by the same test bodies in every way of reaching a server."""

import numpy as np
import pytest
from apis import nothing_applied, refused
from serving import row

from shmelim import EliminationReason, Status


class TestAddingOne:
    def test_says_whether_it_is_new(self, api):
        assert api.add_elimination("a", row("a", 1)) is True
        assert api.add_elimination("a", row("a", 2)) is False
        assert api.add_elimination("a", row("a", 2)) is False
        assert api.get_elimination("a") == row("a", 2)
        assert len(api) == 1

    def test_is_seen_by_every_reading_method(self, api):
        api.add_elimination("a", row("a"))
        assert api.is_hotkey_eliminated("a") is True
        assert api.is_hotkey_eliminated("b") is False
        assert api.get_elimination("a") == api.hotkey_in_eliminations("a") == row("a")
        assert api.get_elimination("b") is api.hotkey_in_eliminations("b") is None
        assert api.get_eliminated_hotkeys() == {"a"}
        assert api.get_eliminations_from_memory() == [row("a")]
        assert api.get_eliminations_dict() == api.eliminations == {"a": row("a")}
        assert api.status("a") == Status.ELIMINATED
        assert api.status("b") == Status(0)
        assert api.are_eliminated(["b", "a", "b"]).tolist() == [False, True, False]
        assert api.read("a", bytes) is not None
        assert api.read("b", bytes) is None
        assert list(api.snapshot().eliminations) == ["a"]

    def test_remote_reads_say_the_same(self, api):
        api.sync_eliminations([row("a"), row("b")])
        api.update_metagraph(["a", "x"])
        api.update_metagraph(["a"])
        api.update_metagraph(["a", "x"])
        assert api.rpc("is_hotkey_eliminated", "a") is True
        assert api.rpc("is_hotkey_eliminated", "x") is False
        assert api.rpc("get_elimination", "b") == row("b")
        assert api.rpc("get_elimination", "x") is None
        assert api.rpc("get_eliminated_hotkeys") == {"a", "b"}
        assert api.rpc("get_eliminations_from_memory") == [row("a"), row("b")]
        assert api.rpc("get_eliminations_dict") == {"a": row("a"), "b": row("b")}
        assert api.rpc("get_eliminations_from_disk") == [row("a"), row("b")]
        assert api.rpc("is_hotkey_re_registered", "x") is True
        assert api.rpc("is_hotkey_re_registered", "a") is False
        assert list(api.rpc("get_departed_hotkeys")) == ["x"]
        assert api.rpc("get_departed_hotkey_info", "x") == api.get_departed_hotkeys()["x"]
        assert api.rpc("get_departed_hotkey_info", "a") is None

    def test_keeps_keys_that_nobody_knows(self, api):
        record = row("a") | {"extra": {"deep": [1, 2.5, None, True, "text"]}, "dd": None}
        api.add_elimination("a", record)
        assert api.get_elimination("a") == record
        assert list(api.get_elimination("a")) == list(record)

    def test_keeps_numbers(self, api):
        for value in (1.7976931348623157e308, 1e-300, -0.0, 2**63, -(2**63), 2**64 - 1, 0):
            api.add_elimination("a", row("a") | {"n": value})
            found = api.get_elimination("a")["n"]
            assert (found, type(found)) == (value, type(value))

    def test_makes_plain_values_of_numpy_and_enum(self, api):
        record = row("a") | {
            "reason": EliminationReason.LIQUIDATED,
            "dd": np.float64(0.25),
            "elimination_initiated_time_ms": np.int64(7),
            "flag": np.bool_(True),  # noqa: FBT003
            "small": np.float32(0.5),
            "pair": (1, 2),
        }
        api.add_elimination("a", record)
        found = api.get_elimination("a")
        assert found["reason"] == "LIQUIDATED"
        assert {
            key: type(found[key]) for key in ("reason", "dd", "elimination_initiated_time_ms", "flag", "small")
        } == {
            "reason": str,
            "dd": float,
            "elimination_initiated_time_ms": int,
            "flag": bool,
            "small": float,
        }
        assert found["pair"] == [1, 2]

    def test_names_a_missing_hotkey(self, api):
        before = api.snapshot()
        record = row("a")
        del record["hotkey"]
        with pytest.raises(ValueError, match="'a' lacks the required field 'hotkey'"):
            api.add_elimination("a", record)
        nothing_applied(api, before)

    def test_refuses_a_record_of_another_hotkey(self, api):
        before = api.snapshot()
        with pytest.raises(ValueError, match="'b'"):
            api.add_elimination("a", row("b"))
        nothing_applied(api, before)

    def test_refuses_a_field_of_the_wrong_type(self, api):
        before = api.snapshot()
        for field, value in (
            ("reason", 5),
            ("hotkey", 5),
            ("elimination_initiated_time_ms", "now"),
            ("dd", "much"),
            ("price_info", [1]),
        ):
            with refused(TypeError, value, match=field):
                api.add_elimination("a", row("a") | {field: value})
            nothing_applied(api, before)

    def test_names_the_path_of_a_value_that_cannot_be_stored(self, api):
        before = api.snapshot()
        for value in (object(), {1, 2}, b"bytes", 2**64, {5: "x"}, "\ud800", 1j):
            with refused(TypeError, value, match="deep"):
                api.add_elimination("a", row("a") | {"deep": {"list": [1, value]}})
            nothing_applied(api, before)

    def test_refuses_what_is_not_a_dict(self, api):
        before = api.snapshot()
        for data in (None, [], "text", 5):
            with refused(TypeError, data):
                api.add_elimination("a", data)
            nothing_applied(api, before)

    def test_takes_almost_1_mib_and_refuses_more(self, api):
        room = (1 << 20) - 300
        api.add_elimination("a", row("a", pad=room))
        assert api.get_elimination("a") == row("a", pad=room)
        before = api.version
        with pytest.raises(ValueError, match="1048576"):
            api.add_elimination("b", row("b", pad=1 << 20))
        assert api.version == before
        assert not api.is_hotkey_eliminated("b")


class TestHotkeys:
    LEGAL = ("x", "x" * 48, "x" * 49, "x" * 255, "schlüssel", "键" * 85, "a b\n\0c", "👑", "\xff:origin")

    def test_that_are_legal(self, api):
        for number, hotkey in enumerate(self.LEGAL):
            assert api.add_elimination(hotkey, row(hotkey)) is True
            assert api.is_hotkey_eliminated(hotkey)
            assert api.get_elimination(hotkey) == row(hotkey)
            assert list(api) == [hotkey]
            assert api.are_eliminated([hotkey, hotkey + "y"]).tolist() == [True, False]
            assert api.update_metagraph([hotkey, "other"]) == []
            assert api.update_metagraph(["other"]) == [hotkey]
            assert api.status(hotkey) == Status.ELIMINATED | Status.DEPARTED
            assert api.remove_elimination(hotkey) is True
            assert api.status(hotkey) == Status.DEPARTED
            assert tuple(api.get_departed_hotkeys()) == self.LEGAL[: number + 1]

    def test_that_are_not_are_refused_where_they_would_be_stored_and_absent_where_they_are_read(self, api):
        before = api.snapshot()
        for hotkey in ("", "x" * 256, "键" * 86, "\ud800", "a\udcff"):
            # A lone surrogate does not even pass the channel; TypeError says so there.
            errors = (ValueError, TypeError) if not hotkey.isprintable() else ValueError
            for call in (
                lambda hotkey: api.add_elimination(hotkey, row("a") | {"hotkey": hotkey}),
                lambda hotkey: api.append_elimination_row(hotkey, 1.0, "ZOMBIE"),
                lambda hotkey: api.sync_eliminations([row("a") | {"hotkey": hotkey}]),
                api.remove_elimination,
                lambda hotkey: api.delete_eliminations(["a", hotkey]),
                lambda hotkey: api.update_metagraph(["a", hotkey]),
            ):
                with refused(errors, hotkey):
                    call(hotkey)
            nothing_applied(api, before)
            assert api.is_hotkey_eliminated(hotkey) is False
            assert api.get_elimination(hotkey) is None
            assert api.is_hotkey_re_registered(hotkey) is False
            assert api.get_departed_hotkey_info(hotkey) is None
            assert api.status(hotkey) == Status(0)
            assert api.are_eliminated([hotkey]).tolist() == [False]
            assert hotkey not in api

    READS = (
        lambda api, hotkey: api.is_hotkey_eliminated(hotkey),
        lambda api, hotkey: api.get_elimination(hotkey),
        lambda api, hotkey: api.is_hotkey_re_registered(hotkey),
        lambda api, hotkey: api.get_departed_hotkey_info(hotkey),
        lambda api, hotkey: api.status(hotkey),
        lambda api, hotkey: any(api.are_eliminated([hotkey])),
        lambda api, hotkey: hotkey in api,
    )
    CHANGES = (
        lambda api, hotkey: api.add_elimination(hotkey, row("a")),
        lambda api, hotkey: api.remove_elimination(hotkey),
        lambda api, hotkey: api.delete_eliminations([hotkey]),
        lambda api, hotkey: api.update_metagraph([hotkey]),
    )

    def test_that_are_not_text(self, api):
        before = api.snapshot()
        for hotkey in (5, b"a", ["a"]):
            for call in self.READS + self.CHANGES:
                with refused((TypeError, ValueError), hotkey):
                    call(api, hotkey)
            nothing_applied(api, before)

    def test_none_is_read_as_in_a_dict_and_never_written(self, api):
        before = api.snapshot()
        for call in self.READS:
            assert not call(api, None)
        for call in self.CHANGES:
            with pytest.raises((TypeError, ValueError)):
                call(api, None)
        nothing_applied(api, before)

    def test_one_string_is_no_list_of_hotkeys(self, api):
        api.add_elimination("a", row("a"))
        with pytest.raises(TypeError):
            api.rpc("delete_eliminations", "a")
        with pytest.raises(TypeError):
            api.rpc("update_metagraph", "a")
        assert "a" in api

    def test_what_can_be_iterated_over_is_not_yet_a_list(self, api):
        api.add_elimination("a", row("a"))
        api.update_metagraph(["a", "m1", "m2"])
        before = api.snapshot()
        for not_a_list in ("", "a", b"", b"a", {}, {"a": row("a")}, memoryview(b"")):
            with refused(TypeError, not_a_list):
                api.sync_eliminations(not_a_list)
            with refused(TypeError, not_a_list):
                api.write_eliminations_to_disk(not_a_list)
            if not isinstance(not_a_list, dict):
                with refused(TypeError, not_a_list):
                    api.delete_eliminations(not_a_list)
                with refused(TypeError, not_a_list):
                    api.update_metagraph(not_a_list)
            nothing_applied(api, before)


class TestAppending:
    def test_builds_the_row(self, api):
        assert (
            api.append_elimination_row("a", 0.1, EliminationReason.ZOMBIE, 5, {"BTC/USD": 1.0}, {"r": 2}) is True
        )
        assert api.get_elimination("a") == {
            "hotkey": "a",
            "dd": 0.1,
            "reason": "ZOMBIE",
            "elimination_initiated_time_ms": 5,
            "price_info": {"BTC/USD": 1.0},
            "return_info": {"r": 2},
        }
        assert api.append_elimination_row("a", None, "PLAGIARISM") is False
        found = api.get_elimination("a")
        assert found["elimination_initiated_time_ms"] > 1_700_000_000_000
        assert (found["dd"], found["price_info"], found["return_info"]) == (None, {}, {})

    def test_refuses_what_add_refuses(self, api):
        before = api.snapshot()
        with pytest.raises(TypeError, match="dd"):
            api.append_elimination_row("a", "much", "ZOMBIE")
        with pytest.raises(TypeError, match="reason"):
            api.append_elimination_row("a", 1.0, 5)
        nothing_applied(api, before)
