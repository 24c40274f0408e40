"""Eliminations that are processed on request, by a server that has the validator's objects in its own process.

Run it: ``python examples/processing.py``
"""

from __future__ import annotations

import tempfile
import time
from types import SimpleNamespace
from typing import Any

from shmelim import EliminationManagerServer, EliminationReader, ValidatorEnvironment
from shmelim.eliminations.validator.collaborators import Collaborators
from shmelim.service import RPCServiceBase
from shmelim.shm import SharedNamespace


class Miners:
    """A validator in short: who is registered, and who lost how much; a real one has positions and ledgers."""

    def __init__(self) -> None:
        self.hotkeys = ["5Miner", "5Other"]
        self.lost: dict[str, float] = {}
        self.perf_ledger_hks_to_invalidate: dict[str, int] = {}
        self.perf_ledger_manager = self  # of the positions, which it has none of

    def has_hotkey(self, hotkey: str) -> bool:
        """Whether a miner is registered."""
        return hotkey in self.hotkeys

    def get_perf_ledger_eliminations(self) -> list[dict[str, Any]]:
        """Return who is to be eliminated."""
        now = int(time.time() * 1000)
        return [
            {"hotkey": who, "reason": "LIQUIDATED", "dd": dd, "elimination_initiated_time_ms": now}
            for who, dd in self.lost.items()
        ]

    def filtered_ledger_for_scoring(self, **_: Any) -> dict[str, Any]:
        """Return the ledgers by which drawdowns are judged."""
        return {}

    def get_positions_for_one_hotkey(self, _hotkey: str, **_: Any) -> list[Any]:
        """Return a miner's positions."""
        return []

    def get_positions_for_hotkeys(self, hotkeys: list[str], **_: Any) -> dict[str, list[Any]]:
        """Return the positions of each of these miners."""
        return {hotkey: [] for hotkey in hotkeys}


class Server(EliminationManagerServer):
    """The server object, with the validator beside it."""

    def __init__(self, name: str, state_dir: str) -> None:
        super().__init__(SharedNamespace(name), state_dir)
        self.miners = Miners()
        everything: Any = self.miners
        challenge = SimpleNamespace(
            has_elimination_reasons=lambda: False,
            get_all_elimination_reasons=dict,
            pop_elimination_reasons=lambda _hotkeys: None,
            get_hotkeys_by_bucket=lambda _bucket: [],
        )
        self.process_with(
            Collaborators(metagraph=everything, position_manager=everything, challengeperiod_manager=challenge),
            ValidatorEnvironment(is_hotkey=lambda _: True),
        )

    def lose_rpc(self, hotkey: str, drawdown: float) -> None:
        """Note what a miner lost."""
        self.miners.lost[hotkey] = drawdown


class Processing(RPCServiceBase):
    """The complete service."""

    def __init__(self, name: str, state_dir: str, port: int = 50005, **options: Any) -> None:
        super().__init__("ProcessingServer", port, **options)
        self.name, self.state_dir = name, state_dir
        self._initialize_service()

    def _create_direct_server(self) -> Server:
        return Server(self.name, self.state_dir)

    def _start_server_process(self, address: Any, authkey: Any, server_ready: Any) -> Any:
        return self._spawn_server(
            Server, self.name, self.state_dir, address=address, authkey=authkey, server_ready=server_ready
        )

    def lose(self, hotkey: str, drawdown: float) -> None:
        """Note what a miner lost."""
        self._server_proxy.lose_rpc(hotkey, drawdown)

    def process_eliminations(self) -> None:
        """Have the server make a tick, if one is due; return when it is made."""
        self._server_proxy.process_eliminations_rpc()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as state, Processing("example-tick", state) as service:
        reader = EliminationReader("example-tick")
        service.lose("5Miner", 0.7)
        print("5Miner eliminated:", reader.is_hotkey_eliminated("5Miner"))
        service.process_eliminations()
        print("after a tick:", reader.is_hotkey_eliminated("5Miner"), reader["5Miner"]["reason"])
    SharedNamespace("example-tick").remove()
