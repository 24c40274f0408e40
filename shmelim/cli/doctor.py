"""``shmelim doctor``: what is wrong with this machine for a name, and what to do."""

from __future__ import annotations

from pathlib import Path

import click

from shmelim.cli.failure import NO, YES
from shmelim.cli.options import PATH, Settings, command
from shmelim.system.text import printable
from shmelim.watch.doctor import examine


@command
@click.option("--state-dir", type=PATH, metavar="DIR", help="The state directory [default: that of the name].")
def doctor(settings: Settings, *, state_dir: Path | None) -> int:
    """Look at this machine with the eyes of this user, and say what keeps a name from being served well.

    Looks at shared memory, logind, limits, the clock, the disk of the state directory (one small file is written
    and removed), permissions, leftovers, versions, how reads are made, and the problems that the server names.
    Run it as the server's user. Exit code 1: something was found.

    With --json: name, findings [{what, severity ("notice" or "warning"), text, remedy}].

    For example:
      shmelim doctor
      sudo -u validator shmelim doctor --name mainnet --json
    """
    found = examine(settings.name, state_dir)

    def say() -> None:
        if not found:
            click.echo("nothing found")
        for finding in found:
            click.echo(printable(f"{finding.severity}: {finding.what}: {finding.text}"))
            click.echo(printable(f"  {finding.remedy}"))

    settings.answer({"findings": [finding._asdict() for finding in found]}, say)
    return NO if found else YES
