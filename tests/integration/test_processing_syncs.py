"""Restarts, syncs, missing collaborators and backtests: what rules and debts become, through the manager."""

from __future__ import annotations

import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from reference_validator import DAY, HOUR, Managed

from shmelim.eliminations.record import generate_row
from shmelim.eliminations.starting import keeping

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


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
    # Who was there may come back, so that it waits for him.
    kind = {"position_manager": "positions", "limit_order_manager": "limit_orders", "contract_manager": "slash"}
    assert [debt["kind"] for debt in directly.debts] == [kind.get(missing)] * len(expected) * (missing in kind)
    slashed = [] if missing == "contract_manager" else sorted(expected)
    assert sorted(validator.collateral.slashes()) == slashed
    assert validator.is_flat("a") == (missing != "position_manager")


def test_collaborator_that_is_replaced_is_the_one_that_is_used(managed: Managed) -> None:

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
