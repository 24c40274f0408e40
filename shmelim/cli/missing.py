"""``shmelim missing``: hotkeys that left the metagraph, so many at once that it was not believed."""

from __future__ import annotations

import contextlib
import sys

import click

from shmelim.cli import output
from shmelim.cli.failure import NO
from shmelim.cli.options import Command, Settings, settings_options
from shmelim.eliminations.client import EliminationClient


@click.command(cls=Command, short_help="List hotkeys whose departure was not believed, or accept it.")
@click.option("--accept", is_flag=True, help="Record that they have departed.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@settings_options
@click.pass_context
def missing(context: click.Context, *, accept: bool, yes: bool) -> None:
    """List the hotkeys that the metagraph showed no more at the last look, and whose departure is not recorded.

    Where more than 10 and at least a quarter are lost at once, the metagraph itself may have failed. Look at the
    chain; if they really left, --accept records their departure, for ever. Meanwhile nobody is taken for a zombie.

    Exit code 1: the question was answered with no, or with --accept, nobody is missing.

    With --json: name, count, missing [hotkey], accepted [hotkey].

    For example:
      shmelim missing
      shmelim missing --accept
    """
    settings: Settings = context.obj
    accepted: list[str] = []
    with contextlib.closing(EliminationClient(settings.name)) as client:
        listed = client.get_missing_hotkeys()
        if accept and listed and (yes or _agreed(len(listed))):
            # By name: who was not seen here is not accepted.
            accepted = client.accept_loss(listed)
    if settings.as_json:
        output.document({"name": settings.name, "count": len(listed), "missing": listed, "accepted": accepted})
    elif accept:
        click.echo(f"departed: {len(accepted)} hotkeys" if accepted else "nothing was changed")
    else:
        output.records(("hotkey",), ((hotkey,) for hotkey in listed))
    if accept and not accepted:
        context.exit(NO)


def _agreed(count: int) -> bool:
    if not _can_ask():
        raise click.UsageError("without a terminal nobody can be asked: give --yes")
    return click.confirm(f"{count} hotkeys have departed?", err=True)


def _can_ask() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()
