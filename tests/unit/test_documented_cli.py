"""Exit codes and environment variables stand in the tables of docs/operations.md, all of them and no others."""

import re
from pathlib import Path

from shmelim.cli import failure
from shmelim.cli.health import CODES

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "docs" / "operations.md").read_text("utf-8").partition("\n## On the command line\n")[2]
SECTION = SECTION.partition("\n## ")[0]


def first_column(heading):
    """Return what stands in the first column of the table with a heading."""
    table = SECTION.partition(f"| {heading} | means |\n|---|---|\n")[2].partition("\n\n")[0]
    return [line.split("|")[1].strip() for line in table.splitlines()]


def test_every_exit_code_is_documented_and_no_other():
    codes = {value for name, value in vars(failure).items() if name.isupper() and isinstance(value, int)}
    said = [cell for cell in first_column("exit code") if "`" not in cell]
    assert {int(code) for cell in said for code in cell.split(", ")} == codes
    assert f"0 to {failure.NOT_SERVING} of `health` and `status`" in first_column("exit code")
    assert sorted({*CODES.values(), failure.NOT_SERVING}) == [0, 1, 2, 3]


def test_every_environment_variable_is_documented_and_no_other():
    sources = [ROOT / "setup.py", *ROOT.glob("shmelim/**/*.py")]
    read = {name for path in sources for name in re.findall(r"\bSHMELIM_[A-Z_]+\b", path.read_text("utf-8"))}
    assert {cell.strip("`") for cell in first_column("variable")} == read
    assert len(first_column("variable")) == len(read)
