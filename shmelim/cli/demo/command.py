"""The ``demo`` command: a stage, the scenario on it, and the report."""

from __future__ import annotations

import os
import sys
from typing import Any, Final

import click

from shmelim.cli import output
from shmelim.cli.demo.scenario import Scenario
from shmelim.cli.demo.stage import Stage
from shmelim.cli.failure import NO, YES
from shmelim.cli.options import Number, Settings, command
from shmelim.system.text import printable

_WHOLE: Final = 100


@command
@click.option(
    "--seconds", type=Number(1, 3600), default=10.0, metavar="S",
    help="About how long it takes; starting processes comes on top of a short one.",
)  # fmt: skip
@click.option(
    "--readers", type=click.IntRange(1, 64), metavar="N",
    help="How many reader processes [default: one for each core but one, which is left to the server].",
)  # fmt: skip
@click.option("--fleet", is_flag=True, help="Show more than one host instead: an engine, three followers, faults.")
def demo(settings: Settings, *, seconds: float, readers: int | None, fleet: bool) -> int:
    """Show the whole job on 367 real hotkeys, and measure it.

    Touches none of your state: it serves a name of its own, whatever --name says, from a temporary directory.

    Starts a server, and readers that read without pause and check every answer. Adds, removes and syncs under
    their eyes, kills the server with SIGKILL in the middle of that, starts the next one, and looks for every
    change that was acknowledged. Exit code 1: an invariant did not hold.

    With --json: name (the demo's own), ok, invariants {invariant: number of violations}, figures
    {checks_per_second, durable_adds_per_second, sync_median_ms, kill_to_next_change_ms, …},
    readers [{pid, checks, …, errors}].

    With --fleet a publisher, a Redis of the demo's own (`redis-server` must be installed) and three followers, all
    on this machine; for root, where `ip` is installed, each in a network namespace of its own. The engine is
    killed and emptied, the publisher killed and superseded, a network cut; --seconds and --readers do not count.
    With --json: name, ok, invariants, figures {hosts_of_their_own, acknowledged_to_visible_median_ms, …},
    faults [{fault, equal_after_s [of each follower], took_snapshot}].

    For example:
      shmelim demo
      shmelim demo --fleet
      shmelim demo --seconds 60 --readers 8 --json
    """
    with Stage() as stage:
        if sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console

            line = stage.enter_context(Console(stderr=True).status(""))
            stage.narrate = lambda what: line.update(f"{what} …")
        if fleet:
            from shmelim.cli.demo.fleet import FleetScenario

            found = FleetScenario(stage).run()
        else:
            readers = readers or min(64, max(1, len(os.sched_getaffinity(0)) - 1))
            found = Scenario(stage, seconds, readers).run()
    found = {"name": stage.name, "ok": not any(found["invariants"].values()), **found}
    settings.answer(found, lambda: _show(found))
    return YES if found["ok"] else NO


def _show(found: dict[str, Any]) -> None:
    """Print the faults and the figures, each invariant, and how many of them held."""
    if faults := [(it["fault"], *it["equal_after_s"], it["took_snapshot"]) for it in found.get("faults", ())]:
        output.records(["what happened", "follower 1 equal after s", "2", "3", "snapshots taken"], faults)
        click.echo()
    for what, figure in found["figures"].items():
        shown = f"{figure:,.0f}" if isinstance(figure, int) or figure > _WHOLE else f"{figure:.1f}"
        click.echo(f"{shown:>12}  {what.replace('_', ' ')}")
    click.echo()
    for invariant, violations in found["invariants"].items():
        verdict = f"VIOLATED {violations:,} times" if violations else "held"
        click.secho(f"{verdict}: {invariant}", fg="red" if violations else "green")
    for error in [error for reader in found.get("readers", ()) for error in reader["errors"]]:
        click.echo(f"error: {printable(error)}")
    held = sum(not violations for violations in found["invariants"].values())
    click.echo(f"\n{held} of {len(found['invariants'])} invariants held")
