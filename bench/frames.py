"""How many of the package's functions a thing passes, and in how many files: ``python -m bench.frames``.

Counted as ``sys.setprofile`` counts calls of Python functions, in every thread of this process. What runs in the
background (heartbeats, the thread that writes the JSON files) is not part of it.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import shmelim
from shmelim import EliminationClient, EliminationManager, EliminationManagerServer
from shmelim.eliminations.serve import ServeOptions, Service
from shmelim.shm import SharedNamespace

PACKAGE = str(Path(shmelim.__file__).parent) + "/"
NAME = "bench-frames"
HOTKEY = "5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs"


class Scenario(NamedTuple):
    """What is counted: ``prepare`` yields the act, and cleans up."""

    title: str
    prepare: Callable[[Path], contextlib.AbstractContextManager[Callable[[], Any]]]


def record(hotkey: str) -> dict[str, Any]:
    return {
        "hotkey": hotkey,
        "dd": 0.11,
        "reason": "MAX_TOTAL_DRAWDOWN",
        "elimination_initiated_time_ms": 1_700_000_000_000,
        "price_info": {"BTC/USD": 1.5},
        "return_info": {"x": 1},
    }


def adding(add: Callable[[str, dict[str, Any]], bool]) -> Callable[[], Any]:
    for n in range(3):
        add(f"before-{n}", record(f"before-{n}"))
    return lambda: add(HOTKEY, record(HOTKEY))


@contextlib.contextmanager
def add_to_a_server_object(place: Path) -> Iterator[Callable[[], Any]]:
    with EliminationManagerServer(None, place / "state") as server:
        yield adding(server.add_elimination_rpc)


@contextlib.contextmanager
def add_in_direct_mode(place: Path) -> Iterator[Callable[[], Any]]:
    with EliminationManager(None, None, None, running_unit_tests=True, state_dir=place / "state") as manager:
        yield adding(manager.add_elimination)


@contextlib.contextmanager
def add_by_a_client(place: Path) -> Iterator[Callable[[], Any]]:
    """Client and server in one process, so that both are counted."""
    try:
        with (
            Service(ServeOptions(NAME, place / "state", runtime_base=place, registry=None)),
            EliminationClient(NAME, runtime_base=place) as client,
        ):
            yield adding(client.add_elimination)
    finally:
        SharedNamespace(NAME).remove()


@contextlib.contextmanager
def managed(place: Path, **options: Any) -> Iterator[EliminationManager]:
    """A manager whose server is a process of its own, which is not counted."""
    with EliminationManager(
        None,
        None,
        None,
        name=NAME,
        port=None,
        state_dir=place / "state",
        runtime_base=place / "run",
        health_check_interval_s=0,
        max_consecutive_failures=1,
        registry=None,
        **options,
    ) as manager:
        manager.health_check()
        yield manager
    SharedNamespace(NAME).remove()


@contextlib.contextmanager
def check_of_a_healthy_server(place: Path) -> Iterator[Callable[[], Any]]:
    with managed(place) as manager:
        yield manager.health_check


@contextlib.contextmanager
def check_that_restarts(place: Path) -> Iterator[Callable[[], Any]]:
    """With ``restart_on_exit=False``, as the requirement has it: else the owner's thread restarts it."""
    with managed(place, restart_on_exit=False) as manager:
        process = manager._server_process  # noqa: SLF001
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        yield manager.health_check


SCENARIOS = [
    Scenario("add, by a client of a server", add_by_a_client),
    Scenario("add, manager in direct mode", add_in_direct_mode),
    Scenario("add, server object", add_to_a_server_object),
    Scenario("health check", check_of_a_healthy_server),
    Scenario("health check with restart", check_that_restarts),
]


class Frames:
    """The calls of the package's functions while it counts, by file and function."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self._counting = False
        # For threads that are started from now on, and for this one.
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def of(self, act: Callable[[], Any]) -> list[tuple[str, str]]:
        self.calls.clear()
        self._counting = True
        act()
        self._counting = False
        return list(self.calls)

    def _note(self, frame: FrameType, event: str, _arg: Any) -> None:
        code = frame.f_code
        if event == "call" and self._counting and code.co_filename.startswith(PACKAGE) and not in_the_background():
            self.calls.append((code.co_filename.removeprefix(PACKAGE), code.co_qualname))


def in_the_background() -> bool:
    name = threading.current_thread().name
    return name in {"shmelim-heartbeat", "shmelim-files", "shmelim-log"} or name.endswith("-owner")


def count(scenario: Scenario, frames: Frames) -> list[tuple[str, str]]:
    with tempfile.TemporaryDirectory(prefix="shmelim-") as place, scenario.prepare(Path(place)) as act:
        return frames.of(act)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", action="store_true", help="calls by file")
    parser.add_argument("--calls", action="store_true", help="every call, in order")
    options = parser.parse_args()
    logging.disable()
    frames = Frames()
    print(f"{'':40} {'calls':>6} {'files':>6}")
    for scenario in SCENARIOS:
        calls = count(scenario, frames)
        by_file = Counter(file for file, _ in calls)
        print(f"{scenario.title:40} {len(calls):>6} {len(by_file):>6}")
        if options.calls:
            print(*(f"    {file}: {function}" for file, function in calls), sep="\n")
        if options.files:
            print(*(f"    {number:4} {file}" for file, number in by_file.most_common()), sep="\n")


if __name__ == "__main__":
    main()
