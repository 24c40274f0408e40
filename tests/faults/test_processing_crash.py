"""A SIGKILL at every step of an elimination: afterwards its effects are complete, and no slash was made twice.

A step is a line of Python, of the processing, of the server, or of the validator's managers, which store what they
do on disk.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import reference_validator
from crashing import Child, call, kill_self
from reference_validator import HOUR, Managed

import shmelim.eliminations
from shmelim import EliminationManagerServer
from shmelim.eliminations.calls import ProcessingCalls, ServerAwayError
from shmelim.eliminations.debts.states import IN_DOUBT
from shmelim.errors import StateUnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

PAIRS = ("BTC/USD", "ETH/USD")
SAMPLE = 24
PARTS = 8  # of the full size, so that several processes can share it

_DOMAIN = Path(shmelim.eliminations.__file__).parent
_VALIDATOR = Path(reference_validator.__file__).parent


def at_step(stop: int, act: Callable[[], None], *places: Path, threads: bool = False) -> Callable[[], int]:
    """From now on count lines in these places; at number ``stop``, act. Returns what ends it.

    Those of this thread, or of all ``threads`` that are started from now on too.
    """
    roots = tuple(f"{place}{os.sep}" for place in places)
    count = 0

    def inside(_frame: FrameType, event: str, _arg: object) -> Any:
        nonlocal count
        if event == "line":
            count += 1
            if count == stop:
                act()
        return inside

    def outside(frame: FrameType, _event: str, _arg: object) -> Any:
        return inside if frame.f_code.co_filename.startswith(roots) else None

    def end() -> int:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
        return count

    sys.settrace(outside)
    if threads:
        threading.settrace(outside)
    return end


def prepare(directory: Path) -> int:
    """Leave a validator on disk that has one miner to eliminate; return when it was liquidated."""
    with Managed("direct", "unused", directory) as managed:
        validator = managed.validator
        validator.register("victim", "bystander")
        managed.tick()
        for hotkey in ("victim", "bystander"):
            validator.limit_orders.place(hotkey)
            for pair in PAIRS:
                validator.open_position(hotkey, pair)
        validator.pass_time(HOUR)
        validator.lose("victim", 0.7)
        return validator.now_ms


def check(managed: Managed, eliminated_ms: int, *, doubt_allowed: bool = True) -> None:
    """What must hold once two ticks were made after a crash."""
    validator = managed.validator
    assert managed.reasons == {"victim": "LIQUIDATED"}
    assert managed.manager.get_elimination("victim")["elimination_initiated_time_ms"] == eliminated_ms
    assert validator.is_flat("victim")
    assert not validator.is_flat("bystander")
    for holding in validator.book.on_disk("victim"):
        assert [trade.at_ms for trade in holding.trades][1:] == [eliminated_ms], "closed once, at its time"
    slashes = validator.collateral.slashes()
    assert slashes in ([], ["victim"])
    debts = [(debt["kind"], debt["state"]) for debt in managed.debts]
    if debts:
        assert doubt_allowed
        assert debts == [("slash", IN_DOUBT)]
        assert any("nobody knows" in text for text in managed.alerts), "people are told"
    else:
        assert slashes == ["victim"], "neither made nor in doubt"


def steps(of: Callable[[int], int]) -> int:
    """How many steps there are, by a run in which nothing happens at any."""
    return call(functools.partial(of, -1))


def sample(total: int) -> range:
    return range(1, total + 1, max(1, total // SAMPLE))


# ---------------------------------------------------------------------- processor and server in one process


def eliminate_here(directory: Path, stop: int) -> int:
    managed = Managed("direct", "unused", directory)
    end = at_step(stop, kill_self, _DOMAIN, _VALIDATOR)
    managed.manager.process_eliminations()
    return end()


def was_killed(child: Child, stop: int) -> bool:
    """Whether a child died at this step; the last ones are not there in every run: who commits is not settled."""
    if child.wait() == -signal.SIGKILL:
        return True
    assert child.result() < stop
    return False


def expect_kills(killed: list[bool], total: int) -> None:
    """Nearly every one of the runs must have died where it should; how many did is told."""
    print(f"killed at {sum(killed)} of {len(killed)} steps; a whole tick has {total}")
    assert sum(killed) >= 0.9 * len(killed)


def part_of(part: int) -> Callable[[int], range]:
    return lambda total: range(1 + part, total + 1, PARTS)


def crash_here(directory: Path, prepared: Path, eliminated_ms: int, stop: int) -> bool:
    shutil.copytree(prepared, directory)
    with Child(functools.partial(eliminate_here, directory, stop)) as child:
        killed = was_killed(child, stop)
    with Managed("direct", "unused", directory) as managed:
        for _ in range(2):
            managed.tick()
        check(managed, eliminated_ms)
    shutil.rmtree(directory)
    return killed


def crashes_here(tmp_path: Path, choose: Callable[[int], range]) -> None:
    eliminated_ms = prepare(tmp_path / "prepared")
    shutil.copytree(tmp_path / "prepared", tmp_path / "whole")
    total = steps(functools.partial(eliminate_here, tmp_path / "whole"))
    assert total > 500, "the steps are not seen"
    killed = [
        crash_here(tmp_path / f"at-{stop}", tmp_path / "prepared", eliminated_ms, stop) for stop in choose(total)
    ]
    expect_kills(killed, total)


def test_killed_at_a_sample_of_steps(tmp_path: Path) -> None:
    crashes_here(tmp_path, sample)


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_killed_at_every_step(tmp_path: Path, part: int) -> None:
    crashes_here(tmp_path, part_of(part))


# ---------------------------------------------------------------------- the processor's process alone


def eliminate_there(managed: Managed, stop: int) -> int:
    """In a forked child, whose manager is a client of the parent's server."""
    end = at_step(stop, kill_self, _DOMAIN / "rules", _VALIDATOR, threads=True)
    managed.manager.process_eliminations()
    return end()


def managed_there(name: str, directory: Path) -> Managed:
    """One whose server is forked from a process that has it imported already: there are hundreds."""
    multiprocessing.set_forkserver_preload([EliminationManagerServer.__module__])
    return Managed("rpc", name, directory, start_method="forkserver", slash_lease_s=0)


def crashes_there(name: Callable[[], str], tmp_path: Path, choose: Callable[[int], range]) -> None:
    eliminated_ms = prepare(tmp_path / "prepared")
    shutil.copytree(tmp_path / "prepared", tmp_path / "whole")
    with managed_there(name(), tmp_path / "whole") as managed:
        total = steps(functools.partial(eliminate_there, managed))
    assert total > 200
    killed = []
    for stop in choose(total):
        directory = tmp_path / f"at-{stop}"
        shutil.copytree(tmp_path / "prepared", directory)
        with managed_there(name(), directory) as managed:
            with Child(functools.partial(eliminate_there, managed, stop)) as child:
                killed.append(was_killed(child, stop))
            managed.restart()
            for _ in range(2):
                managed.tick()
            check(managed, eliminated_ms)
        shutil.rmtree(directory)
    expect_kills(killed, total)


def test_processor_killed_at_a_sample_of_steps(new_name: Callable[[], str], tmp_path: Path) -> None:
    crashes_there(new_name, tmp_path, lambda total: range(1, total + 1, total // 10))


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_processor_killed_at_every_step(new_name: Callable[[], str], tmp_path: Path, part: int) -> None:
    crashes_there(new_name, tmp_path, part_of(part))


# ---------------------------------------------------------------------- the server alone


@pytest.mark.parametrize("carried_out", [False, True], ids=["before", "after"])
def test_server_killed_around_every_call_of_an_elimination(
    new_name: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carried_out: bool
) -> None:
    """The processor lives on and knows what it did: nothing stays in doubt."""
    eliminated_ms = prepare(tmp_path / "prepared")
    original = ProcessingCalls._call
    calls: list[str] = []
    stop, ready = 0, False

    def with_a_death(self: ProcessingCalls, method: str, *args: Any, **options: Any) -> Any:
        if not ready:
            return original(self, method, *args, **options)
        calls.append(method)
        if len(calls) != stop:
            return original(self, method, *args, **options)
        if carried_out:
            original(self, method, *args, **options)
        os.kill(managed.manager.server_pid, signal.SIGKILL)
        raise ServerAwayError(f"no answer to {method}")

    monkeypatch.setattr(ProcessingCalls, "_call", with_a_death)
    while not stop or len(calls) >= stop:
        stop, calls, ready = stop + 1, [], False
        directory = tmp_path / f"at-{stop}"
        shutil.copytree(tmp_path / "prepared", directory)
        with Managed("rpc", new_name(), directory) as managed:
            ready = True
            with contextlib.suppress(StateUnavailableError):
                managed.manager.process_eliminations()
            if len(calls) < stop:
                break
            managed.manager.restart_server()
            for _ in range(2):
                managed.tick()
            check(managed, eliminated_ms, doubt_allowed=False)
    assert stop > 6, "an elimination makes more calls than this"
