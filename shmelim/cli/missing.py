"""``shmelim missing``: hotkeys that left the metagraph, so many at once that it was not believed."""

from __future__ import annotations

import contextlib

import click

from shmelim.cli import output
from shmelim.cli.failure import NO, YES
from shmelim.cli.options import Settings, command
from shmelim.eliminations.client import EliminationClient


@command
@click.option("--accept", is_flag=True, help="Record that they have departed.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def missing(settings: Settings, *, accept: bool, yes: bool) -> int:
    """List the hotkeys that the metagraph no longer shows, and whose departure was not believed.

    Where more than 10 and at least a quarter are lost at once, the metagraph itself may have failed. Look at the
    chain; if they really left, --accept records their departure, for ever. Meanwhile nobody is taken for a zombie.

    Exit code 1: the question was answered with no, or with --accept, nobody is missing.

    With --json: name, count, missing [hotkey], accepted [hotkey].

    For example:
      shmelim missing
      shmelim missing --accept
    """
    accepted: list[str] = []
    with contextlib.closing(EliminationClient(settings.name)) as client:
        listed = client.get_missing_hotkeys()
        if accept and listed and (yes or output.agreed(f"{len(listed)} hotkeys have departed?")):
            # By name: a hotkey that was not seen here is not accepted.
            accepted = client.accept_loss(listed)
    content = {"count": len(listed), "missing": listed, "accepted": accepted}
    if not accept:
        settings.show(content, ("hotkey",), ((hotkey,) for hotkey in listed))
        return YES
    settings.say(content, f"departed: {len(accepted)} hotkeys" if accepted else "nothing was changed")
    return YES if accepted else NO
