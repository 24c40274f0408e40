"""Lists that are larger than one message: sent in parts, checked as they come, applied in one piece."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterable
from typing import Any, Final

from shmelim.eliminations.comparing import Comparison
from shmelim.errors import UploadLostError

MAX_OPEN: Final = 4
MAX_BYTES: Final = 4 << 30
IDLE_LIMIT: Final = 120.0
PAUSE: Final = 5.0  # seconds for which an upload keeps its place, though others want it and nothing comes


class _Upload:
    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.given = 0
        self.extending = threading.Lock()
        self.touched = time.monotonic()


class Uploads:
    """The lists that clients are sending, compared as they come; thread-safe.

    What nobody went on with for two minutes is forgotten; where there is no room, the one idle longest makes some.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Upload] = {}
        self._lock = threading.Lock()

    def begin(self, comparison: Comparison) -> str:
        """Begin an upload and return its token; ValueError where too many are under way."""
        with self._lock:
            if len(self._open) >= MAX_OPEN and not self._drop_idle(PAUSE):
                raise ValueError(f"{MAX_OPEN} uploads are under way already: try again in {PAUSE:.0f} s")
            token = secrets.token_hex(8)
            self._open[token] = _Upload(comparison)
            return token

    def extend(self, token: str, records: Iterable[Any]) -> int:
        """Check records and add them; return how many the upload has now.

        UploadLostError: there is no such upload. After a ValueError or TypeError (a record that cannot be stored,
        or too much) it is given up.
        """
        with self._lock:
            upload = self._get(token)
        try:
            with upload.extending:
                upload.given += upload.comparison.extend(records, upload.given)
        except (ValueError, TypeError):
            self.abandon(token)
            raise
        with self._lock:
            self._get(token).touched = time.monotonic()
            while sum(each.comparison.size for each in self._open.values()) > MAX_BYTES:
                if not self._drop_idle(PAUSE):
                    del self._open[token]
                    raise ValueError(f"uploads of more than {MAX_BYTES:,} bytes together are not accepted")
            return len(upload.comparison)

    def finish(self, token: str) -> Comparison:
        """Return what was uploaded, and forget the upload."""
        with self._lock:
            self._get(token)
            return self._open.pop(token).comparison

    def abandon(self, token: str) -> None:
        """Forget an upload; nothing happens if there is none."""
        with self._lock:
            self._open.pop(token, None)

    def expire(self) -> None:
        """Forget the uploads that nobody goes on with."""
        with self._lock:
            while self._drop_idle(IDLE_LIMIT):
                pass

    def _drop_idle(self, seconds: float) -> bool:
        """Forget the upload that is idle longest, if that is so many seconds; say whether one was."""
        token = min(self._open, key=lambda token: self._open[token].touched, default=None)
        if token is None or time.monotonic() - self._open[token].touched < seconds:
            return False
        del self._open[token]
        return True

    def _get(self, token: str) -> _Upload:
        try:
            return self._open[token]
        except KeyError:
            raise UploadLostError(
                f"there is no upload {token!r}: the server was started anew, or the upload was idle for too long",
                hint="send the whole list again",
            ) from None
