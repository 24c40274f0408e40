"""The page of a name: what is eliminated and why, what is wrong, and what changes; needs the extra ``web``.

Starlette routes, Jinja2 escapes, uvicorn serves. Everything is made here and works without JavaScript; a script of
our own has it follow what changes. Whatever a stranger chose (a hotkey, a reason) reaches the page through a
template that escapes it. Nothing is changed but by a POST with the token, from this very origin.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any, Final
from urllib.parse import parse_qs

from jinja2 import Environment, PackageLoader, select_autoescape
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shmelim.aio import AsyncEliminationClient
from shmelim.eliminations.client import EliminationClient
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.record import differing
from shmelim.errors import ShmelimError
from shmelim.system.clock import utc_text
from shmelim.system.containers import finite
from shmelim.watch import asking
from shmelim.watch.readers import SharedLook
from shmelim.watch.seeing import see

_ROWS: Final = 200  # in a page of the table
_EVENTS: Final = 200  # of one miner's history
_MOST_LISTENING: Final = 16  # each has a connection to the server
_MOST_TOLD: Final = 100  # of the events of one publish; the page shows no more
_READERS: Final = 50  # that a page shows
_PROBLEMS: Final = 100
_FIELDS: Final = 100  # of a record
_SHORT: Final = 500  # characters of what strangers chose; a record may have a million
_MOST_BODY: Final = 10_000  # bytes of a form
_RETRY: Final = 2.0  # seconds between two tries to reach a server that is away
_SORTS: Final = {"hotkey": "hotkey", "reason": "reason", "time": "elimination_initiated_time_ms"}
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def make_app(
    name: str, *, token: str | None = None, hosts: tuple[str, ...] = (), owner: int | None = None
) -> Starlette:
    """Return the page of a name as an ASGI application.

    Who sends ``token`` may take eliminations back and acknowledge notices; None: nobody may. Browsers may ask
    by ``localhost`` and its addresses, and by ``hosts``: another name that leads here (DNS rebinding) is refused.
    Segments of the uid ``owner`` are trusted (None: this user's and root's).
    """
    page = _Page(name, token, owner)
    return Starlette(
        routes=[
            Route("/", page.overview),
            Route("/miner", page.miner),
            Route("/healthz", page.health),
            Route("/metrics", page.metrics),
            Route("/events", page.events),
            Route("/remove", page.remove, methods=["POST"]),
            Route("/ack", page.acknowledge, methods=["POST"]),
            Mount("/page", StaticFiles(packages=[("shmelim.watch", "page")])),
        ],
        middleware=[
            Middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", *hosts]),
            Middleware(_Headers),
        ],
        lifespan=page.living,
    )


class _Headers:
    """Gives every answer the headers that keep a browser from doing what the page does not ask for."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(key.lower().encode(), value.encode()) for key, value in _HEADERS.items()]
            await send(message)

        await self._app(scope, receive, with_headers)


class _Listening(StreamingResponse):
    """A stream of events that says when its listener is gone, also if it never began."""

    def __init__(self, events: AsyncIterator[str], leave: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._leave = leave

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._leave()


class _Page:
    """The answers; each looks anew, and what waits for the server does so in a thread."""

    def __init__(self, name: str, token: str | None, owner: int | None) -> None:
        self._name = name
        self._token = token
        self._owner = owner
        self._listening = 0
        self._decoding = threading.Lock()  # one thread decodes, and guards what it made
        self._decoded: tuple[int, asking.Rows] = (-1, [])
        self._readers = SharedLook(name, owner)
        self._ending = asyncio.Event()
        loader = PackageLoader("shmelim.watch", "page")
        self._templates = Environment(loader=loader, autoescape=select_autoescape(default=True), trim_blocks=True)
        self._templates.filters |= {"moment": utc_text, "short": _text}

    @asynccontextmanager
    async def living(self, _app: Starlette) -> AsyncIterator[None]:
        """End what still listens when the application does."""
        yield
        self._ending.set()

    def _render(self, template: str, status: int = 200, **content: Any) -> Response:
        content |= {"name": self._name, "may_change": self._token is not None}
        return HTMLResponse(self._templates.get_template(template).render(content), status)

    # ------------------------------------------------------------------ looking

    async def overview(self, request: Request) -> Response:
        """Return counts and problems, and a page of the table."""
        query, sort = request.query_params.get("q", ""), request.query_params.get("sort", "time")
        number = request.query_params.get("page", "1")
        at = max(1, int(number)) if number.isascii() and number.isdecimal() and len(number) < 10 else 1  # noqa: PLR2004
        return await run_in_threadpool(self._overview, query, sort if sort in _SORTS else "time", at)

    def _overview(self, query: str, sort: str, at: int) -> Response:
        seen = see(self._name, self._owner)
        rows = [] if seen.table is None else self._rows()
        found = [row for row in rows if query.lower() in f"{row['hotkey']} {row['reason']}".lower()]
        found.sort(key=lambda row: str(row[_SORTS[sort]]) if sort != "time" else -row[_SORTS[sort]])
        pages = max(1, -(-len(found) // _ROWS))
        at = min(at, pages)
        return self._render(
            "overview.html",
            seen=seen,
            problems=seen.problems[:_PROBLEMS],
            reading=self._reading(),
            rows=found[(at - 1) * _ROWS : at * _ROWS],
            found=len(found),
            page=at,
            pages=pages,
            query=query,
            sort=sort,
        )

    def _reading(self) -> dict[str, Any]:
        """Return who reads, who reads most first; the page itself is one of them once it showed a table."""
        found = self._readers.look()
        most = sorted(found["readers"], key=lambda reader: (-(reader["checks_per_s"] or 0), -reader["checks"]))
        return found | {"most": most[:_READERS]}

    def _rows(self) -> asking.Rows:
        """Return all records, which all viewers share until something is published: the table may be large."""
        reader = EliminationReader(self._name, owner=self._owner)
        with self._decoding:
            # A version never comes again, whatever is replaced.
            if (version := reader.version) != self._decoded[0]:
                self._decoded = version, reader.get_eliminations_from_memory()
            return self._decoded[1]

    async def miner(self, request: Request) -> Response:
        """Return all that is known of one hotkey."""
        return await run_in_threadpool(self._miner, request.query_params.get("hotkey", ""))

    def _miner(self, hotkey: str) -> Response:
        problem, record, status = None, None, None
        history: asking.Rows = []
        debts: asking.Rows = []
        slashes: asking.Rows = []
        try:
            reader = EliminationReader(self._name, owner=self._owner)
            record, status = reader.get_elimination(hotkey), reader.status(hotkey)
            (history, debts, slashes), source = asking.all_of(self._name, hotkey, _EVENTS)
            if source == "store":
                problem = "the server cannot be asked: history, debts and slashes are those of the store"
        except (ShmelimError, ValueError, TimeoutError) as error:
            problem = str(error)
        return self._render(
            "miner.html",
            200 if status is not None else 404,
            hotkey=hotkey,
            record=record and dict(islice(record.items(), _FIELDS)),
            hotkey_status=status,
            problem=problem,
            debts=debts,
            slashes=slashes,
            history=[(event, _differences(event)) for event in history],
        )

    async def health(self, _request: Request) -> Response:
        """Return status and problems; 503 where the name is failing, or nobody serves it."""
        seen = await run_in_threadpool(see, self._name, self._owner)
        status = 200 if seen.status in {"ok", "degraded"} else 503
        return JSONResponse({"name": self._name, "status": seen.status, "problems": seen.problems}, status)

    async def metrics(self, _request: Request) -> Response:
        """Return metrics for Prometheus."""
        from shmelim.watch.metrics import text_of  # noqa: PLC0415  # its library is loaded when it is asked

        return PlainTextResponse(await run_in_threadpool(text_of, self._name, self._owner))

    # ------------------------------------------------------------------ changes as they come

    async def events(self, _request: Request) -> Response:
        """Return changes as they come, as server-sent events, to a bounded number of listeners."""
        if self._listening >= _MOST_LISTENING:
            return PlainTextResponse("too many listen already", 503, {"Retry-After": "10"})
        self._listening += 1
        return _Listening(self._stream(), self._leave)

    def _leave(self) -> None:
        self._listening -= 1

    async def _stream(self) -> AsyncIterator[str]:
        yield ": changes as they come\n\n"
        while not self._ending.is_set():
            try:
                client = await run_in_threadpool(EliminationClient, self._name)
                async with AsyncEliminationClient(client) as eliminations:
                    async for line in self._follow(eliminations):
                        yield line
            except (ShmelimError, TimeoutError):
                # It is away, or was started anew: the page is to be looked at again.
                yield "event: look\ndata: {}\n\n"
                await asyncio.sleep(_RETRY)

    async def _follow(self, eliminations: AsyncEliminationClient) -> AsyncIterator[str]:
        seen = eliminations.client.version
        while not self._ending.is_set():
            # Also without a change now and then: by that it is seen that a listener went away.
            if not await eliminations.wait_for_change(15, seen):
                yield ": still here\n\n"
                continue
            found = await eliminations.changes(seen)
            seen = found["version"]
            for event in found["events"][-_MOST_TOLD:]:
                shown = {key: event[key] for key in ("action", "hotkey", "program")}
                shown["at"] = utc_text(event["at_ms"])
                yield f"data: {json.dumps(finite(shown))}\n\n"

    # ------------------------------------------------------------------ changing

    async def remove(self, request: Request) -> Response:
        """Take an elimination back."""
        return await self._change(request, lambda client, form: client.remove_elimination(form["hotkey"]))

    async def acknowledge(self, request: Request) -> Response:
        """Acknowledge what the guard noticed."""
        return await self._change(request, lambda client, _form: client.acknowledge())

    async def _change(
        self, request: Request, change: Callable[[EliminationClient, Mapping[str, str]], object]
    ) -> Response:
        """Make a change, if the form has the token and comes from a page of ours; then show the page again."""
        if self._token is None:
            raise HTTPException(403, "this page changes nothing: it was started without --token-file")
        origin = request.headers.get("origin", "")
        if origin.partition("://")[2] != request.headers["host"]:
            raise HTTPException(403, f"a form of another origin: {origin!a}")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MOST_BODY:
                raise HTTPException(413, "the form is too large")
        form = {key: values[0] for key, values in parse_qs(body.decode("utf-8", "replace")).items()}
        if not hmac.compare_digest(form.get("token", "").encode(), self._token.encode()):
            raise HTTPException(403, "that is not the token")

        def make() -> None:
            with EliminationClient(self._name) as client:
                change(client, form)

        try:
            await run_in_threadpool(make)
        except KeyError as error:
            raise HTTPException(400, f"the form has no {error}") from None
        except (ShmelimError, ValueError) as error:
            raise HTTPException(409, f"not done: {str(error)!a}") from None
        return Response(status_code=303, headers={"Location": "/"})


def _differences(event: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the fields that an event changed, each with its old and its new value as text."""
    fields = differing(event["old"] or {}, event["new"] or {})
    return [(_text(field), _text(old), _text(new)) for field, (old, new) in islice(fields.items(), _FIELDS)]


def _text(value: Any) -> str:
    """Return any value as it is shown, with an end that says so where it is long."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}… ({len(text):,} characters)"
