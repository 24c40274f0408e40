"""``shmelim history``: who changed what, when, from which process; with or without a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from shmelim.cli import output
from shmelim.cli.offline import from_store
from shmelim.cli.options import HOTKEY, Command, Settings, settings_options
from shmelim.eliminations import EliminationClient
from shmelim.eliminations.store.history import read_events
from shmelim.errors import KeyFileError, MessageTooLargeError, NotServingError

if TYPE_CHECKING:
    from collections.abc import Mapping

_PAGE: Final = 200


@click.command(cls=Command, short_help="Show who changed what, and when.")
@click.argument("hotkey", type=HOTKEY, required=False)
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, metavar="N", help="At most so many."
)
@click.option(
    "--state-dir",
    type=click.Path(path_type=Path, readable=False),
    metavar="DIR",
    help="Read the history in this state directory, without asking a server.",
)
@settings_options
@click.pass_obj
def history(settings: Settings, *, hotkey: str | None, limit: int, state_dir: Path | None) -> None:
    """Show the changes of HOTKEY, or all changes, newest first: when, what, to whom, by which process, old → new.

    Asks the server; when none runs, the store in the state directory is read, and nothing there is changed.

    With --json: name, source ("server" or "store"), events [{id, at_ms, action, hotkey, pid, uid,
    program, note, old, new}], where old and new are records or null.

    For example:
      shmelim history 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs
      shmelim history --limit 1000 --json
    """
    events: list[dict[str, Any]]
    source = "store"
    if state_dir is not None:
        events = [event.as_dict() for event in read_events(state_dir, hotkey, limit)]
    else:
        try:
            events = _from_server(settings.name, hotkey, limit)
            source = "server"
        except (NotServingError, KeyFileError) as error:
            found = from_store(settings.name, lambda directory: read_events(directory, hotkey, limit), error)
            events = [event.as_dict() for event in found]
    if settings.as_json:
        output.document({"name": settings.name, "source": source, "events": events})
        return
    output.records(
        ("when (UTC)", "action", "hotkey", "by", "change"),
        (
            (output.moment(event["at_ms"]), event["action"], event["hotkey"], _who(event), _change(event))
            for event in events
        ),
    )


def _from_server(name: str, hotkey: str | None, limit: int) -> list[dict[str, Any]]:
    """Ask in pages, each of which fits into a message."""
    client = EliminationClient(name)
    events: list[dict[str, Any]] = []
    page = _PAGE
    try:
        while len(events) < limit:
            before = events[-1]["id"] if events else None
            wanted = min(page, limit - len(events))
            try:
                found = client.get_history(hotkey, wanted, before)
            except MessageTooLargeError:
                if page == 1:
                    raise
                page = max(1, page // 4)
                continue
            events += found
            if len(found) < wanted:
                break
    finally:
        client.close()
    return events


def _who(event: Mapping[str, Any]) -> str:
    uid = "" if event["uid"] is None else f" uid {event['uid']}"
    return f"{event['program']}[{event['pid']}]{uid}"


def _change(event: Mapping[str, Any]) -> str:
    """Return old → new, as short as it can be said; and the note."""
    old, new = event["old"], event["new"]
    if old is not None and new is not None:
        fields = [field for field in {**old, **new} if old.get(field) != new.get(field)]
        said = ", ".join(
            f"{field}: {output.value(old.get(field))} → {output.value(new.get(field))}" for field in fields
        )
    elif new is not None:
        said = f"→ {_brief(new)}"
    elif old is not None:
        said = f"{_brief(old)} →"
    else:
        said = ""
    return " ".join(part for part in (said, f"({event['note']})" if event["note"] else "") if part)


def _brief(record: Mapping[str, Any]) -> str:
    dd = "" if record.get("dd") is None else f" dd {output.value(record['dd'])}"
    return f"{output.value(record.get('reason'))}{dd}"
