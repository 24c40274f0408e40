"""Publishing eliminations from one's own process, without a child: readers in other processes see them.

Run it: ``python examples/in_one_process.py``
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

from shmelim import EliminationManagerServer
from shmelim.shm import SharedNamespace

NAME = "example-own"
ASK = f"from shmelim import EliminationReader; print(EliminationReader({NAME!r}).is_hotkey_eliminated('5Miner'))"


def ask_elsewhere() -> str:
    """Ask another process, which needs nothing but the name."""
    command = [sys.executable, "-c", ASK]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as state:
        # Holds the lock of the name and of the directory until the block ends. Any thread may call its methods.
        with EliminationManagerServer(SharedNamespace(NAME), state) as server:
            server.append_elimination_row_rpc("5Miner", 0.12, "MAX_TOTAL_DRAWDOWN")
            print("another process says:", ask_elsewhere())
        print("after its end:", ask_elsewhere())
    SharedNamespace(NAME).remove()
