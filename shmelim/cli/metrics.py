"""``shmelim metrics``: what is seen of a name, for Prometheus."""

from __future__ import annotations

from pathlib import Path

import click

from shmelim.cli.failure import YES, extra, to_be_written
from shmelim.cli.options import PATH, Settings, command
from shmelim.system.durable import write_whole, writing


@command
@click.option("--to", type=PATH, metavar="FILE", help="Write this file in one step, for the node exporter.")
def metrics(settings: Settings, *, to: Path | None) -> int:
    """Print metrics for Prometheus: whether the name is served, its problems, counts, sizes, ages.

    Works also where nobody serves the name: shmelim_up is 0 then. Needs the extra: pip install 'shmelim[metrics]'.

    With --json: name, metrics (the same text).

    For example:
      shmelim metrics
      shmelim metrics --to /var/lib/node_exporter/shmelim.prom
    """
    with extra("metrics"):
        from shmelim.watch.metrics import text_of
    text = text_of(settings.name)
    if to is not None and str(to) != "-":
        to = to_be_written(to)
        with writing(f"{to} could not be written"):
            write_whole(to, [text], mode=0o644)  # the node exporter is another user
        settings.answer({"metrics": text.decode()}, f"written: {to}")
        return YES

    settings.answer({"metrics": text.decode()}, lambda: click.echo(text, nl=False))
    return YES
