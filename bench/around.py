"""What is paid around a check: to import the reader, to be woken by a change, and to wait for one.

python -m bench.around
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from bench.crew import Process
from bench.stats import percentile
from bench.worker import obey
from shmelim.table import Reader, Writer

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable
    from multiprocessing.connection import Connection

__all__ = ["importing", "waking"]

_STARTS = 7
_PAUSE = 0.002
_QUIET = 2.0
_IDLE = 1.0
_END = -1
# The modules it has, and its own memory in bytes, after what the first argument says.
_MEASURE = """
import os, sys
exec(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[1])
print(len(sys.modules), pages * os.sysconf("SC_PAGE_SIZE"))
"""
_READER = "from shmelim import EliminationReader"


def importing() -> dict[str, float]:
    """Return the modules, the memory in MB and the seconds that importing the reader takes above bare Python."""
    # In turns, so that both meet the same machine.
    found = [(_started(""), _started(_READER)) for _ in range(_STARTS)]
    more = [tuple(b - a for a, b in zip(*pair, strict=True)) for pair in found]
    modules, memory, seconds = (statistics.median(column) for column in zip(*more, strict=True))
    return {"modules": found[0][1][0], "more_modules": modules, "mb": memory / 2**20, "seconds": seconds}


def _started(program: str) -> tuple[float, float, float]:
    began = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", _MEASURE, program], capture_output=True, check=True, text=True)
    took = time.perf_counter() - began
    modules, memory = map(int, out.stdout.split())
    return modules, memory, took


def waking(publishes: int = 1000) -> dict[str, float]:
    """Return percentiles of the seconds from a publish to its waiter's next line, and what waiting costs.

    The waiter is another process, on another processor where there is one.
    """
    name = f"bench-{os.getpid()}"
    with Writer(name) as writer, Process("a waiter", _waiter, name, environment={}, seat=1) as process:
        try:
            writer.put("moment", 0)
            process.answer(20)
            process.tell("wait")
            for _ in range(publishes):
                time.sleep(_PAUSE)  # until it sleeps again
                writer.put("moment", time.monotonic_ns())
            writer.put("moment", _END)
            late = sorted(process.answer(60))
            busy = process.ask("idle", _IDLE)
            put = _put_cost(writer)
        finally:
            writer.close(unlink=True)
    return {
        "p50": percentile(late, 0.5),
        "p99": percentile(late, 0.99),
        "publishes": len(late),
        "cpu_while_waiting": busy,
        "put": put,
    }


def _put_cost(writer: Writer) -> float:
    """Return the median seconds of a publish for which nobody waits."""
    took = []
    for number in range(2000):
        began = time.perf_counter_ns()
        writer.put("moment", number)
        took.append(time.perf_counter_ns() - began)
    return statistics.median(took) / 1e9


def _waiter(pipe: Connection, name: str) -> None:
    def start(closing: contextlib.ExitStack) -> tuple[Any, dict[str, Callable]]:
        reader = closing.enter_context(Reader(name, wait=20))

        def wait() -> list[float]:
            late, version = [], reader.version
            while reader.wait_for_change(_QUIET, since=version):
                woken, version = time.monotonic_ns(), reader.version
                if (put := reader["moment"]) == _END:
                    return late
                late.append((woken - put) / 1e9)
            raise TimeoutError(f"no publish in {_QUIET} s")

        def idle(seconds: float) -> float:
            began = time.process_time()
            reader.wait_for_change(seconds)
            return (time.process_time() - began) / seconds

        return None, {"wait": wait, "idle": idle}

    obey(pipe, start)


def main() -> None:
    for name, figures in (("import", importing()), ("waking", waking())):
        print(name, ", ".join(f"{key} {value:.6g}" for key, value in figures.items()))


if __name__ == "__main__":
    main()
