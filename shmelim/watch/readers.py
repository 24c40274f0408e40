"""Who reads a name, and how much a second: two looks at the readers' own counts, and what lies between them."""

from __future__ import annotations

import math
import pwd
import threading
from typing import Any, Final

from shmelim.shm import SharedNamespace, readings_of
from shmelim.system import clock

COUNTED: Final = ("checks", "hits", "batches", "records", "snapshots", "retries")

_AT_ONCE: Final = 1.0  # seconds


class Readers:
    """Looks at the readers of a name, and trusts segments of ``owner``; rates are those since the look before."""

    def __init__(self, name: str, owner: int | None = None) -> None:
        self._namespace = SharedNamespace(name, owner=owner)
        self._before: dict[int, tuple[int, ...]] = {}
        self._at: float | None = None

    def look(self) -> dict[str, Any]:
        """Return ``readers``, one dict each, the longest first, and the ``total``, of those that ended, too.

        A reader has ``pid`` (in its own pid namespace), ``uid``, ``user``, ``title`` (a stranger's text),
        ``since_ms``, each count, and each as a rate a second, ``checks_per_s`` and so on: None at the first look.
        One that came since the last look has read all that it counted since then.
        """
        found, now = readings_of(self._namespace), clock.monotonic()
        seconds = None if self._at is None else max(now - self._at, 1e-9)
        nothing = (0,) * len(COUNTED)
        readers = []
        for one in found.processes:
            before = self._before.get(one.id, nothing)
            rates = [
                None if seconds is None else (count - former) / seconds
                for count, former in zip(one.counts, before, strict=True)
            ]
            about = {"pid": one.pid, "uid": one.uid, "user": _user(one.uid), "title": one.title}
            about |= {"since_ms": one.since_ms} | one.counts._asdict()
            readers.append(about | {f"{name}_per_s": rate for name, rate in zip(COUNTED, rates, strict=True)})
        self._before, self._at = {one.id: tuple(one.counts) for one in found.processes}, now
        return {"readers": readers, "total": found.total._asdict()}


class SharedLook:
    """One look at the readers for all who ask within a second, from any thread."""

    def __init__(self, name: str, owner: int | None = None) -> None:
        self._readers = Readers(name, owner)
        self._looking = threading.Lock()  # one thread looks, and guards what it saw
        self._seen: dict[str, Any] = {}
        self._until = -math.inf

    def look(self) -> dict[str, Any]:
        """Return what :meth:`Readers.look` does; rates are since the look before this one, whoever took that."""
        with self._looking:
            if clock.monotonic() >= self._until:
                self._seen, self._until = self._readers.look(), clock.monotonic() + _AT_ONCE
            return self._seen


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
