"""What an error looks like on the command line: one line, a hint, an exit code.

====  ==========================================================================
code  meaning
====  ==========================================================================
0     done; the answer is "yes"
1     the answer is "no", or the request was refused as it stands
2     wrong usage
3     nothing is served under that name
4     any other error
130   interrupted with Ctrl-C; 141: whoever read the output went away
====  ==========================================================================
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import click

from shmelim.errors import GuardedChangeError, NotServingError, ShmelimError
from shmelim.system.owner import OWNER_VARIABLE, means_another, named_owner
from shmelim.system.text import printable

YES: Final = 0
NO: Final = 1
USAGE: Final = 2
NOT_SERVING: Final = 3
ERROR: Final = 4
INTERRUPTED: Final = 130
PIPE_CLOSED: Final = 141

_MEMORY: Final = 1  # major number of /dev/null, zero, full, random


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
    """Return how an error of a command about a name is shown, and its exit code."""
    match error:
        case click.UsageError():
            command = error.ctx.command_path if error.ctx is not None else "shmelim"
            return Failure(error.format_message(), f"see `{command} --help`", USAGE)
        case NotServingError():
            hint = error.hint or f"start it with `shmelim serve --name {name}`"
            return Failure(error.message, hint, NOT_SERVING)
        case ShmelimError():
            is_refused = isinstance(error, (RefusedError, GuardedChangeError))
            return Failure(error.message, error.hint, NO if is_refused else ERROR)
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            return Failure(f"{where}{error.strerror or error}", None, ERROR)
        case ValueError() | TypeError():
            return Failure(str(error), None, ERROR)
        case _:
            hint = "run it again with --debug to see where it came from"
            return Failure(f"unexpected {type(error).__name__}: {error}", hint, ERROR)


def show(failure: Failure, *, as_json: bool, trace: str | None = None, warnings: Sequence[str] = ()) -> None:
    """Write a failure to stderr: as two lines at most, below a trace if given, or as one JSON document."""
    if as_json:
        also = {key: value for key, value in (("trace", trace), ("warnings", [*warnings])) if value}
        click.echo(json.dumps({"error": failure.message, "hint": failure.hint} | also), err=True)
        return
    if trace is not None:
        click.echo(trace, err=True)
    for kind, text in (("error", failure.message), ("hint", failure.hint)):
        if text:
            click.echo(f"{kind}: {printable(' '.join(text.split()))}", err=True)


def need_own_user(name: str, what: str, options: str = "--name") -> None:
    """Raise RefusedError where another user's name is meant: what is made or removed must be that user's.

    `options` are those that come before the name.
    """
    if means_another():
        owner = named_owner()
        raise RefusedError(
            f"uid {owner} is meant ({OWNER_VARIABLE}, --owner), and only that user can {what} {name!r}",
            hint=f"run it as that user: sudo -u '#{owner}' shmelim {what} {options} {name}",
        )


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import in a block what an extra brings; ShmelimError that names the extra where a library is missing."""
    try:
        yield
    except ImportError as error:
        if (error.name or "shmelim").startswith("shmelim"):
            raise
        raise ShmelimError(f"{error.name} is missing", hint=f"pip install 'shmelim[{name}]'") from None


def need_file(path: Path) -> None:
    """Raise FileProblemError where a file is a directory, or does not exist."""
    if path.is_dir():
        raise FileProblemError(f"{path} is a directory, not a file", hint="name a file in it")
    if not path.exists():
        raise FileProblemError(f"{path} does not exist", hint=f"looked for in {path.absolute().parent}")


def need_source(path: Path) -> None:
    """Raise FileProblemError also where it is a device, some of which never end; a terminal does."""
    need_file(path)
    about = path.stat()
    if stat.S_ISBLK(about.st_mode) or (stat.S_ISCHR(about.st_mode) and os.major(about.st_rdev) == _MEMORY):
        raise FileProblemError(f"{path} is a device, not a file", hint="name a file, or a pipe")


def to_be_written(path: Path) -> Path:
    """Return where a file is to be written, through a link, which stays one; FileProblemError where none may."""
    # Most commands load no SQLite.
    from shmelim.eliminations.debts.journal import FILE_NAME as JOURNAL
    from shmelim.eliminations.runtime import STATE_LOCK
    from shmelim.eliminations.starting.keeping import MANIFEST
    from shmelim.eliminations.store.schema import FILE_NAME

    path = Path(os.path.realpath(path))
    if path.exists():
        need_file(path)
        if not path.is_file():
            raise FileProblemError(f"{path} is not a regular file", hint='write to stdout with "-" instead')
    is_a_stores = path.name.startswith(FILE_NAME) or path.name in (STATE_LOCK, JOURNAL, MANIFEST)
    if is_a_stores and (path.parent / FILE_NAME).exists():
        raise FileProblemError(f"{path} belongs to the store in that directory", hint="name another file")
    if not path.parent.is_dir():
        raise FileProblemError(f"there is no directory {path.parent} to write {path.name} to", hint="make it")
    return path
