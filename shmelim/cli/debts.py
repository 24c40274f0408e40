"""``shmelim debts`` and ``shmelim slash``: what is still owed, what was made, and what a person must decide."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from shmelim.cli import output
from shmelim.cli.failure import NO, YES, RefusedError
from shmelim.cli.offline import ask
from shmelim.cli.options import HOTKEY, Command, Group, Settings, command
from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.debts.states import ATTEMPTING, OWED, SLASH, attempt_is_alive


@command
@click.argument("hotkey", type=HOTKEY, required=False)
def debts(settings: Settings, *, hotkey: str | None) -> None:
    """Show what the elimination of HOTKEY still owes, or what all of them do, oldest first.

    Limit orders are to be deleted, positions closed, collateral slashed. What fails is tried again with the next
    tick, except a slash that is in_doubt: it is not known whether it was made, and a person must find out
    ("shmelim slash resolve --help").

    Asks the server; when none runs, the store in the state directory is read, and nothing there is changed.

    With --json: name, source ("server" or "store"), count, debts [{hotkey, kind, state, due, since_ms,
    eliminated_ms, attempts, error, attempt, in_doubt_since_ms}].

    For example:
      shmelim debts
      shmelim debts --json | jq '.debts[] | select(.state == "in_doubt")'
    """
    found, source = ask(
        settings.name,
        lambda client: client.get_debts(hotkey),
        lambda store: [debt.as_dict() for debt in store.debts(hotkey)],
    )
    settings.show(
        {"source": source, "count": len(found), "debts": found},
        ("hotkey", "owes", "state", "since (UTC)", "failures", "last error"),
        (
            (d["hotkey"], d["kind"], d["state"], output.moment(d["since_ms"]), d["attempts"], d["error"])
            for d in found
        ),
    )


@click.group(cls=Group)
def slash() -> None:
    """Show the slashes that were made, or settle one that is in doubt.

    For example:
      shmelim slash list
      shmelim slash resolve 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --made
    """


@slash.command("list", cls=Command, short_help="Show the last slash of each miner that was made.")
@click.argument("hotkey", type=HOTKEY, required=False)
@click.pass_obj
def list_(settings: Settings, *, hotkey: str | None) -> None:
    """Show the last slash of HOTKEY that was made, or that of each miner, oldest first.

    A miner who is eliminated again for the same cause (say, a sync took the elimination back) is not slashed
    again.

    Asks the server; when none runs, the store in the state directory is read, and nothing there is changed.

    With --json: name, source ("server" or "store"), count, slashes [{hotkey, made_ms, eliminated_ms, by
    ("contract" or "hand")}].

    For example:
      shmelim slash list
      shmelim slash list 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --json
    """
    found, source = ask(
        settings.name,
        lambda client: client.get_slashes(hotkey),
        lambda store: [slash._asdict() for slash in store.slashes(hotkey)],
    )
    settings.show(
        {"source": source, "count": len(found), "slashes": found},
        ("hotkey", "made (UTC)", "eliminated (UTC)", "by"),
        ((s["hotkey"], output.moment(s["made_ms"]), output.moment(s["eliminated_ms"]), s["by"]) for s in found),
    )


@slash.command(cls=Command, short_help="Say whether a slash that is in doubt was made.")
@click.argument("hotkey", type=HOTKEY)
@click.option("--made/--not-made", "made", default=None, help="Whether the collateral was taken.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def resolve(settings: Settings, *, hotkey: str, made: bool | None, yes: bool) -> int:
    """Say whether the slash of HOTKEY, which is in doubt, was made.

    First look at the collateral itself, on the chain. --made: it is settled. --not-made: it is owed again, and the
    next tick makes it; a wrong --not-made takes the collateral twice. The history keeps who said so.

    Exit code 1: no slash of HOTKEY is in doubt, or the question was answered with no; nothing was changed.

    With --json: name, hotkey, made, resolved.

    For example:
      shmelim slash resolve 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --made
      shmelim slash resolve 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --not-made --yes
    """
    if made is None:
        raise click.UsageError("say --made or --not-made")
    with contextlib.closing(EliminationClient(settings.name)) as client:
        debt = _in_doubt(client, hotkey)
        since = output.moment(debt["in_doubt_since_ms"])
        resolved = (
            yes
            or output.agreed(
                "It was made, and is settled?" if made else "It was NOT made, and may be made once more?",
                f"hotkey      {output.printable(debt['hotkey'])}",
                f"in doubt    {'not noticed yet' if since is None else f'since {since} UTC'}",
                f"last error  {output.value(debt['error'])}",
            )
        ) and client.resolve_slash(hotkey, made)
        if not resolved:
            # Perhaps somebody was quicker, which this names; else the question was answered with no.
            _in_doubt(client, hotkey)
    again = "made" if made else f"not made; it is {'owed again' if debt['due'] else 'no longer due'}"
    said = f"resolved: {output.printable(hotkey)}: the slash was {again}" if resolved else "nothing was changed"
    settings.say({"hotkey": hotkey, "made": made, "resolved": resolved}, said)
    return YES if resolved else NO


def _in_doubt(client: EliminationClient, hotkey: str) -> dict[str, Any]:
    """Return the slash of a hotkey that a person may settle; RefusedError where there is none."""
    debt = next((debt for debt in client.get_debts(hotkey) if debt["kind"] == SLASH), None)
    shown = output.printable(hotkey)
    if debt is None:
        raise RefusedError(f"no slash of {shown} is in doubt", hint="`shmelim debts` shows what is owed")
    if debt["state"] == OWED:
        raise RefusedError(
            f"the slash of {shown} is owed, not in doubt: it has certainly not been made yet",
            hint="there is nothing to settle; the next tick makes it",
        )
    if debt["state"] == ATTEMPTING and attempt_is_alive(debt["attempt"]):
        pid = debt["attempt"].partition("-")[0]
        raise RefusedError(
            f"process {pid} has begun the slash of {shown} and may be making it right now",
            hint="wait until it is settled or in doubt; if that process hangs, end it first",
        )
    return debt
