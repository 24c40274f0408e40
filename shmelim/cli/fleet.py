"""``shmelim publish``, ``follow`` and ``fleet``: a name on more than one host."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from shmelim.cli import output
from shmelim.cli.failure import NO, NOT_SERVING, YES, extra, need_own_user
from shmelim.cli.options import NAME, PATH, Command, Group, Number, Settings, command
from shmelim.cli.progress import DelayedProgress
from shmelim.eliminations.reader import EliminationReader
from shmelim.errors import FleetDataError, NotServingError, ShmelimError
from shmelim.shm.following import OLD
from shmelim.system.clock import now_ms, utc_text
from shmelim.system.supervisor import notify_supervisor
from shmelim.system.text import printable

if TYPE_CHECKING:
    from shmelim.fleet.redis_engine import RedisEngine

ENGINE_VARIABLE: Final = "SHMELIM_ENGINE"

password_option = click.option(
    "--password-file", type=PATH, metavar="FILE", help="A file whose first line is the engine's password."
)


def _engine_option(name: str) -> Callable[..., Any]:
    return click.option(
        name,
        "url",
        metavar="URL",
        envvar=ENGINE_VARIABLE,
        required=True,
        help=f"The engine: redis://USER@HOST:PORT/0, rediss://… (TLS) or unix://PATH [also: {ENGINE_VARIABLE}].",
    )


@command
@_engine_option("--to")
@password_option
@click.option(
    "--state-dir", type=PATH, metavar="DIR", help="Where the state is kept [default: where the server says]."
)
@click.option(
    "--beat",
    type=Number(0.05, 5),
    default=0.5,
    metavar="SECONDS",
    help="How often it is said that nothing is newer.",
)
@click.option("--hold-guarded", is_flag=True, help="Send nothing on that the guard noticed, before `shmelim ack`.")
@click.option("--take-over", is_flag=True, help="Take the name from another store.")
def publish(
    settings: Settings,
    *,
    url: str,
    password_file: Path | None,
    state_dir: Path | None,
    beat: float,
    hold_guarded: bool,
    take_over: bool,
) -> None:
    """Send what changes to an engine, for followers on other hosts; until Ctrl-C or SIGTERM.

    Runs beside the server, reads its store, and never delays it: whatever happens to the engine, changes cost the
    same. One publisher a name sends; a second one takes over, and the first one ends. Needs the extra:
    pip install 'shmelim[fleet]'.

    With --json: one object a line {time, event, …}, for leading, held, error and their ends.

    For example:
      shmelim publish --to redis://publisher@engine.example:6379/0 --password-file /etc/shmelim/engine
    """
    from shmelim.fleet.outbox import StoreOutbox
    from shmelim.fleet.publisher import Publisher
    from shmelim.fleet.publishing import Note
    from shmelim.fleet.running import run_publisher

    engine = _engine(url, settings.name, password_file)
    outbox = StoreOutbox(state_dir or _state_dir(settings.name))
    publisher = Publisher(
        engine, outbox, beat=beat, take_over=take_over, hold_guarded=hold_guarded, host=socket.gethostname()
    )
    changes = _Changes(settings.name, beat)
    try:
        note = Note(settings.name, engine.place)
        run_publisher(publisher, changes.wait, _stopping(), _teller(settings, ready_at="leading"), note)
    finally:
        outbox.close()
        engine.close()


class _Changes:
    """Waits for the next change of a name's table, or for a while where there is none."""

    def __init__(self, name: str, longest: float) -> None:
        self._name, self._longest = name, longest
        self._reader: EliminationReader | None = None
        self._seen: int | None = None

    def wait(self, seconds: float) -> None:
        """Wait until the version is another one than after the last wait."""
        seconds = min(seconds, self._longest)
        try:
            if self._reader is None:
                self._reader = EliminationReader(self._name)
            self._reader.wait_for_change(seconds, since=self._seen)
            self._seen = self._reader.version
        except ShmelimError:  # nobody serves, and nothing is left; the store may be there all the same
            self._reader = None
            time.sleep(seconds)


def _state_dir(name: str) -> Path:
    from shmelim.eliminations.runtime import RuntimeDirectory

    said = RuntimeDirectory.of_server(name).server().state_dir
    if said is None:
        raise NotServingError(
            f"the server of {name!r} keeps its state in memory", hint="only a state in a directory is published"
        )
    return Path(said)


@command
@_engine_option("--from")
@password_option
@click.option(
    "--as", "local", type=NAME, metavar="NAME", help="The name of the table on this host [default: the same]."
)
@click.option("--group-readable", is_flag=True, help="Let the group read the table (0640 instead of 0600).")
def follow(
    settings: Settings, *, url: str, password_file: Path | None, local: str | None, group_readable: bool
) -> None:
    """Keep a table on this host equal to one that is published on another; until Ctrl-C or SIGTERM.

    Readers use the table as any other. It outlives the follower and the engine, and says how old it is. Nothing
    can be changed here. Needs the extra: pip install 'shmelim[fleet]'.

    With --json: one object a line {time, event, …}, for following, waiting, held, lost, error and their ends; and
    each second in which a snapshot loads {time, event "loading", rows, of}.

    For example:
      shmelim follow --from redis://follower@engine.example:6379/0 --password-file /etc/shmelim/engine
    """
    from shmelim.fleet.engine import EngineError
    from shmelim.fleet.follower import Follower
    from shmelim.fleet.local import LocalTable
    from shmelim.fleet.running import run_follower
    from shmelim.shm import SharedNamespace

    name = local or settings.name
    need_own_user(name, "follow", "--name" if local is None else f"--name {settings.name} --as")
    engine = _engine(url, settings.name, password_file)
    namespace = SharedNamespace(name, mode=0o640 if group_readable else 0o600)
    host = socket.gethostname()
    with LocalTable(namespace, f"{engine.place} {settings.name}") as table, DelayedProgress() as progress:
        say = _teller(settings, ready_at="following", also=progress.stop)
        follower = Follower(
            engine,
            table,
            who=f"{host}/{name}",
            host=host,
            position=table.position,
            loading=telling_loading(progress, say),
        )
        try:
            run_follower(follower, table, _stopping(), say)
            with contextlib.suppress(EngineError):  # its report expires by itself
                follower.stop()
        finally:
            engine.close()


@click.group(cls=Group)
def fleet() -> None:
    """Show and steer what is published and followed.

    For example:
      shmelim fleet status --at redis://engine.example:6379/0
      shmelim fleet hold "a sync that nobody meant"
    """


@fleet.command(cls=Command, short_help="Show who publishes, and who follows.")
@_engine_option("--at")
@password_option
@click.pass_obj
def status(settings: Settings, *, url: str, password_file: Path | None) -> int:
    """Show who publishes, how far, and every follower's position, age and digest.

    Exit code 0: there is a head, and every follower is in its line, not lost, and younger than 10 s; 1: not so;
    3: nothing is published under the name.

    With --json: head {owner, host, store_id, term, line, seq, run, snapshot {seq, rows, size} or null} or null,
    held, followers [{who, host, pid, term, line, seq, lost, age_ms, rows, digest}, or {who, error} of one whose
    report cannot be read].

    For example:
      shmelim fleet status --json
    """
    from shmelim.fleet.messages import unpack_head, unpack_report

    engine = _engine(url, settings.name, password_file)
    look = engine.look()
    head = None if look.head is None else unpack_head(look.head)
    followers: list[dict[str, Any]] = []
    for who, raw in sorted(engine.reports().items()):
        try:
            report = unpack_report(raw)
        except FleetDataError as error:
            followers.append({"who": who, "error": error.message})
            continue
        about = output.attributes(report, "host", "pid", "term", "line", "seq", "lost", "rows")
        age = None if report.age < 0 else report.age
        followers.append({"who": who, **about, "age_ms": age, "digest": f"{report.digest:016x}"})
    found = {
        "head": head
        and {
            "owner": head.owner.hex(),
            "host": head.host,
            "store_id": head.store_id.hex(),
            **output.attributes(head, "term", "line", "seq", "run"),
            "snapshot": head.snapshot and output.attributes(head.snapshot, "seq", "rows", "size"),
        },
        "held": look.held,
        "followers": followers,
    }
    settings.answer(found, lambda: _show(found))
    if head is None:
        return NOT_SERVING
    return YES if all(map(partial(_is_well, head.line), followers)) else NO


def _is_well(line: int, follower: dict[str, Any]) -> bool:
    if "error" in follower:
        return False
    age = follower["age_ms"]
    return follower["line"] == line and not follower["lost"] and age is not None and age < 1000 * OLD


def _show(found: dict[str, Any]) -> None:
    head = found["head"]
    if head is None:
        output.facts([("published", "nothing")])
        return
    snapshot = head["snapshot"]
    output.facts(
        [
            (
                "published",
                f"on {head['host']}: change {head['seq']} of line {head['line']}, by term {head['term']}",
            ),
            ("store", head["store_id"]),
            ("snapshot", snapshot and f"of change {snapshot['seq']}, {snapshot['rows']} rows"),
            ("held", found["held"] or "no"),
        ]
    )
    rows = (
        (each["who"], "", "its report cannot be read", "", "", "", "")
        if "error" in each
        else (
            each["who"],
            each["pid"],
            "this line" if each["line"] == head["line"] else f"line {each['line']}",
            each["seq"],
            "lost" if each["lost"] else _age(each["age_ms"]),
            each["rows"],
            each["digest"],
        )
        for each in found["followers"]
    )
    output.records(["follower", "pid", "in", "change", "age", "rows", "digest"], rows)


def _age(ms: int | None) -> str:
    return "unknown" if ms is None else output.span(ms / 1000)


@fleet.command(cls=Command, short_help="Have the publisher hold.")
@click.argument("why", metavar="[WHY]", required=False, default="")
@_engine_option("--at")
@password_option
@click.pass_obj
def hold(settings: Settings, *, why: str, url: str, password_file: Path | None) -> None:
    """Have the publisher hold: followers keep what they have, and their age says so.

    It heeds that with its next beat. Without a reason, it says when and from where.

    For example:
      shmelim fleet hold "the sync of 14:00 looks wrong"
    """
    text = why or f"held on {socket.gethostname()} at {utc_text(now_ms())} UTC"
    _published(url, settings.name, password_file)[0].hold(text.encode())
    settings.answer({"held": text}, printable(f"held: {text}"))


@fleet.command(cls=Command, short_help="Let the publisher go on.")
@_engine_option("--at")
@password_option
@click.pass_obj
def release(settings: Settings, *, url: str, password_file: Path | None) -> None:
    """Let the publisher go on.

    For example:
      shmelim fleet release
    """
    engine, held = _published(url, settings.name, password_file)
    engine.hold(None)
    settings.answer({"held": None}, "nothing was held" if held is None else "released")


def _published(url: str, name: str, password_file: Path | None) -> tuple[RedisEngine, str | None]:
    """Return the engine, and why what is published there is held; NotServingError where nothing is."""
    engine = _engine(url, name, password_file)
    look = engine.look()
    if look.head is None:
        raise NotServingError(
            f"nothing is published under {name!r} at {engine.place}",
            hint="say which name by --name; `shmelim fleet status` shows whether anything is",
        )
    return engine, look.held


def _engine(url: str, name: str, password_file: Path | None) -> RedisEngine:
    with extra("fleet"):
        from shmelim.fleet.redis_engine import RedisEngine
    try:
        return RedisEngine(url, name, password_file=password_file)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _stopping() -> threading.Event:
    """Return what SIGTERM and Ctrl-C set: an orderly end after what is being done; a second one does not wait."""
    stop = threading.Event()

    def end(*_: object) -> None:
        stop.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})  # who started it may block them
    return stop


def telling_loading(progress: DelayedProgress, say: Callable[..., object]) -> Callable[[int, int], None]:
    """Return what says how far a snapshot is: a bar on a terminal, and an event a second."""
    said = time.monotonic()

    def loading(done: int, rows: int) -> None:
        nonlocal said
        progress.update("taking a snapshot", done, rows)
        if (now := time.monotonic()) - said >= 1:
            said = now
            say("loading", rows=done, of=rows)

    return loading


def _teller(
    settings: Settings, *, ready_at: str, also: Callable[[], object] = lambda: None
) -> Callable[..., object]:
    """Return what says events: a line each, on stderr, or as JSON on stdout; the first good one is readiness."""

    def say(event: str, **about: Any) -> None:
        if event == ready_at:
            also()
            notify_supervisor("READY=1")
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        # A log on a full disk must not end what it tells of.
        with contextlib.suppress(OSError):
            if settings.as_json:
                click.echo(json.dumps({"time": time, "event": event, **about}))
                return
            text = ", ".join(f"{key} {value}" for key, value in about.items() if value is not None)
            click.echo(printable(f"{time} {event}{': ' if text else ''}{text}"), err=True)

    return say
