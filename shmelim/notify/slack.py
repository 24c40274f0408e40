"""Alerts to Slack that never disturb the program which has something to say.

:meth:`SlackNotifier.send_message` puts a message into a queue and returns; a thread sends. So a Slack that is
slow, down or angry costs its callers nothing, and at worst some messages, which are counted.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import multiprocessing.context
import multiprocessing.util
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Final

from shmelim.notify.repeats import Repeats
from shmelim.notify.webhook import Webhook
from shmelim.system import forks
from shmelim.system.logs import LimitedLog

if TYPE_CHECKING:
    from collections.abc import Callable

_SIGNS: Final = {"info": "\u2139\ufe0f", "success": "✅", "warning": "⚠️", "error": "❌"}
_LONGEST: Final = 3500  # characters; Slack shortens from 4000 on

_logger = logging.getLogger("shmelim.notify")


class SlackNotifier:
    """Sends messages to a Slack webhook, from a thread of its own.

    A message that is repeated within `repeat_after` seconds is held back and counted; when it is let through
    again, it says how often it was repeated. Messages leave at a bounded rate; those that find the queue full
    are dropped and counted, and the next one that leaves says so. What Slack refuses for now (429, 5xx, no
    connection) is tried again, and then dropped with a line in the log.

    Thread-safe. No call raises, and each returns at once, but for :meth:`flush` and :meth:`close`, which have a
    bound. In a forked child it begins with an empty queue. Can be pickled to a process that is being started,
    and in no other way. The URL, which is a secret, appears in no log, message or ``repr``.

    Parameters
    ----------
    webhook_url
        The webhook's URL.
    source
        What every message begins with, such as the name of the host; None: nothing.
    repeat_after
        Seconds in which the same message (text and level) is sent once.
    burst, interval
        So many messages may leave at once, and from then on one every `interval` seconds.
    max_queued
        Messages that may wait.
    max_tries
        How often a message is tried.
    retry_delay
        Seconds before the second try; doubled for each further one. Slack's own ``Retry-After`` takes precedence.
    timeout
        Seconds for connecting, and for each piece of an answer.
    exit_timeout
        Seconds for messages that still wait at the end of the process.
    clock
        Returns seconds; for repetitions.

    Raises
    ------
    ValueError
        The URL is no http(s) URL (it is not shown), or a figure is impossible.

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if min(burst, max_queued, max_tries) < 1 or min(repeat_after, interval, retry_delay, exit_timeout) < 0:
            raise ValueError("burst, max_queued and max_tries must be 1 or more, and no time may be negative")
        self._webhook = Webhook(webhook_url, timeout=timeout)
        self._arguments: dict[str, Any] = {
            "webhook_url": webhook_url,
            "source": source,
            "repeat_after": repeat_after,
            "burst": burst,
            "interval": interval,
            "max_queued": max_queued,
            "max_tries": max_tries,
            "retry_delay": retry_delay,
            "timeout": timeout,
            "exit_timeout": exit_timeout,
            "clock": clock,
        }
        self._prefix = f"[{source}] " if source else ""
        self._begin_here(closed=False)

    def _begin_here(self, *, closed: bool) -> None:
        """Make what each process has of its own."""
        figures = self._arguments
        # The condition's lock guards everything below, and is held by nobody who waits for the network. It is
        # re-entrant, since a signal handler may send a message while its thread does.
        self._changed = threading.Condition(threading.RLock())
        self._repeats = Repeats(figures["repeat_after"], figures["clock"])
        self._queue: collections.deque[str] = collections.deque()  # the first one is on its way
        self._closed = closed
        self._thread: threading.Thread | None = None  # lives while there are messages
        self._finalizer: multiprocessing.util.Finalize | None = None
        self._allowance = float(figures["burst"])  # messages that may leave at once
        self._counted_at = time.monotonic()
        self._unsaid = 0  # dropped messages that none has told of
        self._counts = dict.fromkeys(("sent", "held_back", "dropped", "failed"), 0)
        self._log = LimitedLog(_logger)
        forks.register(self)

    # ------------------------------------------------------------------ for everyone

    def send_message(self, text: str, level: str = "info") -> bool:
        """Have a message sent.

        Parameters
        ----------
        text
            The message. Slack's control characters in it are escaped; what is too long is cut.
        level
            info, success, warning or error; anything else counts as info.

        Returns
        -------
        bool
            Whether it waits to be sent; False if it is held back as a repetition, or cannot be taken.

        """
        try:
            with self._changed:
                return self._enqueue(str(text), level)
        except Exception as error:
            with contextlib.suppress(Exception):
                self._log(logging.WARNING, "queue", "a message could not be queued: %s", type(error).__name__)
            return False

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until nothing waits any more; return whether that is so.

        Parameters
        ----------
        timeout
            Seconds; None: `exit_timeout`.

        """
        with self._changed:
            limit = self._arguments["exit_timeout"] if timeout is None else timeout
            self._changed.wait_for(lambda: not self._queue or self._thread is None, limit)
            return not self._queue

    def close(self, timeout: float | None = None) -> bool:
        """Take no more messages, send those that wait without further pauses, and flush; idempotent.

        Returns
        -------
        bool
            Whether nothing waits any more.

        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        return self.flush(timeout)

    def stats(self) -> dict[str, int]:
        """Return counts: messages `sent`, `held_back` as repetitions, `dropped`, `failed`, and `queued` now."""
        with self._changed:
            return {**self._counts, "queued": len(self._queue)}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self._webhook.host}>"

    def __reduce__(self) -> tuple[Any, ...]:
        multiprocessing.context.assert_spawning(self)
        return _again, (self._arguments,)

    def after_fork_in_child(self) -> None:
        """Begin anew: what waits here is the parent's to send. Called by :mod:`shmelim.system.forks`."""
        self._begin_here(closed=self._closed)

    # ------------------------------------------------------------------ with the lock held

    def _enqueue(self, text: str, level: str) -> bool:
        repeated = self._repeats.admit((level, text))
        if repeated is None:
            self._counts["held_back"] += 1
            return False
        if self._closed or len(self._queue) >= self._arguments["max_queued"]:
            self._repeats.forget((level, text))  # nobody will have seen it
            self._drop()
            return False
        if len(text) > _LONGEST:
            text = text[:_LONGEST] + " …"
        if repeated:
            text += f" (repeated {repeated} times meanwhile)"
        self._queue.append(f"{_SIGNS.get(level, _SIGNS['info'])} {self._prefix}{_escaped(text)}")
        if self._thread is None:
            self._start_thread()
        return True

    def _drop(self) -> None:
        self._counts["dropped"] += 1
        self._unsaid += 1

    def _start_thread(self) -> None:
        if self._finalizer is None:
            # Called at the end of the main process, and of a child of multiprocessing, which knows no atexit.
            self._finalizer = multiprocessing.util.Finalize(
                self, _close_at_exit, args=(weakref.ref(self),), exitpriority=100
            )
        thread = threading.Thread(target=self._deliver, name="slack-notifier", daemon=True)
        thread.start()
        self._thread = thread

    # ------------------------------------------------------------------ in the notifier's thread

    def _deliver(self) -> None:
        """Send what is in the queue, and end."""
        while True:
            with self._changed:
                if not self._queue:
                    self._thread = None
                    self._changed.notify_all()
                    return
                self._wait_for_allowance()
                text = self._queue[0]
                unsaid, self._unsaid = self._unsaid, 0
            if unsaid:
                text += f" ({unsaid} other messages were dropped)"
            try:
                problem = self._post(text)
            except (
                Exception
            ) as error:  # nothing raises there; but a thread that ended would be the end of all alerts
                problem = type(error).__name__
            with self._changed:
                self._queue.popleft()
                self._counts["failed" if problem else "sent"] += 1
                if problem:
                    self._unsaid += unsaid
                self._changed.notify_all()
            if problem:
                self._log(logging.WARNING, "failed", "a message was not delivered (%s): %s", problem, text)

    def _wait_for_allowance(self) -> None:
        """Wait until a message may leave, with the lock released meanwhile; one that closes does not wait."""
        burst, interval = self._arguments["burst"], self._arguments["interval"]
        while True:
            now = time.monotonic()
            if interval > 0:
                self._allowance = min(burst, self._allowance + (now - self._counted_at) / interval)
            else:
                self._allowance = burst
            self._counted_at = now
            if self._allowance >= 1 or self._closed:
                self._allowance -= 1
                return
            self._changed.wait((1 - self._allowance) * interval)

    def _post(self, text: str) -> str | None:
        """Try to deliver a message, as often as allowed; return what went wrong."""
        delay = self._arguments["retry_delay"]
        for left in reversed(range(self._arguments["max_tries"])):
            delivery = self._webhook.post(text)
            if delivery.problem is None or not delivery.again or not left:
                return delivery.problem
            with self._changed:
                self._changed.wait_for(lambda: self._closed, delivery.after or delay)
            delay *= 2
        return None


def _escaped(text: str) -> str:
    """Return a text in which nothing means something to Slack, such as ``<!channel>``."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _again(arguments: dict[str, Any]) -> SlackNotifier:
    return SlackNotifier(**arguments)


def _close_at_exit(reference: weakref.ref[SlackNotifier]) -> None:
    notifier = reference()
    if notifier is not None:
        notifier.close()
