"""How many slashes an hour are made, on a server without processes, and what a person's word means for them."""

import pytest
from owing import due, eliminate, make_slash, owed, slash
from serving import row

from shmelim.eliminations.debts.states import (
    POSITIONS,
    SLASH,
)

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
