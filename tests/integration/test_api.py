"""Every method, by the same test bodies: server object here, in memory or with files, or in another process."""

import enum
import json
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from serving import row

from shmelim import EliminationClient, EliminationManagerServer, EliminationReason, Status
from shmelim.errors import UnknownMethodError


class Api:
    """What a reader is, and `rpc` to call any remote method."""

    def __len__(self):
        return len(self.reader)

    def __contains__(self, hotkey):
        return hotkey in self.reader

    def __iter__(self):
        return iter(self.reader)


class Direct(Api):
    """A server object in this process behind the names that a client has; reads go to its reader."""

    def __init__(self, server):
        self.server, self.reader = server, server.reader

    def __getattr__(self, name):
        if hasattr(self.server.reader, name):
            return getattr(self.server.reader, name)
        return getattr(self.server, f"{name}_rpc")

    def rpc(self, name, *args):
        return getattr(self.server, f"{name}_rpc")(*args)


class Remote(Api):
    """A client of a server in another process."""

    def __init__(self, client):
        self.client = self.reader = client

    def __getattr__(self, name):
        if hasattr(self.client, name):
            return getattr(self.client, name)
        return lambda *args: self.rpc(name, *args)

    def rpc(self, name, *args):
        return self.client._call(f"{name}_rpc", args)


class Managed(Api):
    """What a validator holds; what it does not have is asked of its reader."""

    def __init__(self, manager):
        self.manager, self.reader = manager, manager.reader

    def __getattr__(self, name):
        return getattr(self.manager if hasattr(self.manager, name) else self.reader, name)

    def rpc(self, name, *args):
        return getattr(self.manager._server_proxy, f"{name}_rpc")(*args)

    def health_check(self):
        return self.rpc("health_check")


@pytest.fixture(
    params=[
        "in memory",
        "with files",
        "served",
        "direct manager",
        "manager",
        pytest.param("over tcp", marks=pytest.mark.long),
    ]
)
def api(request, tmp_path, serve, managers):
    if request.param == "in memory":
        with EliminationManagerServer() as server:
            yield Direct(server)
    elif request.param == "with files":
        with EliminationManagerServer(state_dir=tmp_path / "state", durability="process") as server:
            yield Direct(server)
    elif request.param.endswith("manager"):
        yield Managed(managers(running_unit_tests=request.param == "direct manager", start_method="fork"))
    else:
        served = serve(durability="process", port=0 if request.param == "over tcp" else None)
        with_client = served.client()
        yield Remote(with_client)
        with_client.close()


def nothing_applied(api, before):
    assert api.snapshot() == before
    return True


@contextmanager
def refused(error, value, match=None):
    """Which of the values that one server is asked with is not refused, a failure says."""
    try:
        yield
    except error as refusal:
        assert match is None or re.search(match, str(refusal)), f"{value!r}: {refusal}"  # noqa: PT017
    else:
        pytest.fail(f"{value!r} was not refused")


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


class TestOrder:
    def test_is_that_of_the_first_elimination(self, api):
        for hotkey in ("z", "a", "m"):
            api.add_elimination(hotkey, row(hotkey))
        api.add_elimination("a", row("a", 9))
        assert list(api) == ["z", "a", "m"]
        api.remove_elimination("z")
        api.add_elimination("z", row("z"))
        assert list(api) == ["a", "m", "z"]
        assert [record["hotkey"] for record in api.get_eliminations_from_memory()] == ["a", "m", "z"]
        assert list(api.get_eliminations_dict()) == list(api.snapshot().eliminations) == ["a", "m", "z"]

    def test_a_sync_keeps_the_places_of_those_that_stay(self, api):
        api.sync_eliminations([row(hotkey) for hotkey in "abcd"])
        assert api.sync_eliminations([row(hotkey, 5) for hotkey in "xdbay"]) == ["c"]
        assert list(api) == ["a", "b", "d", "x", "y"]
        assert all(record == row(hotkey, 5) for hotkey, record in api.items())

    def test_departures_do_not_disturb_it(self, api):
        api.update_metagraph(["b", "m", "a"])
        api.add_elimination("a", row("a"))
        api.update_metagraph(["m"])
        api.add_elimination("b", row("b"))
        api.add_elimination("c", row("c"))
        assert list(api) == ["a", "b", "c"]
        api.remove_elimination("a")
        api.add_elimination("a", row("a"))
        assert list(api) == ["b", "c", "a"]
        assert set(api.get_departed_hotkeys()) == {"a", "b"}

    def test_of_departures_is_that_in_which_they_were_seen(self, api):
        api.update_metagraph(["z", "a", "m", "k"])
        assert api.update_metagraph(["a", "m", "k"]) == ["z"]
        api.add_elimination("a", row("a"))
        assert api.update_metagraph(["k"]) == ["a", "m"]
        # Eliminated later than others departed.
        api.add_elimination("z", row("z"))
        assert list(api.get_departed_hotkeys()) == ["z", "a", "m"]
        assert list(api.departed_hotkeys) == ["z", "a", "m"]


class TestRemoving:
    def test_one(self, api):
        api.add_elimination("a", row("a"))
        assert api.remove_elimination("a") is True
        assert api.remove_elimination("a") is False
        assert api.is_hotkey_eliminated("a") is False
        assert api.get_elimination("a") is None
        assert len(api) == 0

    def test_many_in_one_transaction(self, api):
        for kind in (list, tuple, dict.fromkeys):
            api.clear_eliminations()
            api.sync_eliminations([row(hotkey) for hotkey in "abcde"])
            version = api.version
            assert api.delete_eliminations(kind(["d", "x", "b", "d"])) == ["d", "b"]
            assert api.version == version + 1
            assert list(api) == ["a", "c", "e"]

    def test_a_set(self, api):
        api.sync_eliminations([row(hotkey) for hotkey in "abcde"])
        assert set(api.delete_eliminations({"d", "b"})) == {"b", "d"}
        assert api.rpc("delete_eliminations", {"a"}) == ["a"]
        assert list(api) == ["c", "e"]

    def test_all(self, api):
        api.sync_eliminations([row(hotkey) for hotkey in "abc"])
        version = api.version
        assert api.clear_eliminations() is None
        assert api.version == version + 1
        assert (len(api), api.get_eliminations_from_memory()) == (0, [])
        api.clear_eliminations()
        assert api.version == version + 1

    def test_leaves_departures(self, api):
        api.update_metagraph(["a", "b"])
        api.update_metagraph(["b"])
        api.sync_eliminations([row("a"), row("b")])
        api.clear_eliminations()
        assert list(api.get_departed_hotkeys()) == ["a"]
        assert api.snapshot().registered == {"b"}


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


class TestSync:
    def test_returns_those_that_are_no_longer_eliminated(self, api):
        assert api.sync_eliminations([row("a"), row("b")]) == []
        assert api.sync_eliminations([row("b"), row("c")]) == ["a"]
        assert api.sync_eliminations([]) == ["b", "c"]
        assert list(api) == []

    def test_of_a_hotkey_listed_twice_the_last_counts(self, api):
        api.sync_eliminations([row("a", 1), row("b"), row("a", 2)])
        assert api.get_eliminations_from_memory() == [row("a", 2), row("b")]

    def test_takes_any_iterable(self, api):
        api.sync_eliminations(row(hotkey) for hotkey in "ab")
        api.sync_eliminations(tuple(row(hotkey) for hotkey in "ab"))
        assert list(api) == ["a", "b"]

    def test_one_bad_record_refuses_the_list_and_is_named(self, api):
        api.sync_eliminations([row("x")])
        before = api.snapshot()
        bad = row("c")
        del bad["hotkey"]
        for place in (0, 1, 2):
            rows = [row("a"), row("b")]
            rows.insert(place, bad)
            with pytest.raises(ValueError, match=f"elimination {place} .*'hotkey'"):
                api.sync_eliminations(rows)
            with pytest.raises(ValueError, match="'hotkey'"):
                api.write_eliminations_to_disk(rows)
            nothing_applied(api, before)

    def test_refuses_what_is_not_a_list_of_records(self, api):
        api.sync_eliminations([row("x")])
        before = api.snapshot()
        for rows in (5, None, {"a": row("a")}, "text", ["a"]):
            with refused(TypeError, rows):
                api.rpc("sync_eliminations", rows)
            nothing_applied(api, before)

    def test_write_to_disk_is_a_sync_without_an_answer(self, api):
        api.sync_eliminations([row("x")])
        assert api.write_eliminations_to_disk([row("a")]) is None
        assert list(api) == ["a"]
        assert api.get_eliminations_from_disk() == [row("a")]

    def test_of_equal_records_publishes_nothing(self, api):
        api.sync_eliminations([row("a"), row("b")])
        version = api.version
        assert api.sync_eliminations([row("b"), row("a")]) == []
        assert api.version == version

    def test_is_one_publish(self, api):
        api.sync_eliminations([row(f"h{n}") for n in range(500)])
        version = api.version
        api.sync_eliminations([row(f"h{n}", 1) for n in range(250, 750)])
        # A growth moves the generation, which stands above.
        assert (api.version - version) % (1 << 48) == 1

    def test_of_very_many(self, api):
        all_rows = [row(f"h{n}", n) for n in range(4500)]
        for count in (1999, 2000, 2001, 4500):
            rows = all_rows[:count]
            api.clear_eliminations()
            assert api.sync_eliminations([row("x")]) == []
            assert api.sync_eliminations(rows) == ["x"]
            assert api.get_eliminations_from_memory() == rows
            assert api.are_eliminated([f"h{n}" for n in range(count)]).all()


class TestUploads:
    def test_are_applied_as_a_whole(self, api):
        api.sync_eliminations([row("x")])
        token = api.rpc("begin_upload")
        assert api.rpc("upload", token, [row("a"), row("b")]) == 2
        assert api.rpc("upload", token, [row("b", 5), row("c")]) == 3
        assert list(api) == ["x"]
        assert api.rpc("sync_uploaded", token) == ["x"]
        assert api.get_eliminations_from_memory() == [row("a"), row("b", 5), row("c")]

    def test_a_bad_record_in_the_last_part_leaves_nothing_of_it(self, api):
        api.sync_eliminations([row("x")])
        before = api.snapshot()
        token = api.rpc("begin_upload")
        api.rpc("upload", token, [row("a")])
        with pytest.raises(TypeError, match=r"elimination 2 .*'b'"):
            api.rpc("upload", token, [row("c"), {"hotkey": "b", "reason": 5}])
        for method, args in (("upload", [[row("d")]]), ("sync_uploaded", [])):
            with pytest.raises(ValueError, match="no upload"):
                api.rpc(method, token, *args)
        nothing_applied(api, before)

    def test_a_bad_record_in_a_long_list_leaves_nothing_of_it(self, api):
        api.sync_eliminations([row("x")])
        before = api.snapshot()
        with pytest.raises(TypeError, match=r"elimination 4100 of the list: .*'bad'"):
            api.sync_eliminations([*(row(f"h{n % 4000}") for n in range(4100)), {"hotkey": "bad", "reason": 5}])
        nothing_applied(api, before)

    def test_can_be_finished_once(self, api):
        token = api.rpc("begin_upload")
        api.rpc("upload", token, [row("a")])
        api.rpc("sync_uploaded", token)
        with pytest.raises(ValueError, match="no upload"):
            api.rpc("sync_uploaded", token)
        assert list(api) == ["a"]

    def test_an_empty_one_clears(self, api):
        api.sync_eliminations([row("x")])
        assert api.rpc("sync_uploaded", api.rpc("begin_upload")) == ["x"]

    def test_at_most_four_at_a_time(self, api):
        tokens = [api.rpc("begin_upload") for _ in range(4)]
        with pytest.raises(ValueError, match="4 uploads"):
            api.rpc("begin_upload")
        api.rpc("sync_uploaded", tokens[0])
        api.rpc("begin_upload")


class TestDepartures:
    def test_are_recorded_once_and_for_ever(self, api):
        assert api.update_metagraph(["a", "b", "c"]) == []
        assert api.get_departed_hotkeys() == {}
        assert api.update_metagraph(["b", "c"]) == ["a"]
        first = api.get_departed_hotkey_info("a")
        assert first["detected_ms"] > 1_700_000_000_000
        assert api.update_metagraph(["a", "b", "c"]) == []
        assert api.update_metagraph(["b"]) == ["c"]
        assert api.get_departed_hotkey_info("a") == first
        assert list(api.get_departed_hotkeys()) == ["a", "c"]

    def test_re_registration_is_seen_at_once(self, api):
        api.update_metagraph(["a", "b"])
        assert not api.is_hotkey_re_registered("a")
        api.update_metagraph(["b"])
        assert not api.is_hotkey_re_registered("a")
        assert api.status("a") == Status.DEPARTED
        api.update_metagraph(["a", "b"])
        assert api.is_hotkey_re_registered("a")
        assert not api.is_hotkey_re_registered("b")
        assert api.status("a") == Status.DEPARTED | Status.REGISTERED
        assert api.snapshot().registered == {"a", "b"}
        api.update_metagraph(["b"])
        assert not api.is_hotkey_re_registered("a")

    def test_a_loss_is_recorded_unless_it_is_an_anomaly(self, api):
        hotkeys = [f"h{n:03}" for n in range(54)]
        api.update_metagraph(hotkeys)
        assert api.update_metagraph(hotkeys[10:]) == hotkeys[:10]
        assert api.update_metagraph(hotkeys[21:]) == []
        assert list(api.get_departed_hotkeys()) == hotkeys[:10]

    def test_who_is_still_missing_after_an_anomaly_is_recorded_when_the_metagraph_has_recovered(self, api):
        hotkeys = [f"h{n:02}" for n in range(44)]
        api.update_metagraph(hotkeys)
        assert api.update_metagraph(hotkeys[20:]) == []
        assert api.update_metagraph([]) == []
        assert api.update_metagraph([]) == []
        assert api.update_metagraph([*hotkeys[3:], "new"]) == hotkeys[:3]
        assert list(api.get_departed_hotkeys()) == hotkeys[:3]
        assert api.snapshot().registered == {*hotkeys[3:], "new"}

    def test_a_loss_that_is_not_believed_can_be_accepted(self, api):
        hotkeys = [f"h{n:02}" for n in range(60)]
        api.update_metagraph(hotkeys)
        assert api.get_missing_hotkeys() == []
        api.update_metagraph(hotkeys[20:])
        assert api.get_missing_hotkeys() == hotkeys[:20]
        assert api.accept_loss(hotkeys[:20]) == hotkeys[:20]
        assert list(api.get_departed_hotkeys()) == hotkeys[:20]
        assert not api.is_hotkey_re_registered(hotkeys[0])
        api.update_metagraph(hotkeys)
        assert api.is_hotkey_re_registered(hotkeys[0])

    def test_takes_a_set(self, api):
        api.update_metagraph({"a", "b"})
        assert api.rpc("update_metagraph", {"b"}) == ["a"]

    def test_does_not_touch_eliminations(self, api):
        api.sync_eliminations([row("a"), row("b")])
        api.update_metagraph(["a", "b"])
        api.update_metagraph(["b"])
        api.update_metagraph([])
        assert api.get_eliminations_from_memory() == [row("a"), row("b")]


class TestHistory:
    def test_tells_old_and_new(self, api):
        api.add_elimination("a", row("a", 1))
        api.add_elimination("a", row("a", 2))
        api.remove_elimination("a")
        events = api.get_history("a")
        assert [(event["action"], event["old"], event["new"]) for event in events] == [
            ("remove", row("a", 2), None),
            ("update", row("a", 1), row("a", 2)),
            ("add", None, row("a", 1)),
        ]
        assert all(event["hotkey"] == "a" and event["at_ms"] > 1_700_000_000_000 for event in events)

    def test_tells_who(self, api):
        api.add_elimination("a", row("a"))
        api.rpc("update_metagraph", ["m", "n"])
        api.rpc("update_metagraph", ["n"])
        known = not isinstance(api, Remote) or isinstance(api.client._client.address, str)
        for event in api.get_history():
            assert event["pid"] == os.getpid()
            assert event["program"] == Path(sys.argv[0]).name
            # TCP does not tell whose process is at the other end.
            assert event["uid"] == (os.getuid() if known else None)

    def test_tells_of_departures_and_anomalies(self, api):
        hotkeys = [f"h{n}" for n in range(44)]
        api.update_metagraph(hotkeys)
        api.update_metagraph(hotkeys[1:])
        api.update_metagraph([])
        (anomaly, departure) = api.get_history(limit=2)
        assert (departure["action"], departure["hotkey"]) == ("depart", "h0")
        assert (anomaly["action"], anomaly["hotkey"]) == ("anomaly", None)
        assert "43 of 43" in anomaly["note"]

    def test_tells_of_a_sync(self, api):
        api.sync_eliminations([row("a"), row("b")])
        api.sync_eliminations([row("b", 1), row("c")])
        events = api.get_history(limit=3)
        assert {(event["action"], event["hotkey"], event["note"]) for event in events} == {
            ("remove", "a", "sync"),
            ("update", "b", "sync"),
            ("add", "c", "sync"),
        }

    def test_pages_and_limits(self, api):
        for n in range(10):
            api.add_elimination(f"h{n}", row(f"h{n}"))
        first = api.get_history(limit=4)
        second = api.get_history(limit=4, before_id=first[-1]["id"])
        assert [event["hotkey"] for event in first + second] == [f"h{n}" for n in range(9, 1, -1)]
        assert len(api.get_history(limit=None)) == 10
        assert api.get_history(limit=0) == []
        assert api.get_history("absent") == []
        with suppress(TypeError):  # it cannot be sent
            assert api.get_history("\ud800") == []
        with pytest.raises(ValueError, match="limit"):
            api.get_history(limit=-1)
        for name in "limit", "before_id":
            for odd in "5", 1.5, True, [1], b"":
                with pytest.raises(TypeError, match=f"{name} must be a whole number"):
                    api.get_history(**{name: odd})

    def test_has_nothing_of_what_was_refused(self, api):
        with pytest.raises(TypeError, match="reason"):
            api.add_elimination("a", {"hotkey": "a", "reason": 5})
        api.remove_elimination("a")
        api.add_elimination("b", row("b"))
        api.add_elimination("b", row("b"))
        assert [event["action"] for event in api.get_history()] == ["add"]


class TestTheRest:
    def test_health(self, api):
        api.sync_eliminations([row("a"), row("b")])
        api.update_metagraph(["m", "n"])
        api.update_metagraph(["n"])
        health = api.health_check()
        assert health["status"] == "ok"
        assert health["timestamp_ms"] > 1_700_000_000_000
        assert (health["num_eliminations"], health["num_departed_hotkeys"]) == (2, 1)
        assert (api.num_departed_hotkeys, len(api)) == (1, 2)
        assert health["problems"] == []

    def test_first_refresh(self, api):
        assert api.rpc("get_first_refresh_ran") is False
        api.rpc("set_first_refresh_ran", True)  # noqa: FBT003
        assert api.rpc("get_first_refresh_ran") is True

    def test_zombies(self, api):
        assert api.rpc("is_zombie_hotkey", "a", ["b"]) is True
        assert api.rpc("is_zombie_hotkey", "a", {"a", "b"}) is False
        assert api.rpc("is_zombie_hotkey", "DEVELOPMENT", []) is False

    def test_save(self, api):
        api.add_elimination("a", row("a"))
        assert api.save_eliminations() is None
        assert api.get_eliminations_from_disk() == [row("a")]

    def test_there_is_no_lock(self, api):
        with pytest.raises((AttributeError, UnknownMethodError)):
            api.rpc("get_eliminations_lock")

    def test_what_is_returned_is_the_callers_own(self, api):
        api.sync_eliminations([row("a"), row("b")])
        api.update_metagraph(["a", "m"])
        api.update_metagraph(["a"])
        before = json.dumps([api.snapshot().eliminations, api.snapshot().departed])
        api.get_elimination("a")["return_info"]["stamp"] = 99
        api.get_eliminations_dict().clear()
        api.get_eliminations_dict()["a"]["dd"] = 99
        api.eliminations.pop("a")
        api.get_eliminations_from_memory()[0].clear()
        api.get_eliminated_hotkeys().clear()
        api.get_departed_hotkeys()["m"]["detected_ms"] = 99
        api.departed_hotkeys.clear()
        api.get_departed_hotkey_info("m")["detected_ms"] = 99
        api.snapshot().registered.clear()
        api.rpc("get_elimination", "a").clear()
        api.rpc("get_eliminations_dict")["a"].clear()
        api.rpc("get_departed_hotkeys").clear()
        assert json.dumps([api.snapshot().eliminations, api.snapshot().departed]) == before

    def test_what_was_given_can_be_changed_afterwards(self, api):
        record = row("a")
        api.add_elimination("a", record)
        record["return_info"].clear()
        assert api.get_elimination("a") == row("a")

    def test_the_argument_is_not_changed(self, api):
        record = row("a") | {"reason": EliminationReason.ZOMBIE, "pair": (1, 2)}
        api.add_elimination("a", record)
        assert record["pair"] == (1, 2)
        assert isinstance(record["reason"], enum.Enum)

    def test_verify(self, api):
        api.sync_eliminations([row("a"), row("b")])
        assert api.verify() >= 2


@pytest.mark.parametrize(
    ("lost", "known", "recorded"),
    # An anomaly is more than 10 and at least a quarter.
    [
        (10, 40, True),
        (11, 44, False),
        (11, 45, True),
        (10, 11, True),
        (11, 11, False),
        (100, 401, True),
        (100, 400, False),
    ],
)
def test_the_size_from_which_a_loss_is_an_anomaly(lost, known, recorded):
    hotkeys = [f"h{n:03}" for n in range(known)]
    with EliminationManagerServer() as server:
        server.update_metagraph_rpc(hotkeys)
        gone = hotkeys[:lost] if recorded else []
        assert server.update_metagraph_rpc(hotkeys[lost:]) == gone
        assert list(server.get_departed_hotkeys_rpc()) == gone


CONTRACT = [
    "add_elimination",
    "append_elimination_row",
    "clear_eliminations",
    "delete_eliminations",
    "get_departed_hotkey_info",
    "get_departed_hotkeys",
    "get_elimination",
    "get_eliminated_hotkeys",
    "get_eliminations_dict",
    "get_eliminations_from_disk",
    "get_eliminations_from_memory",
    "health_check",
    "is_hotkey_eliminated",
    "is_hotkey_re_registered",
    "remove_elimination",
    "save_eliminations",
    "sync_eliminations",
    "update_metagraph",
    "write_eliminations_to_disk",
]


def test_the_server_has_every_method_of_the_contract():
    for name in (*CONTRACT, "is_zombie_hotkey", "get_first_refresh_ran", "set_first_refresh_ran", "get_history"):
        assert callable(getattr(EliminationManagerServer, f"{name}_rpc"))
    assert not hasattr(EliminationManagerServer, "get_eliminations_lock_rpc")


def test_a_client_has_every_method_of_the_contract():
    for name in (*CONTRACT, "generate_elimination_row", "get_history", "hotkey_in_eliminations", "snapshot"):
        assert callable(getattr(EliminationClient, name))
