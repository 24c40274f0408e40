"""``shmelim export``: the published state as one of the JSON files that other tools read."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from shmelim.cli.failure import FileProblemError
from shmelim.cli.options import PATH_OR_DASH, Settings, command, owner_option
from shmelim.cli.output import printable
from shmelim.eliminations.files import format as files
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.reading import Snapshot
from shmelim.eliminations.record import encode


@command
@click.argument("file", type=PATH_OR_DASH)
@click.option("--departed", is_flag=True, help="Write the departed hotkeys instead of the eliminations.")
@owner_option
def export(settings: Settings, *, file: Path, departed: bool, owner: int | None) -> None:
    """Write the current eliminations to FILE as {"eliminations": […]}, or to stdout if it is "-".

    All as of one moment, and in one step: FILE is either the old one or the whole new one. Works while the server
    is dead.

    With --json: name, version, file, count.

    For example:
      shmelim export eliminations.json
      shmelim export - --departed | jq '.departed_hotkeys | length'
    """
    snapshot = EliminationReader(settings.name, owner=owner).snapshot()
    count = len(snapshot.departed if departed else snapshot.eliminations)
    if str(file) == "-":
        with tempfile.TemporaryDirectory() as directory:
            whole = Path(directory) / "export.json"
            _write(whole, snapshot, departed=departed)
            click.echo(whole.read_text("utf-8"), nl=False, file=sys.stdout)
        return
    # Through a link, which stays one.
    file = file.resolve()
    if file.is_dir():
        raise FileProblemError(f"{file} is a directory, not a file")
    if file.exists() and not file.is_file():
        raise FileProblemError(f"{file} is not a regular file", hint='write to stdout with "-" instead')
    if not file.parent.is_dir():
        raise FileProblemError(f"there is no directory {file.parent} to write {file.name} to")
    _write(file, snapshot, departed=departed)
    what = "departed hotkeys" if departed else "eliminations"
    content = {"version": snapshot.version, "file": str(file), "count": count}
    settings.say(content, f"{count} {what} written to {printable(str(file))}")


def _write(path: Path, snapshot: Snapshot, *, departed: bool) -> None:
    if departed:
        files.write_departed(path, ((hotkey, info["detected_ms"]) for hotkey, info in snapshot.departed.items()))
    else:
        files.write_eliminations(path, map(encode, snapshot.eliminations.values()))
