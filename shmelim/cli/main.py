"""The group of all commands, and the one place where their errors end."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

import click

from shmelim import __version__
from shmelim.cli import failure
from shmelim.cli.change import add, remove, sync
from shmelim.cli.debts import debts, slash
from shmelim.cli.demo import demo
from shmelim.cli.export import export
from shmelim.cli.history import history
from shmelim.cli.look import check, get, list_
from shmelim.cli.missing import missing
from shmelim.cli.options import Group, Settings, settings_from_environment, settings_options
from shmelim.cli.output import printable
from shmelim.cli.serve import serve
from shmelim.cli.status import status

if TYPE_CHECKING:
    from collections.abc import Sequence


class _ReaderGoneError(Exception):
    """Whoever read stdout went away; click must not take that for its own exit code 1, which is an answer here."""


class _Commands(Group):
    """A group that ends every error in one line, a hint and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command of a context."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _ReaderGoneError from error

    def main(  # type: ignore[override]  # click's own has overloads over standalone_mode, which is always on here
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run a command and exit."""
        arguments = list(sys.argv[1:] if args is None else args)
        settings = Settings(as_json="--json" in arguments, debug="--debug" in arguments)
        extra.pop("standalone_mode", None)
        try:
            settings = settings_from_environment()
            code = super().main(arguments, prog_name, standalone_mode=False, obj=settings, **extra)
            if sys.stdout is not None:
                sys.stdout.flush()
        except (click.Abort, KeyboardInterrupt):
            sys.exit(failure.INTERRUPTED)
        except (BrokenPipeError, _ReaderGoneError):
            _drop_stdout()
            sys.exit(failure.PIPE_CLOSED)
        except Exception as error:
            if settings.debug or "--debug" in arguments:
                traceback.print_exc()
            _drop_unwritten()
            described = failure.describe(error, settings.name)
            failure.show(described, as_json=settings.as_json or "--json" in arguments)
            sys.exit(described.exit_code)
        sys.exit(code if isinstance(code, int) else 0)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 the answer is no or the request was refused, 2 wrong usage, "
    "3 nothing is served under that name, 4 any other error.",
)
@settings_options
@click.version_option(__version__, prog_name="shmelim")
def cli() -> None:
    """Is this hotkey eliminated? Answered from shared memory, in any process.

    One process serves a name; everybody reads it without asking that process. Reading needs no key and goes
    on while the server is dead; changing needs the key that the server leaves for its user.

    For example:
      shmelim serve --state-dir /var/lib/validator --import eliminations.json
      shmelim status
      shmelim check 5C511WZdVSCAcTVLTcheFAwvDvmDH7une5h7cXsUEJjnYWPs
      shmelim demo
    """


for _command in (
    serve,
    status,
    check,
    get,
    list_,
    add,
    remove,
    sync,
    debts,
    slash,
    missing,
    history,
    export,
    demo,
):
    cli.add_command(_command)


def main() -> NoReturn:
    """Run the command line of this process."""
    _open_closed_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            # A terminal that cannot show a character gets its escape, not an exception.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    warnings.showwarning = _show_warning
    cli.main(prog_name="shmelim")


def _show_warning(message: Warning | str, *_where: Any, **_more: Any) -> None:
    click.echo(f"warning: {printable(str(message))}", err=True)


def _open_closed_descriptors() -> None:
    """See to it that descriptors 0 to 2 are taken, lest a state file get one of them and be written to."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # noqa: PLR2004
        os.set_inheritable(descriptor, True)  # noqa: FBT003
    os.close(descriptor)


def _drop_stdout() -> None:
    """Let what is still buffered for a reader who went away end nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _drop_unwritten() -> None:
    """Write out what is buffered, or drop it: the interpreter must not try again at its end."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        _drop_stdout()
