"""``shmelim history``, ``debts`` and ``slash``: what the server has on record, or the store where none answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import click

from shmelim.cli import output
from shmelim.cli.failure import NO, YES, RefusedError
from shmelim.cli.options import (
    COUNT,
    MOMENT,
    PATH,
    Command,
    Group,
    Settings,
    WholeNumber,
    any_hotkey_argument,
    command,
    hotkey_argument,
    yes_option,
)
from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.debts.states import OWED, SLASH
from shmelim.eliminations.record import differing
from shmelim.eliminations.store.store import Store
from shmelim.system.clock import utc_text
from shmelim.system.text import printable
from shmelim.watch import asking

_UNCHANGED: Final = "nothing was changed"
_dry_run_option = click.option("--dry-run", is_flag=True, help="Only say what would be done.")


@command
@any_hotkey_argument
@click.option("--limit", type=COUNT, default=50, metavar="N", help="At most N.")
@click.option(
    "--state-dir", type=PATH, metavar="DIR", help="Read the store in this directory, without asking a server."
)
@click.option(
    "--prune-before",
    type=MOMENT,
    metavar="WHEN",
    help="Forget the events up to this one's number, ms since 1970 or ISO 8601; asks the server.",
)
@_dry_run_option
@yes_option
def history(
    settings: Settings,
    *,
    hotkey: str | None,
    limit: int,
    state_dir: Path | None,
    prune_before: str | None,
    dry_run: bool,
    yes: bool,
) -> int:
    """Show the changes of HOTKEY, or all changes, newest first: when, what, to whom, by which process, old → new.

    Asks the server; where none answers, the store in the state directory is read, and nothing there is changed.

    With --prune-before it asks, and then forgets what came up to that moment; what is asked of later ones, by
    --as-of, diff and rollback too, is answered as before. Exit code 1: nothing was forgotten.

    With --json: name, source ("server" or "store"), events [{id, at_ms, action, hotkey, pid, uid,
    program, note, old, new, commit_number}], where old and new are records or null.

    For example:
      shmelim history 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs
      shmelim history --limit 1000 --json
      shmelim history --prune-before 2026-01-01 --dry-run
    """
    if prune_before is not None:
        if hotkey is not None or state_dir is not None:
            raise click.UsageError(
                "--prune-before is about all events: it goes with no HOTKEY, and no --state-dir"
            )
        return _prune(settings, prune_before, dry_run=dry_run, yes=yes)
    if dry_run or yes:
        raise click.UsageError("--dry-run and --yes go with --prune-before")
    if state_dir is not None:
        with Store.read_only(state_dir) as store:
            found, source = [event.as_dict() for event in store.events(hotkey, limit)], "store"
    else:
        found, source = asking.events(settings.name, hotkey, limit)
    _doubt(settings, hotkey, found)
    settings.table(
        {"source": source, "events": found}, ("when (UTC)", "action", "hotkey", "by", "change"), map(cells, found)
    )
    return YES


def _doubt(settings: Settings, hotkey: str | None, found: Sequence[object]) -> None:
    """Note that a hotkey of which nothing was found is no address, where it is none."""
    if hotkey is not None and not found:
        settings.doubt(hotkey)


def _prune(settings: Settings, before: str, *, dry_run: bool, yes: bool) -> int:
    with EliminationClient(settings.name) as client:
        count, pruned = client.prune_history(before, dry_run=True), 0
        if count and not dry_run and (yes or output.agreed(f"forget {count} events, for ever?")):
            pruned = client.prune_history(before)
    text = f"would forget {count} events" if dry_run else f"forgot {pruned} events" if pruned else _UNCHANGED
    settings.answer({"events": count, "pruned": pruned}, text)
    return YES if pruned or (dry_run and count) else NO


def cells(event: Mapping[str, Any]) -> tuple[object, ...]:
    """Return a change as it is shown: when, what, to whom, by which process, old → new."""
    uid = "" if event["uid"] is None else f" uid {event['uid']}"
    who = f"{event['program']}[{event['pid']}]{uid}"
    return utc_text(event["at_ms"]), event["action"], event["hotkey"], who, _change(event)


def _change(event: Mapping[str, Any]) -> str:
    """Return old → new, as short as it can be said, and the note."""
    old, new = event["old"], event["new"]
    if old and new:
        said = output.changed_fields(differing(old, new))
    else:
        said = f"{_brief(old)} → {_brief(new)}".strip() if old or new else ""
    return f"{said} ({event['note']})".strip() if event["note"] else said


def _brief(record: Mapping[str, Any] | None) -> str:
    if not record:
        return ""
    dd = "" if record.get("dd") is None else f" dd {output.value(record['dd'])}"
    return f"{output.value(record.get('reason'))}{dd}"


@command
@any_hotkey_argument
def debts(settings: Settings, *, hotkey: str | None) -> None:
    """Show what the elimination of HOTKEY still owes, or what all of them do, oldest first.

    Limit orders are to be deleted, positions closed, collateral slashed. What fails is tried again with the next
    tick, except a slash that is in_doubt: it is not known whether it was made, and a person must find out
    ("shmelim slash resolve --help").

    Asks the server; where none answers, the store in the state directory is read, and nothing there is changed.

    A slash is owed for a rule and a registration of the miner. What is not due rests: its elimination was taken
    back.

    With --json: name, source ("server" or "store"), count, debts [{hotkey, kind, rule, registration, state, due,
    since_ms, eliminated_ms, attempts, error, attempt, in_doubt_since_ms, reason, share, share_asked}].

    For example:
      shmelim debts
      shmelim debts --json | jq '.debts[] | select(.state == "in_doubt")'
    """
    found, source = asking.debts(settings.name, hotkey)
    _doubt(settings, hotkey, found)
    columns = {"hotkey": "hotkey", "kind": "owes", "rule": "rule", "state": "state", "due": "due"}
    columns |= {"share": "share", "since_ms": "since (UTC)"}
    settings.rows({"source": source}, "debts", found, columns | {"attempts": "failures", "error": "last error"})


_rule_option = click.option(
    "--rule",
    metavar="RULE",
    help="The rule of the slash, as `shmelim debts` names it; needed where there are several.",
)
_registration_option = click.option(
    "--registration", type=WholeNumber(0), metavar="N", help="Which registration of the hotkey, likewise."
)


def _cause(found: Mapping[str, Any]) -> str:
    """Return a cause in words."""
    again = f", registration {found['registration']}" if found["registration"] else ""
    return f"{printable(found['rule']) or 'any rule'}{again}"


def _share(found: Mapping[str, Any]) -> str:
    return "the contract's own" if found["share"] is None else f"{found['share']:g}"


@click.group(cls=Group)
def slash() -> None:
    """Show slashes, settle one in doubt, release those that are held, or let a miner be slashed once more.

    For example:
      shmelim slash list
      shmelim slash resolve 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --made
    """


@slash.command("list", cls=Command, short_help="Show the slashes that were made or declined.")
@any_hotkey_argument
@click.pass_obj
def list_(settings: Settings, *, hotkey: str | None) -> None:
    """Show the slashes of HOTKEY that were made or declined, or those of all miners, oldest first.

    A miner is slashed once for a rule, until he has departed and registered again ("registration" counts that), or
    "shmelim slash re-arm". A rule that is empty stands for every rule: an older version recorded it.

    Asks the server; where none answers, the store in the state directory is read, and nothing there is changed.

    With --json: name, source ("server" or "store"), count, slashes [{hotkey, rule, registration, made_ms,
    eliminated_ms, by ("contract" or "hand"), outcome ("made" or "declined"), reason, share, answer}].

    For example:
      shmelim slash list
      shmelim slash list 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --json
    """
    found, source = asking.slashes(settings.name, hotkey)
    _doubt(settings, hotkey, found)
    columns = {"hotkey": "hotkey", "rule": "rule", "registration": "registration", "outcome": "outcome"}
    columns |= {"made_ms": "made (UTC)", "eliminated_ms": "eliminated (UTC)", "by": "by", "share": "share"}
    settings.rows({"source": source}, "slashes", found, columns)


@slash.command(cls=Command, short_help="Say whether a slash that is in doubt was made.")
@hotkey_argument
@click.option("--made", is_flag=True, help="The collateral was taken.")
@click.option("--not-made", is_flag=True, help="It was not.")
@_rule_option
@_registration_option
@_dry_run_option
@yes_option
@click.pass_obj
def resolve(
    settings: Settings,
    *,
    hotkey: str,
    made: bool,
    not_made: bool,
    rule: str | None,
    registration: int | None,
    dry_run: bool,
    yes: bool,
) -> int:
    """Say whether the slash of HOTKEY, which is in doubt, was made.

    First look at the collateral itself, on the chain. --made: it is settled. --not-made: it is owed again, and the
    next tick makes it; a wrong --not-made takes the collateral twice. The history keeps who said so.

    Exit code 1: no slash of HOTKEY is in doubt, or the question was answered with no; nothing was changed.

    With --json: name, hotkey, made, resolved, debt (as `shmelim debts` has it).

    For example:
      shmelim slash resolve 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --made
      shmelim slash resolve 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --not-made --yes
    """
    if made == not_made:
        raise click.UsageError("say either --made or --not-made")
    settings.doubt(hotkey)
    shown = printable(hotkey)
    with EliminationClient(settings.name) as client:
        debt = _in_doubt(client, hotkey, rule, registration)
        since = utc_text(debt["in_doubt_since_ms"])
        question = "It was made, and is settled?" if made else "It was NOT made, and may be made once more?"
        about = (
            f"hotkey      {shown}",
            f"cause       {_cause(debt)}",
            f"share       {_share(debt)}",
            f"in doubt    {'not noticed yet' if since is None else f'since {since} UTC'}",
            f"last error  {output.value(debt['error'])}",
        )
        resolved = _agreed(settings, question, about, dry_run=dry_run, yes=yes) and client.resolve_slash(
            hotkey, made, debt["rule"], debt["registration"]
        )
        if not resolved and not dry_run:
            # Perhaps somebody was quicker, which this names; else the question was answered with no.
            _in_doubt(client, hotkey, rule, registration)
    then = "is owed again" if debt["due"] else "rests, as he is not eliminated"
    said = f"resolved: {shown}: the slash was {'made' if made else f'not made; it {then}'}"
    settings.answer(
        {"hotkey": hotkey, "made": made, "resolved": resolved, "debt": debt}, said if resolved else _UNCHANGED
    )
    return YES if resolved or dry_run else NO


@slash.command(cls=Command, short_help="Let slashes go on that are held.")
@_dry_run_option
@yes_option
@click.pass_obj
def release(settings: Settings, *, dry_run: bool, yes: bool) -> int:
    """Let slashes go on that are held.

    They are held when too many are owed within an hour, and after a restore, or a start from something else than
    the store's own latest state: slashes may have been made then of which the store knows nothing. So none is
    begun until a person has looked: compare "shmelim debts" and "shmelim slash list" with the contract's own
    records. All that are owed when you release them may be made, however many they are.

    Exit code 1: nothing was held, or the question was answered with no; nothing was changed.

    With --json: name, released, held {since_ms, why}, owed [debt] (which may be made then).

    For example:
      shmelim slash release --dry-run
    """
    with EliminationClient(settings.name) as client:
        held = client.get_money_held()
        if held is None:
            raise RefusedError("no slash is held", hint="`shmelim status` shows what is wrong")
        owed = [
            debt for debt in client.get_debts() if debt["kind"] == SLASH and debt["state"] == OWED and debt["due"]
        ]
        about = [f"held since {utc_text(held['since_ms'])} UTC: {printable(held['why'])}"]
        about += [f"would be made: {printable(d['hotkey'])} ({_cause(d)}), share {_share(d)}" for d in owed]
        question = f"All {len(owed)} slashes that are owed may be made?"
        released = _agreed(settings, question, about, dry_run=dry_run, yes=yes) and client.release_money()
    settings.answer(
        {"released": released, "held": held, "owed": owed}, "slashes go on" if released else _UNCHANGED
    )
    return YES if released or dry_run else NO


@slash.command("re-arm", cls=Command, short_help="Let a miner be slashed once more for the same rule.")
@hotkey_argument
@_rule_option
@_registration_option
@_dry_run_option
@yes_option
@click.pass_obj
def re_arm(
    settings: Settings, *, hotkey: str, rule: str | None, registration: int | None, dry_run: bool, yes: bool
) -> int:
    """Let HOTKEY be slashed once more for what he was slashed for: the next elimination for it owes a slash again.

    Without --rule and --registration this is so for every slash of his on record. The history keeps who said so.

    Exit code 1: he was not slashed for that, or the question was answered with no; nothing was changed.

    With --json: name, hotkey, rearmed, slashes (as `shmelim slash list` has them).

    For example:
      shmelim slash re-arm 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs --rule drawdown
    """
    settings.doubt(hotkey)
    shown = printable(hotkey)
    with EliminationClient(settings.name) as client:
        found = [made for made in client.get_slashes(hotkey) if _is_meant(made, rule, registration)]
        if not found:
            raise RefusedError(
                f"no such slash of {shown} is on record", hint="`shmelim slash list` shows those that are"
            )
        about = [f"{made['outcome']} {utc_text(made['made_ms'])} UTC for {_cause(made)}" for made in found]
        question = f"{shown} may be slashed once more for {'each of these' if len(found) > 1 else 'this'}?"
        rearmed = _agreed(settings, question, about, dry_run=dry_run, yes=yes) and client.rearm_slash(
            hotkey, rule, registration
        )
    said = f"re-armed: {shown} can be slashed once more" if rearmed else _UNCHANGED
    settings.answer({"hotkey": hotkey, "rearmed": rearmed, "slashes": found}, said)
    return YES if rearmed or dry_run else NO


def _agreed(settings: Settings, question: str, about: Sequence[str], *, dry_run: bool, yes: bool) -> bool:
    """Say what would be done, and return whether it shall be."""
    if not dry_run and not yes:
        return output.agreed(question, *about)
    for line in about:
        settings.note(line)
    return not dry_run


def _is_meant(found: Mapping[str, Any], rule: str | None, registration: int | None) -> bool:
    return rule in (None, found["rule"]) and registration in (None, found["registration"])


def _in_doubt(
    client: EliminationClient, hotkey: str, rule: str | None, registration: int | None
) -> dict[str, Any]:
    """Return the slash of a hotkey that a person may settle; RefusedError where that is not one."""
    slashes = [d for d in client.get_debts(hotkey) if d["kind"] == SLASH and _is_meant(d, rule, registration)]
    begun = [debt for debt in slashes if debt["state"] != OWED]
    shown = printable(hotkey)
    if len(begun) > 1:
        causes = "; ".join(map(_cause, begun))
        raise RefusedError(
            f"{len(begun)} slashes of {shown} are in doubt: {causes}",
            hint="say which with --rule and --registration",
        )
    if not slashes:
        raise RefusedError(f"no slash of {shown} is in doubt", hint="`shmelim debts` shows what is owed")
    if not begun:
        raise RefusedError(
            f"the slash of {shown} is owed, not in doubt: it has certainly not been made yet",
            hint="there is nothing to settle; the next tick makes it",
        )
    (debt,) = begun
    if debt["under_way"]:
        pid = debt["attempt"].partition("-")[0]
        raise RefusedError(
            f"process {pid} has begun the slash of {shown} and may be making it right now",
            hint="wait until it is settled, or in doubt; if that process hangs, end it, and wait half a minute",
        )
    return debt
