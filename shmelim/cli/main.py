"""The group of all commands, and the one place where their errors end."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, Final, NoReturn

import click

from shmelim.cli import failure, streams
from shmelim.cli.options import Group, Settings
from shmelim.system.text import printable, trace_of

_COMMANDS: Final = {
    "serve": ("serve:serve", "Serve a name in the foreground."),
    "status": ("status:status", "Show who serves a name, what, and how full it is."),
    "health": ("health:health", "Say whether a name is served well; for monitors."),
    "doctor": ("doctor:doctor", "Say what is wrong with this machine for a name, and what to do."),
    "web": ("web:web", "Serve a page about a name, with /metrics and /healthz."),
    "metrics": ("metrics:metrics", "Print metrics for Prometheus."),
    "check": ("look:check", "Tell whether hotkeys are eliminated."),
    "get": ("look:get", "Print the elimination record of hotkeys."),
    "list": ("look:list_", "List eliminations, or departed hotkeys."),
    "add": ("change:add", "Eliminate a hotkey."),
    "remove": ("change:remove", "Take an elimination back."),
    "sync": ("transfer:sync", "Replace all eliminations by those of a file."),
    "debts": ("books:debts", "Show what eliminations still owe."),
    "slash": ("books:slash", "Show the slashes that were made, settle one that is in doubt, release them."),
    "ack": ("change:ack", "Say that a change which the guard noticed was meant."),
    "missing": ("change:missing", "List hotkeys whose departure was not believed, or accept it."),
    "returned": ("change:returned", "Undo a departure that was none."),
    "history": ("books:history", "Show who changed what, and when."),
    "watch": ("live:watch", "Show changes as they come."),
    "readers": ("readers:readers", "List the processes that read the name, and how much."),
    "top": ("readers:top", "Show who reads the name as it goes."),
    "names": ("live:names", "List what is served on this machine."),
    "diff": ("travel:diff", "Show what changed between two moments."),
    "rollback": ("travel:rollback", "Make the eliminations what they were at an earlier moment."),
    "backup": ("keep:backup", "Write a backup: the state with history, debts and slashes."),
    "verify": ("keep:verify", "Check a backup, or all that there is of a name."),
    "restore": ("keep:restore", "Put a backup in the place of the state."),
    "forget": ("keep:forget", "Let a name go that is no longer served."),
    "publish": ("fleet:publish", "Send what changes to followers on other hosts."),
    "follow": ("fleet:follow", "Keep a table equal to one on another host."),
    "fleet": ("fleet:fleet", "Show and steer what is published and followed."),
    "export": ("transfer:export", "Write the state to a JSON file."),
    "demo": ("demo.command:demo", "Show and measure all of it, on real hotkeys."),
}
"""Where each command is (its module is loaded when it is used), and its line in the list of all."""


class _Commands(Group):
    """A group that loads a command when it is used, and ends every error in one line, a hint and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        found: click.Command = getattr(import_module(f"shmelim.cli.{module}"), name)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _COMMANDS.items()])

    def main(  # type: ignore[override]  # click's own has overloads over standalone_mode, which is always on here
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        arguments = list(sys.argv[1:] if args is None else args)
        settings = Settings(as_json="--json" in arguments, debug="--debug" in arguments)
        extra.pop("standalone_mode", None)
        log = streams.Log(keeps=not {"--json", "json", "--log-format=json"}.isdisjoint(arguments))
        try:
            with streams.logging_to(log):
                settings = Settings.from_environment()
                code = super().main(arguments, prog_name, standalone_mode=False, obj=settings, **extra)
            streams.finish()
        except (click.Abort, KeyboardInterrupt):
            code = failure.INTERRUPTED
        except streams.ReaderGoneError:
            code = failure.PIPE_CLOSED
        except Exception as error:
            trace = trace_of(error) if settings.debug or "--debug" in arguments else None
            described = failure.describe(error, settings.name)
            as_json = settings.as_json or "--json" in arguments
            failure.show(described, as_json=as_json, trace=trace, warnings=log.kept)
            code = described.exit_code
        with suppress(OSError):
            streams.finish()
        sys.exit(code if isinstance(code, int) else 0)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    epilog="Exit codes: 0 done, 1 the answer is no or the request was refused, 2 wrong usage, "
    "3 nothing is served under that name, 4 any other error. `status` and `health`: 0 ok, 1 degraded, 2 failing.",
)
@click.version_option(package_name="shmelim")
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


def main(interrupted: Any = None) -> NoReturn:
    """Run the command line of this process; ``interrupted`` is the handler of Ctrl-C that it is to have."""
    if interrupted is not None:
        signal.signal(signal.SIGINT, interrupted)
    streams.take_over()
    warnings.showwarning = lambda message, *_: click.echo(f"warning: {printable(str(message))}", err=True)
    cli.main(prog_name="shmelim")
