"""Eliminations as a service: changed over the channel, read by any process from shared memory without asking it.

Run it: ``python examples/eliminations.py``
"""

from __future__ import annotations

import tempfile
from typing import Any

from shmelim import EliminationManagerServer, EliminationReader
from shmelim.service import RPCServiceBase
from shmelim.shm import SharedNamespace


def make_server(name: str, state_dir: str) -> EliminationManagerServer:
    """Make the server object, in the server process: only the process that makes it may write."""
    return EliminationManagerServer(SharedNamespace(name), state_dir)


class Eliminations(RPCServiceBase):
    """The complete service."""

    def __init__(
        self, name: str, state_dir: str, port: int = 50004, running_unit_tests: bool = False, **options: Any
    ) -> None:
        super().__init__("EliminationManagerServer", port, running_unit_tests, **options)
        self.name, self.state_dir = name, state_dir
        self._initialize_service()

    def _create_direct_server(self) -> EliminationManagerServer:
        return EliminationManagerServer()  # in private memory

    def _start_server_process(self, address: Any, authkey: Any, server_ready: Any) -> Any:
        return self._spawn_server(
            make_server, self.name, self.state_dir, address=address, authkey=authkey, server_ready=server_ready
        )

    def append_elimination_row(self, hotkey: str, current_dd: float | None, reason: str) -> bool:
        """Eliminate a miner; False if that was an update."""
        return bool(self._server_proxy.append_elimination_row_rpc(hotkey, current_dd, reason))

    def is_hotkey_eliminated(self, hotkey: str) -> bool:
        """Ask the server; other processes ask an EliminationReader, which is a thousand times faster."""
        return bool(self._server_proxy.is_hotkey_eliminated_rpc(hotkey))


if __name__ == "__main__":
    with (
        tempfile.TemporaryDirectory() as state,
        Eliminations("example", state, enable_health_check=True) as service,
    ):
        reader = EliminationReader("example")
        service.append_elimination_row("5Miner", 0.12, "MAX_TOTAL_DRAWDOWN")
        print("5Miner eliminated:", reader.is_hotkey_eliminated("5Miner"))
        print("5Other eliminated:", reader.is_hotkey_eliminated("5Other"))
        print("healthy:", service.health_check())
    print("without the server:", reader.is_hotkey_eliminated("5Miner"))
    SharedNamespace("example").remove()
