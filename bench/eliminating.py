"""One tick that eliminates many, with a slow contract: when is the last miner recorded, when closed, when slashed?

    python -m bench.eliminating [--miners 50] [--positions 200] [--contract 5]

The contract takes so many seconds for each call, everything else none: what is left is the package's own. All are
recorded before anything is closed, and closed before anything is slashed, so the contract delays nobody's closing.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from bench.records import hotkey
from shmelim import EliminationManager
from shmelim.eliminations.validator.environment import ValidatorEnvironment
from shmelim.shm import SharedNamespace


class Position:
    """An open position that a flat order closes."""

    def __init__(self, owner: str, number: int) -> None:
        self.owner, self.position_uuid = owner, f"{owner}-{number}"
        self.trade_pair = SimpleNamespace(trade_pair_id=f"PAIR{number}")
        self.is_closed_position, self.orders = False, []

    def generate_fake_flat_order(self, *_):
        return SimpleNamespace(processed_ms=0)

    def add_order(self, _order, _fetcher):
        self.is_closed_position = True

    def to_websocket_dict(self):
        return {}


class Book:
    """All positions, and when the last one was saved."""

    def __init__(self, of: dict[str, list[Position]]) -> None:
        self.of, self.saved_at, self.saved = of, 0.0, 0
        self.perf_ledger_manager = None

    def get_positions_for_one_hotkey(self, owner, only_open_positions=False):
        return [one for one in self.of[owner] if not (only_open_positions and one.is_closed_position)]

    def get_positions_for_hotkeys(self, owners, only_open_positions=True):
        return {owner: self.get_positions_for_one_hotkey(owner, only_open_positions) for owner in owners}

    def get_miner_position_by_uuid(self, owner, uuid):
        return next(one for one in self.of[owner] if one.position_uuid == uuid)

    def save_miner_position(self, _position, **_):
        self.saved_at, self.saved = time.monotonic(), self.saved + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--miners", type=int, default=50)
    parser.add_argument("--positions", type=int, default=200)
    parser.add_argument("--contract", type=float, default=5.0, help="seconds for each call")
    options = parser.parse_args()
    miners = [hotkey(number) for number in range(options.miners)]
    positions = range(options.positions)
    book = Book(
        {
            owner: [Position(owner, number) for number in positions if number % len(miners) == place]
            for place, owner in enumerate(miners)
        }
    )
    recorded_at: list[float] = []
    slashed_at: list[float] = []
    reasons = dict.fromkeys(miners, ("PLAGIARISM", None))

    def forget() -> None:
        recorded_at.append(time.monotonic())  # once all are recorded
        reasons.clear()

    def slash(_owner, slash_proportion=None):  # noqa: ARG001 - it is passed by its name
        time.sleep(options.contract)
        slashed_at.append(time.monotonic())

    with tempfile.TemporaryDirectory(prefix="bench-") as base:
        manager = EliminationManager(
            SimpleNamespace(hotkeys=miners),
            book,
            SimpleNamespace(
                has_elimination_reasons=lambda: bool(reasons),
                get_all_elimination_reasons=lambda: dict(reasons),
                clear_elimination_reasons=forget,
                get_hotkeys_by_bucket=lambda _bucket: [],
            ),
            contract_manager=SimpleNamespace(slash_miner_collateral_proportion=slash),
            environment=ValidatorEnvironment(max_slashes_per_hour=10_000),
            name=f"bench-{os.getpid()}",
            registry=None,
            port=None,
            state_dir=Path(base) / "state",
            runtime_base=Path(base),
            enable_health_check=False,
        )
        try:
            begun = time.monotonic()
            manager.process_eliminations()
            ended = time.monotonic()
            assert (len(manager.reader), book.saved, len(slashed_at)) == (len(miners), len(positions), len(miners))
        finally:
            manager.shutdown()
            SharedNamespace(manager.name).remove()
    print(f"{len(miners)} eliminations, {len(positions)} positions, {options.contract:g} s for each slash")
    for what, at in (("recorded", recorded_at[0]), ("closed", book.saved_at), ("slashed", slashed_at[-1])):
        print(f"the last is {what:8} after {at - begun:7.3f} s")
    print(f"of {ended - begun:.2f} s the contract took {len(miners) * options.contract:.2f} s")


if __name__ == "__main__":
    main()
