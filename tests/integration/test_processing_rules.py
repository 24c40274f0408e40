"""Who is eliminated, when and why: each rule and each of its boundaries, through the manager, in both modes."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
from reference_validator import HOUR, MINUTE, Managed
from reference_validator.trading import Holding

from shmelim.eliminations.debts.states import IN_DOUBT
from shmelim.eliminations.record import generate_row
from shmelim.eliminations.starting import keeping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

DAY = 24 * HOUR


@pytest.fixture
def make(new_name: Callable[[], str], tmp_path: Path) -> Iterator[Callable[..., Managed]]:
    made: list[Managed] = []

    def start(mode: str, **options: Any) -> Managed:
        made.append(Managed(mode, new_name(), tmp_path, **options))
        return made[-1]

    yield start
    for managed in made:
        managed.close()


@pytest.fixture(params=["direct", "rpc"])
def managed(request: pytest.FixtureRequest, make: Callable[..., Managed]) -> Managed:
    return make(request.param)


@pytest.fixture
def in_rpc_mode(make: Callable[..., Managed]) -> Managed:
    return make("rpc")


@pytest.fixture
def directly(make: Callable[..., Managed]) -> Managed:
    return make("direct")


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


# ---------------------------------------------------------------------- departed hotkeys


def miners(count: int) -> list[str]:
    return [f"miner{number:02}" for number in range(count)]


def test_10_lost_of_40_are_recorded(managed: Managed) -> None:
    validator = managed.validator
    validator.register(*miners(40))
    managed.tick()
    validator.deregister(*miners(10))
    managed.tick()
    assert sorted(managed.manager.get_departed_hotkeys()) == miners(10)


def test_11_lost_of_44_are_not_recorded_until_the_metagraph_recovered(managed: Managed) -> None:
    validator = managed.validator
    validator.register(*miners(44))
    managed.tick()
    validator.deregister(*miners(11))
    managed.tick()
    assert managed.manager.get_departed_hotkeys() == {}
    validator.registry.set([*validator.registry.hotkeys, *miners(10)])
    managed.tick()
    assert list(managed.manager.get_departed_hotkeys()) == ["miner10"], "the one who is still missing"


def test_loss_that_is_not_believed_is_told_once_until_the_metagraph_recovered(managed: Managed) -> None:
    validator = managed.validator
    told = []
    managed.manager.slack_notifier = SimpleNamespace(send_message=lambda text, level: told.append((text, level)))
    everybody = miners(44)
    for outages in (1, 2):
        validator.registry.set(everybody)
        managed.tick()
        validator.deregister(*miners(11))
        managed.tick()
        managed.tick()
        losses = [level for text, level in told if text.startswith("11 hotkeys are missing")]
        assert losses == ["error"] * outages


def test_hotkey_that_comes_back_is_re_registered_at_once_here_and_elsewhere_once_a_tick_saw_it(
    managed: Managed,
) -> None:
    validator = managed.validator
    validator.register("a", "b")
    managed.tick()
    validator.deregister("a")
    managed.tick()
    info = managed.manager.get_departed_hotkey_info("a")
    validator.registry.set(["a", "b"])
    assert managed.manager.is_hotkey_re_registered("a"), "the metagraph is at hand"
    assert not managed.manager.reader.is_hotkey_re_registered("a")
    managed.tick()
    assert managed.manager.reader.is_hotkey_re_registered("a")
    validator.deregister("a")
    managed.tick()
    assert managed.manager.get_departed_hotkey_info("a") == info, "recorded once, for ever"


def test_legacy_departed_list_reads_as_departed_in_1970(tmp_path: Path, make: Callable[..., Managed]) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "departed_hotkeys.json").write_text(json.dumps({"departed_hotkeys": ["old", "older"]}))
    managed = make("direct")
    managed.validator.register("old")
    managed.tick()
    assert managed.manager.get_departed_hotkeys() == {"old": {"detected_ms": 0}, "older": {"detected_ms": 0}}
    assert managed.manager.is_hotkey_re_registered("old")


def test_default_departed_file_is_used_when_there_is_none_yet(tmp_path: Path) -> None:
    from reference_validator import ReferenceValidator, manager_of, plug_in

    default = tmp_path / "default.json"
    default.write_text(json.dumps({"departed_hotkeys": {"gone": {"detected_ms": 5}}}))
    validator = ReferenceValidator(tmp_path / "validator")
    validator.register("gone")
    collaborators, environment = plug_in(validator)
    manager = manager_of(collaborators, environment, running_unit_tests=True, default_departed=default)
    try:
        manager.process_eliminations()
        assert manager.get_departed_hotkeys() == {"gone": {"detected_ms": 5}}
        assert manager.is_hotkey_re_registered("gone")
    finally:
        manager.shutdown()


@pytest.mark.parametrize("unknown", [None, ["", None]])
def test_metagraph_without_hotkeys_is_not_known_yet(managed: Managed, unknown: Any) -> None:
    validator = managed.validator
    validator.register("a", "b")
    managed.tick()
    validator.registry.set_to(unknown)
    managed.tick()
    assert len(managed.alerts) == (unknown is not None)
    assert managed.reasons == {}
    assert managed.manager.get_departed_hotkeys() == {}


def test_nobody_departs_while_an_entry_of_the_metagraph_is_not_a_hotkey(directly: Managed) -> None:
    validator = directly.validator
    validator.register("a", "b")
    directly.tick()
    validator.deregister("b")
    validator.registry.set_to(["a", "", None, "x" * 256, "new"])
    for _ in range(3):
        directly.tick()
    assert directly.manager.reader.snapshot().registered == {"a", "b", "new"}
    assert directly.manager.get_departed_hotkeys() == {}
    assert directly.reasons == {}
    assert len(directly.alerts) == 1
    assert "3 entries of the metagraph are not hotkeys" in directly.alerts[0]
    validator.registry.set_to(["a", "new"])
    directly.tick()
    assert list(directly.manager.get_departed_hotkeys()) == ["b"]
    assert directly.reasons == {"b": "ZOMBIE"}


def test_manager_starts_with_a_metagraph_that_is_not_whole_yet(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from shmelim import EliminationManager

    for hotkeys, registered in ((None, set()), (["a", "", None], {"a"}), (("b", "c"), {"b", "c"})):
        metagraph: Any = SimpleNamespace(hotkeys=hotkeys)
        with EliminationManager(metagraph, None, None, running_unit_tests=True) as manager:
            assert manager.reader.snapshot().registered == registered


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


# ---------------------------------------------------------------------- zombies


def test_zombie_is_flattened_and_never_slashed(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a", "b")
    validator.open_position("a")
    validator.limit_orders.place("a")
    managed.tick()
    validator.deregister("a")
    managed.tick()
    row = managed.manager.get_elimination("a")
    assert row is not None
    assert (row["reason"], row["dd"], row["elimination_initiated_time_ms"]) == ("ZOMBIE", None, validator.now_ms)
    assert validator.is_flat("a")
    assert validator.collateral.slashes() == []
    assert managed.reasons == {"a": "ZOMBIE"}


def test_development_hotkey_is_no_zombie(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a", "DEVELOPMENT")
    managed.tick()
    validator.deregister("DEVELOPMENT")
    managed.tick()
    assert managed.reasons == {}


def test_missing_miners_whose_loss_is_not_believed_are_no_zombies(managed: Managed) -> None:
    validator = managed.validator
    validator.register(*miners(44))
    managed.tick()
    everybody = list(validator.registry.hotkeys)
    validator.deregister(*miners(11))
    managed.tick()
    assert managed.reasons == {}
    validator.registry.set([])
    managed.tick()
    assert managed.reasons == {}
    validator.registry.set(everybody[1:])
    managed.tick()
    assert managed.reasons == {"miner00": "ZOMBIE"}


def test_newcomer_is_no_zombie_of_a_metagraph_that_is_not_believed(managed: Managed) -> None:
    """Its first look at the metagraph is one in which a third of all are missing, itself among them."""
    validator = managed.validator
    validator.register(*miners(44))
    managed.tick()
    validator.register("newcomer")
    validator.deregister("newcomer", *miners(15))
    managed.tick()
    assert managed.reasons == {}


def test_metagraph_that_is_not_loaded_yet_makes_no_zombies(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a")
    validator.registry.set([])
    managed.tick()
    assert managed.reasons == {}


def test_development_hotkey_is_the_environments_for_the_server_object_too(make: Callable[..., Managed]) -> None:
    managed = make("direct", development_hotkey="own")
    assert not managed.manager._server_proxy.is_zombie_hotkey_rpc("own", [])
    assert managed.manager._server_proxy.is_zombie_hotkey_rpc("DEVELOPMENT", [])
    assert not managed.manager.is_zombie_hotkey("own", [])


def test_manager_has_every_step(managed: Managed) -> None:
    validator, manager = managed.validator, managed.manager
    validator.register("zombie", "owing", "other")
    manager.process_eliminations()
    validator.open_position("owing")
    row = manager.generate_elimination_row("owing", 0.1, "X", validator.now_ms)
    manager._server_proxy.eliminate_rpc("owing", row, ["positions"])
    manager.settle_debts()
    assert validator.is_flat("owing")
    validator.deregister("zombie")
    assert manager.handle_departed() == ["zombie"]
    assert manager.handle_departed() == []
    manager.handle_zombies()
    assert managed.reasons == {"owing": "X", "zombie": "ZOMBIE"}
    validator.pass_time(2 * DAY)
    manager.delete_expired()
    assert managed.reasons == {"owing": "X"}


# ---------------------------------------------------------------------- deletion


def eliminated_and_gone(managed: Managed, hotkey: str = "a") -> int:
    """Eliminate a miner, let it leave, and return when it was eliminated."""
    validator = managed.validator
    validator.register(hotkey, "other")
    validator.open_position(hotkey)
    validator.probation.fail(hotkey, "PLAGIARISM", None)
    managed.tick()
    validator.deregister(hotkey)
    managed.tick()
    return int(managed.manager.get_elimination(hotkey)["elimination_initiated_time_ms"])


def test_elimination_is_deleted_at_exactly_the_delay(managed: Managed) -> None:
    at_ms = eliminated_and_gone(managed)
    validator = managed.validator
    managed.tick(at_ms + 2 * DAY - 1 - validator.now_ms)
    assert "a" in managed.reasons
    validator.pass_time(1)
    managed.manager.delete_expired()
    assert managed.reasons == {}
    assert validator.book.on_disk("a") == []
    assert "a" not in validator.disk.read("stages", {})
    assert not (validator.miners_directory / "a").exists()
    assert (validator.miners_directory / "other").exists()
    assert list(managed.manager.get_departed_hotkeys()) == ["a"], "that it left is never forgotten"


@pytest.mark.parametrize("how", ["sync", "add"])
def test_elimination_that_was_made_anew_while_the_old_one_was_deleted_stays(managed: Managed, how: str) -> None:
    eliminated_and_gone(managed)
    managed.manager.sync_epoch = None
    row = managed.manager.generate_elimination_row("a", 0.1, "LIQUIDATED", managed.validator.now_ms + 3 * DAY)

    def anew() -> None:
        if how == "sync":
            managed.manager.sync_eliminations([row])
        else:
            managed.manager.add_elimination("a", row)

    managed.validator.faults.at("drop!", anew)
    managed.tick(3 * DAY)
    assert managed.reasons == {"a": "LIQUIDATED"}
    managed.tick(2 * DAY)
    assert managed.reasons == {}


def test_elimination_of_a_registered_miner_is_not_deleted(managed: Managed) -> None:
    eliminated_and_gone(managed)
    managed.validator.registry.set(["a", "other"])
    managed.tick(10 * DAY)
    assert "a" in managed.reasons
    assert len(managed.validator.book.on_disk("a")) == 1


def test_nothing_is_deleted_while_so_many_are_missing_that_it_is_not_believed(managed: Managed) -> None:
    validator = managed.validator
    validator.register(*miners(44))
    validator.probation.fail("miner00", "PLAGIARISM", None)
    managed.tick()
    validator.deregister(*miners(11))
    managed.tick(10 * DAY)
    assert managed.reasons == {"miner00": "PLAGIARISM"}


def test_entries_of_the_challenge_period_are_written_once_for_all_that_are_deleted(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a", "b", "c", "other")
    for hotkey in ("a", "b", "c"):
        validator.probation.fail(hotkey, "PLAGIARISM", None)
    managed.tick()
    validator.deregister("a", "b", "c")
    before = validator.faults.count("save stages!")
    managed.tick(3 * DAY)
    assert managed.reasons == {}
    assert validator.faults.count("save stages!") == before + 1
    assert set(validator.disk.read("stages", {})) == {"other"}
    managed.tick(3 * DAY)
    assert validator.faults.count("save stages!") == before + 1


def test_elimination_whose_slash_is_in_doubt_is_not_deleted(managed: Managed) -> None:
    managed.validator.faults.fail("slash!")
    eliminated_and_gone(managed)
    managed.tick(10 * DAY)
    assert [(debt["kind"], debt["state"]) for debt in managed.debts] == [("slash", IN_DOUBT)]
    assert "a" in managed.reasons
    assert managed.manager._server_proxy.resolve_slash_rpc("a", made=True)
    managed.tick()
    assert managed.reasons == {}


def test_positions_that_are_still_owed_do_not_keep_an_expired_elimination(managed: Managed) -> None:
    managed.validator.faults.fail("store", hotkey="a", times=None)
    managed.validator.register("a", "other")
    managed.validator.faults.clear()
    managed.validator.open_position("a")
    managed.validator.faults.fail("store", hotkey="a", times=None)
    managed.validator.probation.fail("a", "PLAGIARISM", None)
    managed.tick()
    managed.validator.deregister("a")
    managed.tick(3 * DAY)
    assert managed.reasons == {}
    assert managed.debts == []
    assert managed.validator.book.on_disk("a") == []


def test_deletion_that_was_broken_off_is_repeated(managed: Managed) -> None:
    eliminated_and_gone(managed)
    managed.validator.faults.fail("drop!")
    managed.tick(3 * DAY)
    assert "a" in managed.reasons
    managed.tick()
    assert managed.reasons == {}
    assert not (managed.validator.miners_directory / "a").exists()


# ---------------------------------------------------------------------- restarts, syncs, missing collaborators


def test_unsaved_state_is_there_after_a_restart(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a", "b", "c")
    validator.open_position("a")
    validator.lose("a", 0.2)
    managed.tick()
    validator.deregister("b")
    managed.tick()
    managed.manager.add_elimination("c", managed.manager.generate_elimination_row("c", 0.5, "PLAGIARISM"))
    before = managed.manager.get_eliminations_dict(), managed.manager.get_departed_hotkeys()
    managed.restart()
    assert (managed.manager.get_eliminations_dict(), managed.manager.get_departed_hotkeys()) == before
    managed.tick()
    assert managed.validator.collateral.slashes() == ["a"]


def test_what_is_owed_is_settled_after_a_restart(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a")
    validator.open_position("a")
    validator.limit_orders.place("a")
    validator.pass_time(HOUR)
    validator.lose("a", 0.7)
    at_ms = validator.now_ms
    for point in ("cancel", "store"):
        validator.faults.fail(point, hotkey="a")
    managed.tick()
    assert [debt["kind"] for debt in managed.debts] == ["limit_orders", "positions"]
    managed.restart()
    managed.tick()
    assert managed.debts == []
    assert managed.validator.is_flat("a")
    [holding] = managed.validator.book.on_disk("a")
    assert holding.trades[-1].at_ms == at_ms
    assert managed.validator.collateral.slashes() == ["a"]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    "point",
    ["liquidated", "all failed", "in stage", "ledgers", "slash", "holding", "price", "store", "cancel!"],
)
@pytest.mark.parametrize("mode", ["direct", "rpc"])
def test_nothing_from_before_a_sync_is_written_after_it(
    make: Callable[..., Managed], mode: str, point: str, live: bool
) -> None:
    """Wherever in a tick the sync comes, and whether positions are copies or the validator's own objects."""
    managed = make(mode, live=live)
    validator = managed.validator
    validator.register("a", "b", "c")
    for hotkey in ("a", "b", "c"):
        validator.open_position(hotkey)
    validator.lose("a", 0.7)
    validator.probation.fail("b", "PLAGIARISM", None)
    validator.lose("c", 0.2)
    synced = managed.manager.generate_elimination_row("elsewhere", 0.1, "ZOMBIE", validator.now_ms)
    written: list[Any] = []
    too_late: list[Any] = []
    store = managed.manager.position_manager.save_miner_position

    def sync() -> None:
        validator.sync(lambda: managed.manager.sync_eliminations([synced]))
        written.extend(managed.manager.get_eliminations_from_memory())

    def save(position: Any, **options: Any) -> None:
        too_late.extend(written)
        store(position, **options)

    managed.manager.position_manager.save_miner_position = save
    validator.faults.at(point, sync)
    if point == "store":
        # It is being stored already: whoever syncs waits for its lock.
        managed.manager.position_manager.save_miner_position = store
    managed.tick()
    assert written == [synced]
    assert too_late == [], "a position from before the sync was saved after it"
    assert managed.manager.get_eliminations_from_memory() == written
    for hotkey in ("a", "b", "c"):
        assert validator.book.holdings(hotkey) == validator.book.on_disk(hotkey), "nothing was changed unsaved"
    managed.manager.position_manager.save_miner_position = store
    reasons = set(validator.probation.failed)
    managed.tick(0)
    # The reasons of the challenge period are gone once they were recorded, also if a sync says otherwise.
    assert set(managed.reasons) == {"elsewhere", "a", "c"} | reasons, (
        "the next tick is due at once, and decides anew"
    )
    assert all(validator.is_flat(hotkey) for hotkey in ("a", "b", "c") if hotkey in managed.reasons)


@pytest.mark.parametrize("resolved", [False, True])
def test_elimination_that_a_sync_took_back_is_not_slashed_again(managed: Managed, resolved: bool) -> None:
    validator = managed.validator
    validator.register("a", "b")
    validator.lose("a", 0.2)
    validator.lose("b", 0.7)
    if resolved:
        validator.faults.fail("slash!", times=2)
    managed.tick()
    for hotkey in ("a", "b") if resolved else ():
        assert managed.manager._server_proxy.resolve_slash_rpc(hotkey, made=True)
    managed.manager.sync_eliminations([])
    managed.tick()
    assert set(managed.reasons) == {"a", "b"}
    assert sorted(validator.collateral.slashes()) == ["a", "b"]
    assert managed.debts == []


def test_slash_is_remembered_however_much_happened_to_its_miner_since(managed: Managed) -> None:
    validator, manager = managed.validator, managed.manager
    validator.register("a")
    validator.lose("a", 0.2)
    managed.tick()
    for _ in range(60):
        manager.append_elimination_row("a", 0.1, "PLAGIARISM")
        manager.remove_elimination("a")
    assert "settle" not in {event["action"] for event in manager.get_history("a")}
    managed.tick()
    assert managed.reasons == {"a": "MAX_TOTAL_DRAWDOWN"}
    assert validator.collateral.slashes() == ["a"]
    assert managed.debts == []
    assert [(slash["hotkey"], slash["by"]) for slash in manager.get_slashes("a")] == [("a", "contract")]


def test_miner_who_is_eliminated_anew_for_the_same_rule_is_slashed_once_however_much_later(
    managed: Managed,
) -> None:
    validator = managed.validator
    validator.register("a")
    validator.lose("a", 0.2)
    for _ in range(4):
        managed.tick(2 * DAY)
        managed.manager.remove_elimination("a")
    managed.tick(2 * DAY)
    assert validator.collateral.slashes() == ["a"]


def test_miner_who_departed_and_registered_again_is_slashed_anew_within_the_hour(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a", "b")
    validator.lose("a", 0.7)
    managed.tick()
    validator.deregister("a")
    managed.tick()
    validator.register("a")
    managed.tick()
    managed.manager.remove_elimination("a")
    managed.tick()
    assert validator.collateral.slashes() == ["a", "a"]


def test_another_rule_is_another_slash(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a")
    validator.lose("a", 0.2)
    managed.tick()
    managed.manager.remove_elimination("a")
    validator.probation.fail("a", "FAILED_CHALLENGE_PERIOD_TIME", 0.1)
    managed.tick()
    found = {slash["rule"] for slash in managed.manager.get_slashes("a")}
    assert found == {"drawdown", "challenge_period"}
    assert validator.collateral.slashes() == ["a", "a"]


def test_position_of_a_miner_whom_a_sync_takes_back_and_brings_again_is_closed(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a")
    managed.tick()
    validator.open_position("a")
    validator.probation.fail("a", "PLAGIARISM", None)
    validator.faults.fail("store", hotkey="a")
    managed.tick()
    rows = managed.manager.get_eliminations_from_memory()
    managed.manager.sync_eliminations([])
    managed.tick()
    assert [(debt["kind"], debt["due"]) for debt in managed.debts] == [("positions", False)]
    assert not validator.is_flat("a")
    managed.manager.sync_eliminations(rows)
    managed.tick()
    assert validator.is_flat("a")
    assert managed.debts == []


def test_what_a_miner_opens_while_he_is_taken_back_is_closed_when_he_is_brought_again(managed: Managed) -> None:
    """What his elimination owed was settled long before, and the slash is not made again."""
    validator = managed.validator
    validator.register("a")
    managed.tick()
    validator.open_position("a")
    validator.lose("a", 0.2)
    managed.tick()
    assert managed.debts == []
    rows = managed.manager.get_eliminations_from_memory()
    for _ in range(2):
        managed.manager.sync_eliminations([])
        validator.open_position("a")
        validator.limit_orders.place("a")
        assert managed.debts == []
        managed.manager.sync_eliminations(rows)
        managed.tick()
        assert validator.is_flat("a")
        assert managed.debts == []
    assert validator.collateral.slashes() == ["a"]


def test_what_a_miner_opened_before_a_restore_brings_him_again_is_closed(managed: Managed) -> None:
    """His elimination was taken back after the backup; the slash is not made again."""
    validator, state = managed.validator, managed.directory / "state"
    validator.register("a")
    managed.tick()
    validator.lose("a", 0.2)
    managed.tick()
    keeping.back_up(state, managed.directory / "backup")
    managed.manager.sync_eliminations([])
    validator.open_position("a")
    validator.limit_orders.place("a")
    managed.close(final=False)
    keeping.restore(managed.directory / "backup", state, None)
    managed._open()
    managed.tick()
    assert managed.manager.release_money()
    managed.tick()
    assert set(managed.reasons) == {"a"}
    assert managed.validator.is_flat("a")
    assert managed.debts == []
    assert managed.validator.collateral.slashes() == ["a"]


def test_what_a_sync_alone_brings_owes_nothing(managed: Managed) -> None:
    managed.validator.register("a")
    managed.validator.open_position("a")
    managed.tick()
    for _ in range(2):
        managed.manager.sync_eliminations([generate_row("a", 0.1, "ZOMBIE", managed.validator.now_ms)])
        assert managed.debts == []
        managed.manager.sync_eliminations([])


def test_slash_that_was_not_made_is_owed_anew(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a")
    validator.lose("a", 0.2)
    validator.faults.fail("slash")
    managed.tick()
    managed.manager.sync_eliminations([])
    assert managed.manager._server_proxy.resolve_slash_rpc("a", made=False)
    managed.tick()
    assert validator.collateral.slashes() == ["a"]


def test_ledger_that_names_a_miner_long_gone_eliminates_nobody(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a", "b")
    validator.lose("a", 0.7)
    managed.tick()
    validator.deregister("a")
    managed.tick(2 * DAY)
    assert managed.reasons == {}
    managed.tick()
    added = [e for e in managed.manager._server_proxy.get_history_rpc("a") if e["action"] == "add"]
    assert len(added) == 1


@pytest.mark.parametrize(("age", "eliminated"), [(2 * DAY - 1, True), (2 * DAY, False)])
def test_ledger_names_a_miner_long_gone_from_exactly_the_delay_on(
    managed: Managed, age: int, eliminated: bool
) -> None:
    """Eliminated now, it would be deleted at once."""
    validator = managed.validator
    validator.register("a", "b")
    managed.tick()
    validator.lose("a", 0.7)
    validator.deregister("a")
    shutil.rmtree(validator.miners_directory / "a")
    validator.pass_time(age)
    managed.manager.handle_perf_ledger_eliminations()
    assert managed.reasons == ({"a": "LIQUIDATED"} if eliminated else {})


@pytest.mark.parametrize("debt", ["limit_orders", "positions", "slash"])
def test_nothing_more_is_settled_once_the_epoch_moved(managed: Managed, debt: str) -> None:
    """A sync that leaves the eliminations as they are: the debts stay, and the next tick settles them."""
    validator = managed.validator
    validator.register("a")
    validator.open_position("a")
    validator.limit_orders.place("a")
    validator.lose("a", 0.2)
    point = {"limit_orders": "in stage", "positions": "cancel!", "slash": "store!"}[debt]
    validator.faults.at(point, lambda: validator.sync(lambda: None))
    managed.tick()
    assert validator.collateral.slashes() == []
    owed = [found["kind"] for found in managed.debts]
    kinds = ["limit_orders", "positions", "slash"]
    assert owed == ([] if debt == "limit_orders" else kinds[kinds.index(debt) :])
    managed.tick(0)
    assert managed.debts == []
    assert validator.collateral.slashes() == ["a"]


def test_sync_without_an_epoch_is_noticed_by_the_server(managed: Managed) -> None:
    managed.manager.sync_epoch = None
    managed.manager.append_elimination_row("x", 0.1, "PLAGIARISM")  # so that the sync changes something
    validator = managed.validator
    validator.register("a")
    validator.lose("a", 0.7)
    validator.faults.at("liquidated", lambda: managed.manager.sync_eliminations([]))
    managed.tick()
    assert managed.reasons == {}
    managed.tick(0)
    assert managed.reasons == {"a": "LIQUIDATED"}


def test_given_epoch_is_the_one_that_counts(managed: Managed) -> None:
    validator = managed.validator
    validator.register("a")
    validator.lose("a", 0.7)
    validator.sync(lambda: None)
    managed.manager.handle_perf_ledger_eliminations(iteration_epoch=validator.epoch.value - 1)
    assert managed.reasons == {}
    managed.manager.handle_perf_ledger_eliminations(iteration_epoch=validator.epoch.value)
    assert managed.reasons == {"a": "LIQUIDATED"}


@pytest.mark.parametrize(
    "missing",
    [
        "metagraph",
        "position_manager",
        "challengeperiod_manager",
        "contract_manager",
        "position_locks",
        "limit_order_manager",
        "live_price_fetcher",
        "shared_queue_websockets",
        "slack_notifier",
        "sync_epoch",
        "shutdown_dict",
        "sync_in_progress",
    ],
)
def test_tick_without_a_collaborator_leaves_out_what_needs_it(directly: Managed, missing: str) -> None:
    validator = directly.validator
    validator.register("a", "b")
    directly.tick()
    validator.open_position("a")
    validator.lose("a", 0.7)
    validator.probation.fail("b", "PLAGIARISM", None)
    setattr(directly.manager, missing, None)
    directly.tick()
    expected = {"a": "LIQUIDATED", "b": "PLAGIARISM"}
    if missing == "position_manager":
        del expected["a"]
    if missing == "challengeperiod_manager":
        del expected["b"]
    assert directly.reasons == expected
    # Nobody owes what nobody could ever settle; a slash waits for somebody who can.
    assert [debt["kind"] for debt in directly.debts] == (["slash"] * 2 if missing == "contract_manager" else [])
    slashed = [] if missing == "contract_manager" else sorted(expected)
    assert sorted(validator.collateral.slashes()) == slashed
    assert validator.is_flat("a") == (missing != "position_manager")


def test_collaborator_that_is_replaced_is_the_one_that_is_used(managed: Managed) -> None:
    from types import SimpleNamespace

    slashed: list[str] = []
    managed.tick()
    managed.manager.contract_manager = SimpleNamespace(slash_miner_collateral_proportion=slashed.append)
    managed.validator.register("a")
    managed.validator.lose("a", 0.2)
    managed.tick()
    assert slashed == ["a"]
    assert managed.validator.collateral.slashes() == []


def test_backtest_has_no_first_refresh_and_no_zombies(tmp_path: Path) -> None:
    from reference_validator import ReferenceValidator, manager_of, plug_in

    validator = ReferenceValidator(tmp_path)
    validator.register("a", "b")
    validator.open_position("a")
    validator.deregister("b")
    collaborators, environment = plug_in(validator)
    manager = manager_of(collaborators, environment, running_unit_tests=True, is_backtesting=True)
    try:
        manager.append_elimination_row("a", 0.2, "PLAGIARISM")
        manager.process_eliminations()
        assert not validator.is_flat("a")
        assert set(manager.get_eliminations_dict()) == {"a"}
    finally:
        manager.shutdown()


def test_backtest_takes_no_collateral_and_removes_no_directory(tmp_path: Path) -> None:
    """It may have been given the living validator's contract, and the path of its miners."""
    from reference_validator import ReferenceValidator, manager_of, plug_in

    validator = ReferenceValidator(tmp_path)
    validator.register("a", "gone", "other")
    validator.open_position("a")
    validator.open_position("gone")
    validator.lose("a", 0.2)
    validator.deregister("gone")
    collaborators, environment = plug_in(validator)
    manager = manager_of(collaborators, environment, running_unit_tests=True, is_backtesting=True)
    try:
        manager.append_elimination_row("gone", 0.2, "PLAGIARISM", validator.now_ms - 3 * DAY)
        manager.process_eliminations()
        assert set(manager.get_eliminations_dict()) == {"a"}, "the expired row is gone"
        assert validator.is_flat("a")
        assert validator.collateral.slashes() == []
        assert manager.get_debts() == []
        assert (validator.miners_directory / "gone").exists()
        manager._server_proxy.eliminate_rpc(
            "other", manager.generate_elimination_row("other", 0.1, "X"), ["slash"]
        )
        manager.process_eliminations()
        assert validator.collateral.slashes() == []
    finally:
        manager.shutdown()
