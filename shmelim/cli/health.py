"""``shmelim health``: one word for a monitor, what is wrong and what to do, and an exit code."""

from __future__ import annotations

from typing import Any, Final

from shmelim.cli import output
from shmelim.cli.failure import NOT_SERVING
from shmelim.cli.options import Settings, command
from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.runtime import RuntimeDirectory
from shmelim.errors import ChannelError, NotServingError
from shmelim.fleet.publishing import publishing
from shmelim.watch.seeing import problem_of, see, with_publisher

CODES: Final = {"ok": 0, "degraded": 1, "failing": 2}
"""Exit codes of what a server says of itself."""

_ASKING: Final = 5.0


@command
def health(settings: Settings) -> int:
    """Say whether a name is served well, and if not, what is wrong and what to do.

    A table that follows another host's is degraded once it is more than 10 s old.

    Exit code 0: ok; 1: degraded (something does not work); 2: failing (the purpose is not served, or the server
    does not answer); 3: nobody serves the name. A notice, which is worth knowing, leaves the code as it is.

    With --json: name, status ("ok", "degraded", "failing" or "not served"), pid, heartbeat_age_s,
    problems [{name, subject, severity, text, remedy, since_ms}].

    For example:
      shmelim health
      shmelim health --name mainnet --json
    """
    reader = EliminationReader(settings.name)
    writer = reader.writer
    answer: dict[str, Any]
    if reader.source is not None or not writer.alive:
        seen = see(settings.name)
        answer = {"status": seen.status, "problems": seen.problems}
    else:
        answer = with_publisher(publishing(settings.name), _ask(settings.name))
    found = {
        "status": answer["status"],
        "pid": writer.pid,
        "heartbeat_age_s": None if writer.heartbeat_age is None else round(writer.heartbeat_age, 3),
        "problems": answer["problems"],
    }
    settings.answer(found, lambda: output.facts(_lines(found)))
    return CODES.get(answer["status"], NOT_SERVING)


def _ask(name: str) -> dict[str, Any]:
    """Return what the server says of itself, or that it says nothing; an error if this user cannot ask it."""
    try:
        RuntimeDirectory.of_server(name).server()
    except NotServingError as error:
        raise ChannelError(f"the writer of {name!r} lives and cannot be asked: {error}") from None
    try:
        with EliminationClient(name, timeout=_ASKING) as client:
            answer: dict[str, Any] = client.health_check()
    except (ChannelError, NotServingError, TimeoutError) as error:
        silence = ChannelError(f"the server does not answer: {error}")
        return {"status": "failing", "problems": [problem_of("no_answer", silence)]}
    return answer


def _ago(seconds: float | None) -> str:
    return "unknown: its clock is another" if seconds is None else f"{output.span(seconds)} ago"


def _lines(found: dict[str, Any]) -> list[tuple[str, object]]:
    lines: list[tuple[str, object]] = [
        ("status", found["status"]),
        ("writer", f"process {found['pid']}, last heartbeat {_ago(found['heartbeat_age_s'])}"),
    ]
    return lines + [(problem["severity"], output.problem(problem)) for problem in found["problems"]]
