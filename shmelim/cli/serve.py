"""``shmelim serve``: a server in the foreground, for a terminal or a supervisor."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any, Final, TextIO, cast

import click

from shmelim.channel.address import describe
from shmelim.cli.failure import need_own_user, need_source
from shmelim.cli.options import PATH, PERMISSIONS, Settings, command, registry_option
from shmelim.cli.progress import DelayedProgress
from shmelim.cli.streams import Log
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.serve import ServeOptions, Service, run
from shmelim.errors import AlreadyServingError, FollowerError, ShmelimError
from shmelim.system.background import BackgroundStream
from shmelim.system.text import printable

_STANDARD_ERROR: Final = 2
_DRAIN: Final = 1.0  # seconds for what stderr has not taken yet, before the server says that it is ready or ends


class _LineFormatter(logging.Formatter):
    """One line a record, and below it the trace if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S")
        level = record.levelname.lower()
        text = f"{time}.{record.msecs:03.0f}Z {level}: {printable(record.getMessage())}"
        return f"{text}\n{record.exc_text}" if record.exc_text else text


class _JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def format(self, record: logging.LogRecord) -> str:
        about = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            about["exception"] = self.formatException(record.exc_info)
        return json.dumps(about)


_FORMATTERS: Final = {"text": _LineFormatter, "json": _JsonFormatter}


@command
@click.option(
    "--state-dir",
    type=PATH,
    metavar="DIR",
    help="Where the state is kept [default: a directory of the user's state].",
)
@click.option(
    "--import",
    "imports",
    type=PATH,
    metavar="FILE",
    multiple=True,
    help="Merge a file of eliminations or of departed hotkeys into the state, once; repeatable.",
)
@click.option(
    "--default-departed", type=PATH, metavar="FILE", help="Departed hotkeys to start from while none are known."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    help="Take commands on this TCP port of 127.0.0.1, 0 for any [default: a Unix socket].",
)
@click.option(
    "--durability",
    type=click.Choice(["power", "process"]),
    default="power",
    help="What an acknowledged change survives: a power cut, or only the death of the process.",
)
@click.option(
    "--files",
    type=click.Choice(["current", "lagged", "off"]),
    default="lagged",
    help="Whether the JSON files are current when a change returns, follow within a second, or are not kept.",
)
@click.option(
    "--files-mode",
    type=PERMISSIONS,
    default="600",
    help="Permissions of a JSON file that is new, such as 640; one that exists keeps its own.",
)
@click.option(
    "--adopt-published", is_flag=True, help="Where the state conflicts with what is published: that is the truth."
)
@click.option(
    "--replace-published",
    is_flag=True,
    help="Where the state conflicts with what is known: the state is the truth.",
)
@click.option("--must-exist", is_flag=True, help="Refuse to make a new store.")
@click.option(
    "--sync-guard",
    type=click.Choice(["tell", "refuse", "off"]),
    default="tell",
    help="What becomes of a change that takes back many eliminations at once, or doubles them.",
)
@registry_option
@click.option("--group-readable", is_flag=True, help="Let the group of this process read the state.")
@click.option(
    "--ready-fd",
    type=click.IntRange(min=1),
    metavar="FD",
    help='Write "ready" and a newline to this descriptor once readers and commands are served, and close it.',
)
@click.option(
    "--log-format",
    type=click.Choice([*_FORMATTERS]),
    default="text",
    help="How log lines look on stderr; json, as with --json: an object each, with time, level, logger, message,"
    " exception.",
)
@click.option("-v", "--verbose", is_flag=True, help="Log more than warnings.")
def serve(settings: Settings, *, ready_fd: int | None, log_format: str, verbose: bool, **options: Any) -> None:
    """Serve a name until SIGTERM or Ctrl-C.

    Recovers the state, publishes it in shared memory, and takes changes from whoever may read the key. When it
    is ready it says so in one line on stderr that begins with "serving", and to systemd (Type=notify). Whatever
    ends it, readers keep the last state, and the next server goes on from there.

    For example:
      shmelim serve
      shmelim serve --name mainnet --state-dir /var/lib/shmelim --default-departed departed_hotkeys.json
      shmelim serve --import old/eliminations.json --import old/departed_hotkeys.json
    """
    need_own_user(settings.name, "serve")
    if options["adopt_published"] and options["replace_published"]:
        raise click.UsageError("--adopt-published and --replace-published contradict each other")
    if ready_fd is not None:
        try:
            os.fstat(ready_fd)
        except OSError:
            raise click.UsageError(f"--ready-fd: descriptor {ready_fd} is not open") from None
    for path in (*options["imports"], options["default_departed"]):
        if path is not None:
            need_source(path)
    log_format = "json" if settings.as_json else log_format
    # Nothing here waits for whoever reads stderr, or does not.
    stderr = BackgroundStream(_stderr())
    progress = DelayedProgress(file=cast("TextIO", stderr))

    def announce(service: Service) -> None:
        progress.stop()
        line = _ready_line(service)
        if log_format == "json":
            record = {"name": "shmelim.serve", "levelname": "INFO", "msg": "%s", "args": (line,)}
            line = handler.format(logging.makeLogRecord(record))
        stderr.write(f"{line}\n")
        stderr.drain(_DRAIN)
        if ready_fd is not None:
            _tell_ready(ready_fd)

    handler = logging.StreamHandler(progress)
    handler.setFormatter(_FORMATTERS[log_format]())
    _log_through(handler, logging.DEBUG if verbose else logging.WARNING)
    with progress:
        try:
            run(ServeOptions(settings.name, **options), announce, progress.update)
        except AlreadyServingError as error:
            raise _naming_the_other(error, settings.name) from error
        finally:
            stderr.drain(_DRAIN)


def _log_through(handler: logging.Handler, level: int) -> None:
    """Have the package log there, in the place of a command's notes, and what was kept of these before."""
    log = logging.getLogger("shmelim")
    kept = [text for each in log.handlers if isinstance(each, Log) for text in each.kept]
    log.handlers = [handler]
    for text in kept:
        log.warning("%s", text)
    log.setLevel(level)


def _tell_ready(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # whoever wanted to know may be gone: no reason to stop serving
        os.write(descriptor, b"ready\n")
    if descriptor > _STANDARD_ERROR:
        os.close(descriptor)


def _ready_line(service: Service) -> str:
    server = service.server
    return printable(
        f"serving {service.options.name!r}: {len(server.reader)} eliminated,"
        f" {server.reader.num_departed_hotkeys} departed; channel {describe(service.channel.address)};"
        f" state {server.state_dir}"
    )


def _stderr() -> int | None:
    """Return the descriptor of stderr; None where it was closed, and another file may have its number."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return None


def _naming_the_other(error: AlreadyServingError, name: str) -> ShmelimError:
    """Return the error with the process that serves the name, if that can be seen."""
    with contextlib.suppress(ShmelimError):
        reader = EliminationReader(name)
        writer = reader.writer
        if writer.alive and reader.source is not None:
            return FollowerError(
                f"{name!r} on this host follows {reader.source!r}, by process {writer.pid}",
                hint="serve under another --name; how a server moves to this host is in docs/fleet.md",
            )
        if writer.hangs:
            return AlreadyServingError(
                f"{name!r} is already served by process {writer.pid}, which hangs or is stopped",
                hint=f"end it (kill -KILL {writer.pid}), and start again: what was acknowledged is kept",
            )
        if writer.alive is not False:
            return AlreadyServingError(
                f"{name!r} is already served by process {writer.pid}",
                hint=f"see `shmelim status --name {name}`, stop that process, or serve under another --name",
            )
    return error
