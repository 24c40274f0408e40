"""``shmelim diff`` and ``rollback``: what eliminations were at an earlier moment, and making them so again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import click

from shmelim.cli import output
from shmelim.cli.failure import NO, YES
from shmelim.cli.options import MOMENT, Settings, command, yes_option
from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.record import differing
from shmelim.system.text import printable

Rows = Mapping[str, Mapping[str, Any]]

_COLUMNS: Final = ("what", "hotkey", "change")
_MOST_SHOWN: Final = 20  # lines before a question


@command
@click.argument("before", metavar="A", type=MOMENT)
@click.argument("after", metavar="[B]", type=MOMENT, required=False)
def diff(settings: Settings, *, before: str, after: str | None) -> int:
    """Show which eliminations were added, removed and changed from moment A to moment B (default: now).

    A moment is the number of an event (see `shmelim history`), ms since 1970, or ISO 8601 (UTC without a zone).
    Exit code 1: they differ.

    With --json: name, added [record], removed [record], changed [{hotkey, fields {field: [old, new]}}].

    For example:
      shmelim diff 2026-01-31T12:00:00Z
      shmelim diff 1200 1250
    """
    with EliminationClient(settings.name) as client:
        old = client.as_of(before)
        new = client.get_eliminations_dict() if after is None else client.as_of(after)
    found = _difference(old, new)
    settings.table(found, _COLUMNS, _lines(found))
    return NO if any(found.values()) else YES


@command
@click.option(
    "--to",
    "when",
    type=MOMENT,
    required=True,
    metavar="WHEN",
    help="An event's number, ms since 1970, or ISO 8601.",
)
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@yes_option
def rollback(settings: Settings, *, when: str, dry_run: bool, yes: bool) -> int:
    """Make the eliminations what they were at an earlier moment, in one step. Shows the difference, and asks.

    Departures and registrations stay, and no debt is made or unmade: what the eliminations owe that go rests, as
    after a sync. The history keeps all, so that this can be rolled back, too. Exit code 1: nothing was changed.

    With --json: name, added [record], removed [record], changed [{hotkey, fields}], done.

    For example:
      shmelim rollback --to 1200 --dry-run
      shmelim rollback --to 2026-01-31T12:00:00Z
    """
    with EliminationClient(settings.name) as client:
        found = _difference(client.get_eliminations_dict(), client.as_of(when))
        count = sum(map(len, found.values()))
        done = False
        if count and not dry_run:
            shown = ["  ".join(map(output.value, line)) for line in _lines(found)]
            more = [f"… and {len(shown) - _MOST_SHOWN} more"] if len(shown) > _MOST_SHOWN else []
            about = [printable(line) for line in shown[:_MOST_SHOWN] + more]
            if yes or output.agreed(f"roll {count} eliminations back?", *about):
                client.rollback(when)
                done = True

    def say() -> None:
        if dry_run:
            output.records(_COLUMNS, _lines(found))
        else:
            click.echo(f"rolled back: {count} eliminations" if done else "nothing was changed")

    settings.answer({**found, "done": done}, say)
    return YES if done or (dry_run and count) else NO


def _difference(old: Rows, new: Rows) -> dict[str, list[Any]]:
    """Return what differs between two states."""
    both = sorted(old.keys() & new.keys())
    changed = [{"hotkey": hotkey, "fields": differing(old[hotkey], new[hotkey])} for hotkey in both]
    return {
        "added": [row for hotkey, row in new.items() if hotkey not in old],
        "removed": [row for hotkey, row in old.items() if hotkey not in new],
        "changed": [each for each in changed if each["fields"]],
    }


def _lines(found: Mapping[str, list[Any]]) -> list[tuple[str, str, str]]:
    lines = [(what, row["hotkey"], str(row["reason"])) for what in ("added", "removed") for row in found[what]]
    lines += [("changed", each["hotkey"], output.changed_fields(each["fields"])) for each in found["changed"]]
    return lines
