"""A departure that was none is undone, and money does not take it for a new registration."""

from __future__ import annotations

import pytest
from serving import row

from shmelim import EliminationManagerServer


@pytest.fixture
def server():
    with EliminationManagerServer() as server:
        server.update_metagraph_rpc(["a", "b"])
        server.update_metagraph_rpc(["b"])
        yield server


def eliminate(server, hotkey="a"):
    record = row(hotkey, reason="MAX_TOTAL_DRAWDOWN")
    return server.eliminate_rpc(hotkey, record, ["slash"], rule="drawdown", share=0.5)


def slash(server, hotkey="a"):
    assert server.begin_slash_rpc(hotkey, "token", "drawdown")
    assert server.settle_debt_rpc(hotkey, "slash", "token")


def owed(server, hotkey="a"):
    return [debt["rule"] for debt in server.get_debts_rpc(hotkey)]


def test_it_is_forgotten_and_the_history_says_so(server):
    assert server.undo_departures_rpc(["a", "b", "nobody"]) == ["a"]
    assert server.get_departed_hotkeys_rpc() == {}
    event = server.get_history_rpc(limit=1)[0]
    assert (event["action"], event["hotkey"], event["note"]) == ("forget", "a", "the departure was none")
    assert server.undo_departures_rpc(["a"]) == []


def test_who_came_back_is_not_re_registered(server):
    server.update_metagraph_rpc(["a", "b"])
    assert server.is_hotkey_re_registered_rpc("a")
    server.undo_departures_rpc(["a"])
    assert not server.is_hotkey_re_registered_rpc("a")


@pytest.mark.parametrize("is_undone", [True, False])
def test_he_is_slashed_again_only_for_a_departure_that_was_one(is_undone):
    with EliminationManagerServer() as server:
        server.update_metagraph_rpc(["a", "b"])
        eliminate(server)
        slash(server)
        server.update_metagraph_rpc(["b"])
        server.update_metagraph_rpc(["a", "b"])
        if is_undone:
            server.undo_departures_rpc(["a"])
        server.sync_eliminations_rpc([])
        eliminate(server)
        assert owed(server) == ([] if is_undone else ["drawdown"])


def test_what_was_slashed_since_his_return_stays_of_that_registration(server):
    server.update_metagraph_rpc(["a", "b"])
    eliminate(server)
    slash(server)
    server.undo_departures_rpc(["a"])
    server.sync_eliminations_rpc([])
    eliminate(server)
    assert owed(server) == []


def leave_and_return(server):
    server.update_metagraph_rpc(["b"])
    server.update_metagraph_rpc(["a", "b"])


def is_due(server):
    return [(debt["registration"], debt["due"]) for debt in server.get_debts_rpc("a")]


def test_what_rested_over_a_return_that_was_none_is_due_when_he_is_eliminated_again(server):
    server.update_metagraph_rpc(["a", "b"])
    eliminate(server)
    server.sync_eliminations_rpc([])
    leave_and_return(server)
    server.undo_departures_rpc(["a"])
    server.sync_eliminations_rpc([row("a", 5, reason="MAX_TOTAL_DRAWDOWN")])
    assert is_due(server) == [(0, True)]


@pytest.mark.parametrize("state", ["owed", "in_doubt"])
def test_a_slash_owed_before_and_since_stands_for_both_and_is_due(state):
    with EliminationManagerServer() as server:
        server.update_metagraph_rpc(["a", "b"])
        eliminate(server)
        if state == "in_doubt":
            server.begin_slash_rpc("a", "one")
            server.fail_debt_rpc("a", "slash", "timeout", "one", in_doubt=True)
        leave_and_return(server)
        server.remove_elimination_rpc("a")
        eliminate(server)
        assert is_due(server) == [(0, False), (1, True)]
        server.undo_departures_rpc(["a"])
        assert is_due(server) == [(0, True)]
        if state == "in_doubt":
            server.resolve_slash_rpc("a", made=False)
        slash(server)


@pytest.mark.parametrize("is_away", [False, True])
def test_one_that_was_seen_away_twice_has_not_come_back_either(is_away):
    with EliminationManagerServer() as server:
        server.update_metagraph_rpc(["a", "b"])
        eliminate(server)
        slash(server)
        leave_and_return(server)
        leave_and_return(server)
        if is_away:
            server.update_metagraph_rpc(["b"])
        server.undo_departures_rpc(["a"])
        server.update_metagraph_rpc(["a", "b"])
        server.remove_elimination_rpc("a")
        eliminate(server)
        assert owed(server) == []


@pytest.mark.parametrize("again", [False, True])
def test_who_only_a_wrong_look_showed_has_not_come_back(again):
    """The next look, which does not show him, corrects it; and counts him once he does come."""
    crowd = [f"m{number}" for number in range(40)]
    with EliminationManagerServer() as server:
        server.update_metagraph_rpc([*crowd, "a"])
        eliminate(server)
        slash(server)
        server.update_metagraph_rpc(crowd)
        server.update_metagraph_rpc([*crowd[:5], "a"])
        assert server.get_missing_hotkeys_rpc() == sorted(crowd[5:])
        server.update_metagraph_rpc(crowd)
        if again:
            server.update_metagraph_rpc([*crowd, "a"])
        server.remove_elimination_rpc("a")
        eliminate(server)
        assert is_due(server) == ([(1, True)] if again else [])


def test_who_is_first_seen_in_a_wrong_look_has_come_back_if_he_stays():
    crowd = [f"m{number}" for number in range(40)]
    with EliminationManagerServer() as server:
        for hotkeys in ([*crowd, "a"], crowd, [*crowd[:5], "a"], [*crowd[:9], "a"], [*crowd, "a"], [*crowd, "a"]):
            server.update_metagraph_rpc(hotkeys)
        eliminate(server)
        assert is_due(server) == [(1, True)]


@pytest.mark.parametrize("is_due", [True, False])
def test_a_late_answer_counts_also_where_two_slashes_became_one(server, is_due):
    """A person took it for not made; it would be made once more."""
    eliminate(server)
    server.sync_eliminations_rpc([])
    leave_and_return(server)
    eliminate(server)
    assert server.begin_slash_rpc("a", "late", "drawdown", 1)
    assert server.fail_debt_rpc("a", "slash", "timeout", "late", in_doubt=True)
    assert server.resolve_slash_rpc("a", made=False)
    if not is_due:
        server.sync_eliminations_rpc([])
    server.undo_departures_rpc(["a"])
    assert server.settle_debt_rpc("a", "slash", "late")
    assert owed(server) == []


@pytest.mark.parametrize("is_slashed", [True, False])
@pytest.mark.parametrize("by_hand", [True, False])
def test_a_return_since_which_a_slash_was_begun_is_undone_once_that_took_nothing(server, is_slashed, by_hand):
    """Whoever undid the departure before he said so had him slashed twice."""
    if is_slashed:
        eliminate(server)
        slash(server)
        server.sync_eliminations_rpc([])
    server.update_metagraph_rpc(["a", "b"])
    eliminate(server)
    assert server.begin_slash_rpc("a", "second", "drawdown")
    assert server.fail_debt_rpc("a", "slash", "timeout", "second", in_doubt=True)
    server.undo_departures_rpc(["a"])
    if by_hand:
        assert server.resolve_slash_rpc("a", made=False)
    else:
        assert server.fail_debt_rpc("a", "slash", "late", "second", in_doubt=False) is True
    assert is_due(server) == ([] if is_slashed else [(0, True)])


@pytest.mark.parametrize("is_eliminated", [True, False])
@pytest.mark.parametrize("is_away", [True, False])
def test_who_was_slashed_for_another_rule_since_is_slashed_no_second_time_for_the_first(
    server, is_eliminated, is_away
):
    """The return stays counted, as a slash is on record for it; but it was none."""
    eliminate(server)
    slash(server)
    server.sync_eliminations_rpc([])
    server.update_metagraph_rpc(["a", "b"])
    server.eliminate_rpc("a", row("a", reason="LIQUIDATED"), ["slash"], rule="perf_ledger", share=0.5)
    assert server.begin_slash_rpc("a", "other", "perf_ledger")
    assert server.settle_debt_rpc("a", "slash", "other")
    server.sync_eliminations_rpc([])
    if is_eliminated:
        eliminate(server)
    server.undo_departures_rpc(["a"])
    server.sync_eliminations_rpc([])
    eliminate(server)
    assert owed(server) == []
    if is_away:
        leave_and_return(server)
        server.sync_eliminations_rpc([])
        eliminate(server)
        assert owed(server) == ["drawdown"]


def test_a_wrong_look_leaves_a_return_that_was_undone_before_one_with_the_registration_before():
    crowd = [f"m{number}" for number in range(40)]
    with EliminationManagerServer() as server:
        server.update_metagraph_rpc([*crowd, "a"])
        eliminate(server)
        slash(server)
        server.sync_eliminations_rpc([])
        server.update_metagraph_rpc(crowd)
        server.update_metagraph_rpc([*crowd, "a"])
        server.eliminate_rpc("a", row("a", reason="LIQUIDATED"), ["slash"], rule="perf_ledger", share=0.5)
        assert server.begin_slash_rpc("a", "other", "perf_ledger")
        assert server.settle_debt_rpc("a", "slash", "other")
        server.undo_departures_rpc(["a"])
        server.update_metagraph_rpc(crowd)
        server.update_metagraph_rpc([*crowd[:5], "a"])
        server.update_metagraph_rpc(crowd)
        server.sync_eliminations_rpc([])
        eliminate(server)
        assert owed(server) == []


def test_a_return_that_was_one_is_not_undone_by_an_attempt_that_takes_nothing(server):
    server.update_metagraph_rpc(["a", "b"])
    eliminate(server)
    assert server.begin_slash_rpc("a", "one", "drawdown")
    server.undo_departures_rpc(["a"])
    assert server.fail_debt_rpc("a", "slash", "not now", "one")
    assert is_due(server) == [(0, True)]
    slash(server)
    leave_and_return(server)
    server.sync_eliminations_rpc([])
    eliminate(server)
    assert server.begin_slash_rpc("a", "two", "drawdown")
    assert server.fail_debt_rpc("a", "slash", "not now", "two")
    assert is_due(server) == [(1, True)]


def eliminate_by(server, rule, time):
    reason = {"drawdown": "MAX_TOTAL_DRAWDOWN", "perf_ledger": "LIQUIDATED"}[rule]
    server.eliminate_rpc("a", row("a", time, reason=reason), ["slash"], rule=rule, share=0.5)


def slash_by(server, rule, time):
    eliminate_by(server, rule, time)
    assert server.begin_slash_rpc("a", f"{rule}-{time}", rule)
    assert server.settle_debt_rpc("a", "slash", f"{rule}-{time}")
    server.remove_elimination_rpc("a")


@pytest.fixture
def present():
    with EliminationManagerServer() as server:
        server.update_metagraph_rpc(["a", "b"])
        yield server


def test_a_slash_two_returns_ago_counts_where_both_were_none(present):
    slash_by(present, "drawdown", 1)
    leave_and_return(present)
    leave_and_return(present)
    slash_by(present, "perf_ledger", 2)
    eliminate_by(present, "drawdown", 3)
    assert owed(present) == ["drawdown"]
    present.undo_departures_rpc(["a"])
    assert owed(present) == []


def test_one_that_rested_and_one_in_doubt_are_one_where_the_return_between_them_was_none(present):
    leave_and_return(present)
    eliminate_by(present, "drawdown", 1)
    present.remove_elimination_rpc("a")
    leave_and_return(present)
    eliminate_by(present, "drawdown", 2)
    assert present.begin_slash_rpc("a", "one", "drawdown", 2)
    assert present.fail_debt_rpc("a", "slash", "timeout", "one", in_doubt=True)
    present.undo_departures_rpc(["a"])
    assert is_due(present) == [(2, True)]
    present.resolve_slash_rpc("a", made=False)
    assert is_due(present) == [(0, True)]


def test_two_that_rested_are_one_also_where_a_later_return_stays_counted(present):
    for time in (1, 2):
        eliminate_by(present, "drawdown", time)
        present.remove_elimination_rpc("a")
        leave_and_return(present)
    slash_by(present, "perf_ledger", 3)
    present.undo_departures_rpc(["a"])
    assert is_due(present) == [(0, False)]
    present.sync_eliminations_rpc([row("a", 2, reason="MAX_TOTAL_DRAWDOWN")])
    assert is_due(present) == [(0, True)]


def test_what_was_not_made_before_he_really_came_back_is_not_owed_twice(present):
    slash_by(present, "drawdown", 1)
    leave_and_return(present)
    eliminate_by(present, "drawdown", 2)
    assert present.begin_slash_rpc("a", "one", "drawdown", 1)
    assert present.fail_debt_rpc("a", "slash", "timeout", "one", in_doubt=True)
    present.undo_departures_rpc(["a"])
    leave_and_return(present)
    present.remove_elimination_rpc("a")
    eliminate_by(present, "drawdown", 3)
    present.resolve_slash_rpc("a", made=False)
    assert is_due(present) == [(2, True)]


def test_a_wrong_look_at_who_has_slashes_of_several_returns_leaves_them_one(present):
    crowd = [f"m{number}" for number in range(40)]
    present.update_metagraph_rpc([*crowd, "a", "b"])
    slash_by(present, "drawdown", 1)
    for _ in range(2):
        present.update_metagraph_rpc(crowd)
        present.update_metagraph_rpc([*crowd, "a"])
    slash_by(present, "perf_ledger", 4)
    present.undo_departures_rpc(["a"])
    present.update_metagraph_rpc(crowd)
    present.update_metagraph_rpc([*crowd[:5], "a"])
    present.update_metagraph_rpc(crowd)
    eliminate_by(present, "drawdown", 5)
    assert owed(present) == []
