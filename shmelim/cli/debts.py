"""``shmelim debts`` and ``shmelim slash``: what is still owed, what a person must decide, what was made."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from shmelim.cli import output
from shmelim.cli.failure import NO, RefusedError
from shmelim.cli.offline import from_store
from shmelim.cli.options import HOTKEY, Command, Group, Settings, settings_options
from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.debts.states import ATTEMPTING, OWED, SLASH, attempt_is_alive
from shmelim.eliminations.store.offline import read_debts, read_slashes
from shmelim.errors import KeyFileError, NotServingError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from shmelim.eliminations.debts.states import Debt, Slash


@click.command(cls=Command, short_help="Show what eliminations still owe.")
@click.argument("hotkey", type=HOTKEY, required=False)
@settings_options
@click.pass_obj
def debts(settings: Settings, *, hotkey: str | None) -> None:
    """Show what the elimination of HOTKEY still owes, or what all of them do, in the order in which they came.

    Limit orders are to be deleted, positions to be closed, collateral is to be slashed. What fails is tried again
    with the next tick, except a slash that is in_doubt: nobody knows whether it was made, and a person must find
    out ("shmelim slash resolve --help").

    Asks the server; when none runs, the store in the state directory is read, and nothing there is changed.

    With --json: name, source ("server" or "store"), count, debts [{hotkey, kind, state, due, since_ms,
    eliminated_ms, attempts, error, attempt, in_doubt_since_ms}].

    For example:
      shmelim debts
      shmelim debts --json | jq '.debts[] | select(.state == "in_doubt")'
    """
    source, found = _ask(
        settings.name, lambda client: client.get_debts(hotkey), lambda directory: read_debts(directory, hotkey)
    )
    if settings.as_json:
        output.document({"name": settings.name, "source": source, "count": len(found), "debts": found})
        return
    output.records(
        ("hotkey", "owes", "state", "since (UTC)", "failures", "last error"),
        (
            (d["hotkey"], d["kind"], d["state"], output.moment(d["since_ms"]), d["attempts"], d["error"])
            for d in found
        ),
    )


@click.group(cls=Group, short_help="Show the slashes that were made, settle one that is in doubt.")
@settings_options
def slash() -> None:
    """Show the slashes that were made, or settle by hand one of which nobody knows whether it was.

    For example:
      shmelim slash list
      shmelim slash resolve 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --made
    """


@slash.command("list", cls=Command, short_help="Show the last slash of each miner that was made.")
@click.argument("hotkey", type=HOTKEY, required=False)
@settings_options
@click.pass_obj
def list_(settings: Settings, *, hotkey: str | None) -> None:
    """Show the last slash of HOTKEY that was made, or of each miner, oldest first.

    A miner who is eliminated again for the same cause, after a sync took the elimination back, say, is not slashed
    again.

    Asks the server; when none runs, the store in the state directory is read, and nothing there is changed.

    With --json: name, source ("server" or "store"), count, slashes [{hotkey, made_ms, eliminated_ms, by
    ("contract" or "hand")}].

    For example:
      shmelim slash list
      shmelim slash list 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --json
    """
    source, found = _ask(
        settings.name, lambda client: client.get_slashes(hotkey), lambda directory: read_slashes(directory, hotkey)
    )
    if settings.as_json:
        output.document({"name": settings.name, "source": source, "count": len(found), "slashes": found})
        return
    output.records(
        ("hotkey", "made (UTC)", "eliminated (UTC)", "by"),
        ((s["hotkey"], output.moment(s["made_ms"]), output.moment(s["eliminated_ms"]), s["by"]) for s in found),
    )


@slash.command(cls=Command, short_help="Say whether a slash that is in doubt was made.")
@click.argument("hotkey", type=HOTKEY)
@click.option("--made/--not-made", "made", default=None, help="Whether the collateral was taken.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@settings_options
@click.pass_context
def resolve(context: click.Context, *, hotkey: str, made: bool | None, yes: bool) -> None:
    """Say whether the slash of HOTKEY, which is in doubt, was made.

    First look at the collateral itself, on the chain. --made: it is settled. --not-made: it is owed again, and the
    next tick makes it; a wrong --not-made takes the collateral twice. The history keeps who said so.

    Exit code 1: no slash of HOTKEY is in doubt, or the question was answered with no; nothing was changed.

    With --json: name, hotkey, made, resolved.

    For example:
      shmelim slash resolve 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --made
      shmelim slash resolve 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --not-made --yes
    """
    settings: Settings = context.obj
    if made is None:
        raise click.UsageError("say --made or --not-made")
    with contextlib.closing(EliminationClient(settings.name)) as client:
        debt = _in_doubt(client, hotkey)
        resolved = (yes or _agreed(debt, made=made)) and client.resolve_slash(hotkey, made)
        if not resolved:
            # Somebody was quicker, perhaps; else the question was answered with no.
            _in_doubt(client, hotkey)
    said = f"{output.printable(hotkey)}: the slash was {'made' if made else 'not made'}"
    if settings.as_json:
        output.document({"name": settings.name, "hotkey": hotkey, "made": made, "resolved": resolved})
    elif resolved:
        again = "" if made else "; it is owed again" if debt["due"] else "; it is no longer due"
        click.echo(f"resolved: {said}{again}")
    else:
        click.echo("nothing was changed")
    if not resolved:
        context.exit(NO)


def _in_doubt(client: EliminationClient, hotkey: str) -> dict[str, Any]:
    """Return the slash of a hotkey that a person may settle; RefusedError where there is none."""
    found = [debt for debt in client.get_debts(hotkey) if debt["kind"] == SLASH]
    shown = output.printable(hotkey)
    if not found:
        raise RefusedError(f"no slash of {shown} is in doubt", hint="`shmelim debts` shows what is owed")
    (debt,) = found
    if debt["state"] == OWED:
        raise RefusedError(
            f"the slash of {shown} is owed, not in doubt: it was certainly not made yet",
            hint="there is nothing to settle; the next tick makes it",
        )
    if debt["state"] == ATTEMPTING and attempt_is_alive(debt["attempt"]):
        pid = debt["attempt"].partition("-")[0]
        raise RefusedError(
            f"process {pid} has begun the slash of {shown} and may be making it right now",
            hint="wait until it is settled or in doubt; if that process hangs, end it first",
        )
    return debt


def _agreed(debt: Mapping[str, Any], *, made: bool) -> bool:
    """Ask whether to go on."""
    if not _can_ask():
        raise click.UsageError("without a terminal nobody can be asked: give --yes")
    since = output.moment(debt["in_doubt_since_ms"])
    click.echo(f"hotkey      {output.printable(debt['hotkey'])}", err=True)
    click.echo(f"in doubt    {'not noticed yet' if since is None else f'since {since} UTC'}", err=True)
    click.echo(f"last error  {output.value(debt['error'])}", err=True)
    if made:
        return click.confirm("It was made, and is settled?", err=True)
    return click.confirm("It was NOT made, and may be made once more?", err=True)


def _can_ask() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _ask(
    name: str,
    server: Callable[[EliminationClient], list[dict[str, Any]]],
    store: Callable[[Path], Sequence[Debt | Slash]],
) -> tuple[str, list[dict[str, Any]]]:
    """Return who answered, and what: the server, or where none runs, the store in the state directory."""
    try:
        with contextlib.closing(EliminationClient(name)) as client:
            return "server", server(client)
    except (NotServingError, KeyFileError) as error:
        return "store", [one.as_dict() for one in from_store(name, store, error)]
