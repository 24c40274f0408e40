"""What a slow disk costs whom: each ``fsync`` of the server takes so long, and readers and callers go on.

    python -m bench.slow_disk [--fsync-ms 200] [--callers 12] [--adds 5]

The server runs under a shim of ten lines of C that waits before it calls the real function (so this needs ``cc``).
Measured: a single add; adds of many callers at once, which share commits; checks and questions of health while
those are under way; and checks while nothing is, which they should equal.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.records import hotkey, record
from bench.stats import enough_for, percentile
from bench.units import duration
from shmelim import EliminationClient, EliminationReader
from shmelim.errors import NotServingError

_SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <unistd.h>
static int slowly(const char *name, int descriptor) {
    usleep(%d);
    return ((int (*)(int))dlsym(RTLD_NEXT, name))(descriptor);
}
int fsync(int descriptor) { return slowly("fsync", descriptor); }
int fdatasync(int descriptor) { return slowly("fdatasync", descriptor); }
"""
_NAME = "bench-slow"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fsync-ms", type=int, default=200, help="what each fsync takes longer (default 200)")
    parser.add_argument("--callers", type=int, default=12, help="threads that add, each by a client of its own")
    parser.add_argument("--adds", type=int, default=5, help="that each of them makes")
    options = parser.parse_args()
    compiler = shutil.which("cc")
    if compiler is None:
        parser.error("this needs a C compiler named cc")
    with tempfile.TemporaryDirectory() as place:
        source, shim = Path(place, "shim.c"), Path(place, "shim.so")
        source.write_text(_SHIM % (options.fsync_ms * 1000))
        subprocess.run([compiler, "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
        os.environ["SHMELIM_RUNTIME_DIR"] = f"{place}/run"
        os.environ["SHMELIM_REGISTRY"] = "off"
        command = [sys.executable, "-m", "shmelim"]
        serve = [*command, "serve", "--name", _NAME, "--state-dir", f"{place}/state", "--replace-published"]
        slowed = os.environ | {"LD_PRELOAD": str(shim)}
        with subprocess.Popen(serve, env=slowed, stdout=subprocess.DEVNULL) as server:
            try:
                measure(when_served(server), options.callers, options.adds)
            finally:
                server.terminate()
        subprocess.run([*command, "forget", "--name", _NAME, "--yes"], stdout=subprocess.DEVNULL, check=True)


def measure(reader: EliminationReader, callers: int, adds: int) -> None:
    first, known = EliminationClient(_NAME), hotkey(0)
    add(first, 0)  # which finds a store whose log is still empty
    alone = [add(first, number) for number in range(1, 6)]
    show("a single add", alone)
    second = time.monotonic() + 1
    quietly = repeated(lambda: reader.is_hotkey_eliminated(known), lambda: time.monotonic() > second)
    with ThreadPoolExecutor(callers + 2) as pool:
        began = time.monotonic()
        under_way = [pool.submit(add_some, 10 + caller * adds, adds) for caller in range(callers)]

        def is_over() -> bool:
            return all(one.done() for one in under_way)

        health = pool.submit(repeated, first.health_check, is_over)
        checks = pool.submit(repeated, lambda: reader.is_hotkey_eliminated(known), is_over)
        taken = [one for caller in under_way for one in caller.result()]
        whole = time.monotonic() - began
    show(f"{len(taken)} adds of {callers} callers", taken)
    print(f"    all in {duration(whole)}; one by one they would take {duration(min(alone) * len(taken))}")
    show("health meanwhile", health.result())
    show("a check meanwhile", checks.result())
    show("a check, nothing under way", quietly)


def add(client: EliminationClient, number: int) -> float:
    return seconds(lambda: client.add_elimination(hotkey(number), record(number)))


def add_some(first: int, count: int) -> list[float]:
    client = EliminationClient(_NAME)
    return [add(client, number) for number in range(first, first + count)]


def when_served(server: subprocess.Popen) -> EliminationReader:
    while server.poll() is None:
        try:
            EliminationClient(_NAME).close()  # it takes calls a moment after it can be read
            return EliminationReader(_NAME)
        except NotServingError:
            time.sleep(0.05)
    sys.exit("the server did not start")


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def repeated(act: Callable[[], object], is_over: Callable[[], bool]) -> list[float]:
    taken = []
    while not is_over():
        taken.extend(seconds(act) for _ in range(10))
        time.sleep(0.001)  # for the others who need this interpreter
    return taken


def show(title: str, taken: list[float]) -> None:
    taken.sort()
    shares = [share for share in (0.5, 0.99) if enough_for(share, len(taken))]
    shown = [f"p{share * 100:.0f} {duration(percentile(taken, share)):>8}" for share in shares]
    print(f"{title:28}{len(taken):8,} times   {'   '.join([*shown, f'worst {duration(taken[-1]):>8}'])}")


if __name__ == "__main__":
    main()
