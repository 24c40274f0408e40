"""The floors of the house: imports run downwards only, and in no circle, neither between files nor folders."""

from __future__ import annotations

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Which files each file imports, also inside functions and for types alone."""
    graph = grimp.build_graph("shmelim", cache_dir=None)

    def is_of_a_file(importer: str, imported: str) -> bool:
        # Of the compiled module, which is not in the graph, grimp makes its folder.
        details = graph.get_import_details(importer=importer, imported=imported)
        return not all("import _native" in detail["line_contents"] for detail in details)

    return {
        name: {other for other in graph.find_modules_directly_imported_by(name) if is_of_a_file(name, other)}
        for name in graph.modules
    }


def circle(imports: dict[str, set[str]]) -> list[str]:
    """One circle of files that import each other; empty if there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_file_imports_itself_by_way_of_others(imports: dict[str, set[str]]) -> None:
    assert len(imports) > 100
    assert circle(imports) == []


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        ("shmelim.system.clock", "shmelim.cli.status"),
        ("shmelim.eliminations.store.schema", "shmelim.eliminations.store.store"),
        ("shmelim.eliminations.rules.alerts", "shmelim.eliminations.rules"),
    ],
)
def test_one_import_that_closes_a_circle_would_be_found(
    imports: dict[str, set[str]], lower: str, upper: str
) -> None:
    assert {lower, upper} <= set(circle(imports | {lower: imports[lower] | {upper}}))


def test_floors_and_rooms_are_as_the_contracts_in_pyproject_say() -> None:
    # In a process of its own, as it configures logging.
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " 0 broken" in run.stdout
