"""Slashes that were made, on a server without processes: each stays on record, and is made once for a rule."""

import itertools
import sqlite3
import time

import pytest
from owing import ELIMINATED_MS, due, eliminate, leave_and_return, make_slash, owed, slash, slashes, told
from serving import row

from shmelim import EliminationManagerServer
from shmelim.eliminations.debts.states import (
    KINDS,
    LIMIT_ORDERS,
    POSITIONS,
    SLASH,
)
from shmelim.eliminations.store import schema

# ------------------------------------------------------------------ a slash that was made


@pytest.mark.parametrize("how", ["contract", "hand"])
def test_a_slash_that_was_made_stays_on_record(server, how):
    eliminate(server, stamp=7)
    before = time.time_ns() // 1_000_000
    assert server.get_slashes_rpc() == []
    make_slash(server, how=how)
    (made,) = server.get_slashes_rpc()
    assert before <= made.pop("made_ms") <= time.time_ns() // 1_000_000
    assert made == {
        "hotkey": "a",
        "rule": "",
        "registration": 0,
        "eliminated_ms": ELIMINATED_MS + 7,
        "by": how,
        "outcome": "made",
        "reason": "ZOMBIE",
        "share": None,
        "answer": None,
    }
    server.remove_elimination_rpc("a")
    assert slashes(server, "a") == [("a", 7, how)]
    assert slashes(server, "b") == []


def test_what_is_not_a_slash_that_was_made_is_not_on_record(server):
    eliminate(server)
    for kind in (LIMIT_ORDERS, POSITIONS):
        assert server.settle_debt_rpc("a", kind)
    assert server.settle_debt_rpc("a", SLASH, "one") is False
    assert server.begin_slash_rpc("a", "one")
    assert server.settle_debt_rpc("a", SLASH, "two") is False
    assert server.fail_debt_rpc("a", SLASH, "refused", "one")
    assert server.begin_slash_rpc("a", "two")
    assert server.doubt_slash_rpc("a", "two", "timeout")
    assert server.resolve_slash_rpc("a", made=False)
    assert server.get_slashes_rpc() == []


def test_the_oldest_comes_first(server, monkeypatch):
    clock = itertools.count(1_700_000_000_000_000_000, 1_000_000)
    monkeypatch.setattr(time, "time_ns", lambda: next(clock))
    for number, (hotkey, rule) in enumerate([("c", "r"), ("b", "r"), ("a", "r"), ("c", "s")]):
        eliminate(server, hotkey, [SLASH], stamp=number, rule=rule)
        make_slash(server, hotkey, "hand" if number == 3 else "contract")
        server.remove_elimination_rpc(hotkey)
    assert slashes(server) == [("c", 0, "contract"), ("b", 1, "contract"), ("a", 2, "contract"), ("c", 3, "hand")]


@pytest.mark.parametrize("how", ["contract", "hand"])
@pytest.mark.parametrize("stamp", [0, 10**12])
def test_for_one_rule_a_miner_is_slashed_once(server, how, stamp):
    eliminate(server, rule="drawdown")
    make_slash(server, how=how)
    server.sync_eliminations_rpc([row("b")])
    assert eliminate(server, stamp=stamp, rule="drawdown") == "added"
    assert owed(server) == [("a", kind, "owed") for kind in KINDS[:2]]
    assert told(server, "owe")[-1] == ("owe", "limit_orders, positions, slash (made before)")
    assert server.begin_slash_rpc("a", "two") is False


def test_for_another_rule_he_is_slashed_again(server):
    for rule in ("drawdown", "challenge_period", "perf_ledger"):
        eliminate(server, kinds=[SLASH], rule=rule)
        assert [debt["rule"] for debt in server.get_debts_rpc("a")] == [rule]
        make_slash(server)
        server.sync_eliminations_rpc([])
    assert {made["rule"] for made in server.get_slashes_rpc("a")} == {
        "drawdown",
        "challenge_period",
        "perf_ledger",
    }


def test_and_after_he_has_departed_and_registered_again(server):
    """However short a time lies between."""
    eliminate(server, kinds=[SLASH], rule="drawdown")
    make_slash(server)
    server.remove_elimination_rpc("a")
    for registration in (1, 2):
        leave_and_return(server, "a")
        eliminate(server, kinds=[SLASH], rule="drawdown")
        assert slash(server)["registration"] == registration
        make_slash(server)
        server.remove_elimination_rpc("a")
        eliminate(server, kinds=[SLASH], rule="drawdown")
        assert server.get_debts_rpc() == []
        server.remove_elimination_rpc("a")
    assert sorted(made["registration"] for made in server.get_slashes_rpc("a")) == [0, 1, 2]


def test_to_depart_alone_or_to_be_seen_again_is_not_enough(server):
    eliminate(server, kinds=[SLASH], rule="drawdown")
    make_slash(server)
    server.update_metagraph_rpc(["other", "a"])
    server.update_metagraph_rpc(["other"])
    for hotkeys in (["other"], ["other", "b"]):
        server.remove_elimination_rpc("a")
        server.update_metagraph_rpc(hotkeys)
        eliminate(server, kinds=[SLASH], rule="drawdown")
        assert server.get_debts_rpc() == []


def test_who_is_registered_at_the_first_look_has_not_come_back(server, tmp_path):
    """A list of old departures does not make returns of those who are there."""
    (tmp_path / "default.json").write_text('{"departed_hotkeys": {"a": {"detected_ms": 0}}}')
    with EliminationManagerServer(default_departed=tmp_path / "default.json") as fresh:
        fresh.update_metagraph_rpc(["a", "other"])
        eliminate(fresh, kinds=[SLASH], rule="drawdown")
        assert slash(fresh)["registration"] == 0


def test_what_rested_for_an_earlier_registration_is_due_again_for_that_very_elimination_alone(server):
    eliminate(server, rule="drawdown")
    server.sync_eliminations_rpc([])
    leave_and_return(server, "a")
    server.sync_eliminations_rpc([row("a", 5)])
    assert due(server, "a") == [True, True, False]
    server.sync_eliminations_rpc([])
    server.sync_eliminations_rpc([row("a")])
    assert due(server, "a") == [True, True, True]


def test_an_elimination_that_was_slashed_for_in_one_registration_is_not_slashed_for_in_another(server):
    """The ledger names it with its old time again."""
    eliminate(server, kinds=[SLASH], rule="perf_ledger")
    server.sync_eliminations_rpc([])
    leave_and_return(server, "a")
    eliminate(server, kinds=[SLASH], rule="perf_ledger")
    server.sync_eliminations_rpc([])
    server.sync_eliminations_rpc([row("a")])
    assert [(debt["registration"], debt["due"]) for debt in server.get_debts_rpc()] == [(0, False), (1, True)]
    make_slash(server)
    server.sync_eliminations_rpc([])
    server.sync_eliminations_rpc([row("a")])
    assert due(server, "a") == [False]


@pytest.mark.parametrize("state", ["owed", "in_doubt"])
def test_an_elimination_that_outlived_a_return_owes_its_slash_when_it_is_brought_again(server, state):
    eliminate(server, kinds=[SLASH], rule="drawdown")
    if state == "in_doubt":
        server.begin_slash_rpc("a", "one")
        server.doubt_slash_rpc("a", "one", "timeout")
    leave_and_return(server, "a")
    server.sync_eliminations_rpc([])
    server.sync_eliminations_rpc([row("a")])
    assert (slash(server)["state"], slash(server)["due"]) == (state, True)
    if state == "in_doubt":
        assert server.resolve_slash_rpc("a", made=False)
    assert server.begin_slash_rpc("a", "two") is True


def test_one_of_the_next_registration_owes_no_slash_of_the_last(server):
    eliminate(server, kinds=[SLASH], rule="drawdown")
    leave_and_return(server, "a")
    server.sync_eliminations_rpc([])
    server.sync_eliminations_rpc([row("a", 1000)])
    assert due(server, "a") == [False]


@pytest.mark.parametrize("how", ["sync", "add"])
def test_an_elimination_that_takes_anothers_place_owes_its_own_slash_and_not_the_others(server, how):
    """As if the other had been taken back first."""
    first, then = row("a", reason="MAX_TOTAL_DRAWDOWN"), row("a", 5, reason="PLAGIARISM")
    server.eliminate_rpc("a", first, list(KINDS), None, "drawdown")
    server.sync_eliminations_rpc([])
    server.eliminate_rpc("a", then, list(KINDS), None, "challenge_period")

    def bring(record):
        if how == "sync":
            server.sync_eliminations_rpc([record])
        else:
            server.add_elimination_rpc("a", record)
        return {(debt["rule"], debt["due"]) for debt in server.get_debts_rpc()} - {("", True)}

    assert bring(first) == {("drawdown", True), ("challenge_period", False)}
    assert bring(then) == {("drawdown", False), ("challenge_period", True)}
    # What has no slash of its own leaves him the one that he owes.
    for reason in ("LIQUIDATED", "in words of one's own"):
        assert bring(row("a", 7, reason=reason)) == {("drawdown", False), ("challenge_period", True)}
    assert server.begin_slash_rpc("a", "one")
    server.settle_debt_rpc("a", SLASH, "one")
    assert bring(row("a", 7, reason="in other words")) == {("drawdown", False)}


def test_an_elimination_that_was_slashed_for_and_takes_anothers_place_has_the_others_slash_rest(server):
    """Taken back and brought in two steps it did."""
    first, then = row("a", reason="LIQUIDATED"), row("a", 5, reason="MAX_TOTAL_DRAWDOWN")
    server.eliminate_rpc("a", first, [SLASH], None, "perf_ledger")
    make_slash(server)
    server.sync_eliminations_rpc([])
    server.eliminate_rpc("a", then, [SLASH], None, "drawdown")
    # Also one that owes nothing as he was slashed for its rule before.
    for taking in (first, row("a", 9, reason="LIQUIDATED")):
        server.sync_eliminations_rpc([taking])
        assert due(server, "a") == [False]
        server.sync_eliminations_rpc([then])
        assert due(server, "a") == [True]


def test_a_slash_that_stands_for_two_eliminations_is_due_when_the_later_one_is_brought_again(server):
    """Its reason is that of the first, and says nothing of the other's rule."""
    for stamp, reason in enumerate(("FAILED_CHALLENGE_PERIOD_TIME", "PLAGIARISM")):
        server.eliminate_rpc("a", row("a", stamp, reason=reason), [SLASH], None, "challenge_period")
        server.sync_eliminations_rpc([])
    server.sync_eliminations_rpc([row("a", 1, reason="PLAGIARISM")])
    assert due(server, "a") == [True]


def test_an_elimination_of_an_earlier_registration_that_takes_a_place_owes_its_own_slash(server):
    server.eliminate_rpc("a", row("a", reason="MAX_TOTAL_DRAWDOWN"), [SLASH])
    server.sync_eliminations_rpc([])
    leave_and_return(server, "a")
    server.add_elimination_rpc("a", row("a", 5, reason="MAX_TOTAL_DRAWDOWN"))
    assert due(server, "a") == [False]
    server.sync_eliminations_rpc([row("a", reason="MAX_TOTAL_DRAWDOWN")])
    assert due(server, "a") == [True]
    # Also where one of this registration rests.
    server.sync_eliminations_rpc([])
    server.eliminate_rpc("a", row("a", 9, reason="MAX_TOTAL_DRAWDOWN"), [SLASH])
    server.sync_eliminations_rpc([row("a", reason="MAX_TOTAL_DRAWDOWN")])
    assert due(server, "a") == [True, False]


def test_an_old_doubt_swallows_no_slash_of_another_rule(server):
    eliminate(server, kinds=[SLASH], rule="drawdown")
    server.begin_slash_rpc("a", "one")
    server.doubt_slash_rpc("a", "one", "timeout")
    server.remove_elimination_rpc("a")
    eliminate(server, kinds=[SLASH], rule="challenge_period")
    found = [(debt["rule"], debt["state"], debt["due"]) for debt in server.get_debts_rpc()]
    assert found == [("drawdown", "in_doubt", False), ("challenge_period", "owed", True)]
    assert server.begin_slash_rpc("a", "two") is True
    # Each is settled alone.
    with pytest.raises(ValueError, match=r"a has 2 slashes .*rule 'drawdown', registration 0; rule 'chall"):
        server.resolve_slash_rpc("a", made=True)
    assert server.resolve_slash_rpc("a", made=True, rule="drawdown") is True
    assert [debt["rule"] for debt in server.get_debts_rpc()] == ["challenge_period"]
    assert server.settle_debt_rpc("a", SLASH, "two") is True
    assert {made["rule"] for made in server.get_slashes_rpc()} == {"drawdown", "challenge_period"}


def test_reason_and_share_are_those_of_the_first_moment(server):
    eliminate(server, kinds=[SLASH], rule="drawdown", share=0.5)
    server.remove_elimination_rpc("a")
    other = row("a", reason="LIQUIDATED")
    server.eliminate_rpc("a", other, [SLASH], None, "drawdown", 1.0)
    assert (slash(server)["reason"], slash(server)["share"], slash(server)["share_asked"]) == ("ZOMBIE", 0.5, True)
    make_slash(server)
    (made,) = server.get_slashes_rpc()
    assert (made["reason"], made["share"]) == ("ZOMBIE", 0.5)
    assert told(server, "owe")[0] == ("owe", "slash (drawdown) for ZOMBIE: share 0.5")


def test_a_slash_that_was_declined_is_settled_and_on_record(server):
    eliminate(server, kinds=[SLASH], rule="drawdown")
    server.begin_slash_rpc("a", "one")
    assert server.settle_debt_rpc("a", SLASH, "one", declined=True, answer="bool False") is True
    assert server.get_debts_rpc() == []
    (declined,) = server.get_slashes_rpc()
    assert (declined["outcome"], declined["answer"]) == ("declined", "bool False")
    note = "slash (drawdown), attempt one, declined; the contract answered bool False"
    assert told(server, "settle") == [("settle", note)]
    server.remove_elimination_rpc("a")
    eliminate(server, kinds=[SLASH], rule="drawdown")
    assert told(server, "owe")[-1] == ("owe", "slash (declined before)")


@pytest.mark.parametrize("late", ["made", "declined", "not made"])
def test_a_late_answer_settles_the_doubt(server, late):
    eliminate(server, kinds=[SLASH])
    server.begin_slash_rpc("a", "one")
    server.doubt_slash_rpc("a", "one", "its process is gone")
    if late == "not made":
        assert server.fail_debt_rpc("a", SLASH, "refused", "one") is True
        assert (slash(server)["state"], slash(server)["in_doubt_since_ms"]) == ("owed", None)
        assert server.begin_slash_rpc("a", "two") is True
    else:
        assert server.settle_debt_rpc("a", SLASH, "one", declined=late == "declined") is True
        assert server.get_debts_rpc() == []
        assert [made["outcome"] for made in server.get_slashes_rpc()] == [late]


def test_rearmed_he_can_be_slashed_once_more(server):
    for rule in ("drawdown", "perf_ledger"):
        eliminate(server, kinds=[SLASH], rule=rule)
        make_slash(server)
        server.remove_elimination_rpc("a")
    assert server.rearm_slash_rpc("a", "drawdown") is True
    assert server.rearm_slash_rpc("a", "drawdown") is False
    assert server.rearm_slash_rpc("unknown") is False
    assert [made["rule"] for made in server.get_slashes_rpc()] == ["perf_ledger"]
    assert told(server, "rearm") == [
        ("rearm", "slash (drawdown): may be slashed for it once more; made by contract")
    ]
    eliminate(server, kinds=[SLASH], rule="drawdown")
    make_slash(server)
    assert server.rearm_slash_rpc("a") is True
    assert server.get_slashes_rpc() == []


def test_a_slash_of_one_miner_is_not_anothers(server):
    eliminate(server)
    make_slash(server)
    eliminate(server, "b")
    assert slash(server, "b")["state"] == "owed"


def test_a_slash_that_was_made_is_known_after_a_restart(tmp_path):
    with EliminationManagerServer(None, tmp_path, durability="process") as server:
        eliminate(server, kinds=[SLASH])
        make_slash(server)
        server.remove_elimination_rpc("a")
        before = server.get_slashes_rpc()
    with EliminationManagerServer(None, tmp_path, durability="process") as server:
        assert server.get_slashes_rpc() == before
        eliminate(server, kinds=[SLASH])
        assert server.get_debts_rpc() == []
        assert told(server)[-1] == ("owe", "slash (made before)")


def test_a_slash_that_stood_for_two_eliminations_is_on_record_with_the_later(server):
    eliminate(server)
    server.begin_slash_rpc("a", "one")
    server.remove_elimination_rpc("a")
    eliminate(server, stamp=1000)
    assert slash(server)["eliminated_ms"] == ELIMINATED_MS + 1000
    assert server.settle_debt_rpc("a", SLASH, "one")
    assert slashes(server) == [("a", 1000, "contract")]


@pytest.mark.parametrize("time_ms", [-(1 << 63), (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_any_time_that_a_record_may_have(server, time_ms):
    record = row("a") | {"elimination_initiated_time_ms": time_ms}
    assert server.eliminate_rpc("a", record, [SLASH]) == "added"
    make_slash(server)
    server.remove_elimination_rpc("a")
    assert server.eliminate_rpc("a", record, [SLASH]) == "added"
    assert server.get_debts_rpc() == []


def test_the_store_takes_no_other_teller():
    db = sqlite3.connect(":memory:")
    for statement in schema._CAUSES:
        db.execute(statement)
    with pytest.raises(sqlite3.IntegrityError, match="said_by"):
        db.execute("INSERT INTO slashes VALUES ('a', '', 0, 1, 1, 'hearsay', 'made', NULL, NULL, NULL)")
    db.close()
