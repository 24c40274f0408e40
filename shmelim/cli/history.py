"""``shmelim history``: who changed what, when, from which process; with or without a server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import click

from shmelim.cli import output
from shmelim.cli.offline import ask
from shmelim.cli.options import HOTKEY, PATH, Settings, command
from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.store.store import Store
from shmelim.errors import MessageTooLargeError

_PAGE: Final = 200


@command
@click.argument("hotkey", type=HOTKEY, required=False)
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, metavar="N", help="At most N.")
@click.option(
    "--state-dir", type=PATH, metavar="DIR", help="Read the store in this directory, without asking a server."
)
def history(settings: Settings, *, hotkey: str | None, limit: int, state_dir: Path | None) -> None:
    """Show the changes of HOTKEY, or all changes, newest first: when, what, to whom, by which process, old → new.

    Asks the server; when none runs, the store in the state directory is read, and nothing there is changed.

    With --json: name, source ("server" or "store"), events [{id, at_ms, action, hotkey, pid, uid,
    program, note, old, new}], where old and new are records or null.

    For example:
      shmelim history 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs
      shmelim history --limit 1000 --json
    """

    def stored(store: Store) -> list[dict[str, Any]]:
        return [event.as_dict() for event in store.events(hotkey, limit)]

    if state_dir is not None:
        with Store.read_only(state_dir) as store:
            events, source = stored(store), "store"
    else:
        events, source = ask(settings.name, lambda client: _pages(client, hotkey, limit), stored)
    settings.show(
        {"source": source, "events": events},
        ("when (UTC)", "action", "hotkey", "by", "change"),
        ((output.moment(it["at_ms"]), it["action"], it["hotkey"], _who(it), _change(it)) for it in events),
    )


def _pages(client: EliminationClient, hotkey: str | None, limit: int) -> list[dict[str, Any]]:
    """Ask the server in pages, each of which fits into a message."""
    events: list[dict[str, Any]] = []
    page = _PAGE
    while len(events) < limit:
        wanted = min(page, limit - len(events))
        try:
            found = client.get_history(hotkey, wanted, events[-1]["id"] if events else None)
        except MessageTooLargeError:
            if page == 1:
                raise
            page = max(1, page // 4)
            continue
        events += found
        if len(found) < wanted:
            break
    return events


def _who(event: Mapping[str, Any]) -> str:
    uid = "" if event["uid"] is None else f" uid {event['uid']}"
    return f"{event['program']}[{event['pid']}]{uid}"


def _change(event: Mapping[str, Any]) -> str:
    """Return old → new, as short as it can be said, and the note."""
    old, new = event["old"], event["new"]
    said = ""
    if old is not None and new is not None:
        fields = [field for field in {**old, **new} if old.get(field) != new.get(field)]
        said = ", ".join(
            f"{field}: {output.value(old.get(field))} → {output.value(new.get(field))}" for field in fields
        )
    elif new is not None:
        said = f"→ {_brief(new)}"
    elif old is not None:
        said = f"{_brief(old)} →"
    return " ".join(part for part in (said, f"({event['note']})" if event["note"] else "") if part)


def _brief(record: Mapping[str, Any]) -> str:
    dd = "" if record.get("dd") is None else f" dd {output.value(record['dd'])}"
    return f"{output.value(record.get('reason'))}{dd}"
