"""What can be seen of a name from this process: the table, its writer, and what the server says of itself."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.reader import EliminationReader
from shmelim.errors import CallerFaultError, ChannelError, NotServingError, SegmentError, ShmelimError
from shmelim.fleet.publishing import Publishing, publishing
from shmelim.shm import TableInfo, WriterInfo
from shmelim.shm.following import OLD

_ASKING: Final = 2.0  # seconds that the server has to answer


class Seen(NamedTuple):
    """What is seen of a name at one moment."""

    status: str  # "ok", "degraded", "failing", or "not served"
    problems: list[dict[str, Any]]  # the oldest first, as a health check has them
    writer: WriterInfo | None  # None, and the next two: nothing is published under the name
    table: TableInfo | None
    server: dict[str, Any] | None  # its health check; None where it could not be asked, and for a follower
    publishing: Publishing | None = None  # what the publisher of the name says, on the server's host
    source: str | None = None  # whom the table follows, on another host
    staleness: float | None = None  # seconds since that was known to have nothing newer; None: not known

    @property
    def is_served(self) -> bool:
        """Whether a writer lives, as its heartbeat or its server says."""
        return self.server is not None or (self.writer is not None and self.writer.alive is True)


def see(name: str, owner: int | None = None) -> Seen:
    """Look at a name; ``owner`` is the uid whose segments are trusted (None: this user's and root's).

    Raises nothing for what is wrong with the name: that is a problem in the answer. Costs one call to the server
    where one lives, at most 2 s.
    """
    try:
        reader = EliminationReader(name, owner=owner)
        writer, table = reader.writer, reader.table
    except NotServingError as error:
        return Seen("not served", [problem_of("not_served", error)], None, None, None)
    except SegmentError as error:
        return Seen("failing", [problem_of("table_unreadable", error)], None, None, None)
    if reader.source is not None or writer.alive is False:
        return _unasked(reader, writer, table)
    try:
        with EliminationClient(name, timeout=_ASKING) as client:
            server = client.health_check()
    except (ShmelimError, TimeoutError) as error:
        is_silent = isinstance(error, (ChannelError, NotServingError, TimeoutError))
        if is_silent and not isinstance(error, CallerFaultError):
            failing = Seen("failing", [problem_of("no_answer", error)], writer, table, None)
            return failing if writer.alive else _unasked(reader, writer._replace(alive=False), table)
        # This user, or this process, may not ask, and the server may be well.
        return Seen("ok", [problem_of("cannot_check", error) | {"severity": "notice"}], writer, table, None)
    found = publishing(name)
    judged = with_publisher(found, server)
    return Seen(judged["status"], judged["problems"], writer, table, server, found)


def with_publisher(found: Publishing | None, health: dict[str, Any]) -> dict[str, Any]:
    """Return a health check whose status and problems count what is wrong with the name's publisher."""
    if found is None or (wrong := found.problem()) is None:
        return health
    name, severity, error = wrong
    status = "degraded" if health["status"] == "ok" and severity == "degraded" else health["status"]
    about = {"severity": severity, "since_ms": found.since_ms}
    return health | {"status": status, "problems": [*health["problems"], problem_of(name, error) | about]}


def _unasked(reader: EliminationReader, writer: WriterInfo, table: TableInfo) -> Seen:
    """See a table whose writer is dead, or which follows another host's: nobody could say more."""
    source, age, problems = reader.source, reader.staleness, []
    if source is not None and (age is None or age > OLD):
        known = "is not known yet" if age is None else f"is {age:.0f} s"
        text = f"the table follows {source!r}, and how old it is {known}"
        hint = "see `shmelim fleet status`: is it held, is the follower here running, and the publisher there?"
        problems.append(problem_of("follower_old", ShmelimError(text, hint=hint)) | {"severity": "degraded"})
    if writer.alive is False:
        unheard = "has no heartbeat any more" if writer.heartbeat_age is not None else "is not to be heard of"
        state = f"process {writer.pid}, {writer.state}, {unheard}"
        hint = f"start {'the server' if source is None else '`shmelim follow`'} again"
        if writer.hangs:
            state += ", and runs: it hangs, or is stopped"
            hint = f"end it (kill -KILL {writer.pid}), and {hint}, unless a validator does"
        found = NotServingError(f"nobody serves {reader.name!r}: {state}", hint=hint)
        problems.insert(0, problem_of("not_served", found))
    status = "ok" if not problems else "not served" if writer.alive is False else "degraded"
    return Seen(status, problems, writer, table, None, source=source, staleness=age)


def problem_of(name: str, error: Exception) -> dict[str, Any]:
    """Return an error as a problem that a health check lists."""
    text, remedy = (error.message, error.hint) if isinstance(error, ShmelimError) else (str(error), None)
    return {
        "name": name, "subject": "", "severity": "failing", "text": text, "remedy": remedy, "since_ms": None,
    }  # fmt: skip
