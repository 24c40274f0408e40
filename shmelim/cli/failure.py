"""What an error looks like on the command line: one line, a hint, an exit code.

====  ==========================================================================
code  meaning
====  ==========================================================================
0     done; the answer is "yes"
1     the answer is "no", or the request was refused as it stands
2     wrong usage
3     nothing is served under that name
4     any other error
130   broken off with Ctrl-C; 141: whoever read the output went away
====  ==========================================================================
"""

from __future__ import annotations

import json
from typing import Final, NamedTuple

import click

from shmelim.cli.output import printable
from shmelim.errors import NotServingError, ShmelimError

NO: Final = 1
USAGE: Final = 2
NOT_SERVING: Final = 3
ERROR: Final = 4
INTERRUPTED: Final = 130
PIPE_CLOSED: Final = 141


class RefusedError(ShmelimError):
    """The request was understood and refused as it stands; nothing was changed."""


class FileProblemError(ShmelimError):
    """A file named on the command line cannot be used."""


class Failure(NamedTuple):
    """An error as it is shown."""

    message: str
    hint: str | None
    exit_code: int


def describe(error: BaseException, name: str) -> Failure:
    """Return how an error is shown and which exit code it has.

    Parameters
    ----------
    error
        What was raised.
    name
        The name that the command was about.

    """
    message, hint, exit_code = str(error), None, ERROR
    match error:
        case click.UsageError():
            command = error.ctx.command_path if error.ctx is not None else "shmelim"
            message, hint, exit_code = error.format_message(), f"see `{command} --help`", USAGE
        case NotServingError():
            message, exit_code = error.message, NOT_SERVING
            hint = error.hint or f"start it with `shmelim serve --name {name}`"
        case ShmelimError():
            message, hint = error.message, error.hint
            exit_code = NO if isinstance(error, RefusedError) else ERROR
        case OSError():
            message = f"{f'{error.filename}: ' if error.filename else ''}{error.strerror or error}"
        case ValueError() | TypeError():
            pass
        case _:
            message = f"unexpected {type(error).__name__}: {error}"
            hint = "run it again with --debug to see where it came from"
    return Failure(message, hint, exit_code)


def show(failure: Failure, *, as_json: bool) -> None:
    """Write a failure to stderr: as two lines at most, or as one JSON document."""
    if as_json:
        click.echo(json.dumps({"error": failure.message, "hint": failure.hint}), err=True)
        return
    click.echo(f"error: {_one_line(failure.message)}", err=True)
    if failure.hint:
        click.echo(f"hint: {_one_line(failure.hint)}", err=True)


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))
