"""``shmelim watch`` and ``names``: what changes as it comes, and what there is on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from time import sleep
from typing import Any, Final

import click

from shmelim.cli import output
from shmelim.cli.books import cells
from shmelim.cli.failure import YES
from shmelim.cli.options import COUNT, Settings, WholeNumber, command
from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.reader import EliminationReader
from shmelim.errors import ChangesUnknownError, ChannelError, NotServingError, SegmentError
from shmelim.system.clock import now_ms
from shmelim.system.containers import finite
from shmelim.system.text import printable

_SEGMENTS: Final = Path("/dev/shm")  # noqa: S108  # where Linux keeps POSIX shared memory
_ROOT: Final = re.compile(r"shmelim\.([a-z0-9_-]{1,16})")
_COLUMNS: Final = ("name", "uid", "status", "pid", "version", "eliminated", "departed", "problem")
_PATIENCE: Final = 1.0  # seconds between two tries to reach a server that is away


@command
@click.option(
    "--since", type=WholeNumber(0), metavar="VERSION", help="Begin after this version, not with the next change."
)
@click.option("--count", type=COUNT, metavar="N", help="End after N changes.")
def watch(settings: Settings, *, since: int | None, count: int | None) -> int:
    """Show changes as they come, oldest first, until Ctrl-C: when, what, to whom, by which process, old → new.

    Sleeps until something changes, and waits while the server is away, which is said on stderr; so is what cannot
    be told because it happened while nobody could be asked.

    Of a table that follows another host's, each change as it arrives; who made it is known where its server runs.

    With --json: a line for each change, {version, id, at_ms, action, hotkey, pid, uid, program, note, old, new,
    commit_number}.

    For example:
      shmelim watch
      shmelim watch --json | jq .hotkey
    """
    if (reader := EliminationReader(settings.name)).source is not None:
        return _watch_follower(settings, reader, count)
    with EliminationClient(settings.name) as client:
        seen = client.version if since is None else since
        shown, waiting = 0, False
        while True:
            try:
                found = client.changes(seen)
            except ChangesUnknownError as error:
                _warn(settings, f"{error.message}; `shmelim history` has it")
                seen = client.version
                continue
            except (ChannelError, NotServingError) as error:
                if not waiting:
                    _warn(settings, f"{error.message}; waiting for the server")
                waiting = True
                sleep(_PATIENCE)
                continue
            waiting = False
            seen = found["version"]
            for event in found["events"]:
                _show({"version": seen, **event}, as_json=settings.as_json)
                shown += 1
                if shown == count:
                    return YES
            client.wait_for_change(None, seen)


def _warn(settings: Settings, text: str) -> None:
    """Say at once on stderr what no change says."""
    click.echo(json.dumps({"warning": text}) if settings.as_json else f"warning: {printable(text)}", err=True)


def _watch_follower(settings: Settings, reader: EliminationReader, count: int | None) -> int:
    """Show what becomes another in a table that follows another host's: who did it is known there."""
    shown, known = 0, reader.snapshot()
    while True:
        reader.wait_for_change(None, known.version)
        found = reader.snapshot()
        before, after = known.eliminations, found.eliminations
        known = found
        for hotkey in [*before, *(each for each in after if each not in before)]:
            old, new = before.get(hotkey), after.get(hotkey)
            if old == new:
                continue
            action = "add" if old is None else "remove" if new is None else "update"
            about = {"at_ms": now_ms(), "action": action, "hotkey": hotkey, "old": old, "new": new, "note": None}
            follower = {"pid": reader.writer.pid, "uid": None, "program": "follower"}
            _show({"version": found.version, **about, **follower}, as_json=settings.as_json)
            shown += 1
            if shown == count:
                return YES


def _show(event: dict[str, Any], *, as_json: bool) -> None:
    """Print one change, at once."""
    if as_json:
        click.echo(json.dumps(finite(event), default=str))
    else:
        click.echo("\t".join(map(output.value, cells(event))))


@command
def names(settings: Settings) -> int:
    """List the names that are served on this machine, or were, and that this user may look at or not.

    With --json: name (the one that other commands take), names [{name, uid, status ("alive", "dead", "unknown" or
    "unreadable"), pid, version, eliminated, departed, problem}].

    For example:
      shmelim names
    """
    found = [
        _look(match[1], path) for path in sorted(_SEGMENTS.iterdir()) if (match := _ROOT.fullmatch(path.name))
    ]
    settings.table({"names": found}, _COLUMNS, ([*each.values()] for each in found))
    return YES


def _look(name: str, path: Path) -> dict[str, Any]:
    """Return what can be seen of a name from here."""
    uid = None
    with contextlib.suppress(OSError):
        uid = os.lstat(path).st_uid
    about = dict.fromkeys(_COLUMNS) | {"name": name, "uid": uid, "status": "unreadable"}
    try:
        reader = EliminationReader(name, owner=uid)
        writer = reader.writer
    except (NotServingError, SegmentError) as error:
        return about | {"problem": error.message}
    return about | {
        "status": {True: "alive", False: "dead", None: "unknown"}[writer.alive],
        "pid": writer.pid,
        "version": reader.version,
        "eliminated": len(reader),
        "departed": reader.num_departed_hotkeys,
    }
