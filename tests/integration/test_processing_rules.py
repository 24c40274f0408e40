"""Who is eliminated, when and why: each rule and each of its boundaries, through the manager, in both modes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
from reference_validator import DAY, HOUR, MINUTE, Managed
from reference_validator.trading import Holding

if TYPE_CHECKING:
    from collections.abc import Callable


# ---------------------------------------------------------------------- when a tick is due


def test_tick_runs_only_after_strictly_more_than_the_interval(in_rpc_mode: Managed) -> None:
    validator = in_rpc_mode.validator
    validator.register("a")
    in_rpc_mode.tick()
    last = in_rpc_mode.manager.get_last_update_time_ms()
    assert last == validator.now_ms
    validator.lose("a", 0.2)
    in_rpc_mode.tick(300_000)
    assert in_rpc_mode.reasons == {}
    assert in_rpc_mode.manager.get_last_update_time_ms() == last
    in_rpc_mode.tick(1)
    assert in_rpc_mode.reasons == {"a": "MAX_TOTAL_DRAWDOWN"}


def test_waiting_challenge_reasons_make_a_tick_due_at_once(in_rpc_mode: Managed) -> None:
    in_rpc_mode.validator.register("a")
    in_rpc_mode.tick()
    in_rpc_mode.validator.probation.fail("a", "FAILED_CHALLENGE_PERIOD_TIME", None)
    in_rpc_mode.tick(0)
    assert in_rpc_mode.reasons == {"a": "FAILED_CHALLENGE_PERIOD_TIME"}


def test_direct_mode_ticks_whenever_it_is_asked(directly: Managed) -> None:
    directly.validator.register("a")
    directly.tick(0)
    directly.validator.lose("a", 0.2)
    directly.tick(0)
    assert directly.reasons == {"a": "MAX_TOTAL_DRAWDOWN"}


def test_steps_come_in_their_order(managed: Managed) -> None:
    """Each step has one thing to do that no other step does; what does it says so."""
    validator = managed.validator
    validator.register("expired", "owing", "listed", "liquid", "failed", "down", "zombie")
    validator.probation.fail("expired", "PLAGIARISM", None)
    managed.tick()
    validator.deregister("expired")
    managed.tick(2 * DAY - HOUR)
    for hotkey in ("listed", "liquid", "failed", "down", "zombie"):
        validator.open_position(hotkey)
    row = managed.manager.generate_elimination_row("owing", 0.1, "X", validator.now_ms)
    managed.manager._server_proxy.eliminate_rpc("owing", row, ["limit_orders"])
    managed.manager.append_elimination_row("listed", 0.1, "X", validator.now_ms)
    managed.manager.first_refresh_ran = False
    validator.lose("liquid", 0.7)
    validator.probation.fail("failed", "PLAGIARISM", None)
    validator.lose("down", 0.2)
    validator.deregister("zombie")
    validator.book.store(Holding("old", "expired", "BTC/USD", closed=True))
    validator.faults.passed.clear()
    # What departs is noted where the table shows it, when the next thing happens.
    departed: list[bool] = []
    validator.faults.at(
        "cancel", lambda: departed.append("zombie" in managed.manager.get_departed_hotkeys()), hotkey="owing"
    )
    managed.tick(HOUR)
    did = [hotkey for name, hotkey in validator.faults.passed if name in ("cancel", "store", "drop")]
    assert list(dict.fromkeys(did)) == ["listed", "owing", "liquid", "failed", "down", "zombie", "expired"]
    assert departed == [True]
    assert managed.reasons == {
        "owing": "X",
        "listed": "X",
        "liquid": "LIQUIDATED",
        "failed": "PLAGIARISM",
        "down": "MAX_TOTAL_DRAWDOWN",
        "zombie": "ZOMBIE",
    }


def test_first_rule_that_fits_counts(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a", "b", "c")
    managed.tick()
    for hotkey, share in (("a", 0.6), ("b", 0.2), ("c", 0.2)):
        validator.lose(hotkey, share)
    for hotkey in ("a", "b"):
        validator.probation.fail(hotkey, "PLAGIARISM", None)
    validator.deregister("a", "b", "c")
    managed.tick()
    assert managed.reasons == {"a": "LIQUIDATED", "b": "PLAGIARISM", "c": "MAX_TOTAL_DRAWDOWN"}


def test_clock_that_was_set_back_makes_a_tick_due(in_rpc_mode: Managed) -> None:
    validator = in_rpc_mode.validator
    validator.register("a")
    in_rpc_mode.tick()
    validator.lose("a", 0.2)
    in_rpc_mode.tick(-HOUR)
    assert in_rpc_mode.reasons == {"a": "MAX_TOTAL_DRAWDOWN"}
    assert in_rpc_mode.manager.get_last_update_time_ms() == validator.now_ms
    assert not in_rpc_mode.manager.refresh_allowed(300_000)


# ---------------------------------------------------------------------- first refresh


def test_first_refresh_closes_what_eliminated_miners_hold_once(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a", "b")
    validator.open_position("a")
    validator.open_position("b")
    managed.manager.append_elimination_row("a", 0.2, "PLAGIARISM", validator.now_ms + MINUTE)
    managed.tick()
    assert validator.is_flat("a")
    assert not validator.is_flat("b")
    assert managed.manager.first_refresh_ran
    assert validator.collateral.slashes() == [], "a row from elsewhere owes nothing"
    validator.open_position("a", "ETH/USD")
    managed.tick()
    assert not validator.is_flat("a"), "not a second time"


def test_first_refresh_asks_for_many_at_once_where_it_may(managed: Managed) -> None:
    validator, asked = managed.validator, []
    validator.register("a", "b")
    validator.open_position("a")
    positions: Any = managed.collaborators.position_manager

    def of_many(hotkeys: list[str], only_open_positions: bool = False) -> dict[str, Any]:
        asked.append((hotkeys, only_open_positions))
        others = {"b": [], "somebody": [object()]}
        return {"a": positions.get_positions_for_one_hotkey("a", only_open_positions)} | others

    positions.get_positions_for_hotkeys = of_many
    for hotkey in ("a", "b"):
        managed.manager.append_elimination_row(hotkey, 0.2, "PLAGIARISM")
    managed.tick()
    assert (asked, validator.is_flat("a")) == ([(["a", "b"], True)], True)
    assert managed.manager.first_refresh_ran
    assert managed.alerts == []


def test_first_refresh_that_failed_for_a_miner_comes_again(managed: Managed) -> None:
    validator = managed.validator
    for hotkey in ("a", "b"):
        validator.register(hotkey)
        validator.open_position(hotkey)
        managed.manager.append_elimination_row(hotkey, 0.2, "PLAGIARISM")
    validator.faults.fail("store", hotkey="a")
    managed.tick()
    assert (validator.is_flat("a"), validator.is_flat("b")) == (False, True)
    assert not managed.manager.first_refresh_ran
    managed.tick()
    assert validator.is_flat("a")
    assert managed.manager.first_refresh_ran


# ---------------------------------------------------------------------- perf ledger, challenge period, drawdown


def test_liquidated_miner_keeps_what_its_ledger_says(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a")
    validator.open_position("a")
    validator.limit_orders.place("a")
    validator.pass_time(MINUTE)
    validator.lose("a", 0.7)
    at_ms, prices = validator.now_ms, {pair: validator.prices.at(pair, validator.now_ms) for pair in ("BTC/USD",)}
    managed.tick(HOUR)
    row = managed.manager.get_elimination("a")
    assert row is not None
    assert (row["reason"], row["elimination_initiated_time_ms"]) == ("LIQUIDATED", at_ms)
    assert row["dd"] == pytest.approx(0.7)
    [holding] = validator.book.on_disk("a")
    assert holding.closed
    assert holding.trades[-1].at_ms == at_ms
    assert holding.trades[-1].price == prices["BTC/USD"], "closed at the price of the elimination"
    assert validator.is_flat("a")
    assert validator.collateral.slashes() == ["a"]
    assert validator.websockets.messages == [{"hotkey": "a", "position": holding.id, "closed": True}]
    assert managed.debts == []


def test_failed_challenge_period_is_cleared_once_it_is_recorded(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a", "b")
    validator.open_position("a")
    validator.probation.fail("a", "FAILED_CHALLENGE_PERIOD_DRAWDOWN", 0.12)
    validator.probation.fail("b", "FAILED_CHALLENGE_PERIOD_TIME", None)
    managed.tick()
    assert managed.reasons == {"a": "FAILED_CHALLENGE_PERIOD_DRAWDOWN", "b": "FAILED_CHALLENGE_PERIOD_TIME"}
    assert validator.probation.failed == {}
    assert validator.is_flat("a")
    assert sorted(validator.collateral.slashes()) == ["a", "b"]
    row = managed.manager.get_elimination("a")
    assert row is not None
    assert (row["dd"], row["elimination_initiated_time_ms"]) == (0.12, validator.now_ms)


def test_reason_that_comes_while_others_are_recorded_is_not_cleared(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a", "b")
    validator.probation.fail("a", "PLAGIARISM", None)
    challenge = managed.manager.challengeperiod_manager
    look, looks = challenge.get_all_elimination_reasons, []

    def get_all_elimination_reasons() -> dict[str, Any]:
        found = dict(look())
        if not looks:
            validator.probation.fail("b", "PLAGIARISM", None)
        looks.append(found)
        return found

    challenge.get_all_elimination_reasons = get_all_elimination_reasons
    managed.tick()
    assert set(validator.probation.failed) == {"a", "b"}
    assert managed.reasons == {"a": "PLAGIARISM"}
    managed.tick(0)
    assert validator.probation.failed == {}
    assert managed.reasons == {"a": "PLAGIARISM", "b": "PLAGIARISM"}
    assert validator.collateral.slashes() == ["a", "b"]


@pytest.mark.parametrize("drawdown", [float("nan"), 0.5])
def test_reasons_are_the_same_if_miners_and_reasons_are(directly: Managed, drawdown: float) -> None:
    """Whatever is beside them, which may be equal to nothing, or refuse to say."""
    validator = directly.validator
    validator.register("a")
    challenge = directly.manager.challengeperiod_manager
    challenge.get_all_elimination_reasons = lambda: {
        hotkey: (reason, Unlike(dd)) for hotkey, (reason, dd) in validator.probation.failed.items()
    }
    validator.probation.fail("a", "PLAGIARISM", drawdown)
    directly.tick()
    assert directly.reasons == {"a": "PLAGIARISM"}
    assert validator.probation.failed == {}


class Unlike(float):
    """A number that cannot be compared, as an array cannot be."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth value of an array is ambiguous")

    __hash__ = None  # type: ignore[assignment]


def test_reasons_that_are_recorded_are_popped_where_that_can_be_done(directly: Managed) -> None:
    """A reason that comes between a comparison and a clearing of all would be lost."""
    validator = directly.validator
    validator.register("a", "b", "c")
    failed = validator.probation.failed
    popped: list[list[str]] = []

    def pop(hotkeys: list[str]) -> None:
        popped.append(hotkeys)
        validator.probation.fail("c", "PLAGIARISM", None)
        for hotkey in hotkeys:
            del failed[hotkey]

    directly.manager.challengeperiod_manager.pop_elimination_reasons = pop
    validator.probation.fail("a", "PLAGIARISM", None)
    validator.probation.fail("b" * 256, "PLAGIARISM", None)
    directly.tick()
    assert popped == [["a"]], "the other is not a hotkey"
    assert set(failed) == {"b" * 256, "c"}
    assert validator.faults.count("clear failed") == 0
    directly.tick()
    assert directly.reasons == {"a": "PLAGIARISM", "c": "PLAGIARISM"}


def test_pop_that_a_mock_would_have_is_not_used(directly: Managed) -> None:
    challenge = Mock(spec=["has_elimination_reasons", "get_all_elimination_reasons", "clear_elimination_reasons",
                           "pop_elimination_reasons", "get_hotkeys_by_bucket"])  # fmt: skip
    challenge.has_elimination_reasons.return_value = True
    challenge.get_all_elimination_reasons.return_value = {"a": ("PLAGIARISM", None)}
    challenge.get_hotkeys_by_bucket.return_value = []
    directly.manager.challengeperiod_manager = challenge
    directly.tick()
    challenge.clear_elimination_reasons.assert_called_once_with()
    challenge.pop_elimination_reasons.assert_not_called()


def test_drawdown_of_exactly_10_percent_eliminates(managed: Managed) -> None:
    validator = managed.validator
    validator.register("below", "exact", "above")
    validator.lose("below", 0.0999)
    validator.lose("exact", 0.1)
    validator.lose("above", 0.1001)
    managed.tick()
    assert managed.reasons == dict.fromkeys(("exact", "above"), "MAX_TOTAL_DRAWDOWN")
    row = managed.manager.get_elimination("exact")
    assert row is not None
    assert row["dd"] == pytest.approx(10.0), "a percentage"


def test_drawdown_judges_only_the_bucket_that_is_scored(managed: Managed) -> None:
    managed.validator.register("a", stage="probation")
    managed.validator.lose("a", 0.3)
    managed.tick()
    assert managed.reasons == {}


def test_ledgers_of_others_than_were_asked_for_are_not_judged(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a")
    validator.register("b", stage="probation")
    validator.lose("b", 0.3)
    ledgers = managed.manager.position_manager.perf_ledger_manager
    ledgers.filtered_ledger_for_scoring = lambda **_: validator.ledgers.of(["a", "b"])
    managed.tick()
    assert managed.reasons == {}


@pytest.mark.parametrize("stale", ["a", b"a", None, lambda: {"a"}, 5])
def test_nobody_is_judged_while_nobody_can_say_whose_ledger_is_stale(directly: Managed, stale: Any) -> None:
    validator = directly.validator
    validator.register("a")
    validator.lose("a", 0.3)
    ledgers = directly.manager.position_manager.perf_ledger_manager
    ledgers.perf_ledger_hks_to_invalidate = stale
    directly.tick()
    assert directly.reasons == {}
    [alert] = directly.alerts
    assert "perf_ledger_hks_to_invalidate" in alert
    ledgers.perf_ledger_hks_to_invalidate = iter(())
    directly.tick()
    assert directly.reasons == {"a": "MAX_TOTAL_DRAWDOWN"}


def test_ledger_that_is_being_built_again_is_not_judged(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a")
    validator.lose("a", 0.3)
    validator.ledgers.stale["a"] = validator.now_ms
    managed.tick()
    assert managed.reasons == {}
    validator.ledgers.stale.clear()
    managed.tick()
    assert managed.reasons == {"a": "MAX_TOTAL_DRAWDOWN"}


def test_first_reason_stays(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a")
    validator.lose("a", 0.2)
    managed.tick()
    validator.probation.fail("a", "PLAGIARISM", None)
    validator.lose("a", 0.9)
    managed.tick()
    assert managed.reasons == {"a": "MAX_TOTAL_DRAWDOWN"}
    assert validator.probation.failed == {}
    assert validator.collateral.slashes() == ["a"]


def test_slash_takes_the_share_of_its_reason_or_leaves_it_to_the_contract(make: Callable[..., Managed]) -> None:
    managed = make("direct", slash_proportions={"PLAGIARISM": 1.0})
    managed.validator.register("a", "b")
    managed.validator.probation.fail("a", "PLAGIARISM", None)
    managed.validator.probation.fail("b", "FAILED_CHALLENGE_PERIOD_TIME", None)
    managed.tick()
    assert managed.validator.collateral.taken("a") == [100.0]
    assert managed.validator.collateral.taken("b") == [25.0]


# ---------------------------------------------------------------------- closing positions


@pytest.mark.parametrize(("before", "closed_at"), [(1, 0), (0, 1), (-5, 6)])
def test_flat_order_stands_at_the_elimination_or_1_ms_after_a_later_order(
    managed: Managed, before: int, closed_at: int
) -> None:
    validator = managed.validator
    validator.register("a")
    validator.pass_time(HOUR)
    validator.lose("a", 0.7)
    eliminated = validator.now_ms
    validator.open_position("a", at_ms=eliminated - before)
    managed.tick()
    [holding] = validator.book.on_disk("a")
    assert holding.trades[-1].at_ms == eliminated + closed_at


def test_every_pair_is_closed_and_closed_positions_are_left_alone(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a")
    first = validator.open_position("a", "ETH/USD")
    first.trade(-1.0, 5.0, validator.now_ms + 1)
    validator.book.store(first)
    for pair in ("BTC/USD", "EUR/USD", "ETH/USD"):
        validator.open_position("a", pair)
    validator.lose("a", 0.2)
    managed.tick()
    assert validator.is_flat("a")
    assert [len(holding.trades) for holding in validator.book.on_disk("a")] == [2, 2, 2, 2]
    assert first in validator.book.on_disk("a")


def test_position_is_read_again_under_its_lock(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a")
    holding = validator.open_position("a")
    validator.lose("a", 0.2)

    def order_comes_in() -> None:
        late = validator.book.holding("a", holding.id)
        late.trade(3.0, 1.0, validator.now_ms + 500)
        validator.book.store(late)

    validator.faults.at("lock", order_comes_in)
    managed.tick(0)
    [found] = validator.book.on_disk("a")
    assert [trade.size for trade in found.trades] == [1.0, 3.0, -4.0]
    assert found.trades[-1].at_ms == found.trades[-2].at_ms + 1
    assert validator.locks.held() == []


def test_position_is_stored_under_its_lock(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a")
    validator.open_position("a")
    validator.lose("a", 0.2)
    held: list[Any] = []
    validator.faults.at("store", lambda: held.extend(validator.locks.held()))
    managed.tick()
    assert held == [("a", "BTC/USD")]


def test_price_that_the_elimination_does_not_have_is_fetched(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a")
    validator.open_position("a")
    validator.pass_time(HOUR)
    managed.validator.probation.fail("a", "PLAGIARISM", None)
    managed.tick()
    [holding] = validator.book.on_disk("a")
    assert holding.trades[-1].price == validator.prices.at("BTC/USD", validator.now_ms)
