"""How many instructions one check takes: counted by valgrind, so that the machine's noise does not matter.

Run with ``python -m bench.instructions``; needs valgrind, and the compiled read path. What is counted is the C
function behind ``EliminationReader.is_hotkey_eliminated``. It is called two different numbers of times, and
what the counts differ by is that of the calls.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.records import hotkey, record

SIZE = 256
CALLS = (1000, 3000)
FUNCTION = "test_0"  # of the extension: a method that tests one flag


def check(kind: str, calls: int) -> None:
    """Make so many checks, each of another hotkey; under valgrind."""
    from shmelim import EliminationManager
    from shmelim.shm import READ_PATH

    if READ_PATH != "native":
        sys.exit("the compiled read path is not in use")
    with EliminationManager(None, None, None, running_unit_tests=True) as manager:
        manager.sync_eliminations([record(number) for number in range(SIZE)])
        first = 0 if kind == "hit" else SIZE
        hotkeys = [hotkey(first + number % SIZE) for number in range(calls)]
        is_eliminated = manager.reader.is_hotkey_eliminated
        assert sum(map(is_eliminated, hotkeys)) == (calls if kind == "hit" else 0)


def counted(kind: str, calls: int) -> int:
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "callgrind.out"
        command = [
            "valgrind",
            "--tool=callgrind",
            f"--toggle-collect={FUNCTION}",
            f"--callgrind-out-file={output}",
        ]
        command += [sys.executable, "-m", "bench.instructions", kind, str(calls)]
        environment = os.environ | {"PYTHONHASHSEED": "0"}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        return int(re.search(r"^(?:totals|summary): (\d+)", output.read_text(), re.MULTILINE)[1])


def main() -> None:
    if len(sys.argv) == 3:
        check(sys.argv[1], int(sys.argv[2]))
        return
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed: apt-get install valgrind")
    for kind in ("hit", "miss"):
        few, many = (counted(kind, calls) for calls in CALLS)
        print(f"{kind}: {(many - few) / (CALLS[1] - CALLS[0]):.1f} instructions")


if __name__ == "__main__":
    main()
