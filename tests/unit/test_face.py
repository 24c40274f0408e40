"""The public face: names that are loaded when they are asked for, and look to everybody as if they always were."""

from __future__ import annotations

import ast
import copy
import doctest
import importlib
import pickle
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import shmelim
import shmelim.shm

FACE = Path(shmelim.__file__)
ROOT = FACE.parent.parent

SCRIPT = """\
from shmelim import EliminationClient, EliminationManager, EliminationReader, NotServingError, Status, __version__
from shmelim import EliminationRaeder  # misspelt

reader = EliminationReader("shmelim")
eliminated: bool = reader.is_hotkey_eliminated("a")
status: Status = reader.status("a")
version: str = __version__
hotkeys: set[str] = EliminationClient("shmelim").get_eliminated_hotkeys()
error: type[ConnectionError] = NotServingError
reader.is_hotkey_eliminated(7)  # not a hotkey
reader.is_eliminated("a")  # no such method
number: int = reader.status("a").name  # not a number
manager = EliminationManager(wrong=1)  # no such parameter

from shmelim.table import Reader, Writer

text = Reader("a")
anything: list[int] = text["a"]
text[b"a"]  # not a text
raw = Reader("a", keys=bytes, decode=bytes)
record: bytes | None = raw.get(b"a")
number = raw[b"a"]  # not a number
put: Writer[str, float] = Writer("a")
put.put("a", "b")  # not a float
put.snapshot()  # not a reader
"""
EXPECTED = {
    (19, "index"),
    (22, "assignment"),
    (24, "arg-type"),
    (25, "attr-defined"),
    (2, "attr-defined"),
    (10, "arg-type"),
    (11, "attr-defined"),
    (12, "assignment"),
    (13, "call-arg"),
}


def imported_for_type_checkers(file: Path) -> dict[str, str]:
    """Return {name: module} of the imports under ``if TYPE_CHECKING:``."""
    blocks = [
        node
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return {
        alias.name: statement.module
        for block in blocks
        for statement in block.body
        if isinstance(statement, ast.ImportFrom) and statement.module is not None
        for alias in statement.names
    }


def test_the_table_the_type_checkers_view_and_all_name_the_same() -> None:
    table = {name: f"shmelim.{module}" for name, module in shmelim._MODULES.items()}
    assert imported_for_type_checkers(FACE) == table
    errors = {name for name, value in vars(shmelim.errors).items() if getattr(shmelim, name, None) is value}
    assert {*table, *errors & set(shmelim.__all__), "__version__"} == set(shmelim.__all__)


@pytest.mark.parametrize("name", shmelim._MODULES)
def test_a_name_is_the_object_of_its_module(name: str) -> None:
    module = importlib.import_module(f"shmelim.{shmelim._MODULES[name]}")
    assert getattr(shmelim, name) is getattr(module, name)
    assert name in vars(shmelim), "it is looked up once"


def test_a_star_import_brings_all_names() -> None:
    names: dict[str, object] = {}
    exec("from shmelim import *", names)
    assert set(shmelim.__all__) - {"__builtins__"} <= set(names)


def test_dir_and_help_show_all_names() -> None:
    code = "import shmelim, pydoc; print(*dir(shmelim)); print(pydoc.plain(pydoc.render_doc(shmelim)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    listed, _, text = shown.partition("\n")
    assert set(shmelim.__all__) <= set(listed.split())
    assert [name for name in shmelim.__all__ if name not in text] == ["__version__"]
    assert "class EliminationReader" in text
    assert pydoc.locate("shmelim.EliminationReader") is shmelim.EliminationReader


def test_another_name_is_an_attribute_error_that_names_it() -> None:
    for package in (shmelim, shmelim.shm):
        with pytest.raises(AttributeError, match=f"{package.__name__}' has no attribute 'EliminationRaeder'"):
            package.EliminationRaeder  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'EliminationRaeder'"):
        exec("from shmelim import EliminationRaeder")


def test_the_version_is_that_of_the_installed_package() -> None:
    assert shmelim.__version__ == importlib.metadata.version("shmelim")


@pytest.mark.parametrize("name", ["EliminationReason", "Snapshot", "EliminationReader", "NotServingError"])
def test_classes_and_members_survive_pickling_and_copying(name: str) -> None:
    kind = getattr(shmelim, name)
    assert pickle.loads(pickle.dumps(kind)) is copy.deepcopy(kind) is kind
    assert pickle.loads(pickle.dumps(shmelim.EliminationReason.ZOMBIE)) is shmelim.EliminationReason.ZOMBIE


@pytest.mark.parametrize("module", sorted(set(shmelim._MODULES.values())))
def test_the_examples_in_the_documentation_hold(module: str) -> None:
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(importlib.import_module(f"shmelim.{module}"), optionflags=flags).failed == 0


@pytest.mark.parametrize("module", ["eliminations", "eliminations.manager", "shm", "errors"])
def test_submodules_can_be_imported_first(module: str) -> None:
    code = f"import shmelim.{module}, shmelim as s; s.EliminationReader, s.eliminations.reader, s.{module}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_strict_type_checker_sees_what_the_names_are(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    # With the configuration and the cache of the project, so that its modules are not checked once more.
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--show-error-codes", str(script)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = {
        (int(line.split(":")[1]), line.rpartition("[")[2].rstrip("]"))
        for line in done.stdout.splitlines()
        if ": error:" in line
    }
    assert found == EXPECTED, done.stdout + done.stderr
