"""One message to a Slack webhook: what became of it, told without its URL, which is a secret."""

from __future__ import annotations

import logging
import math
import urllib.parse
from http import HTTPStatus
from typing import NamedTuple

_LONGEST_WAIT = 300.0  # seconds that a server's Retry-After may ask for

# The client logs the URL, so that what it says goes nowhere.
_silent = logging.Logger("shmelim.webhook", logging.CRITICAL + 1)  # noqa: LOG001  # not in the tree on purpose
_silent.disabled = True


class Delivery(NamedTuple):
    """What became of a message.

    Attributes
    ----------
    problem : str | None
        Why it was not delivered; None if it was.
    again : bool
        Whether another try may help.
    after : float | None
        Seconds to wait before it, if the server said so.

    """

    problem: str | None = None
    again: bool = False
    after: float | None = None


class Webhook:
    """A Slack webhook. Thread-safe.

    Parameters
    ----------
    url
        Its URL.
    timeout
        Seconds for connecting, and for each piece of the answer.

    Raises
    ------
    ValueError
        It is no http(s) URL. The message does not show it.

    """

    def __init__(self, url: str, *, timeout: float) -> None:
        # Imported where it is used: it takes 0.1 s, which no program without alerts should pay.
        from slack_sdk.webhook import WebhookClient  # noqa: PLC0415

        self.host = _host(url)
        self._client = WebhookClient(
            url,
            timeout=timeout,  # type: ignore[arg-type]  # fractions of a second are fine
            logger=_silent,
            retry_handlers=[],  # the queue decides about another try
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.host}>"

    def post(self, text: str) -> Delivery:
        """Send a message. Never raises, and never shows the URL."""
        try:
            answer = self._client.send(text=text)
        except OSError as error:  # no connection, no answer in time
            reason = getattr(error, "reason", error)
            return Delivery(getattr(reason, "strerror", None) or type(reason).__name__, again=True)
        except Exception as error:  # its text may have the URL in it
            return Delivery(type(error).__name__, again=True)
        status = answer.status_code
        if status == HTTPStatus.OK:
            return Delivery()
        again = status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR
        return Delivery(f"HTTP status {status}", again, _seconds(answer.headers.get("Retry-After")))


def _host(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        host = (
            parts.hostname if parts.scheme in {"http", "https"} and url.isprintable() and " " not in url else None
        )
    except ValueError:
        host = None
    if host is None:
        raise ValueError("the webhook's URL is no http(s) URL") from None
    return host


def _seconds(header: object) -> float | None:
    try:
        seconds = float(str(header))
    except ValueError:
        return None
    return min(seconds, _LONGEST_WAIT) if seconds >= 0 and math.isfinite(seconds) else None
