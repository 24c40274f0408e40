"""Attempts at a slash, on a server without processes: how long one lives, and how it ends."""

import contextlib
import os

import pytest
from owing import eliminate, slash, told

from shmelim import EliminationManagerServer
from shmelim.eliminations.debts.states import (
    SLASH,
    new_attempt,
)
from shmelim.eliminations.state import leases
from shmelim.shm import SharedNamespace

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


@pytest.mark.parametrize("lease_s", [0, 30])
def test_health_tells_of_an_attempt_whose_process_is_not_heard_of_though_nobody_ticks(lease_s):
    """The next tick, which finds the doubt, may be minutes away, or never come."""
    with EliminationManagerServer(slash_lease_s=lease_s) as server:
        eliminate(server, kinds=[SLASH])
        server.begin_slash_rpc("a", "one")
        names = [problem["name"] for problem in server.health_check_rpc()["problems"]]
        assert names == ([] if lease_s else ["slashes_in_doubt"])
        assert server.resolve_slash_rpc("a", made=True) is (lease_s == 0)
