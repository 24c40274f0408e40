"""Alerts to Slack that never disturb the program which has something to say.

:meth:`SlackNotifier.send_message` puts a message into a queue and returns; a thread sends. So a Slack that is
slow, down or angry costs its callers nothing, and at worst some messages, which are counted.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import multiprocessing.context
import multiprocessing.util
import threading
import urllib.parse
import weakref
from http import HTTPStatus
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from shmelim.errors import MissingExtraError
from shmelim.notify.outbox import Outbox
from shmelim.notify.problems import Undelivered
from shmelim.system import forks
from shmelim.system.arguments import seconds, whole
from shmelim.system.background import Background
from shmelim.system.clock import monotonic, now_ms
from shmelim.system.logs import LimitedLog
from shmelim.system.places import place
from shmelim.system.text import get_logger, printable

if TYPE_CHECKING:
    from slack_sdk.webhook import WebhookResponse

_SIGNS: Final = {"info": "\u2139\ufe0f", "success": "✅", "warning": "⚠️", "error": "❌"}
_LONGEST: Final = 3500  # characters; Slack shortens from 4000 on
_LONGEST_WAIT: Final = 300.0  # seconds that a Retry-After may ask for
_LONGEST_DELAY: Final = 60.0  # seconds between two tries
_TRIES_AT_END: Final = 3
_LONG_MS: Final = 60_000
_REMEMBERED: Final = 256  # messages by which repetitions are known
_ITS_OWN_FAULT: Final = (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
_LOOK: Final = ""  # in the queue, where no message is empty: look into the outbox

_logger = get_logger("shmelim.notify")
# The client logs the URL, so that what it says goes nowhere.
_silent = logging.Logger("shmelim.webhook", logging.CRITICAL + 1)  # noqa: LOG001  # not in the tree on purpose


class _Fault(NamedTuple):
    """Why a try failed; after how many seconds Slack wants the next, and whether there is none."""

    why: str
    after: float | None = None
    is_final: bool = False


_NOT_OURS: Final = _Fault("another process sends", 1.0)


class SlackNotifier:
    """Sends messages to a Slack webhook, from a thread of its own.

    A message (text and level) that is repeated within `repeat_after` seconds is held back; when it is let through
    again, it says how often it was repeated. Messages leave in their order and at a bounded rate; those that find
    the queue full are dropped, and one that leaves later says how many. What Slack refuses for now (429, 5xx, no
    connection) is tried until it can be delivered, and those behind it wait; :meth:`undelivered` says so.

    With an `outbox` a message that was taken is on disk, and waits there for Slack also when this process ends or
    is killed: the next notifier with that outbox sends it. An :class:`~shmelim.EliminationManager` gives its
    notifier one in its state directory.

    Thread-safe. No method raises but :meth:`use_outbox`, and each returns at once (some 10 µs, with an outbox some
    100), but for :meth:`flush` and :meth:`close`, which have a bound. A forked child begins with an empty queue.
    Can be pickled to a process that is being started, and in no other way. The URL, which is a secret, appears in
    no log, message or ``repr``.

    Parameters
    ----------
    webhook_url, source : str
        The webhook's http(s) URL; and what every message begins with, such as the name of the host.
    burst, interval : int, float
        So many messages may leave at once, and from then on one every `interval` seconds.
    max_queued, max_tries, retry_delay : int, int or None, float
        How many messages may wait; how often each is tried before it is dropped with a line in the log (None:
        until it is delivered; with an outbox always so); and seconds before the second try, doubled for each
        further one up to a minute. Slack's ``Retry-After`` takes precedence.
    timeout, exit_timeout : float
        Seconds for connecting, and for each piece of an answer; seconds for what waits when the process ends.
    outbox : Path, str or None
        A directory of this user's where messages wait until Slack has them; it is made where it is missing.
        Several notifiers and processes may share one.

    Raises
    ------
    ValueError
        The URL is not an http(s) URL (it is not shown), or a figure is impossible.
    OSError
        The outbox cannot be made.
    MissingExtraError
        slack_sdk is not installed; it comes with the extra ``slack``.

    Examples
    --------
    >>> slack = SlackNotifier("https://hooks.slack.com/services/T0/B0/secret", source="validator-1")
    >>> slack
    <SlackNotifier at hooks.slack.com>
    >>> slack.stats()
    {'sent': 0, 'held_back': 0, 'dropped': 0, 'failed': 0, 'queued': 0}
    >>> slack.close()
    True
    >>> slack.send_message("too late", level="warning")
    False

    """

    def __init__(
        self,
        webhook_url: str,
        *,
        source: str | None = None,
        repeat_after: float = 300.0,
        burst: int = 5,
        interval: float = 1.0,
        max_queued: int = 100,
        max_tries: int | None = None,
        retry_delay: float = 1.0,
        timeout: float = 5.0,
        exit_timeout: float = 2.0,
        outbox: Path | str | None = None,
    ) -> None:
        # What a started process gets, and all that an instance is made of.
        self._arguments: dict[str, Any] = {name: value for name, value in locals().items() if name != "self"}
        for name in ("burst", "max_queued", *(() if max_tries is None else ("max_tries",))):
            self._arguments[name] = whole(name, self._arguments[name])
        for name in ("repeat_after", "interval", "retry_delay", "timeout", "exit_timeout"):
            self._arguments[name] = seconds(name, self._arguments[name])
        if not isinstance(source, str | None):
            raise TypeError(f"source must be text or None, not {source!r:.100}")
        self._host = _host(webhook_url)
        if find_spec("slack_sdk") is None:  # looked for only: see _post
            hint = "pip install 'shmelim[slack]'"
            raise MissingExtraError("alerts to a Slack webhook need slack_sdk, which is missing", hint=hint)
        self._log = LimitedLog(_logger)
        self._background = Background(self._deliver, self._lost, max_queued)
        self._closed = False
        self._outbox: Outbox | None = None
        self.after_fork_in_child()
        forks.register(self)
        if outbox is not None:
            self.use_outbox(outbox)

    def after_fork_in_child(self) -> None:
        """Begin anew: what waits here is the parent's to send. Called by :mod:`shmelim.system.forks`."""
        # Guards everything below, and is held by nobody who waits for the network. Re-entrant: a signal handler
        # may send a message while its thread does.
        self._changed = threading.Condition(threading.RLock())
        # (level, text) -> [when it was let through, how often it was held back since], the oldest first.
        self._seen: dict[tuple[str, str], list[float]] = {}
        self._finalizer: multiprocessing.util.Finalize | None = None
        self._full_at = 0.0  # when a whole burst may leave again; each message moves it by an interval
        self._counts = dict.fromkeys(("sent", "held_back", "dropped", "failed"), 0)
        self._tries_at_end = 0
        self._fault: tuple[str, int] | None = None  # why the last try failed, and since when (ms) all do
        self._trying_ms: int | None = None  # since when a try is under way

    def use_outbox(self, directory: Path | str) -> None:
        """Have messages wait in a directory from now on, and send those that wait there.

        A notifier that has an outbox keeps it. OSError as at construction.
        """
        with self._changed:
            if self._outbox is not None:
                return
            self._arguments["outbox"] = place("outbox", directory)
            self._outbox = Outbox(self._arguments["outbox"], self._arguments["max_queued"])
            if len(self._outbox):
                self._wake()

    def undelivered(self) -> Undelivered | None:
        """Return what waits although it was tried, or has waited for a minute; None while all goes well."""
        with self._changed:
            waiting, fault, since_ms = self.stats()["queued"], self._fault, None
            trying_ms = self._trying_ms
            if self._outbox is not None and waiting:
                with contextlib.suppress(OSError):
                    since_ms = self._outbox.since_ms()
        if not waiting:
            return None
        if fault is not None:
            return Undelivered(waiting, fault[1] if since_ms is None else since_ms, fault[0])
        if trying_ms is not None and now_ms() - trying_ms > _LONG_MS:
            return Undelivered(waiting, trying_ms, "the answer does not end")  # each piece of it comes in time
        if since_ms is not None and now_ms() - since_ms > _LONG_MS:
            return Undelivered(waiting, since_ms, "another process has the turn to send, or nobody")
        return None

    def send_message(self, text: str, level: str = "info") -> bool | None:
        """Have a message sent; None if it is counted as a repetition, False if it cannot be taken.

        The text is cut after 3,500 characters, and Slack's control characters in it are escaped. The level is
        "info", "success", "warning" or "error"; any other counts as "info".
        """
        try:
            with self._changed:
                return self._enqueue(str(text), level)
        except Exception as error:
            with contextlib.suppress(Exception):
                self._log(logging.WARNING, "queue", "a message could not be queued: %s", type(error).__name__)
            return False

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until every message was sent or given up, `timeout` seconds at most (None: `exit_timeout`).

        False: some still wait.
        """
        return self._background.drain(self._arguments["exit_timeout"] if timeout is None else timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Take no more messages, send what waits without pauses, and :meth:`flush`; idempotent, called at exit."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        return self.flush(timeout)

    def stats(self) -> dict[str, int]:
        """Return counts: messages `sent`, `held_back` as repetitions, `dropped`, `failed`, and `queued` now."""
        with self._changed:
            queued = len(self._background)
            if self._outbox is not None:
                with contextlib.suppress(OSError):
                    queued = len(self._outbox)
            return {**self._counts, "queued": queued}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self._host}>"

    def __reduce__(self) -> tuple[Any, ...]:
        multiprocessing.context.assert_spawning(self)
        return functools.partial(type(self), **self._arguments), ()

    def _enqueue(self, text: str, level: str) -> bool | None:
        """Put a message into the queue, with the lock held."""
        message, now = (level, text), monotonic()
        let_through, repeated = self._seen.get(message, (-math.inf, 0))
        if now - let_through < self._arguments["repeat_after"]:
            self._seen[message][1] += 1
            self._counts["held_back"] += 1
            return None
        self._seen.pop(message, None)
        again = f" (repeated {repeated:.0f} times meanwhile)" if repeated else ""
        if self._closed or not self._take(self._as_sent(text, again, level)):
            self._counts["dropped"] += 1
            return False
        self._seen[message] = [now, 0]
        if len(self._seen) > _REMEMBERED:
            del self._seen[next(iter(self._seen))]
        if self._finalizer is None:
            # Called at the end of the main process, and of a child of multiprocessing, which knows no atexit.
            reference = weakref.ref(self)
            self._finalizer = multiprocessing.util.Finalize(
                self, lambda: (living := reference()) and living.close(), exitpriority=100
            )
        return True

    def _take(self, message: str) -> bool:
        """Put a message into the outbox; where there is none, or it cannot be used, into the queue."""
        if self._outbox is not None:
            try:
                taken = self._outbox.put(message)
            except OSError as error:
                self._log(
                    logging.WARNING, "outbox", "the outbox cannot be used, a message is in memory: %s", error
                )
            else:
                self._wake()
                return taken
        return self._background.put(message)

    def _wake(self) -> None:
        """Have the thread look into the outbox, once more where it is about to be done with it."""
        if len(self._background) < 2:  # noqa: PLR2004  # one that is at work, and one after it
            self._background.put(_LOOK)

    def _as_sent(self, text: str, again: str, level: str) -> str:
        if self._arguments["source"]:
            text = f"[{printable(self._arguments['source'])}] {text}"
        # Escaped, so that nothing in it means something to Slack, such as <!channel>, or hides what is there.
        text = "\n".join(map(printable, text.split("\n")))
        text = f"{text[:_LONGEST]} …" if len(text) > _LONGEST else text
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return f"{_SIGNS.get(level, _SIGNS['info'])} {text}{again}"

    def _lost(self, count: int) -> str:
        return self._as_sent(f"{count} messages were dropped: too many waited", "", "warning")

    def _deliver(self, text: str) -> None:
        """Deliver a message, or all in the outbox, in the thread that sends."""
        if text == _LOOK and self._outbox is not None:
            self._empty(self._outbox)
            return
        self._await_turn()
        tries, delay = self._arguments["max_tries"], self._arguments["retry_delay"]
        while (fault := self._try(text)) is not None and not fault.is_final:
            tries = None if tries is None else tries - 1
            if tries == 0 or self._last_words_said():
                break
            self._pause(delay if fault.after is None else fault.after)
            delay = min(2 * delay, _LONGEST_DELAY)
        self._count(fault, text)

    def _empty(self, outbox: Outbox) -> None:
        """Deliver what waits in the outbox, the oldest first, until nothing does or the notifier is closed."""
        delay = self._arguments["retry_delay"]
        while outbox.first() is not None:
            fault: _Fault | None = _NOT_OURS
            with outbox.turn() as is_ours:
                if is_ours and (kept := outbox.first()) is not None:
                    self._await_turn()
                    fault = self._try(kept.text)
                    if fault is None or fault.is_final:
                        outbox.remove(kept)
                        self._count(fault, kept.text)
            if fault is None or fault.is_final:
                delay = self._arguments["retry_delay"]
                continue
            if self._last_words_said():
                return
            self._pause(delay if fault.after is None else fault.after)
            delay = min(2 * delay, _LONGEST_DELAY)

    def _await_turn(self) -> None:
        """Wait until a message may leave."""
        burst, interval = self._arguments["burst"], self._arguments["interval"]
        self._pause(self._full_at - (burst - 1) * interval - monotonic())
        self._full_at = max(self._full_at, monotonic()) + interval

    def _count(self, fault: _Fault | None, text: str) -> None:
        if fault is not None:
            self._log(logging.WARNING, "failed", "a message was not delivered (%s): %s", fault.why, text)
        with self._changed:
            self._counts["sent" if fault is None else "failed"] += 1

    def _last_words_said(self) -> bool:
        """Whether the notifier is closed and had its tries since, which are without pauses."""
        self._tries_at_end += self._closed
        return self._tries_at_end > _TRIES_AT_END

    def _pause(self, seconds: float) -> None:
        """Let time pass, unless the notifier is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)

    def _try(self, text: str) -> _Fault | None:
        """Try once to deliver a message; return what went wrong, without the URL."""
        fault, self._trying_ms = None, now_ms()
        try:
            answer = self._post(text)
            status = answer.status_code
            if status != HTTPStatus.OK:
                # The rest of 4xx, such as a webhook that was revoked, a person can mend while the outbox waits.
                lasts = HTTPStatus.TOO_MANY_REQUESTS != status < HTTPStatus.INTERNAL_SERVER_ERROR
                is_final = lasts and (self._outbox is None or status in _ITS_OWN_FAULT)
                fault = _Fault(f"HTTP status {status}", _seconds(answer.headers.get("Retry-After")), is_final)
            elif answer.body.lstrip().startswith(
                "<"
            ):  # where a redirection led, without the message: a login, mostly
                fault = _Fault("a web page answered in its place")
        except OSError as error:  # no connection, no answer in time
            reason = getattr(error, "reason", error)
            fault = _Fault(getattr(reason, "strerror", None) or type(reason).__name__)
        except Exception as error:  # its text may have the URL in it
            fault = _Fault(type(error).__name__)
        with self._changed:
            self._trying_ms = None
            if fault is None or fault.is_final:
                self._fault = None
            else:
                self._fault = fault.why, now_ms() if self._fault is None else self._fault[1]
        return fault

    def _post(self, text: str) -> WebhookResponse:
        # Imported by the first message: it takes 0.1 s, which no program without alerts should pay.
        from slack_sdk.webhook import WebhookClient  # noqa: PLC0415

        url, timeout = self._arguments["webhook_url"], self._arguments["timeout"]
        return WebhookClient(url, timeout=timeout, logger=_silent, retry_handlers=[]).send(
            text=text, unfurl_links=False, unfurl_media=False
        )


def _host(url: str) -> str:
    if not isinstance(url, str):  # it is not shown: whoever has it may write to the channel
        raise TypeError(f"webhook_url must be text, not {type(url).__name__}")
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme in {"http", "https"} and parts.hostname and url.isprintable() and " " not in url:
            return parts.hostname
    raise ValueError("the webhook's URL is not an http(s) URL")


def _seconds(header: object) -> float | None:
    with contextlib.suppress(ValueError):
        seconds = float(str(header))
        if seconds >= 0 and math.isfinite(seconds):
            return min(seconds, _LONGEST_WAIT)
    return None
