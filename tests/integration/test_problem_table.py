"""The table of problems in docs/operations.md: every line can come true, and no other name."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from reference_validator import HOUR, Managed

import shmelim

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGE = Path(shmelim.__file__).parent
TESTS = Path(__file__).parent.parent
OPERATIONS = PACKAGE.parent / "docs" / "operations.md"

# Where each line is provoked, but for those that are provoked below; of `loop` there are two.
SHOWN_BY = {
    "commit_failed": "integration/test_health_problems.py"
    "::test_a_commit_that_failed_is_named_logged_once_and_over_with_the_next_that_works",
    "wal_large": "integration/test_health_problems.py::test_a_log_that_a_forgotten_read_keeps_growing_is_named",
    "shared_memory_full": "integration/test_health_problems.py::test_full_shared_memory_is_named",
    "disk_nearly_full": "integration/test_health_problems.py"
    "::test_room_that_runs_out_is_named_before_a_change_is_refused",
    "shared_memory_nearly_full": "integration/test_health_problems.py"
    "::test_room_that_runs_out_is_named_before_a_change_is_refused",
    "files_behind": "integration/test_health_problems.py::test_files_that_are_not_written_in_time_are_behind",
    "file_not_applied": "unit/test_mirror.py::test_is_a_named_problem_until_somebody_takes_it_away",
    "file_damaged": "faults/test_edits.py::test_but_has_not_one_usable_row_is_damaged_and_empties_nothing",
    "state_dir_contested": "unit/test_locks.py"
    "::test_a_lock_that_another_process_has_is_a_named_problem_until_it_is_given_back",
    "alerts_undelivered": "integration/test_notify.py"
    "::test_a_validator_whose_slack_is_away_says_so_in_its_health_and_tells_after_its_restart",
    "debts_old": "integration/test_health_problems.py::test_what_is_owed_for_long_is_named",
    "slashes_in_doubt": "unit/test_debts.py::test_health_tells_of_debts_and_of_slashes_in_doubt",
    "slash_journal": "faults/test_slash_journal.py::test_a_slash_that_cannot_be_written_there_is_not_begun",
    "money_held": "unit/test_debts_held.py::test_one_too_many_within_an_hour_holds_all",
    "shared_memory_lost": "faults/test_names_lost.py::test_it_publishes_again_and_every_reader_follows",
    "registry_behind": "faults/test_whose_state.py"
    "::test_a_registry_that_cannot_be_used_is_a_problem_and_no_refusal",
    "debts_unreadable": "integration/test_health_problems.py::test_debts_that_cannot_be_read_are_named",
    "guarded_change": "integration/test_cli_changing.py::test_a_guarded_change_needs_force_and_is_acknowledged",
    "connections_crowded": "faults/test_rpc_crowd.py::test_health_names_the_crowd_until_it_is_gone",
    "channel_unreachable": "integration/test_health_problems.py"
    "::test_what_is_wrong_with_its_channel_is_in_its_health",
    "tick_overdue": "unit/test_ticks.py::test_ticks_that_cease_are_a_problem_until_there_is_another",
    "slash under way": "integration/test_processing_hangs.py"
    "::test_contract_that_hangs_stops_no_other_slash_and_its_answer_counts",
    "slash not recorded": "integration/test_processing_slashes.py"
    "::test_an_answer_that_the_server_does_not_take_is_in_its_health",
    "loop tick": "integration/test_processing_loop.py::test_a_value_whose_lock_is_never_released_is_in_the_health",
    "loop sync": "integration/test_processing_loop.py"
    "::test_a_sync_that_never_ends_is_in_the_health_though_nothing_is_processed",
    "shutdown": "integration/test_processing_loop.py"
    "::test_a_shutdown_dict_that_hangs_stops_neither_the_loop_nor_sigterm",
    "clock": "integration/test_clock.py::test_nothing_is_deleted_in_the_tick_after_a_leap",
    "server_down": "unit/test_health_monitor.py"
    "::test_a_streak_is_told_once_each_restart_once_and_the_recovery_once",
    "cannot_check": "unit/test_health_monitor.py::test_what_is_the_askers_own_fault_is_not_counted_and_told_once",
    **dict.fromkeys(
        ("publisher_silent", "publisher_ended", "publisher_error", "publisher_held"),
        "unit/test_fleet_publishing.py::test_what_is_wrong_with_it_is_a_problem_of_the_name",
    ),
    "not_served": "integration/test_cli_health.py::test_a_name_that_was_never_served",
    "no_answer": "integration/test_cli_health.py::test_a_server_that_lives_and_cannot_be_reached_is_failing",
    "table_unreadable": "integration/test_cli_health.py::test_a_table_that_cannot_be_read_is_failing",
    "follower_old": "integration/test_web.py::test_a_table_that_follows_another_hosts_says_whose_and_how_old",
    "unchecked": "unit/test_health_monitor.py"
    "::test_a_server_that_cannot_be_checked_is_told_of_once_and_left_alone",
}

# Calls that pass a name on in a variable, by module and variable: which names those are.
PASSED_ON = {
    ("closing", "kind"): {"limit_orders", "positions"},
    ("processor", "kind"): {
        "perf-ledger elimination", "challenge-period elimination", "drawdown elimination", "zombie elimination",
    },
    ("alerts", "kind"): set(),  # it passes on what its callers say
    ("server", "whole_ms"): set(),  # a report of ticks
    ("health", "name"): {"cannot_check", "unchecked"},
    ("room", "name"): {"disk_nearly_full", "shared_memory_nearly_full"},
}  # fmt: skip


def lines_of_the_table() -> Iterator[tuple[str, str]]:
    """Name and second cell of each line of the tables in the section on problems."""
    section = OPERATIONS.read_text().split("\n## Problems, by name\n")[1].split("\n## ")[0]
    tables = section.split("\n| name |")[1:]
    for table in tables:
        for line in table.splitlines()[2:]:
            if not line.startswith("|"):
                break
            first, second = line.split("|")[1:3]
            for name in re.findall(r"`([^`]+)`", first):
                yield name, second.strip().strip("`")


def names_reported() -> set[str]:
    """Every name that some line of the package reports a problem by."""
    names: set[str] = set()
    for path in PACKAGE.glob("**/*.py"):
        calls = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and node.args
        ]
        for call in calls:
            if getattr(call.func, "attr", "") in ("report", "failed", "about", "each"):
                names |= names_by(call.args[0], path)
    return names | names_seen_from_outside()


def names_seen_from_outside() -> set[str]:
    """What no server reports of itself: the publisher's state, and what is seen of a name from this host."""
    publishing = ast.walk(ast.parse((PACKAGE / "fleet" / "publishing.py").read_text()))
    returned = [
        node.value.elts
        for node in publishing
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)
    ]
    names = {elements[0].value for elements in returned if isinstance(elements[0], ast.Constant)}
    assert names, "publishing.py says its problems in another way"
    seeing = [
        node
        for node in ast.walk(ast.parse((PACKAGE / "watch" / "seeing.py").read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "problem_of"
    ]
    assert seeing, "seeing.py says its problems in another way"
    return names | {each.args[0].value for each in seeing if isinstance(each.args[0], ast.Constant)}


def names_by(argument: ast.expr, path: Path) -> set[str]:
    if isinstance(argument, ast.Starred):
        argument = argument.value
    if isinstance(argument, ast.Constant):
        return {argument.value}
    if not isinstance(argument, ast.Name):
        return set()
    relative = path.relative_to(PACKAGE.parent).with_suffix("")
    value = getattr(importlib.import_module(".".join(relative.parts)), argument.id, None)
    if value is not None:
        return {value if isinstance(value, str) else value[0]}
    return PASSED_ON[path.stem, argument.id]


def test_every_name_that_the_code_reports_has_a_line_and_every_line_a_name_that_it_reports() -> None:
    assert names_reported() == {name for name, _ in lines_of_the_table()}


def defined_in(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_line_has_a_test_that_shows_it() -> None:
    lines = {f"{name} {subject}" if name == "loop" else name for name, subject in lines_of_the_table()}
    assert SHOWN_BY.keys() | PROVOKED.keys() == lines
    for place in SHOWN_BY.values():
        path, _, test = place.partition("::")
        assert test in defined_in(TESTS / path), place


# ---------------------------------------------------------------------- what goes wrong in the processing


def fail(point: str) -> Callable[[Managed], object]:
    return lambda managed: managed.validator.faults.fail(point, times=None)


def lose_contract(managed: Managed) -> None:
    managed.manager.contract_manager = None


def refuse_shares(managed: Managed) -> None:
    managed.environment.slash_proportion = lambda _reason: 2.0


def odd_ledger(managed: Managed) -> None:
    managed.validator.ledgers._ledgers["a"].drawdown = lambda: 1 / 0


def odd_row(managed: Managed) -> None:
    managed.validator.ledgers._liquidated["a"] = [0.7, managed.validator.now_ms, {}]
    original = managed.manager._processor.context.state.eliminate

    def refuse(hotkey: str, *rest: Any) -> Any:
        if hotkey == "a":
            raise ValueError("refused")
        return original(hotkey, *rest)

    managed.manager._processor.context.state.eliminate = refuse


def odd_reason(managed: Managed) -> None:
    odd_row(managed)
    managed.validator.ledgers._liquidated.clear()
    managed.validator.probation.fail("a", "PLAGIARISM", None)


def zombie(managed: Managed) -> None:
    odd_row(managed)
    managed.validator.ledgers._liquidated.clear()
    managed.validator.deregister("a")


def held_by_one_eliminated(managed: Managed) -> None:
    managed.manager.sync_eliminations([{"hotkey": "a", "reason": "PLAGIARISM"}])
    managed.validator.faults.fail("store", times=None)


def long_gone(managed: Managed) -> None:
    managed.tick()
    managed.validator.deregister("a")
    managed.validator.pass_time(72 * HOUR)
    managed.validator.faults.fail("remove", times=None)


def nobodys_zombie(managed: Managed) -> None:
    managed.manager.sync_eliminations([{"hotkey": "lost+found", "reason": "ZOMBIE"}])


def odd_entry(managed: Managed) -> None:
    managed.validator.registry.set_to([*managed.validator.registry._hotkeys, 5])


def anomaly(managed: Managed) -> None:
    managed.validator.registry.set(managed.validator.registry._hotkeys[:5])


# By the name: the subject, and what provokes it. "a" loses 20 % before.
PROVOKED: dict[str, tuple[str, Callable[[Managed], object]]] = {
    "drawdown elimination": ("a", odd_ledger),
    "perf-ledger elimination": ("a", odd_row),
    "challenge-period elimination": ("a", odd_reason),
    "zombie elimination": ("a", zombie),
    "first refresh": ("a", held_by_one_eliminated),
    "deletion": ("a", long_gone),
    "limit_orders": ("a", fail("cancel")),
    "positions": ("a", fail("store")),
    "no contract manager": ("the contract manager", lose_contract),
    "slash not made": ("a", refuse_shares),
    "slash in doubt": ("", fail("slash")),
    "step": ("drawdown eliminations", fail("ledgers")),
    "websockets": ("the queue", fail("websockets")),
    "not a hotkey": ("lost+found", nobodys_zombie),
    "metagraph": ("entries", odd_entry),
    "departures": ("the metagraph", anomaly),
}


@pytest.mark.parametrize("name", PROVOKED)
def test_what_goes_wrong_in_the_processing_is_in_the_health_by_its_name(tmp_path: Path, name: str) -> None:
    subject, provoke = PROVOKED[name]
    with Managed("direct", "unused", tmp_path) as managed:
        validator = managed.validator
        validator.register("a", *(f"other-{number}" for number in range(40)))
        if name != "first refresh":
            managed.tick()
        validator.open_position("a")
        validator.limit_orders.place("a")
        if name not in ("challenge-period elimination", "zombie elimination", "first refresh"):
            validator.lose("a", 0.2)
        provoke(managed)
        managed.tick()
        health = managed.manager._server_proxy.health_check_rpc()
        (problem,) = (problem for problem in health["problems"] if problem["name"] == name)
        assert problem["part"] == "processing"
        assert problem["remedy"]
        assert problem["since_ms"] > 0
        assert subject in ("", problem["subject"])
