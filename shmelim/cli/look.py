"""``shmelim check``, ``get`` and ``list``: questions that shared memory answers."""

from __future__ import annotations

from typing import Any, Final

import click

from shmelim.cli import output
from shmelim.cli.failure import NO
from shmelim.cli.options import HOTKEY, Command, Settings, hotkeys_from, owner_option, settings_options
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.rows import Status

_RE_REGISTERED: Final = Status.DEPARTED | Status.REGISTERED


@click.command(cls=Command, short_help="Tell whether hotkeys are eliminated.")
@click.argument("hotkeys", metavar="HOTKEY…", type=HOTKEY, nargs=-1, required=True)
@owner_option
@settings_options
@click.pass_context
def check(context: click.Context, *, hotkeys: tuple[str, ...], owner: int | None) -> None:
    """Tell of each HOTKEY whether it is eliminated, re-registered, departed, or clear.

    "-" stands for the hotkeys on stdin, one a line. Exit code 0: none is eliminated; 1: at least one is;
    3: nothing is served, so that nobody knows.

    With --json: name, eliminated (how many), hotkeys [{hotkey, eliminated, departed,
    registered, re_registered}].

    For example:
      shmelim check 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs
      shmelim check - < hotkeys.txt
    """
    settings: Settings = context.obj
    reader = EliminationReader(settings.name, owner=owner)
    asked = list(dict.fromkeys(hotkeys_from(hotkeys)))
    found = dict(zip(asked, reader.statuses(asked), strict=True))
    eliminated = sum(Status.ELIMINATED in status for status in found.values())
    if settings.as_json:
        output.document(
            {
                "name": settings.name,
                "eliminated": eliminated,
                "hotkeys": [
                    {
                        "hotkey": hotkey,
                        "eliminated": Status.ELIMINATED in status,
                        "departed": Status.DEPARTED in status,
                        "registered": Status.REGISTERED in status,
                        "re_registered": _RE_REGISTERED in status,
                    }
                    for hotkey, status in found.items()
                ],
            }
        )
    else:
        output.records(("hotkey", "status"), ((hotkey, _in_words(status)) for hotkey, status in found.items()))
    if eliminated:
        context.exit(NO)


def _in_words(status: Status) -> str:
    words = ["eliminated"] if Status.ELIMINATED in status else []
    if _RE_REGISTERED in status:
        words.append("re-registered")
    elif Status.DEPARTED in status:
        words.append("departed")
    return ", ".join(words) or "clear"


@click.command(cls=Command, short_help="Print the elimination record of hotkeys.")
@click.argument("hotkeys", metavar="HOTKEY…", type=HOTKEY, nargs=-1, required=True)
@owner_option
@settings_options
@click.pass_context
def get(context: click.Context, *, hotkeys: tuple[str, ...], owner: int | None) -> None:
    """Print the elimination record of each HOTKEY; "-" stands for those on stdin.

    Exit code 1: at least one of them is not eliminated.

    With --json: name, eliminations [record], missing [hotkey].

    For example:
      shmelim get 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --json
    """
    settings: Settings = context.obj
    reader = EliminationReader(settings.name, owner=owner)
    found = {hotkey: reader.get_elimination(hotkey) for hotkey in hotkeys_from(hotkeys)}
    eliminations = [record for record in found.values() if record is not None]
    missing = [hotkey for hotkey, record in found.items() if record is None]
    if settings.as_json:
        output.document({"name": settings.name, "eliminations": eliminations, "missing": missing})
    else:
        for number, record in enumerate(eliminations):
            if number:
                click.echo()
            output.facts([*record.items(), ("(UTC)", output.moment(record["elimination_initiated_time_ms"]))])
        for hotkey in missing:
            click.echo(f"not eliminated: {output.printable(hotkey)}", err=True)
    if missing:
        context.exit(NO)


@click.command("list", cls=Command, short_help="List eliminations, or departed hotkeys.")
@click.option("--departed", is_flag=True, help="List the hotkeys that left the metagraph instead.")
@click.option("--reason", metavar="REASON", help="Only eliminations for this reason.")
@owner_option
@settings_options
@click.pass_obj
def list_(settings: Settings, *, departed: bool, reason: str | None, owner: int | None) -> None:
    """List the eliminations in the order in which they came: hotkey, reason, drawdown, time (UTC).

    On a terminal as a table, else one line each with tabs between, never shortened.

    With --json: name, version, count, eliminations [record]; with --departed: name, version, count,
    departed [{hotkey, detected_ms}].

    For example:
      shmelim list
      shmelim list --reason PLAGIARISM --json
      shmelim list --departed | cut -f1
    """
    if departed and reason is not None:
        raise click.UsageError("--reason is about eliminations and does not go with --departed")
    snapshot = EliminationReader(settings.name, owner=owner).snapshot()
    columns: tuple[str, ...]
    cells: list[tuple[object, ...]]
    if departed:
        rows: list[dict[str, Any]] = [{"hotkey": hotkey, **info} for hotkey, info in snapshot.departed.items()]
        columns, cells = (
            ("hotkey", "seen to leave"),
            [(r["hotkey"], output.moment(r["detected_ms"])) for r in rows],
        )
    else:
        rows = [r for r in snapshot.eliminations.values() if reason is None or r["reason"] == reason]
        columns = ("hotkey", "reason", "dd", "eliminated")
        cells = [
            (r["hotkey"], r["reason"], r.get("dd"), output.moment(r["elimination_initiated_time_ms"]))
            for r in rows
        ]
    if settings.as_json:
        key = "departed" if departed else "eliminations"
        output.document({"name": settings.name, "version": snapshot.version, "count": len(rows), key: rows})
    else:
        output.records(columns, cells)
