"""``shmelim status``: who writes, what is published, how full it is, and what is wrong."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

import click

from shmelim.cli import output
from shmelim.cli.options import Command, Settings, owner_option, settings_options
from shmelim.eliminations import EliminationClient, EliminationReader
from shmelim.eliminations.runtime import RuntimeDirectory
from shmelim.eliminations.state.debt_book import MOST_SHOWN
from shmelim.eliminations.store.offline import read_debt_figures
from shmelim.errors import KeyFileError, NotServingError, ShmelimError, StoreError
from shmelim.shm import READ_PATH

if TYPE_CHECKING:
    from shmelim.shm import TableInfo, WriterInfo

_ASKING: Final = 2.0


@click.command(cls=Command, short_help="Show who serves a name, what, and how full it is.")
@click.option("--verify", is_flag=True, help="Check every record's checksum and that each entry can be found.")
@owner_option
@settings_options
@click.pass_obj
def status(settings: Settings, *, verify: bool, owner: int | None) -> None:
    """Show who serves a name, what is published, how full it is, and what needs a person.

    Needs no key and no living server: the last published state stays readable. What only the server knows (its
    store, trouble with its files) is asked of it where this user may; what is still owed is read from the store
    where no server answers.

    With --json: name, version, generation, sequence, eliminated, departed, registered, entries,
    read_path ("native" or "pure"), writer {pid, alive, state, heartbeat_age_s, started_ms},
    table {capacity, usable, arena_size, arena_used, arena_live, segment_bytes},
    channel {address, answers, problem}, state_dir,
    server {commits, changes, store_bytes, problems} or null, debts (how many, or null),
    slashes_in_doubt [hotkey] (the first 20, or null), verified (entries, or null).

    For example:
      shmelim status
      shmelim status --name mainnet --verify --json
    """
    reader = EliminationReader(settings.name, owner=owner)
    verified = reader.verify() if verify else None
    writer, table = reader.writer, reader.table
    address, state_dir, channel_problem = _announced(settings.name)
    server, channel_problem = (None, channel_problem) if address is None else _ask(settings.name)
    owed, in_doubt = _owed(server, state_dir)
    document = {
        "name": settings.name,
        "version": table.version,
        "generation": table.generation,
        "sequence": table.sequence,
        "eliminated": table.flag_counts[0],
        "departed": table.flag_counts[1],
        "registered": table.flag_counts[2],
        "entries": table.entries,
        "read_path": READ_PATH,
        "writer": {
            "pid": writer.pid,
            "alive": writer.alive,
            "state": writer.state,
            "heartbeat_age_s": round(writer.heartbeat_age, 3),
            "started_ms": writer.started_ms,
        },
        "table": {
            "capacity": table.capacity,
            "usable": table.capacity // 2,
            "arena_size": table.arena_size,
            "arena_used": table.arena_used,
            "arena_live": table.arena_live,
            "segment_bytes": table.segment_size,
        },
        "channel": {"address": address, "answers": server is not None, "problem": channel_problem},
        "state_dir": state_dir,
        "server": server and {key: server.get(key) for key in ("commits", "changes", "store_bytes", "problems")},
        "debts": owed,
        "slashes_in_doubt": in_doubt,
        "verified": verified,
    }
    if settings.as_json:
        output.document(document)
    else:
        output.facts(_lines(document, writer, table))


def _announced(name: str) -> tuple[str | None, str | None, str | None]:
    """Return address and state directory that the last server left word of, or what is in the way."""
    try:
        info = RuntimeDirectory(name).server()
    except (NotServingError, KeyFileError) as error:
        return None, None, error.message
    address = info.address if isinstance(info.address, str) else f"{info.address[0]}:{info.address[1]}"
    return address, info.state_dir, None


def _ask(name: str) -> tuple[dict[str, Any] | None, str | None]:
    """Return what the server says of itself, or why it does not."""
    try:
        client = EliminationClient(name, timeout=_ASKING)
        try:
            return client.health_check(), None
        finally:
            client.close()
    except ShmelimError as error:
        return None, error.message


def _owed(server: dict[str, Any] | None, state_dir: str | None) -> tuple[int | None, list[str] | None]:
    """Return how many debts there are and whose slash is in doubt, as server or store say; None: nobody knows."""
    if server is not None:
        return server.get("num_debts"), server.get("slashes_in_doubt")
    if state_dir is not None:
        with contextlib.suppress(StoreError):
            figures = read_debt_figures(state_dir)
            return figures.debts, figures.in_doubt[:MOST_SHOWN]
    return None, None


def _in_doubt_line(hotkeys: list[str]) -> str:
    if not hotkeys:
        return "none"
    return f"{', '.join(hotkeys)}: settle with `shmelim slash resolve HOTKEY --made` or `--not-made`"


def _lines(document: dict[str, Any], writer: WriterInfo, table: TableInfo) -> list[tuple[str, object]]:
    channel, server = document["channel"], document["server"]
    answers = "" if channel["answers"] else f" ({channel['problem']})"
    lines: list[tuple[str, object]] = [
        ("name", document["name"]),
        ("writer", _writer_line(writer)),
        ("started", output.moment(writer.started_ms)),
        ("version", f"generation {table.generation}, sequence {table.sequence}"),
        ("eliminated", document["eliminated"]),
        ("departed", document["departed"]),
        ("registered", document["registered"]),
        ("slots", _share(table.entries, table.capacity // 2, "{:,}".format)),
        ("records", _share(table.arena_used, table.arena_size, output.size)),
        ("segment", output.size(table.segment_size)),
        ("read path", document["read_path"]),
        ("channel", f"{channel['address'] or 'unknown'}{answers}"),
        ("state", document["state_dir"]),
        ("debts", document["debts"]),
    ]
    if document["slashes_in_doubt"] is not None:
        lines.append(("slashes in doubt", _in_doubt_line(document["slashes_in_doubt"])))
    if server is not None:
        lines.append(("store", f"{output.size(server['store_bytes'])}, {server['commits']} commits"))
        lines.append(("problems", "; ".join(server["problems"] or []) or "none"))
    if document["verified"] is not None:
        lines.append(("verified", f"{document['verified']} entries, all whole"))
    return lines


def _writer_line(writer: WriterInfo) -> str:
    heartbeat = output.span(writer.heartbeat_age)
    if writer.alive:
        return f"process {writer.pid}, alive, {writer.state}, heartbeat {heartbeat} ago"
    end = "stopped" if writer.state == "stopped" else f"dead (it was {writer.state})"
    return f"process {writer.pid}, {end}, last heartbeat {heartbeat} ago; the last state stays readable"


def _share(used: int, whole: int, show: Any) -> str:
    percent = 100 * used / whole if whole else 0.0
    return f"{show(used)} of {show(whole)} ({percent:.1f} %)"
