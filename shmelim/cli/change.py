"""``shmelim add``, ``remove`` and ``sync``: changes by hand, durable when the command returns."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Final

import click

from shmelim.cli.failure import NO, YES, FileProblemError, RefusedError
from shmelim.cli.options import HOTKEY, PATH_OR_DASH, Settings, command
from shmelim.cli.output import printable
from shmelim.cli.progress import DelayedProgress
from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.files import format as files
from shmelim.eliminations.record import EliminationReason, decode, generate_row
from shmelim.errors import DamagedFileError

_REASONS: Final = ", ".join(EliminationReason.__members__)
_SHOWN: Final = 3


@command
@click.argument("hotkey", type=HOTKEY)
@click.option("--reason", required=True, metavar="REASON", help=f"Why: normally one of {_REASONS}.")
@click.option("--dd", type=float, metavar="X", help="The drawdown, stored as given.")
@click.option(
    "--time-ms",
    type=click.IntRange(0, (1 << 63) - 1),
    metavar="T",
    help="When, in milliseconds since 1970 UTC [default: now].",
)
def add(settings: Settings, *, hotkey: str, reason: str, dd: float | None, time_ms: int | None) -> None:
    """Eliminate HOTKEY, or replace its record. When this returns, every reader sees it and it is durable.

    With --json: name, added (false: a record was replaced), elimination (the record).

    For example:
      shmelim add 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --reason PLAGIARISM --dd 0.1
    """
    if not reason.strip():
        raise click.UsageError("--reason must say why")
    if dd is not None and not math.isfinite(dd):
        raise click.UsageError(f"--dd must be a number, not {dd}")
    if reason not in EliminationReason.__members__:
        click.echo(f"note: {printable(repr(reason))} is stored as given; usual are {_REASONS}", err=True)
    at_ms = time.time_ns() // 1_000_000 if time_ms is None else time_ms
    with contextlib.closing(EliminationClient(settings.name)) as client:
        added = client.append_elimination_row(hotkey, dd, reason, at_ms)
    content = {"added": added, "elimination": generate_row(hotkey, dd, reason, at_ms)}
    settings.say(content, f"{'added' if added else 'replaced'}: {printable(hotkey)}")


@command
@click.argument("hotkey", type=HOTKEY)
def remove(settings: Settings, *, hotkey: str) -> int:
    """Remove the elimination of HOTKEY; exit code 1 if there was none. The history keeps what it was.

    With --json: name, hotkey, removed.

    For example:
      shmelim remove 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs
    """
    with contextlib.closing(EliminationClient(settings.name)) as client:
        removed = bool(client.delete_eliminations([hotkey]))
    what = "removed" if removed else "not eliminated"
    settings.say({"hotkey": hotkey, "removed": removed}, f"{what}: {printable(hotkey)}")
    return YES if removed else NO


@command
@click.argument("file", type=PATH_OR_DASH)
def sync(settings: Settings, *, file: Path) -> None:
    """Make exactly the eliminations in FILE the current ones, in one step; "-" is stdin.

    FILE is {"eliminations": [record, …]}. A hotkey that is not in it is no longer eliminated. If a single record
    cannot be stored, nothing is changed, the exit code is 1, and the error names the record.

    With --json: name, records (in the file), removed [hotkey], eliminated (how many there are now).

    For example:
      shmelim sync eliminations.json
      ssh other shmelim export - | shmelim sync -
    """
    with DelayedProgress() as progress, contextlib.ExitStack() as stack:
        progress.tell("reading", 0, None)
        records = _read(file)
        client = stack.enter_context(contextlib.closing(EliminationClient(settings.name)))
        progress.tell("sending", 0, len(records))

        def tell(sent: int) -> None:
            if sent < len(records):
                progress.tell("sending", sent, len(records))
            else:
                progress.tell("committing", 0, None)

        try:
            removed = client.sync_eliminations(map(decode, records), on_progress=tell)
        except (ValueError, TypeError) as error:
            raise RefusedError(str(error), hint="nothing was changed") from error
        eliminated = len(client)
    content = {"records": len(records), "removed": removed, "eliminated": eliminated}
    settings.say(content, f"{len(removed)} removed, {eliminated} eliminated now")


def _read(file: Path) -> list[bytes]:
    """Return the records of a file, or refuse it whole."""
    shown, path = ("stdin", Path("/dev/stdin")) if str(file) == "-" else (str(file), file)
    if path.is_dir():
        raise FileProblemError(f"{shown} is a directory, not a file")
    try:
        found = files.read_eliminations(path)
    except DamagedFileError as error:
        raise FileProblemError(error.message.replace(str(path), shown, 1), hint="nothing was changed") from error
    if found is None:
        raise FileProblemError(f"{shown} does not exist")
    if found.bad:
        problems = "; ".join(f"row {bad.index}: {bad.problem}" for bad in found.bad[:_SHOWN])
        more = f"; and {len(found.bad) - _SHOWN} more" if len(found.bad) > _SHOWN else ""
        raise RefusedError(f"{shown} is refused: {problems}{more}", hint="nothing was changed; repair the file")
    return [record for _, record in found.rows]
