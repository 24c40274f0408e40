"""``shmelim status``: who writes, what is published, how full it is, and what is wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

import click

from shmelim.channel.address import describe
from shmelim.cli import output
from shmelim.cli.failure import NOT_SERVING
from shmelim.cli.health import CODES
from shmelim.cli.options import Settings, command
from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.runtime import RuntimeDirectory
from shmelim.eliminations.state.debt_book import MOST_SHOWN
from shmelim.eliminations.store.store import Store
from shmelim.errors import KeyFileError, ShmelimError, StoreError
from shmelim.fleet.publishing import publishing
from shmelim.shm import READ_PATH
from shmelim.system.clock import utc_text
from shmelim.watch.seeing import see, with_publisher

_ASKING: Final = 2.0
_NO_CHANNEL: Final = {
    "address": None,
    "answers": False,
    "silent": False,
    "problem": "changes are made where its server runs",
}


@command
@click.option("--verify", is_flag=True, help="Check every record's checksum and that each entry can be found.")
def status(settings: Settings, *, verify: bool) -> int:
    """Show who serves a name, what is published, how full it is, and what needs a person.

    Needs no key and no living server: the last published state stays readable. What only the server knows (its
    store, trouble with its files) is asked of it where this user may; what is still owed is read from the store
    where no server answers.

    Exit code: as that of `shmelim health`; 0 where the server lives and this user may not ask it.

    With --json: name, version, generation, eliminated, departed, registered, entries,
    read_path ("native" or "pure"), writer {pid, alive, state, heartbeat_age_s, started_ms},
    table {capacity, usable, arena_size, arena_used, arena_live, segment_bytes},
    follows {source, line, seq, as_of_ms, age_s} or null,
    publishing {pid, engine, line, seq, behind, held, error} or null,
    channel {address, answers, silent, problem}, state_dir,
    server {commits, changes, store_bytes, problems [{name, subject, severity, text, remedy, since_ms}]} or null,
    debts (how many, or null),
    slashes_in_doubt [hotkey] (the first 20, or null), verified (entries, or null).

    For example:
      shmelim status
      shmelim status --name mainnet --verify --json
    """
    reader = EliminationReader(settings.name)
    verified = reader.verify() if verify else None
    writer, table = reader.writer, reader.table
    follows = _follows(reader)
    channel, state_dir, server = _ask(settings.name) if follows is None else (dict(_NO_CHANNEL), None, None)
    published = publishing(settings.name) if follows is None else None
    server = server and with_publisher(published, server)
    debts, in_doubt = _owed(server, state_dir)
    found = {
        **output.attributes(table, "version", "generation"),
        **dict(zip(("eliminated", "departed", "registered"), table.flag_counts, strict=False)),
        "entries": table.entries,
        "read_path": READ_PATH,
        "writer": {
            **output.attributes(writer, "pid", "alive", "state", "started_ms"),
            "heartbeat_age_s": None if writer.heartbeat_age is None else round(writer.heartbeat_age, 3),
        },
        "table": {
            **output.attributes(table, "capacity", "arena_size", "arena_used", "arena_live"),
            "usable": table.capacity // 2,
            "segment_bytes": table.segment_size,
        },
        "follows": follows,
        "publishing": published
        and output.attributes(published, "pid", "engine", "line", "seq", "behind", "held", "error"),
        "channel": channel,
        "state_dir": state_dir,
        "server": server and {key: server.get(key) for key in ("commits", "changes", "store_bytes", "problems")},
        "debts": debts,
        "slashes_in_doubt": in_doubt,
        "verified": verified,
    }
    settings.answer(found, lambda: output.facts(_lines({"name": settings.name, **found})))
    if writer.alive is False or (writer.alive is None and follows is server is None):
        return NOT_SERVING
    if follows is not None:
        return CODES.get(see(settings.name).status, NOT_SERVING)  # it may have ended by now
    return CODES[server["status"]] if server is not None else CODES["failing" if channel["silent"] else "ok"]


def _follows(reader: EliminationReader) -> dict[str, Any] | None:
    """Return whom a table follows, how far it is and how old; None where its writer is the source."""
    if reader.source is None:
        return None
    position, age = reader.position, reader.staleness
    return {
        "source": reader.source,
        "line": position and position.line,
        "seq": position and position.seq,
        "as_of_ms": reader.as_of,
        "age_s": age if age is None else round(age, 3),
    }


def _ask(name: str) -> tuple[dict[str, Any], str | None, dict[str, Any] | None]:
    """Return where the server that started last is and whether it answers, its directory, and what it says."""
    address = state_dir = server = problem = None
    silent = False  # it should answer, and does not
    try:
        info = RuntimeDirectory.of_server(name).server()
        address, state_dir = describe(info.address), info.state_dir
        with EliminationClient(name, timeout=_ASKING) as client:
            server = client.health_check()
    except ShmelimError as error:
        problem, silent = error.message, address is not None and not isinstance(error, KeyFileError)
    answers = server is not None
    return {"address": address, "answers": answers, "silent": silent, "problem": problem}, state_dir, server


def _owed(server: dict[str, Any] | None, state_dir: str | None) -> tuple[int | None, list[str] | None]:
    """Return how many debts there are and whose slash is in doubt, as server or store say; else None."""
    if server is not None:
        return server.get("num_debts"), server.get("slashes_in_doubt")
    if state_dir is not None:
        with contextlib.suppress(StoreError), Store.read_only(state_dir) as store:
            figures = store.debt_figures()
            return figures.debts, figures.in_doubt[:MOST_SHOWN]
    return None, None


def _lines(status: dict[str, Any]) -> list[tuple[str, object]]:
    writer, table, channel, server = status["writer"], status["table"], status["channel"], status["server"]
    answers = "" if channel["answers"] else f" ({channel['problem']})"
    follows = status["follows"]
    lines: list[tuple[str, object]] = [
        ("name", status["name"]),
        ("writer", _writer_line(writer)),
        *([] if follows is None else [("follows", _follower_line(follows))]),
        ("started", utc_text(writer["started_ms"])),
        ("version", f"{status['version']}, generation {status['generation']}"),
        ("eliminated", status["eliminated"]),
        ("departed", status["departed"]),
        ("registered", status["registered"]),
        ("slots", _share(status["entries"], table["usable"], "{:,}".format)),
        ("records", _share(table["arena_used"], table["arena_size"], output.size)),
        ("segment", output.size(table["segment_bytes"])),
        ("read path", status["read_path"]),
        ("channel", f"{channel['address'] or 'unknown'}{answers}"),
        ("state", status["state_dir"]),
        ("debts", status["debts"]),
    ]
    if (in_doubt := status["slashes_in_doubt"]) is not None:
        settle = ": settle with `shmelim slash resolve HOTKEY --made` or `--not-made`"
        lines.append(("slashes in doubt", f"{', '.join(in_doubt)}{settle}" if in_doubt else "none"))
    if (published := status["publishing"]) is not None:
        place = f"to {published['engine']}, change {published['seq']} of line {published['line']}"
        lines.append(("published", f"{place}, {published['behind']} behind"))
    if server is not None:
        lines.append(("store", f"{output.size(server['store_bytes'])}, {server['commits']} commits"))
        lines.append(("problems", "; ".join(map(output.problem, server["problems"])) or "none"))
    if status["verified"] is not None:
        lines.append(("verified", f"{status['verified']} entries, all whole"))
    return lines


def _follower_line(follows: dict[str, Any]) -> str:
    age = "of unknown age" if follows["age_s"] is None else f"{output.span(follows['age_s'])} old"
    return f"{follows['source']}: change {follows['seq']} of line {follows['line']}, {age}"


def _writer_line(writer: dict[str, Any]) -> str:
    age = writer["heartbeat_age_s"]
    if age is None:
        return (
            f"process {writer['pid']}, {writer['state']}; its clock is another, so nobody knows whether it lives"
        )
    heartbeat = f"heartbeat {output.span(age)} ago"
    if writer["alive"]:
        return f"process {writer['pid']}, alive, {writer['state']}, {heartbeat}"
    end = "stopped" if writer["state"] == "stopped" else f"dead (it was {writer['state']})"
    return f"process {writer['pid']}, {end}, last {heartbeat}; the last state stays readable"


def _share(used: int, whole: int, show: Callable[[int], str]) -> str:
    return f"{show(used)} of {show(whole)} ({100 * used / whole if whole else 0:.1f} %)"
