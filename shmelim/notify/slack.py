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
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from shmelim.system import forks
from shmelim.system.background import Background
from shmelim.system.logs import LimitedLog

if TYPE_CHECKING:
    from slack_sdk.webhook import WebhookResponse

_SIGNS: Final = {"info": "\u2139\ufe0f", "success": "✅", "warning": "⚠️", "error": "❌"}
_LONGEST: Final = 3500  # characters; Slack shortens from 4000 on
_LONGEST_WAIT: Final = 300.0  # seconds that a Retry-After may ask for
_REMEMBERED: Final = 256  # messages by which repetitions are known

_logger = logging.getLogger("shmelim.notify")
# The client logs the URL, so that what it says goes nowhere.
_silent = logging.Logger("shmelim.webhook", logging.CRITICAL + 1)  # noqa: LOG001  # not in the tree on purpose


class SlackNotifier:
    """Sends messages to a Slack webhook, from a thread of its own.

    A message (text and level) that is repeated within `repeat_after` seconds is held back; when it is let through
    again, it says how often it was repeated. Messages leave at a bounded rate; those that find the queue full
    are dropped, and one that leaves later says how many. What Slack refuses for now (429, 5xx, no connection) is
    tried again, and then dropped with a line in the log.

    Thread-safe. No method raises, and each returns at once (some 10 µs), but for :meth:`flush` and :meth:`close`,
    which have a bound. A forked child begins with an empty queue. Can be pickled to a process that is being
    started, and in no other way. The URL, which is a secret, appears in no log, message or ``repr``.

    Parameters
    ----------
    webhook_url, source : str
        The webhook's http(s) URL; and what every message begins with, such as the name of the host.
    burst, interval : int, float
        So many messages may leave at once, and from then on one every `interval` seconds.
    max_queued, max_tries, retry_delay : int, int, float
        How many messages may wait, how often each is tried, and seconds before the second try, doubled for each
        further one; Slack's ``Retry-After`` takes precedence.
    timeout, exit_timeout : float
        Seconds for connecting, and for each piece of an answer; seconds for what waits when the process ends.

    Raises
    ------
    ValueError
        The URL is not an http(s) URL (it is not shown), or a figure is impossible.

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
        max_tries: int = 4,
        retry_delay: float = 1.0,
        timeout: float = 5.0,
        exit_timeout: float = 2.0,
    ) -> None:
        # What a started process gets, and all that an instance is made of.
        self._arguments: dict[str, Any] = {name: value for name, value in locals().items() if name != "self"}
        if min(burst, max_queued, max_tries) < 1 or min(repeat_after, interval, retry_delay, exit_timeout) < 0:
            raise ValueError("burst, max_queued and max_tries must be 1 or more, and no time may be negative")
        self._host = _host(webhook_url)
        self._log = LimitedLog(_logger)
        self._background = Background(self._deliver, self._lost, max_queued)
        self._closed = False
        self.after_fork_in_child()
        forks.register(self)

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

    def send_message(self, text: str, level: str = "info") -> bool:
        """Have a message sent; False if it is held back as a repetition, or cannot be taken.

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
            return {**self._counts, "queued": len(self._background)}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self._host}>"

    def __reduce__(self) -> tuple[Any, ...]:
        multiprocessing.context.assert_spawning(self)
        return functools.partial(type(self), **self._arguments), ()

    def _enqueue(self, text: str, level: str) -> bool:
        """Put a message into the queue, with the lock held."""
        message, now = (level, text), monotonic()
        let_through, repeated = self._seen.get(message, (-math.inf, 0))
        if now - let_through < self._arguments["repeat_after"]:
            self._seen[message][1] += 1
            self._counts["held_back"] += 1
            return False
        self._seen.pop(message, None)
        again = f" (repeated {repeated:.0f} times meanwhile)" if repeated else ""
        if self._closed or not self._background.put(self._as_sent(text, again, level)):
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

    def _as_sent(self, text: str, again: str, level: str) -> str:
        text = f"{text[:_LONGEST]} …" if len(text) > _LONGEST else text
        source = f"[{self._arguments['source']}] " if self._arguments["source"] else ""
        # Escaped, so that nothing in it means something to Slack, such as <!channel>.
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return f"{_SIGNS.get(level, _SIGNS['info'])} {source}{text}{again}"

    def _lost(self, count: int) -> str:
        return self._as_sent(f"{count} messages were dropped: too many waited", "", "warning")

    def _deliver(self, text: str) -> None:
        """Deliver a message, in the thread that sends, when it is its turn."""
        burst, interval = self._arguments["burst"], self._arguments["interval"]
        self._pause(self._full_at - (burst - 1) * interval - monotonic())
        self._full_at = max(self._full_at, monotonic()) + interval
        fault = self._try(text)
        if fault:
            self._log(logging.WARNING, "failed", "a message was not delivered (%s): %s", fault, text)
        with self._changed:
            self._counts["failed" if fault else "sent"] += 1

    def _pause(self, seconds: float) -> None:
        """Let time pass, unless the notifier is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed, seconds)

    def _try(self, text: str) -> str | None:
        """Try to deliver a message, as often as allowed; return what went wrong, without the URL."""
        delay, fault = self._arguments["retry_delay"], ""
        for left in reversed(range(self._arguments["max_tries"])):
            after = None
            try:
                answer = self._post(text)
                if answer.status_code == HTTPStatus.OK:
                    return None
                fault = f"HTTP status {answer.status_code}"
                if HTTPStatus.TOO_MANY_REQUESTS != answer.status_code < HTTPStatus.INTERNAL_SERVER_ERROR:
                    return fault
                after = _seconds(answer.headers.get("Retry-After"))
            except OSError as error:  # no connection, no answer in time
                reason = getattr(error, "reason", error)
                fault = getattr(reason, "strerror", None) or type(reason).__name__
            except Exception as error:  # its text may have the URL in it
                fault = type(error).__name__
            if left:
                self._pause(delay if after is None else after)
            delay *= 2
        return fault

    def _post(self, text: str) -> WebhookResponse:
        # Imported by the first message: it takes 0.1 s, which no program without alerts should pay.
        from slack_sdk.webhook import WebhookClient  # noqa: PLC0415

        url, timeout = self._arguments["webhook_url"], self._arguments["timeout"]
        return WebhookClient(url, timeout=timeout, logger=_silent, retry_handlers=[]).send(text=text)


def _host(url: str) -> str:
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
