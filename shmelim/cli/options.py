"""The options that every command shares, and the hotkeys that several of them take."""

from __future__ import annotations

import inspect
import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from shmelim.eliminations.record import check_hotkey
from shmelim.shm import check_name

if TYPE_CHECKING:
    from collections.abc import Callable

_BLOCK: Final = re.compile(r"^(?=(With --json|For example):)", re.MULTILINE)

F = TypeVar("F", bound="Callable[..., Any]")

NAME_VARIABLE: Final = "SHMELIM_NAME"
DEBUG_VARIABLE: Final = "SHMELIM_DEBUG"
DEFAULT_NAME: Final = "shmelim"


class Command(click.Command):
    """A command whose help keeps the lines of its examples, and of what it says about JSON, as they are."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        named["help"] = keep_lines(named.get("help"))
        super().__init__(*arguments, **named)


class Group(click.Group):
    """A group whose help keeps its lines in the same way."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        named["help"] = keep_lines(named.get("help"))
        super().__init__(*arguments, **named)


def keep_lines(text: str | None) -> str | None:
    """Mark the blocks of a help text that click must not fill, as it wants them marked."""
    return None if text is None else _BLOCK.sub("\b\n", inspect.cleandoc(text))


@dataclass
class Settings:
    """What the shared options say; a command finds it as its context's object."""

    name: str = DEFAULT_NAME
    as_json: bool = False
    debug: bool = False


def settings_options(command: F) -> F:
    """Give a command ``--name``, ``--json`` and ``--debug``, which it finds as its :class:`Settings`."""
    # Decorators stack, so the last one applied comes first in the help.
    for option in (
        click.option(
            "--debug",
            is_flag=True,
            expose_value=False,
            callback=_remember("debug"),
            help=f"Show where an error came from (also: {DEBUG_VARIABLE}=1).",
        ),
        click.option(
            "--json",
            is_flag=True,
            expose_value=False,
            callback=_remember("as_json"),
            help="Print one JSON document; errors as JSON on stderr.",
        ),
        click.option(
            "--name",
            metavar="NAME",
            expose_value=False,
            callback=_remember("name"),
            help=f"The name that is served [default: {NAME_VARIABLE}, else {DEFAULT_NAME!r}].",
        ),
    ):
        command = option(command)
    return command


def settings_from_environment() -> Settings:
    """Return what holds where no option says otherwise."""
    debug = os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    name = os.environ.get(NAME_VARIABLE) or DEFAULT_NAME
    try:
        check_name(name)
    except ValueError as error:
        raise click.UsageError(f"{NAME_VARIABLE}: {error}") from None
    return Settings(name=name, debug=debug)


def _remember(field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(context: click.Context, parameter: click.Parameter, given: Any) -> None:
        settings = context.ensure_object(Settings)
        if given is None or given is False:
            return
        if field == "name":
            try:
                check_name(given)
            except ValueError as error:
                raise click.BadParameter(str(error), context, parameter) from None
        setattr(settings, field, given)

    return callback


class Hotkey(click.ParamType[str]):
    """A hotkey: 1 to 255 bytes of UTF-8."""

    name = "hotkey"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the hotkey, or fail with what is wrong with it."""
        try:
            check_hotkey(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)
        return str(value)


HOTKEY: Final = Hotkey()

owner_option = click.option(
    "--owner",
    type=click.IntRange(min=0),
    metavar="UID",
    help="Trust the segments of this user, who serves with --group-readable [default: you and root].",
)


def hotkeys_from(arguments: tuple[str, ...]) -> list[str]:
    """Return the hotkeys named, where ``-`` stands for those on stdin, one a line."""
    found: list[str] = []
    for argument in arguments:
        if argument != "-":
            found.append(argument)
            continue
        lines = (
            [] if sys.stdin is None else sys.stdin.buffer.read().decode("utf-8", "surrogateescape").splitlines()
        )
        for number, line in enumerate(lines, 1):
            hotkey = line.strip()
            if not hotkey:
                continue
            try:
                check_hotkey(hotkey)
            except ValueError as error:
                raise click.UsageError(f"line {number} of stdin: {error}") from None
            found.append(hotkey)
    if not found:
        raise click.UsageError("no hotkey was given")
    return found
