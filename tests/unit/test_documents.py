"""What is written is true: examples in docstrings give what they show, and the Python of the documents runs."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
WITH_EXAMPLES = sorted(path for path in ROOT.glob("shmelim/**/*.py") if ">>> " in path.read_text("utf-8"))
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")])
BLOCKS = [
    pytest.param(block, id=f"{path.relative_to(ROOT)}-{number}")
    for path in DOCUMENTS
    for number, block in enumerate(PYTHON.findall(path.read_text("utf-8")), 1)
]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_examples_in_docstrings(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.FAIL_FAST
    failed, tried = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize("block", BLOCKS)
def test_python_in_documents_compiles(block: str) -> None:
    compile(block, "a document", "exec")


def test_python_in_the_readme_runs_against_a_server(short_path, serve, table_name, monkeypatch, capsys):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_path))
    serve(table_name, runtime_base=short_path / "shmelim")
    reading, changing, managing = PYTHON.findall((ROOT / "README.md").read_text("utf-8"))
    for block in (reading, changing, reading):
        exec(block.replace('"shmelim"', repr(table_name)), {})
    # Not eliminated before the change, and eliminated after it.
    assert capsys.readouterr().out == "order refused\n"
    told = []
    own = dict.fromkeys(("position_manager", "challengeperiod_manager"))
    slack = SimpleNamespace(send_message=lambda *message, **_: told.append(message))
    metagraph = SimpleNamespace(hotkeys=["a"], has_hotkey=lambda hotkey: hotkey == "a")
    managing = managing.replace("slack_notifier=slack", "slack_notifier=slack, running_unit_tests=True")
    exec(managing, {"metagraph": metagraph, "slack": slack, "hotkey": "a", **own})
    assert told == []
