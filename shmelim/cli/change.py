"""``shmelim add``, ``remove``, ``ack``, ``missing``, ``returned``: changes by hand, durable when they return."""

from __future__ import annotations

import time
from typing import Final

import click

from shmelim.cli import output
from shmelim.cli.failure import NO, YES
from shmelim.cli.options import (
    AnyNumber,
    Settings,
    WholeNumber,
    command,
    hotkey_argument,
    hotkeys_argument,
    yes_option,
)
from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.record import EliminationReason, generate_row
from shmelim.system.clock import utc_text
from shmelim.system.text import printable

_REASONS: Final = ", ".join(EliminationReason.__members__)


@command
@hotkey_argument
@click.option("--reason", required=True, metavar="REASON", help=f"Why: normally one of {_REASONS}.")
@click.option("--dd", type=AnyNumber(), metavar="X", help="The drawdown, stored as given.")
@click.option(
    "--time-ms", type=WholeNumber(0), metavar="T", help="When, in milliseconds since 1970 UTC [default: now]."
)
def add(settings: Settings, *, hotkey: str, reason: str, dd: float | None, time_ms: int | None) -> None:
    """Eliminate HOTKEY, or replace its record. When this returns, every reader sees it and it is durable.

    With --json: name, added (false: a record was replaced), elimination (the record).

    For example:
      shmelim add 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --reason PLAGIARISM --dd 0.1
    """
    if not reason.strip():
        raise click.UsageError("--reason must say why")
    if reason not in EliminationReason.__members__:
        settings.note(f"note: {reason!r} is stored as given; usual are {_REASONS}")
    settings.doubt(hotkey)
    at_ms = time.time_ns() // 1_000_000 if time_ms is None else time_ms
    with EliminationClient(settings.name) as client:
        added = client.append_elimination_row(hotkey, dd, reason, at_ms)
    content = {"added": added, "elimination": generate_row(hotkey, dd, reason, at_ms)}
    settings.answer(content, f"{'added' if added else 'replaced'}: {printable(hotkey)}")


@command
@hotkey_argument
def remove(settings: Settings, *, hotkey: str) -> int:
    """Remove the elimination of HOTKEY; exit code 1 if there was none. The history keeps what it was.

    With --json: name, hotkey, removed.

    For example:
      shmelim remove 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs
    """
    with EliminationClient(settings.name) as client:
        removed = bool(client.delete_eliminations([hotkey]))
    if not removed:
        settings.doubt(hotkey)
    what = "removed" if removed else "not eliminated"
    settings.answer({"hotkey": hotkey, "removed": removed}, f"{what}: {printable(hotkey)}")
    return YES if removed else NO


@command
def ack(settings: Settings) -> int:
    """Say that somebody has looked at the changes that the guard noticed; exit code 1 if there were none.

    They are notices in `shmelim health`: a change that took back at least 10 and a quarter of the eliminations, or
    doubled them. Without this they stand there for a day.

    With --json: name, acknowledged [text].

    For example:
      shmelim health
      shmelim ack
    """
    with EliminationClient(settings.name) as client:
        found = client.acknowledge()
    text = "\n".join(f"acknowledged: {printable(each)}" for each in found) or "there was nothing to acknowledge"
    settings.answer({"acknowledged": found}, text)
    return YES if found else NO


@command
@hotkeys_argument
@yes_option
def returned(settings: Settings, *, hotkeys: tuple[str, ...], yes: bool) -> int:
    """Undo the departure of each HOTKEY that never left: the metagraph was wrong. Shows them, and asks before.

    It is no longer departed, and so not re-registered either; a slash that was made counts as if it had stayed.
    Exit code 1: none of them had departed, or the question was answered with no.

    With --json: name, undone [hotkey].

    For example:
      shmelim returned 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs
    """
    undone: list[str] = []
    with EliminationClient(settings.name) as client:
        known = {hotkey: client.get_departed_hotkey_info(hotkey) for hotkey in dict.fromkeys(hotkeys)}
        departed = {hotkey: info["detected_ms"] for hotkey, info in known.items() if info is not None}
        settings.doubt(*(known.keys() - departed.keys()))
        for hotkey, at_ms in departed.items():
            since = utc_text(at_ms) or "an unknown time"
            settings.note(f"departed since {since}: {hotkey}")
        if departed and (yes or output.agreed(f"forget the departure of {len(departed)} hotkeys?")):
            undone = client.undo_departures(list(departed))
    text = f"no longer departed: {len(undone)} hotkeys" if undone else "nothing was changed"
    settings.answer({"undone": undone}, text)
    return YES if undone else NO


@command
@click.option("--accept", is_flag=True, help="Record that they have departed.")
@yes_option
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
    if yes and not accept:
        raise click.UsageError("--yes goes with --accept")
    accepted: list[str] = []
    with EliminationClient(settings.name) as client:
        listed = client.get_missing_hotkeys()
        if accept and listed and (yes or output.agreed(f"{len(listed)} hotkeys have departed?")):
            # By name: a hotkey that was not seen here is not accepted.
            accepted = client.accept_loss(listed)
    content = {"count": len(listed), "missing": listed, "accepted": accepted}
    if not accept:
        settings.table(content, ("hotkey",), ((hotkey,) for hotkey in listed))
        return YES
    settings.answer(content, f"departed: {len(accepted)} hotkeys" if accepted else "nothing was changed")
    return YES if accepted else NO
