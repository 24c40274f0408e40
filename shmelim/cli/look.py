"""``shmelim check``, ``get`` and ``list``: questions that shared memory answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import click

from shmelim.cli import output
from shmelim.cli.failure import NO, YES
from shmelim.cli.options import Settings, as_of_option, command, hotkeys_argument, hotkeys_from
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.rows import Status
from shmelim.eliminations.validator.addresses import is_ss58_address
from shmelim.system.clock import utc_text
from shmelim.system.text import printable

_STATES: Final = {
    "eliminated": Status.ELIMINATED,
    "departed": Status.DEPARTED,
    "registered": Status.REGISTERED,
    "re_registered": Status.DEPARTED | Status.REGISTERED,
}


@command
@hotkeys_argument
def check(settings: Settings, *, hotkeys: tuple[str, ...]) -> int:
    """Tell of each HOTKEY whether it is eliminated, re-registered, departed, or clear.

    "-" stands for the hotkeys on stdin, one a line. Exit code 0: none is eliminated; 1: at least one is;
    3: nothing is served, so the answer is not known. What makes an answer doubtful stands on stderr: a hotkey that
    is no valid SS58 address, or a writer that is not alive.

    With --json: name, eliminated (how many), writer_alive, hotkeys [{hotkey, eliminated, departed,
    registered, re_registered, ss58 (whether it is a valid address)}].

    For example:
      shmelim check 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs
      shmelim check - < hotkeys.txt
    """
    asked = hotkeys_from(hotkeys)
    reader = EliminationReader(settings.name)
    statuses = reader.statuses(asked)
    if not (writer := reader.writer).alive:
        known = "is not alive" if writer.alive is False else "has another clock, so nobody knows whether it lives"
        settings.note(f"note: the writer, process {writer.pid}, {known}: this is the last that it published")
    rows: list[dict[str, Any]] = [
        {
            "hotkey": hotkey,
            **{name: state in status for name, state in _STATES.items()},
            "ss58": is_ss58_address(hotkey),
        }
        for hotkey, status in zip(asked, statuses, strict=True)
    ]
    settings.doubt(*asked)
    eliminated = sum(row["eliminated"] for row in rows)
    words = ((row["hotkey"], _in_words(row)) for row in rows)
    content = {"eliminated": eliminated, "writer_alive": writer.alive, "hotkeys": rows}
    settings.table(content, ("hotkey", "status"), words)
    return NO if eliminated else YES


def _as_of(name: str, when: str) -> dict[str, dict[str, Any]]:
    """Ask the server what was eliminated at an earlier moment."""
    from shmelim.eliminations.client import EliminationClient

    with EliminationClient(name) as client:
        return client.as_of(when)


def _in_words(row: dict[str, Any]) -> str:
    left = "re-registered" if row["re_registered"] else "departed" if row["departed"] else ""
    return ", ".join(filter(None, ("eliminated" if row["eliminated"] else "", left))) or "clear"


@command
@hotkeys_argument
@as_of_option
def get(settings: Settings, *, hotkeys: tuple[str, ...], as_of: str | None) -> int:
    """Print the elimination record of each HOTKEY; "-" stands for those on stdin.

    Exit code 1: at least one of them is not eliminated.

    With --json: name, eliminations [record], missing [hotkey].

    For example:
      shmelim get 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --json
    """
    reader = EliminationReader(settings.name)
    then = None if as_of is None else _as_of(settings.name, as_of)
    one: Callable[[str], dict[str, Any] | None] = reader.get_elimination if then is None else then.get
    found = {hotkey: one(hotkey) for hotkey in hotkeys_from(hotkeys)}
    eliminations = [record for record in found.values() if record is not None]
    missing = [hotkey for hotkey, record in found.items() if record is None]

    def say() -> None:
        for number, record in enumerate(eliminations):
            if number:
                click.echo()
            output.facts([*record.items(), ("(UTC)", utc_text(record["elimination_initiated_time_ms"]))])
        for hotkey in missing:
            click.echo(f"not eliminated: {printable(hotkey)}", err=True)

    settings.doubt(*missing)
    settings.answer({"eliminations": eliminations, "missing": missing}, say)
    return NO if missing else YES


@command
@click.option("--departed", is_flag=True, help="List the hotkeys that left the metagraph instead.")
@click.option("--reason", metavar="REASON", help="Only eliminations for this reason.")
@as_of_option
def list_(settings: Settings, *, departed: bool, reason: str | None, as_of: str | None) -> None:
    """List the eliminations in the order in which they came: hotkey, reason, drawdown, time (UTC).

    On a terminal a table, otherwise one line each with tabs between; never shortened.

    With --json: name, version, count, eliminations [record]; with --departed: name, version, count,
    departed [{hotkey, detected_ms}].

    For example:
      shmelim list
      shmelim list --reason PLAGIARISM --json
      shmelim list --departed | cut -f1
    """
    if departed and reason is not None:
        raise click.UsageError("--reason is about eliminations and does not go with --departed")
    if departed and as_of is not None:
        raise click.UsageError("--as-of is about eliminations and does not go with --departed")
    reader = EliminationReader(settings.name)
    if as_of is None:
        version, eliminations, left, _ = reader.snapshot()
    else:
        version, eliminations, left = reader.version, _as_of(settings.name, as_of), {}
    if departed:
        gone = [{"hotkey": hotkey, **info} for hotkey, info in left.items()]
        settings.rows({"version": version}, "departed", gone, {"hotkey": "hotkey", "detected_ms": "seen to leave"})
        return
    rows = [row for row in eliminations.values() if reason is None or row["reason"] == reason]
    columns = {"hotkey": "hotkey", "reason": "reason", "dd": "dd", "elimination_initiated_time_ms": "eliminated"}
    settings.rows({"version": version}, "eliminations", rows, columns)
