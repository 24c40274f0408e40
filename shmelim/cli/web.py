"""``shmelim web``: the page of a name."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import stat
from pathlib import Path

import click

from shmelim.cli.failure import extra, need_source
from shmelim.cli.options import PATH, Settings, command
from shmelim.errors import KeyFileError, ShmelimError
from shmelim.system.text import get_logger, printable

_LEAST_TOKEN = 16
# A name, of which the first label may stand for any, or an address.
_HOST = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?|\[[0-9A-Fa-f:.]+\]")


def _check_host(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what no browser says as the host that it asks: it would be allowed, and nobody be let in by it."""
    for host in given:
        if not _HOST.fullmatch(host):
            text = f"{host!r} is not a host's name, as in page.example.org, without scheme, port or path"
            raise click.BadParameter(text, context, parameter)
    return given


@command
@click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="The address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8765,
    metavar="PORT",
    help="The port to listen on; 0: any that is free.",
)
@click.option(
    "--allow-host",
    "hosts",
    multiple=True,
    metavar="NAME",
    callback=_check_host,
    help="A name by which browsers may ask; repeatable.",
)
@click.option(
    "--token-file",
    type=PATH,
    metavar="FILE",
    help="Who knows the token in this file may change things [default: nobody].",
)
def web(settings: Settings, *, host: str, port: int, hosts: tuple[str, ...], token_file: Path | None) -> None:
    """Serve a page with counts, problems, the table, each miner's history, and changes as they come.

    Also /metrics for Prometheus and /healthz, which is 503 where the name is failing or nobody serves it. Works
    while the server is dead. Listens on this machine alone and changes nothing, unless it is told otherwise:
    behind a proxy name its host with --allow-host. Needs the extra: pip install 'shmelim[web]'.

    For example:
      shmelim web
      shmelim web --port 8080 --token-file /etc/shmelim/token
    """
    with extra("web"):
        import uvicorn

        from shmelim.watch.web import make_app
    app = make_app(settings.name, token=None if token_file is None else _token_in(token_file), hosts=hosts)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ShmelimError(
            f"cannot listen on {host} port {port}: {error.strerror}", hint="choose another --host or --port"
        ) from None
    with listening:
        at = listening.getsockname()[1]
        where = f"[{host}]:{at}" if family == socket.AF_INET6 else f"{host}:{at}"
        click.echo(printable(f"the page of {settings.name!r}: http://{where}/"), err=True)
        config = uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=1)
        get_logger("uvicorn.error").addFilter(_is_worth_telling)
        uvicorn.Server(config).run([listening])


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """Tell whether a line is about something else than what was cut off because somebody ended the page."""
    error = record.exc_info and record.exc_info[1]
    return not isinstance(error, asyncio.CancelledError) and "shutdown exceeded" not in record.getMessage()


def _token_in(path: Path) -> str:
    """Return the token in a file that only its owner may read."""
    need_source(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise KeyFileError(f"others may read the token in {path}", hint=f"chmod 600 {path}")
    token = path.read_text("latin-1").strip()
    hint = f"head -c 24 /dev/urandom | base64 > {path}"
    if len(token) < _LEAST_TOKEN:
        raise KeyFileError(f"the token in {path} has less than {_LEAST_TOKEN} characters", hint=hint)
    if not (token.isascii() and token.isprintable()):
        raise KeyFileError(f"the token in {path} has characters that no browser can send", hint=hint)
    return token
