"""Departures, history and the rest, by the same test bodies in every way of reaching a server (see apis.py)."""

import enum
import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from apis import Remote
from serving import row

from shmelim import EliminationClient, EliminationManagerServer, EliminationReason, Status
from shmelim.errors import UnknownMethodError


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
