"""Open positions in a process of their own, on disk as well: a killed server comes back with every one of them.

Run it: ``python examples/positions.py``
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from shmelim.service import RPCServiceBase
from shmelim.table import Writer


class PositionServer:
    """The state: position id -> position, written through to a file; published by hotkey."""

    def __init__(self, path: str, max_per_hotkey: int, table: str | None = None) -> None:
        self.path = Path(path)
        self.max_per_hotkey = max_per_hotkey
        self.positions: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.lock = threading.Lock()
        # What is on disk takes the place of what a predecessor published: callers never see an empty table.
        self.table = Writer(table, keep=True)
        hotkeys = {position["hotkey"] for position in self.positions.values()}
        self.table.replace_all({hotkey: self.get_positions_for_one_hotkey_rpc(hotkey) for hotkey in hotkeys})

    def health_check_rpc(self) -> dict[str, Any]:
        """Say how the server is."""
        writable = self.path.parent.is_dir()
        return {
            "status": "ok" if writable else f"no directory {self.path.parent}",
            "timestamp_ms": time.time_ns() // 1_000_000,
            "num_positions": len(self.positions),
        }

    def open_position_rpc(self, hotkey: str, pair: str, size: float) -> str:
        """Open a position; return its id."""
        if not size:
            raise ValueError("the size of a position must not be 0")
        with self.lock:
            if sum(p["hotkey"] == hotkey for p in self.positions.values()) >= self.max_per_hotkey:
                raise ValueError(f"{hotkey} has {self.max_per_hotkey} positions, which is the limit")
            number = str(uuid.uuid4())
            self._save(self.positions | {number: {"hotkey": hotkey, "pair": pair, "size": size}}, hotkey)
        return number

    def close_position_rpc(self, number: str) -> dict[str, Any]:
        """Close a position; return what it was. KeyError if there is none of that id."""
        with self.lock:
            closed = self.positions[number]
            self._save({key: value for key, value in self.positions.items() if key != number}, closed["hotkey"])
        return closed

    def get_positions_for_one_hotkey_rpc(self, hotkey: str) -> list[dict[str, Any]]:
        """Return a hotkey's positions."""
        return [position for position in self.positions.values() if position["hotkey"] == hotkey]

    def _save(self, positions: dict[str, dict[str, Any]], changed: str) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(positions))
        temporary.replace(self.path)
        self.positions = positions  # readers see the old dict or the new one
        self.table.put(changed, self.get_positions_for_one_hotkey_rpc(changed))


class PositionManager(RPCServiceBase):
    """What the validator holds: the complete service."""

    def __init__(
        self, path: str, port: int = 50002, running_unit_tests: bool = False, *, limit: int = 10, **options: Any
    ) -> None:
        options.setdefault("published_table", "positions")
        super().__init__("PositionManagerServer", port, running_unit_tests, **options)
        self.path, self.limit = path, limit
        self._initialize_service()

    def _create_direct_server(self) -> PositionServer:
        return PositionServer(self.path, self.limit)

    def _start_server_process(self, address: Any, authkey: Any, server_ready: Any) -> Any:
        arguments = self.path, self.limit, self.published_table
        return self._spawn_server(
            PositionServer, *arguments, address=address, authkey=authkey, server_ready=server_ready
        )

    def open_position(self, hotkey: str, pair: str, size: float) -> str:
        """Open a position; return its id."""
        return str(self._server_proxy.open_position_rpc(hotkey, pair, size))

    def close_position(self, number: str) -> dict[str, Any]:
        """Close a position; return what it was."""
        return dict(self._server_proxy.close_position_rpc(number))

    def get_positions_for_one_hotkey(self, hotkey: str) -> list[dict[str, Any]]:
        """Return a hotkey's positions, from shared memory."""
        return list(self._server_table.get(hotkey, []))


if __name__ == "__main__":
    with (
        tempfile.TemporaryDirectory() as directory,
        PositionManager(f"{directory}/positions.json", enable_health_check=True) as manager,
    ):
        manager.open_position("5Miner", "BTC/USD", 0.5)
        print("open:", manager.get_positions_for_one_hotkey("5Miner"))
        killed = manager.server_pid
        os.kill(killed or 0, signal.SIGKILL)  # an accident
        while manager.server_pid == killed:
            time.sleep(0.01)
        print("its server was killed, and is back")
        print("still open:", manager.get_positions_for_one_hotkey("5Miner"))
