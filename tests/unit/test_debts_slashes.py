"""Slashes, on a server without processes: attempts, what was made stays on record, how many an hour are made."""

import contextlib
import itertools
import os
import sqlite3
import time

import pytest
from owing import ELIMINATED_MS, a_server, due, eliminate, owed, slash, slashes, told
from serving import row

from shmelim import EliminationManagerServer
from shmelim.eliminations.debts.states import (
    KINDS,
    LIMIT_ORDERS,
    POSITIONS,
    SLASH,
    new_attempt,
)
from shmelim.eliminations.state import leases
from shmelim.eliminations.store import schema
from shmelim.shm import SharedNamespace


@pytest.fixture(params=["memory", "disk"])
def server(request, tmp_path):
    with a_server(request.param, tmp_path) as server:
        yield server


# ------------------------------------------------------------------ attempts


class Clock:
    """The monotonic clock of leases."""

    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(leases, "monotonic", clock)
    return clock


@pytest.fixture
def leasing(clock, new_name, tmp_path):
    """Starts servers of one state, whose leases last 30 s; nothing else keeps time by that clock."""

    @contextlib.contextmanager
    def start():
        namespace = SharedNamespace(new_name())
        with EliminationManagerServer(namespace, tmp_path / "state", durability="process") as server:
            yield server

    return start


def test_each_attempt_has_a_token_of_its_own():
    assert len({new_attempt() for _ in range(100)}) == 100


def test_an_attempt_lives_as_long_as_it_is_renewed(leasing, clock):
    with leasing() as server:
        eliminate(server, kinds=[SLASH])
        assert server.begin_slash_rpc("a", "one")
        for _ in range(3):
            clock.now += 29
            assert server.doubt_slash_rpc("a", "one", "not heard of") is False
            for made in (True, False):
                assert server.resolve_slash_rpc("a", made=made) is False, "it may be making it right now"
            assert slash(server)["under_way"] is True
            assert server.renew_slash_rpc("a", "one") is True
        clock.now += 30
        assert slash(server)["under_way"] is False
        assert server.doubt_slash_rpc("a", "one", "not heard of") is True
        assert slash(server)["state"] == "in_doubt"


def test_whether_an_attempt_lives_is_not_read_from_process_ids(leasing, clock):
    """One of a process that is not there, as far as can be seen from here, in another pid namespace perhaps."""
    with leasing() as server:
        eliminate(server, kinds=[SLASH])
        assert server.begin_slash_rpc("a", f"{2**22}-1-x.1")
        assert server.resolve_slash_rpc("a", made=False) is False
        clock.now += 30
        assert server.resolve_slash_rpc("a", made=False) is True
        assert slash(server)["state"] == "owed"


def test_after_a_restart_each_attempt_has_one_lease_to_be_heard_of_again(leasing, clock):
    with leasing() as server:
        for hotkey in ("a", "b"):
            eliminate(server, hotkey, kinds=[SLASH])
            assert server.begin_slash_rpc(hotkey, f"of {hotkey}")
    clock.now += 1000
    with leasing() as server:
        clock.now += 29
        assert server.renew_slash_rpc("b", "of b") is True
        clock.now += 1
        assert server.doubt_slash_rpc("a", "of a", "not heard of") is True
        assert server.doubt_slash_rpc("b", "of b", "not heard of") is False


def test_one_that_was_not_heard_of_for_a_while_is_not_declared_unmade_once_it_is(leasing, clock):
    with leasing() as server:
        eliminate(server, kinds=[SLASH])
        assert server.begin_slash_rpc("a", "one")
        clock.now += 30
        assert server.doubt_slash_rpc("a", "one", "not heard of") is True
        assert server.renew_slash_rpc("a", "one") is True
        assert server.resolve_slash_rpc("a", made=False) is False
        assert server.resolve_slash_rpc("a", made=True) is False, "it may still end in SlashNotMadeError"
        assert server.settle_debt_rpc("a", SLASH, "one") is True
        assert server.renew_slash_rpc("a", "one") is False, "it is over"


def test_a_doubt_that_the_contract_left_can_be_resolved_at_once(leasing):
    with leasing() as server:
        eliminate(server, kinds=[SLASH])
        assert server.begin_slash_rpc("a", "one")
        assert server.fail_debt_rpc("a", SLASH, "timeout", "one", in_doubt=True)
        assert server.resolve_slash_rpc("a", made=False) is True


@pytest.mark.parametrize("declined", [False, True])
def test_a_late_answer_counts_though_a_person_took_it_for_not_made(server, declined):
    """Else the next tick would take the collateral a second time."""
    eliminate(server, kinds=[SLASH])
    server.begin_slash_rpc("a", "one")
    server.doubt_slash_rpc("a", "one", "not heard of")
    assert server.resolve_slash_rpc("a", made=False) is True
    assert server.settle_debt_rpc("a", SLASH, "one", declined=declined) is True
    assert server.get_debts_rpc() == []
    assert server.begin_slash_rpc("a", "two") is False
    (made,) = server.get_slashes_rpc("a")
    assert (made["by"], made["outcome"]) == ("contract", "declined" if declined else "made")


def test_a_late_answer_does_not_settle_what_the_next_attempt_has_begun(server):
    eliminate(server, kinds=[SLASH])
    server.begin_slash_rpc("a", "one")
    server.doubt_slash_rpc("a", "one", "not heard of")
    server.resolve_slash_rpc("a", made=False)
    assert server.begin_slash_rpc("a", "two") is True
    assert server.settle_debt_rpc("a", SLASH, "one") is False
    assert slash(server)["attempt"] == "two"


# ------------------------------------------------------------------ slashes


def test_a_slash_belongs_to_one_attempt(server):
    eliminate(server)
    assert server.begin_slash_rpc("a", "one") is True
    assert server.begin_slash_rpc("a", "one") is True
    assert server.begin_slash_rpc("a", "two") is False
    assert (slash(server)["state"], slash(server)["attempt"]) == ("attempting", "one")
    for refused in ("two", None):
        assert server.settle_debt_rpc("a", SLASH, refused) is False
        assert server.fail_debt_rpc("a", SLASH, "error", refused) is False
    assert server.doubt_slash_rpc("a", "two", "error") is False
    assert (slash(server)["state"], slash(server)["attempts"]) == ("attempting", 0)
    assert server.settle_debt_rpc("a", SLASH, "one") is True
    assert server.begin_slash_rpc("a", "one") is False
    assert server.begin_slash_rpc("a", "two") is False
    assert told(server, "begin", "settle") == [("begin", "slash, attempt one"), ("settle", "slash, attempt one")]


def test_a_slash_that_is_only_owed_cannot_be_settled(server):
    eliminate(server)
    assert server.settle_debt_rpc("a", SLASH) is False
    assert server.settle_debt_rpc("a", SLASH, "one") is False
    assert slash(server)["state"] == "owed"


def test_a_slash_can_fail_before_it_is_begun(server):
    eliminate(server)
    assert server.fail_debt_rpc("a", SLASH, "no contract manager") is True
    assert (slash(server)["state"], slash(server)["error"]) == ("owed", "no contract manager")


def test_a_slash_that_was_certainly_not_made_is_owed_again(server):
    eliminate(server)
    assert server.begin_slash_rpc("a", "one")
    assert server.fail_debt_rpc("a", SLASH, "chain refused", "one") is True
    debt = slash(server)
    assert (debt["state"], debt["attempt"], debt["attempts"], debt["error"]) == ("owed", None, 1, "chain refused")
    assert server.begin_slash_rpc("a", "one") is False, "an attempt that ended came back"
    assert server.begin_slash_rpc("a", "two") is True
    assert server.settle_debt_rpc("a", SLASH, "two") is True
    assert told(server, "settle") == [("settle", "slash, attempt two, after 1 failures")]


@pytest.mark.parametrize("how", ["fail", "doubt"])
def test_a_slash_in_doubt_is_nobodys(server, how):
    eliminate(server)
    server.begin_slash_rpc("a", "one")
    if how == "fail":
        assert server.fail_debt_rpc("a", SLASH, "timeout", "one", in_doubt=True) is True
    else:
        assert server.doubt_slash_rpc("a", "one", "timeout") is True
    debt = slash(server)
    assert (debt["state"], debt["attempt"], debt["attempts"], debt["error"]) == ("in_doubt", "one", 1, "timeout")
    assert debt["in_doubt_since_ms"] >= debt["since_ms"]
    for attempt in ("one", "two"):
        assert server.begin_slash_rpc("a", attempt) is False
        assert server.doubt_slash_rpc("a", attempt, "again") is False
    assert server.settle_debt_rpc("a", SLASH, "two") is False
    assert server.fail_debt_rpc("a", SLASH, "again", "two") is False
    assert server.fail_debt_rpc("a", SLASH, "again") is False
    assert slash(server) == debt
    assert told(server, "doubt") == [("doubt", "slash, attempt one: timeout")]


def test_resolved_as_made(server):
    eliminate(server, kinds=[SLASH])
    server.begin_slash_rpc("a", "one")
    server.doubt_slash_rpc("a", "one", "timeout")
    assert server.resolve_slash_rpc("a", made=True) is True
    assert server.get_debts_rpc() == []
    assert server.resolve_slash_rpc("a", made=True) is False
    assert told(server, "resolve") == [("resolve", "slash, attempt one: made")]
    (event,) = [event for event in server.get_history_rpc("a") if event["action"] == "resolve"]
    assert event["pid"] == os.getpid()


def test_resolved_as_not_made(server):
    eliminate(server, kinds=[SLASH])
    server.begin_slash_rpc("a", "one")
    server.doubt_slash_rpc("a", "one", "timeout")
    assert server.resolve_slash_rpc("a", made=False) is True
    debt = slash(server)
    assert (debt["state"], debt["in_doubt_since_ms"]) == ("owed", None)
    assert server.resolve_slash_rpc("a", made=False) is False
    assert server.begin_slash_rpc("a", "one") is False
    assert server.begin_slash_rpc("a", "two") is True
    assert told(server, "resolve") == [("resolve", "slash, attempt one: not made")]


def test_attempts_that_are_refused_each_time_do_not_flood_the_history(server):
    eliminate(server, kinds=[SLASH])
    for number in range(1, 21):
        assert server.begin_slash_rpc("a", f"t{number}")
        assert server.fail_debt_rpc("a", SLASH, "not now", f"t{number}")
    begun = [note for _, note in told(server, "begin")]
    assert begun == [f"slash, attempt t{n}" for n in (1, 2, 4, 8, 16)]
    assert [note.split(":")[0] for _, note in told(server, "fail")] == begun


# ------------------------------------------------------------------ a slash that was made


def make_slash(server, hotkey="a", how="contract"):
    assert server.begin_slash_rpc(hotkey, "one")
    if how == "contract":
        assert server.settle_debt_rpc(hotkey, SLASH, "one")
    else:
        assert server.doubt_slash_rpc(hotkey, "one", "timeout")
        assert server.resolve_slash_rpc(hotkey, made=True)


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


def leave_and_return(server, *hotkeys):
    server.update_metagraph_rpc(["other", *hotkeys])
    server.update_metagraph_rpc(["other"])
    server.update_metagraph_rpc(["other", *hotkeys])


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


# ------------------------------------------------------------------ held


HOUR = 3_600_000


def begin(server, number, at_ms, most=3):
    return server.begin_slash_rpc(f"h{number}", f"t{number}", at_ms=at_ms, most_per_hour=most)


@pytest.fixture
def many(server):
    """A server with ten miners who owe a slash."""
    for number in range(10):
        eliminate(server, f"h{number}", [SLASH])
    return server


def test_one_too_many_within_an_hour_holds_all(many):
    assert [begin(many, number, number) for number in range(5)] == [True, True, True, False, False]
    held = many.get_money_held_rpc()
    assert held["why"].startswith("3 slashes within an hour")
    assert "money_held" in {problem["name"] for problem in many.health_check_rpc()["problems"]}
    assert begin(many, 3, 5 * HOUR) is False, "time alone releases nothing"
    assert many.settle_debt_rpc("h0", SLASH, "t0") is True, "those under way end as ever"


def test_released_all_that_were_owed_may_be_made_and_later_ones_count_anew(many):
    for number in range(4):
        begin(many, number, 0)
    assert many.release_money_rpc() is True
    assert many.get_money_held_rpc() is None
    assert all(begin(many, number, 0) for number in range(3, 10))
    eliminate(many, "h10", [SLASH])
    assert begin(many, 10, 0) is False
    assert many.get_money_held_rpc() is not None


def test_what_becomes_owed_once_the_released_are_settled_counts_anew(many):
    for number in range(4):
        begin(many, number, 0)
    assert many.release_money_rpc()
    for number in range(3, 10):
        assert begin(many, number, 0)
    for number in range(10):
        assert many.settle_debt_rpc(f"h{number}", SLASH, f"t{number}")
    eliminate(many, "h10", [SLASH])
    assert begin(many, 10, 0) is False


def test_an_hour_later_slashes_go_on_unheld(many):
    assert all(begin(many, number, number * HOUR // 2) for number in range(10))
    assert many.get_money_held_rpc() is None


@pytest.mark.parametrize("leap", [72 * HOUR, -72 * HOUR])
def test_a_clock_that_leaps_for_a_moment_makes_no_room_for_more(many, leap):
    now = 1000 * HOUR
    assert [begin(many, number, now) for number in range(2)] == [True, True]
    assert begin(many, 2, now + leap)
    assert [begin(many, number, now) for number in range(3, 6)] == [False, False, False]
    assert many.get_money_held_rpc() is not None


def test_what_was_certainly_not_made_does_not_count(many):
    for number in range(10):
        assert begin(many, number, 0)
        assert many.fail_debt_rpc(f"h{number}", SLASH, "refused", f"t{number}")
    assert many.get_money_held_rpc() is None


def test_without_a_limit_nothing_is_held(many):
    assert all(begin(many, number, 0, None) for number in range(10))


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


@pytest.mark.parametrize("lease_s", [0, 30])
def test_health_tells_of_an_attempt_whose_process_is_not_heard_of_though_nobody_ticks(lease_s):
    """The next tick, which finds the doubt, may be minutes away, or never come."""
    with EliminationManagerServer(slash_lease_s=lease_s) as server:
        eliminate(server, kinds=[SLASH])
        server.begin_slash_rpc("a", "one")
        names = [problem["name"] for problem in server.health_check_rpc()["problems"]]
        assert names == ([] if lease_s else ["slashes_in_doubt"])
        assert server.resolve_slash_rpc("a", made=True) is (lease_s == 0)


# ------------------------------------------------------------------ what a person's word means for money


@pytest.mark.parametrize(
    ("reason", "is_due"),
    [
        ("MAX_TOTAL_DRAWDOWN", True),
        ("LIQUIDATED", False),
        ("PLAGIARISM", False),
        ("ZOMBIE", False),
        ("in words of his own", True),
    ],
)
def test_a_slash_that_rests_is_not_made_for_another_rules_elimination(server, reason, is_due):
    server.eliminate_rpc("a", row("a", reason="MAX_TOTAL_DRAWDOWN"), [SLASH], None, "drawdown")
    server.remove_elimination_rpc("a")
    server.add_elimination_rpc("a", {**row("a"), "reason": reason})
    assert due(server, "a") == [is_due]
    assert server.begin_slash_rpc("a", "one") is is_due


def test_a_release_frees_what_is_due_and_later_ones_count_anew(server):
    for n in range(4):
        eliminate(server, f"rests {n}", kinds=[SLASH], rule="drawdown")
    server.sync_eliminations_rpc([])
    for n in range(3):
        eliminate(server, f"due {n}", kinds=[SLASH], rule="drawdown")

    def begin(hotkey):
        return server.begin_slash_rpc(hotkey, f"of {hotkey}", most_per_hour=2)

    assert [begin(f"due {n}") for n in range(3)] == [True, True, False]
    assert server.release_money_rpc() is True
    server.sync_eliminations_rpc([row(f"due {n}") for n in range(3)] + [row(f"rests {n}") for n in range(4)])
    assert begin("due 2") is True
    assert [begin(f"rests {n}") for n in range(4)] == [True, False, False, False], (
        "the one that was released counts"
    )


def test_what_was_declined_counts_for_no_hour(server):
    """A contract that is not the mothership's takes nothing, of however many."""
    for number in range(4):
        eliminate(server, f"m{number}", kinds=[SLASH])
        assert server.begin_slash_rpc(f"m{number}", f"t{number}", most_per_hour=2) is True
        server.settle_debt_rpc(f"m{number}", SLASH, f"t{number}", declined=True)
    assert server.get_money_held_rpc() is None


@pytest.mark.parametrize(("made", "again"), [(True, False), (False, True)])
def test_a_slash_owed_since_a_return_that_was_none_counts_for_the_registration_before(server, made, again):
    server.update_metagraph_rpc(["a", "b"])
    if made:
        eliminate(server, kinds=[SLASH], rule="drawdown")
        make_slash(server)
    server.update_metagraph_rpc(["b"])
    server.update_metagraph_rpc(["a", "b"])
    server.sync_eliminations_rpc([])
    eliminate(server, kinds=[SLASH], rule="drawdown", stamp=5)
    assert slash(server)["registration"] == 1
    assert server.undo_departures_rpc(["a"]) == ["a"]
    assert [debt["registration"] for debt in server.get_debts_rpc()] == ([] if made else [0])
    assert server.begin_slash_rpc("a", "two") is again


def test_what_the_attempt_itself_says_is_kept_though_it_was_in_doubt_before(server):
    eliminate(server, kinds=[SLASH])
    server.begin_slash_rpc("a", "one")
    server.doubt_slash_rpc("a", "one", "not heard of")
    assert server.fail_debt_rpc("a", SLASH, "the chain answered nothing", "one", in_doubt=True) is False
    assert (slash(server)["state"], slash(server)["error"]) == ("in_doubt", "the chain answered nothing")
    assert server.doubt_slash_rpc("a", "one", "not heard of") is False
    assert slash(server)["error"] == "the chain answered nothing"


@pytest.mark.parametrize("wrongly", ["by the rule", "by hand"])
def test_a_rollback_that_exchanges_an_elimination_exchanges_what_is_due(server, wrongly):
    """The slash of what is undone rests, and that of what stands again is due; no debt is made or unmade."""
    ruled, by_hand = row("a", reason="MAX_TOTAL_DRAWDOWN"), row("a", 5, reason="PLAGIARISM")

    def eliminate_by_rule():
        server.eliminate_rpc("a", ruled, [SLASH], None, "drawdown")

    def eliminate_by_hand():
        server.add_elimination_rpc("a", by_hand)

    first, then = eliminate_by_hand, eliminate_by_rule
    if wrongly == "by hand":
        first, then = then, first
    first()
    before = server.get_history_rpc(limit=1)[0]["id"]
    server.delete_eliminations_rpc(["a"])
    then()
    debts = owed(server)
    server.rollback_rpc(before)
    assert server.get_elimination_rpc("a")["reason"] == (
        "PLAGIARISM" if wrongly == "by the rule" else ruled["reason"]
    )
    assert owed(server) == debts
    assert due(server, "a") == [wrongly == "by hand"]
    assert server.begin_slash_rpc("a", "one", "drawdown") is (wrongly == "by hand")


def test_a_rollback_makes_no_debt(server):
    eliminate(server, kinds=[POSITIONS], rule="drawdown")
    server.settle_debt_rpc("a", POSITIONS)
    before = server.get_history_rpc(limit=1)[0]["id"]
    server.sync_eliminations_rpc([])
    server.rollback_rpc(before)
    assert owed(server) == []
