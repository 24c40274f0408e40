"""A tick in which nothing happens: 256 miners with ledgers and directories, 40 of them eliminated.

The collaborators answer from what they have in hand, so that the time is the package's own, the default drawdown
rule over 180 checkpoints of each miner included. The last checkpoint of each moves with every tick.
"""

from __future__ import annotations

import itertools
import os
import time
from types import SimpleNamespace

import pytest

from bench.records import hotkey, records
from shmelim import EliminationManager
from shmelim.eliminations.validator.environment import ValidatorEnvironment
from shmelim.shm import SharedNamespace

MINERS = 256
ELIMINATED = 40
CHECKPOINTS = 180


class Checkpoint:
    def __init__(self, mdd):
        self.mdd = mdd


class Ledger:
    def __init__(self):
        self.cps = [Checkpoint(0.99) for _ in range(CHECKPOINTS)]


@pytest.fixture(params=["direct", "shmelim"])
def manager(request, tmp_path):
    everybody = [hotkey(number) for number in range(MINERS)]
    for name in everybody:
        (tmp_path / "miners" / name).mkdir(parents=True)
    ledgers = {name: Ledger() for name in everybody}
    rows = records(ELIMINATED)
    manager = EliminationManager(
        SimpleNamespace(hotkeys=everybody),
        SimpleNamespace(
            get_positions_for_hotkeys=lambda *_, **__: {},
            perf_ledger_manager=SimpleNamespace(
                get_perf_ledger_eliminations=lambda: rows,
                filtered_ledger_for_scoring=lambda **_: ledgers,
                perf_ledger_hks_to_invalidate={},
            ),
        ),
        SimpleNamespace(has_elimination_reasons=lambda: False, get_hotkeys_by_bucket=lambda _bucket: everybody),
        running_unit_tests=request.param == "direct",
        environment=ValidatorEnvironment(
            miner_directory=tmp_path / "miners",
            check_interval_ms=0,
            clock=itertools.count(int(time.time() * 1000)).__next__,  # at each look later, so that a tick is due
        ),
        name=f"bench-{os.getpid()}",
        registry=None,
        replace_published=True,
        port=0,
        state_dir=tmp_path / "state",
        runtime_base=tmp_path,
        enable_health_check=False,
    )
    manager.sync_eliminations(rows)
    manager.process_eliminations()
    yield manager
    name = manager.name
    manager.shutdown()
    SharedNamespace(name).remove()


@pytest.mark.parametrize("size", [MINERS])
def test_tick_with_nothing_to_do(benchmark, manager, size):
    benchmark.group = f"a tick over {size} miners with nothing to do"
    ledgers = manager.position_manager.perf_ledger_manager.filtered_ledger_for_scoring()

    def move():
        for ledger in ledgers.values():
            ledger.cps[-1].mdd -= 1e-6

    benchmark.pedantic(manager.process_eliminations, setup=move, rounds=200, warmup_rounds=5)
    assert len(manager.reader) == ELIMINATED
