"""What commands share: their options, the layout of their help, and the hotkeys that several of them take."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click

from shmelim.cli import output

NAME_VARIABLE: Final = "SHMELIM_NAME"
DEBUG_VARIABLE: Final = "SHMELIM_DEBUG"
DEFAULT_NAME: Final = "shmelim"
PATH: Final = click.Path(path_type=Path, readable=False)
PATH_OR_DASH: Final = click.Path(path_type=Path, readable=False, allow_dash=True)
_BLOCK: Final = re.compile(r"^(?=(With --json|For example):)", re.MULTILINE)


@dataclass
class Settings:
    """What the shared options say; a command finds it as its context's object."""

    name: str = DEFAULT_NAME
    as_json: bool = False
    debug: bool = False

    @classmethod
    def from_environment(cls) -> Settings:
        """Return what holds where no option says otherwise."""
        name = os.environ.get(NAME_VARIABLE) or DEFAULT_NAME
        if problem := _problem("name", name):
            raise click.UsageError(f"{NAME_VARIABLE}: {problem}")
        return cls(name, debug=os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"))

    def say(self, content: dict[str, Any], text: str) -> None:
        """Print what was done: as JSON with the name, or as text."""
        if self.as_json:
            output.document({"name": self.name, **content})
        else:
            click.echo(text)

    def show(self, content: dict[str, Any], columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print what was found: as JSON with the name, or as rows."""
        if self.as_json:
            output.document({"name": self.name, **content})
        else:
            output.records(columns, rows)


class _Shared:
    """Gives a command ``--name``, ``--json`` and ``--debug``, and keeps the lines of its help's last blocks."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        # "\b" is how click wants a block marked that it must not fill.
        named["help"] = _BLOCK.sub("\b\n", inspect.cleandoc(named["help"]))
        options = [
            _option("name", f"The name that is served [default: {NAME_VARIABLE}, else {DEFAULT_NAME!r}]."),
            _option("json", "Print one JSON document; errors as JSON on stderr.", field="as_json"),
            _option("debug", f"Show where an error came from (also: {DEBUG_VARIABLE}=1)."),
        ]
        named["params"] = [*(named.get("params") or ()), *options]
        super().__init__(*arguments, **named)


class Command(_Shared, click.Command):
    """A command with the shared options."""


class Group(_Shared, click.Group):
    """A group of commands with the shared options; alone it shows its help."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the arguments."""
        if not args and not ctx.resilient_parsing:  # which completion is
            click.echo(ctx.get_help())
            ctx.exit()
        return super().parse_args(ctx, args)


def command(function: Callable[..., Any]) -> Command:
    """Make a function a command of its name, which is given the settings and may return an exit code."""
    return click.command(function.__name__.rstrip("_"), cls=Command)(click.pass_obj(function))


def _option(name: str, text: str, field: str | None = None) -> click.Option:
    def remember(context: click.Context, parameter: click.Parameter, given: Any) -> None:
        settings = context.ensure_object(Settings)
        if given is None or given is False:
            return
        if name == "name" and (problem := _problem("name", given)):
            raise click.BadParameter(problem, context, parameter)
        setattr(settings, field or name, given)

    flag = name != "name"
    return click.Option(
        [f"--{name}"],
        is_flag=flag,
        metavar=None if flag else name.upper(),
        expose_value=False,
        callback=remember,
        help=text,
    )


def _problem(what: str, text: str) -> str | None:
    """Return what is wrong with a name or a hotkey."""
    from shmelim.eliminations.record import check_hotkey
    from shmelim.shm import check_name

    try:
        (check_name if what == "name" else check_hotkey)(text)
    except ValueError as error:
        return str(error)
    return None


class _Hotkey(click.ParamType[str]):
    """A hotkey: 1 to 255 bytes of UTF-8."""

    name = "hotkey"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the hotkey, or fail with what is wrong with it."""
        if problem := _problem("hotkey", value):
            self.fail(problem, param, ctx)
        return str(value)


HOTKEY: Final = _Hotkey()

owner_option = click.option(
    "--owner",
    type=click.IntRange(min=0),
    metavar="UID",
    help="Trust the segments of this user, who serves with --group-readable [default: you and root].",
)


def hotkeys_from(arguments: tuple[str, ...]) -> list[str]:
    """Return the hotkeys named, each once, where ``-`` stands for those on stdin, one a line."""
    found: list[str] = []
    for argument in arguments:
        if argument != "-":
            found.append(argument)
            continue
        text = "" if sys.stdin is None else sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
        for number, line in enumerate(text.splitlines(), 1):
            if hotkey := line.strip():
                if problem := _problem("hotkey", hotkey):
                    raise click.UsageError(f"line {number} of stdin: {problem}")
                found.append(hotkey)
    if not found:
        raise click.UsageError("no hotkey was given")
    return list(dict.fromkeys(found))
