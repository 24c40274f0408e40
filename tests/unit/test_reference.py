"""What docs/reference is made of: every public name has its place there, and mkdocs.yml knows every page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import shmelim
import shmelim.errors
import shmelim.table

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs/reference"
PLACES = set(
    re.findall(r"^::: (\S+)", "\n".join(path.read_text() for path in REFERENCE.glob("*.md")), re.MULTILINE)
)


@pytest.mark.parametrize("package", [shmelim, shmelim.table], ids=lambda package: package.__name__)
def test_every_public_name_is_there(package):
    by_module = set(vars(shmelim.errors))  # shown whole
    wanted = {f"{package.__name__}.{name}" for name in set(package.__all__) - by_module - {"__version__"}}
    assert wanted - PLACES == set()
    assert {"shmelim.errors", "shmelim.aio"} <= PLACES


def test_every_page_is_in_the_navigation():
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert settings["strict"] is True

    def pages(found):
        if isinstance(found, str):
            return {found}
        return set().union(*map(pages, found.values() if isinstance(found, dict) else found))

    assert pages(settings["nav"]) == {path.name for path in REFERENCE.glob("*.md")}
