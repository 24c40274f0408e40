"""Counts the Python calls and the files of this package that one operation passes in its caller's thread.

Run it: ``python -m bench.frames``, with ``-v`` for each file. Counted as ``sys.setprofile`` counts calls, warm:
after one operation of the same kind.
"""

from __future__ import annotations

import collections
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import shmelim
from shmelim import EliminationManager

_ROOT = str(Path(shmelim.__file__).parent)
_NAME = "frames"


def count(operation: Callable[[], object]) -> collections.Counter[str]:
    """Return how many calls an operation makes in each file of the package."""
    calls: collections.Counter[str] = collections.Counter()

    def profile(frame: FrameType, event: str, _argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(_ROOT):
            calls[os.path.relpath(file, _ROOT)] += 1

    sys.setprofile(profile)
    try:
        operation()
    finally:
        sys.setprofile(None)
    return calls


def measured(place: Path) -> Iterator[tuple[str, collections.Counter[str]]]:
    """Count an add, a check of a healthy server, and one that finds a dead server and restarts it."""
    options: dict[str, Any] = {"health_check_interval_s": 0, "max_consecutive_failures": 1}
    if hasattr(EliminationManager, "health_check_interval_ms"):
        # Else the owner's thread restarts it, and the check has nothing to do.
        options["restart_on_exit"] = False
    record = {
        "hotkey": "5Counted",
        "reason": "ZOMBIE",
        "dd": 0.1,
        "elimination_initiated_time_ms": 1_700_000_000_000,
        "price_info": {},
        "return_info": {},
    }
    with EliminationManager(
        None, None, None, name=_NAME, port=None, state_dir=place / "state", runtime_base=place / "run", **options
    ) as manager:
        for _ in range(2):
            manager.add_elimination("5Counted", record)
            add = count(lambda: manager.add_elimination("5Counted", record))
            check = count(manager.health_check)
            process = manager._server_process  # noqa: SLF001
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            restart = count(manager.health_check)
    yield "an add", add
    yield "a health check", check
    yield "a health check with restart", restart


def main() -> None:
    """Print the counts."""
    logging.disable()
    with tempfile.TemporaryDirectory(prefix="frames-") as place:
        for what, calls in measured(Path(place)):
            print(f"{what}: {calls.total()} calls in {len(calls)} files")
            if "-v" in sys.argv:
                for file, number in calls.most_common():
                    print(f"{number:6} {file}")


if __name__ == "__main__":
    main()
