"""What a tick costs in which nothing happens: counted, since a timing tells more of the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from reference_validator import Managed

from shmelim.eliminations.calls import ProcessingCalls
from shmelim.eliminations.rules import deadlines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MINERS = 256
ELIMINATED = 40


@pytest.fixture(params=["direct", "rpc"])
def managed(request: pytest.FixtureRequest, new_name: Callable[[], str], tmp_path: Path) -> Iterator[Managed]:
    with Managed(request.param, new_name(), tmp_path) as made:
        validator = made.validator
        validator.register(*(f"miner-{number:040}" for number in range(MINERS)))
        for hotkey in validator.registry.hotkeys[:ELIMINATED]:
            validator.probation.fail(hotkey, "PLAGIARISM", None)
        made.tick()
        made.tick()
        # The digest of a file that follows behind would be a commit too.
        made.manager.save_eliminations()
        yield made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    original, made = ProcessingCalls._call, []

    def call(self: ProcessingCalls, method: str, *args: Any, **options: Any) -> Any:
        made.append(method)
        return original(self, method, *args, **options)

    monkeypatch.setattr(ProcessingCalls, "_call", call)
    return made


def test_tick_with_nothing_to_do_asks_three_things_reports_and_commits_nothing(
    managed: Managed, calls: list[str]
) -> None:
    proxy = managed.manager._server_proxy
    before = proxy.health_check_rpc()["commits"], managed.manager.reader.version
    for _ in range(3):
        managed.tick()
    assert (
        calls
        == [
            "get_replacements_rpc",
            "get_first_refresh_ran_rpc",
            "get_debts_rpc",
            "get_money_held_rpc",
            "report_processing_rpc",
        ]
        * 3
    )
    assert (proxy.health_check_rpc()["commits"], managed.manager.reader.version) == before


def test_tick_with_nothing_to_do_hands_over_to_a_thread_six_times(
    new_name: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each costs tens of microseconds: nothing is handed over that asks nobody anything."""
    original, made = deadlines.call, []

    def call(scope: object, what: str, *args: Any, **options: Any) -> Any:
        made.append(what)
        return original(scope, what, *args, **options)

    with Managed("rpc", new_name(), tmp_path) as managed:
        managed.validator.register("a")
        managed.manager.sync_epoch = None
        managed.tick()
        monkeypatch.setattr(deadlines, "call", call)
        managed.tick()
    assert made == [
        "metagraph",
        "perf-ledger elimination",
        "challenge-period elimination",
        "drawdown elimination",
        "drawdown elimination",
        "zombie elimination",
    ]


def test_look_between_two_ticks_asks_the_server_nothing(
    new_name: Callable[[], str], tmp_path: Path, calls: list[str]
) -> None:
    with Managed("rpc", new_name(), tmp_path) as managed:
        managed.validator.register("a")
        managed.tick()
        calls.clear()
        managed.tick(1000)
        assert calls == []


def test_tick_whose_metagraph_changed_tells_the_server_once(managed: Managed, calls: list[str]) -> None:
    managed.validator.deregister(managed.validator.registry.hotkeys[-1])
    for _ in range(2):
        managed.tick()
    assert calls.count("update_metagraph_rpc") == 1


def test_records_are_decoded_only_when_they_changed(managed: Managed, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = managed.manager.reader
    decoded: list[None] = []
    original = type(reader).snapshot
    monkeypatch.setattr(type(reader), "snapshot", lambda self: decoded.append(None) or original(self))
    for _ in range(3):
        managed.tick()
    assert decoded == []
    managed.manager.append_elimination_row("one-more", 0.1, "PLAGIARISM")
    managed.tick()
    assert len(decoded) == 1
