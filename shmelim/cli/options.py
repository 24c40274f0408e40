"""What commands share: their options, the layout of their help, and the hotkeys that several of them take."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from shmelim.cli import output
from shmelim.system.clock import utc_text
from shmelim.system.containers import finite
from shmelim.system.owner import OWNER_VARIABLE, named_owner
from shmelim.system.text import printable

NAME_VARIABLE: Final = "SHMELIM_NAME"
DEBUG_VARIABLE: Final = "SHMELIM_DEBUG"
DEFAULT_NAME: Final = "shmelim"
PATH: Final = click.Path(path_type=Path, readable=False)
if TYPE_CHECKING:
    _OfText = click.ParamType[str]
    _OfNumber = click.ParamType[int]
else:  # before click 8.4 it took no parameter
    _OfText = _OfNumber = click.ParamType
_MAY_BE_EMPTY: Final = frozenset({"rule"})  # as an older version recorded it
_BLOCK: Final = re.compile(r"^(?=(With --json|For example):)", re.MULTILINE)


def _problem(what: str, text: str) -> str | None:
    """Return what is wrong with a name or a hotkey."""
    from shmelim.eliminations.record import check_hotkey
    from shmelim.shm import check_name

    try:
        (check_name if what == "name" else check_hotkey)(text)
    except ValueError as error:
        return str(error)
    return None


class _Checked(_OfText):
    """A name or a hotkey."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if problem := _problem(self.name, value):
            self.fail(problem, param, ctx)
        return str(value)


class _Permissions(_OfNumber):
    """Permissions of a file, in octal digits as for ``chmod``."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return value if isinstance(value, int) else int(value, 8)
        except ValueError:
            self.fail(f"{value!r} is not octal digits, such as 640", param, ctx)


class AnyNumber(click.types.FloatParamType):
    """A number; NaN and infinity are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return it, or fail as click does."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is not a number that can be used.", param, ctx)
        return number


class Number(click.FloatRange, AnyNumber):
    """A number within bounds, outside of which no comparison finds NaN."""


class WholeNumber(click.IntRange):
    """A whole number from a least one up to what eight bytes hold, which the help needs not say."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return it, or fail as click does."""
        number: int = super().convert(value, param, ctx)
        if number >> 63:
            self.fail(f"{value} is beyond all that is counted here.", param, ctx)
        return number


class _Moment(_OfText):
    """An event's number, or a time that is past: what cannot be known yet is not answered."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from shmelim.eliminations.moments import Moment

        try:
            Moment.of(value)
        except (ValueError, OverflowError) as error:
            self.fail(str(error), param, ctx)
        return str(value)


PERMISSIONS: Final = _Permissions()
NAME: Final = _Checked("name")
MOMENT: Final = _Moment()
COUNT: Final = WholeNumber(1)


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
        try:
            named_owner()
        except ValueError as error:
            raise click.UsageError(str(error)) from None
        return cls(name, debug=os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"))

    def answer(self, content: dict[str, Any], say: str | Callable[[], object]) -> None:
        """Print what was found or done: as JSON with the name, or else a text, or whatever `say` prints."""
        if self.as_json:
            click.echo(json.dumps(finite({"name": self.name, **content}), default=str))
        elif isinstance(say, str):
            click.echo(say)
        else:
            say()

    def note(self, text: str) -> None:
        """Say something by the way, on stderr; with --json that is for errors alone, and the answer has it."""
        if not self.as_json:
            click.echo(printable(text), err=True)

    def doubt(self, *hotkeys: str) -> None:
        """Note which hotkeys are no addresses: one with a blank, or cut short, is nobody's."""
        from shmelim.eliminations.validator.addresses import is_ss58_address

        for hotkey in hotkeys:
            if not is_ss58_address(hotkey):
                self.note(f"note: {hotkey!r} is not a valid SS58 address")

    def table(self, content: dict[str, Any], columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print what was found, as JSON or as rows."""
        self.answer(content, lambda: output.records(columns, rows))

    def rows(
        self, content: dict[str, Any], what: str, rows: list[dict[str, Any]], columns: dict[str, str]
    ) -> None:
        """Print rows that are dicts; `columns` has the heading of each key, and a key in ``_ms`` is a time."""

        def cell(row: dict[str, Any], key: str) -> object:
            return utc_text(row[key]) if key.endswith("_ms") else row.get(key)

        cells = ([cell(row, key) for key in columns] for row in rows)
        self.table({**content, "count": len(rows), what: rows}, list(columns.values()), cells)


def _shared(*names: str, **about: Any) -> click.Option:
    def remember(context: click.Context, parameter: click.Parameter, given: Any) -> None:
        if given:
            setattr(context.ensure_object(Settings), str(parameter.name), given)

    return click.Option(names, expose_value=False, callback=remember, **about)


def _set_while_it_runs(context: click.Context, variable: str, value: str) -> None:
    """Set what all of this process and of its children go by, until the command ends."""
    before = os.environ.get(variable)
    os.environ[variable] = value
    context.call_on_close(
        lambda: os.environ.pop(variable, None) if before is None else os.environ.update({variable: before})
    )


def _choose_runtime(context: click.Context, _parameter: click.Parameter, given: str | None) -> None:
    from shmelim.eliminations.runtime import RUNTIME_VARIABLE

    if given:
        _set_while_it_runs(context, RUNTIME_VARIABLE, os.path.abspath(given))  # noqa: PTH100  # follows no links


def _choose_owner(context: click.Context, _parameter: click.Parameter, given: int | None) -> None:
    if given is not None:
        _set_while_it_runs(context, OWNER_VARIABLE, str(given))


_OF_NAME = f"The name that is served [default: {NAME_VARIABLE}, else {DEFAULT_NAME!r}]."
_SHARED: Final = [
    _shared("--name", type=NAME, metavar="NAME", help=_OF_NAME),
    click.Option(
        ["--runtime-dir"],
        expose_value=False,
        callback=_choose_runtime,
        metavar="DIR",
        help="Where key and socket of each name are [default: where the server says, else the user's].",
    ),
    click.Option(
        ["--owner"],
        type=click.IntRange(min=0),
        expose_value=False,
        callback=_choose_owner,
        metavar="UID",
        help=f"Whose table and key are meant [default: {OWNER_VARIABLE}, else yours and root's].",
    ),
    _shared("--json", "as_json", is_flag=True, help="Print one JSON document; errors as JSON on stderr."),
    _shared("--debug", is_flag=True, help=f"Show where an error came from (also: {DEBUG_VARIABLE}=1)."),
]


class _Shared:
    """Gives a command the options that all have, and keeps the lines of its help's last blocks."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        # "\b" is how click wants a block marked that it must not fill.
        named["help"] = _BLOCK.sub("\b\n", inspect.cleandoc(named["help"] or ""))
        named["params"] = [*(named.get("params") or ()), *_SHARED]
        super().__init__(*arguments, **named)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take the arguments; click closes a context only once all of them are good."""
        try:
            self._refuse_empty(ctx, args)
            return super().parse_args(ctx, args)  # type: ignore[misc, no-any-return]  # of click's command
        except BaseException as error:
            if isinstance(error, click.UsageError) and error.ctx is None:
                error.ctx = ctx  # click's parser does not say it of every error, and the hint names it
            ctx.close()
            raise

    def _refuse_empty(self: Any, ctx: click.Context, args: list[str]) -> None:
        """Refuse an empty text: of a variable that is not set, it would be this directory, or every address."""
        if ctx.resilient_parsing:  # which completion is
            return
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in self.get_params(ctx):
            value = None if parameter.name in _MAY_BE_EMPTY else given.get(parameter.name)
            if value == "" or (isinstance(value, (list, tuple)) and "" in value):
                raise click.BadParameter("it is empty; is a variable not set?", ctx, parameter)


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


hotkey_argument = click.argument("hotkey", type=_Checked("hotkey"))
any_hotkey_argument = click.argument("hotkey", type=_Checked("hotkey"), required=False)
hotkeys_argument = click.argument("hotkeys", metavar="HOTKEY…", type=_Checked("hotkey"), nargs=-1, required=True)
file_argument = click.argument("file", type=click.Path(path_type=Path, readable=False, allow_dash=True))
as_of_option = click.option(
    "--as-of",
    type=MOMENT,
    metavar="WHEN",
    help="As it was at an event's number, ms since 1970 or ISO 8601; asks the server.",
)
yes_option = click.option("--yes", is_flag=True, help="Do not ask.")


def _registry(_context: click.Context, _parameter: click.Parameter, given: str | None) -> Path | bool:
    return True if given is None else given != "off" and Path(given)


registry_option = click.option(
    "--registry",
    metavar="DIR",
    callback=_registry,
    help='Where is remembered what is served under each name; "off": nowhere'
    " [default: SHMELIM_REGISTRY, else a directory of the user's state].",
)


def hotkeys_from(arguments: tuple[str, ...]) -> list[str]:
    """Return the hotkeys named, each once, where ``-`` stands for those on stdin, one a line."""
    found: list[str] = []
    for argument in arguments:
        if argument != "-":
            found.append(argument)
            continue
        text = "" if sys.stdin is None else sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
        # Not splitlines: what else ends a line somewhere may stand in a hotkey.
        for number, line in enumerate(text.split("\n"), 1):
            if hotkey := line.strip(" \t\r"):
                if problem := _problem("hotkey", hotkey):
                    raise click.UsageError(f"line {number} of stdin: {problem}")
                found.append(hotkey)
    if not found:
        raise click.UsageError("no hotkey was given")
    return list(dict.fromkeys(found))
