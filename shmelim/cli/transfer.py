"""``shmelim sync`` and ``export``: all eliminations from a JSON file, and to one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final

import click

from shmelim.cli.failure import FileProblemError, RefusedError, need_source, to_be_written
from shmelim.cli.options import Settings, command, file_argument
from shmelim.cli.progress import DelayedProgress
from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.files import format as files
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.reading import Snapshot
from shmelim.eliminations.record import decode, encode
from shmelim.errors import DamagedFileError
from shmelim.system.text import printable

_SHOWN: Final = 3


@command
@file_argument
@click.option("--force", is_flag=True, help="It is meant, however many eliminations it takes back or adds.")
def sync(settings: Settings, *, file: Path, force: bool) -> None:
    """Make exactly the eliminations in FILE the current ones, in one step; "-" is stdin.

    FILE is {"eliminations": [record, …]}. A hotkey that is not in it is no longer eliminated. If a single record
    cannot be stored, nothing is changed, the exit code is 1, and the error names the record.

    With --json: name, records (in the file), removed [hotkey], eliminated (how many there are now).

    For example:
      shmelim sync eliminations.json
      ssh other shmelim export - | shmelim sync -
    """
    with DelayedProgress() as progress:
        progress.update("reading", 0, None)
        records = _read(file)

        def show_sent(sent: int) -> None:
            if sent < len(records):
                progress.update("sending", sent, len(records))
            else:
                progress.update("committing", 0, None)

        with EliminationClient(settings.name) as client:
            show_sent(0)
            try:
                removed = client.sync_eliminations(map(decode, records), force=force, on_progress=show_sent)
            except (ValueError, TypeError) as error:
                raise RefusedError(str(error), hint="nothing was changed") from error
            eliminated = len(client)
    content = {"records": len(records), "removed": removed, "eliminated": eliminated}
    settings.answer(content, f"{len(removed)} removed, {eliminated} eliminated now")


def _read(file: Path) -> list[bytes]:
    """Return the records of a file, or refuse it whole."""
    shown, path = ("stdin", Path("/dev/stdin")) if str(file) == "-" else (str(file), file)
    need_source(path)
    try:
        found = files.read_eliminations(path, stream=True)
    except DamagedFileError as error:
        raise FileProblemError(error.message.replace(str(path), shown, 1), hint="nothing was changed") from error
    if found is None:
        raise FileProblemError(f"{shown} does not exist", hint="it was removed while it was read")
    if found.bad:
        problems = "; ".join(f"row {bad.index}: {bad.problem}" for bad in found.bad[:_SHOWN])
        more = f"; and {len(found.bad) - _SHOWN} more" if len(found.bad) > _SHOWN else ""
        raise RefusedError(f"{shown} is refused: {problems}{more}", hint="nothing was changed; repair the file")
    return list(found.taken.values())


@command
@file_argument
@click.option("--departed", is_flag=True, help="Write the departed hotkeys instead of the eliminations.")
def export(settings: Settings, *, file: Path, departed: bool) -> None:
    """Write the current eliminations to FILE as {"eliminations": […]}, or to stdout if it is "-".

    All as of one moment, and in one step: FILE is either the old one or the whole new one. Works while the server
    is dead.

    With --json: name, version, file, count.

    For example:
      shmelim export eliminations.json
      shmelim export - --departed | jq '.departed_hotkeys | length'
    """
    snapshot = EliminationReader(settings.name).snapshot()
    count = len(snapshot.departed if departed else snapshot.eliminations)
    if str(file) == "-":
        with tempfile.TemporaryDirectory() as directory:
            whole = Path(directory) / "export.json"
            _write(whole, snapshot, departed=departed)
            # Bytes: JSON is UTF-8, whatever the locale says.
            click.echo(whole.read_bytes(), nl=False)
        return
    file = to_be_written(file)
    _write(file, snapshot, departed=departed)
    what = "departed hotkeys" if departed else "eliminations"
    content = {"version": snapshot.version, "file": str(file), "count": count}
    settings.answer(content, f"{count} {what} written to {printable(str(file))}")


def _write(path: Path, snapshot: Snapshot, *, departed: bool) -> None:
    if departed:
        files.write_departed(path, ((hotkey, info["detected_ms"]) for hotkey, info in snapshot.departed.items()))
    else:
        files.write_eliminations(path, map(encode, snapshot.eliminations.values()))
