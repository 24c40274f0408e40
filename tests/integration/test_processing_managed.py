"""The loop in a forked child, as validators run it, over dicts, lists, queues and values of a manager's process.

A proxy that a child inherited cannot be iterated over as one that it made can, and each of its threads has a
connection of its own to the manager.
"""

from __future__ import annotations

import itertools
import multiprocessing
from typing import TYPE_CHECKING, Any

import pytest
from reference_validator import HOUR, Managed
from reference_validator.validator import START
from waiting import PATIENCE, until

from shmelim.eliminations.record import generate_row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FORK = multiprocessing.get_context("fork")
MINERS = ("liquid", "failed", "down", "stale", "well")


@pytest.fixture
def shared() -> Iterator[Any]:
    with FORK.Manager() as manager:
        yield manager


@pytest.fixture
def managed(new_name: Callable[[], str], tmp_path: Path, shared: Any) -> Iterator[Managed]:
    """A validator all of whose shared things live in the manager's process."""
    figures: dict[str, Any] = {"tick_pause_s": 0.0, "error_pause_s": 0.0, "check_interval_ms": 0}
    # A clock that goes on in the child too: a millisecond each time that it is looked at.
    figures["start_method"] = None  # here everything is as validators have it
    with Managed("rpc", new_name(), tmp_path, clock=itertools.count(START + HOUR).__next__, **figures) as made:
        validator, manager = made.validator, made.manager
        validator.register(*MINERS)
        for hotkey in MINERS:
            validator.open_position(hotkey)
            validator.limit_orders.place(hotkey)
        made.tick()
        validator.registry.set_to(shared.list(MINERS))
        for hotkey in ("down", "stale"):
            validator.lose(hotkey, 0.2)
        challenge: Any = manager.challengeperiod_manager
        reasons = validator.probation.failed = shared.dict({"failed": ("PLAGIARISM", 0.2)})
        challenge.get_all_elimination_reasons = lambda: reasons
        challenge.clear_elimination_reasons = reasons.clear
        scored = shared.list(MINERS)
        challenge.get_hotkeys_by_bucket = lambda _bucket: scored
        prices = shared.dict({"BTCUSD": (1000.0, validator.now_ms)})
        row = shared.dict(generate_row("liquid", 0.7, "LIQUIDATED", validator.now_ms, prices))
        rows = shared.list([row])
        ledgers: Any = manager.position_manager.perf_ledger_manager
        ledgers.get_perf_ledger_eliminations = lambda: rows
        ledgers.perf_ledger_hks_to_invalidate = shared.dict({"stale": 1})
        of_scored = ledgers.filtered_ledger_for_scoring
        kept = shared.dict(of_scored(hotkeys=MINERS))
        ledgers.filtered_ledger_for_scoring = lambda **_: kept
        manager.shared_queue_websockets = shared.Queue()
        manager.sync_in_progress = shared.Value("b", False)  # noqa: FBT003
        manager.sync_epoch = shared.Value("i", 0)
        manager.shutdown_dict = shared.dict()
        yield made


@pytest.fixture
def loop(managed: Managed) -> Iterator[Any]:
    process = FORK.Process(target=managed.manager.run_update_loop, daemon=True)
    yield process
    if process.is_alive():
        process.kill()
    process.join()


def health_of(managed: Managed) -> dict[str, Any]:
    return dict(managed.manager._server_proxy.health_check_rpc())


def test_everything_is_judged_closed_told_and_slashed_in_a_forked_child(managed: Managed, loop: Any) -> None:
    validator, queue = managed.validator, managed.manager.shared_queue_websockets
    before = health_of(managed)["last_tick_ms"]
    loop.start()
    until(lambda: health_of(managed)["last_tick_ms"] != before or health_of(managed)["problems"], "a tick")
    assert health_of(managed)["problems"] == []
    assert managed.reasons == {"liquid": "LIQUIDATED", "failed": "PLAGIARISM", "down": "MAX_TOTAL_DRAWDOWN"}
    assert [hotkey for hotkey in MINERS if validator.is_flat(hotkey)] == ["liquid", "failed", "down"]
    assert sorted(validator.collateral.slashes()) == ["down", "failed", "liquid"]
    assert sorted(queue.get(timeout=PATIENCE)["hotkey"] for _ in range(3)) == ["down", "failed", "liquid"]
    assert dict(managed.manager.challengeperiod_manager.get_all_elimination_reasons()) == {}
    assert managed.debts == []


def test_values_of_a_manager_pause_and_end_it(managed: Managed, loop: Any) -> None:
    managed.manager.sync_in_progress.value = True
    loop.start()
    managed.manager.shutdown_dict["now"] = True
    loop.join(PATIENCE)
    assert (loop.exitcode, managed.reasons) == (0, {}), "it paused for the sync, and ended"


def test_what_comes_while_it_runs_is_seen(managed: Managed, loop: Any) -> None:
    loop.start()
    until(lambda: managed.reasons.keys() == {"liquid", "failed", "down"})
    managed.manager.position_manager.perf_ledger_manager.perf_ledger_hks_to_invalidate.clear()
    until(lambda: "stale" in managed.reasons, "an end of the rebuilding of a ledger")
    managed.validator.probation.failed["well"] = ("PLAGIARISM", None)
    until(lambda: "well" in managed.reasons, "a reason that came")
    managed.manager.shutdown_dict["now"] = True
    loop.join(PATIENCE)
    assert loop.exitcode == 0
