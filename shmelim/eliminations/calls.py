"""The remote methods, each declared once: its arguments, its documentation, and how it may be called.

The server implements a declared method as ``<name>_rpc``. Clients, the manager in both modes, and the processing
inherit it from here. So a new remote method is its declaration in this file and its body in ``server.py``.
"""

# mypy: disable-error-code="empty-body"
# What a declaration does stands in the server.

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from itertools import chain, islice
from typing import Any, Final, ParamSpec, TypeVar

from shmelim.eliminations.comparing import Difference, difference, encoded, packed
from shmelim.eliminations.moments import carried
from shmelim.eliminations.reading import Reading
from shmelim.eliminations.record import check_hotkeys, check_listed, generate_row
from shmelim.errors import (
    ChannelError,
    MessageTooLargeError,
    NotServingError,
    SegmentError,
    ShmelimError,
    StateUnavailableError,
    StoreError,
    UnknownMethodError,
)

P = ParamSpec("P")
R = TypeVar("R")
Class = TypeVar("Class", bound=type)

_PART: Final = 2000  # records in a message
_ABANDON_TIMEOUT: Final = 2.0  # seconds, as those below
_PART_TIMEOUT: Final = 60.0
_LONG_TIMEOUT: Final = 60.0
_TIMEOUT_PER_ROW: Final = 0.001


def remote(
    *,
    idempotent: bool = False,
    grows: bool = False,
    keywords: Mapping[str, str] | None = None,
    check: Callable[[Any], Any] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare a method of :class:`Calls` whose body is the server's ``<name>_rpc``; a plain function comes of it.

    ``idempotent``: it is sent again when a connection breaks. ``grows``: it takes the longer, the more hotkeys are
    eliminated. ``keywords``: callers' names for its parameters, with ours. ``check`` is applied to the first
    argument before that is sent.
    """

    def declare(declared: Callable[P, R]) -> Callable[P, R]:
        method = f"{declared.__name__}_rpc"
        first = list(inspect.signature(declared).parameters)[1:2]

        @functools.wraps(declared)
        def call(self: Calls, *args: Any, **kwargs: Any) -> Any:
            if kwargs and keywords:
                kwargs = _our_names(kwargs, keywords)
            if check is not None and args:
                args = (check(args[0]), *args[1:])
            elif check is not None:
                kwargs.update({name: check(kwargs[name]) for name in first if name in kwargs})
            return self._call(method, args, kwargs, idempotent=idempotent, timeout=self._long() if grows else None)

        call.keywords = keywords  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return declare


def accepts(**keywords: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a method take callers' names of its parameters beside ours."""

    def decorate(method: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(method)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return method(*args, **(_our_names(kwargs, keywords) if kwargs else kwargs))

        call.keywords = keywords  # type: ignore[attr-defined]
        return call

    return decorate


def _our_names(kwargs: Mapping[str, Any], keywords: Mapping[str, str]) -> dict[str, Any]:
    ours: dict[str, Any] = {}
    for given, value in kwargs.items():
        name = keywords.get(given, given)
        if name in ours:
            raise TypeError(f"{name} was given twice: {' and '.join(map(repr, kwargs))}")
        ours[name] = value
    return ours


def implements(*declarations: type) -> Callable[[Class], Class]:
    """Give a server's ``<name>_rpc`` methods the documentation and the keywords of the methods they implement."""

    def decorate(server: Class) -> Class:
        for name in dir(server):
            own = name.removesuffix("_rpc")
            declared = next((getattr(each, own) for each in declarations if hasattr(each, own)), None)
            if own != name and declared is not None:
                body = getattr(server, name)
                body.__doc__ = body.__doc__ or declared.__doc__
                if keywords := getattr(declared, "keywords", None):
                    setattr(server, name, accepts(**keywords)(body))
        return server

    return decorate


class Calls:
    """The methods that ask the server: all that change the state, and what only it can answer.

    When a change returns it is durable, and every later read in every process sees it. It costs a commit: with
    durability "process" some 0.2 ms, with "power" a write to the disk more (0.7 ms together on an SSD). Times are
    in ms since 1970, UTC; a hotkey is 1 to 255 bytes of UTF-8.

    Every method raises ``TypeError`` or ``ValueError`` for what cannot be a hotkey, ``StoreError`` or
    ``SegmentFullError`` where a change could not be stored or published, and in RPC mode ``NotServingError``,
    ``CallTimeoutError`` or another ``ChannelError`` where the call did not reach the server. Nothing was applied
    then; after ``OutcomeUnknownError`` it may have been.
    """

    _timeout: float  # seconds for a usual call
    _client: Any  # the ChannelClient of a class that makes its calls as it is

    def _call(self, method: str, args: tuple[Any, ...] = (), kwargs: Any = None, **options: Any) -> Any:
        """Call the server's method; ``options`` are ``idempotent`` and ``timeout`` (seconds; None: the usual)."""
        return self._client.call(method, args, kwargs, **options)

    def _published(self) -> Reading | None:
        """Return what the server has published, where this process has that mapped and the server is another."""
        return None

    def _size(self) -> int:
        """Return how many hotkeys are eliminated."""
        raise NotImplementedError

    def _long(self) -> float:
        """Return the seconds that a call may take which writes the files, or changes many records."""
        return max(self._timeout, _LONG_TIMEOUT + self._size() * _TIMEOUT_PER_ROW)

    # ------------------------------------------------------------------ one elimination

    @remote(keywords={"elimination_data": "data"})
    def add_elimination(self, hotkey: str, data: Mapping[str, Any]) -> bool:
        """Add or replace an elimination record; True for a hotkey that was not eliminated before.

        ``data`` is a mapping of JSON-like values, at most 1 MiB: ``hotkey`` (the same), ``reason``,
        ``elimination_initiated_time_ms``, ``dd`` (drawdown, stored as given, or None), ``price_info``,
        ``return_info``, and whatever else is to be kept. ``ValueError`` if a field is missing, or the record is
        another hotkey's, or too large; ``TypeError``, which names the path, if a value cannot be stored.
        """

    @remote(keywords={"dd": "current_dd"})
    def append_elimination_row(
        self,
        hotkey: str,
        current_dd: float | None,
        reason: str,
        t_ms: int | None = None,
        price_info: Mapping[str, Any] | None = None,
        return_info: Mapping[str, Any] | None = None,
    ) -> bool:
        """Build a record as :meth:`generate_elimination_row`, and add it.

        Returns and errors are those of :meth:`add_elimination`.
        """

    generate_elimination_row = staticmethod(accepts(dd="current_dd")(generate_row))

    @remote()
    def remove_elimination(self, hotkey: str) -> bool:
        """Remove a hotkey's elimination record; True if there was one."""

    # ------------------------------------------------------------------ many

    @remote(grows=True, keywords={"deleted_hotkeys": "hotkeys"}, check=check_hotkeys)
    def delete_eliminations(
        self, hotkeys: Iterable[str], times_ms: Mapping[str, int] | None = None, force: bool = False
    ) -> list[str]:
        """Remove many records in one transaction, and return whose were removed.

        With ``times_ms`` only those that were initiated at the time which stands there for their hotkey: another
        elimination may have come since. GuardedChangeError, ``force``: as for :meth:`sync_eliminations`.
        """

    @accepts(dat="eliminations", eliminations_list="eliminations")
    def sync_eliminations(
        self,
        eliminations: Iterable[Mapping[str, Any]],
        *,
        force: bool = False,
        on_progress: Callable[[int], Any] | None = None,
    ) -> list[str]:
        """Make exactly these records the eliminations, in one step; return the hotkeys that are none any more.

        Hotkeys that stay keep their place in the order. Of a hotkey that is listed twice the last record counts.
        Only what differs is sent, a long list in parts, and applied as a whole. ``on_progress`` is called with the
        number of records sent so far; once all are sent, the commit is still to come.

        A sync that takes back at least 10 and at least a quarter of the eliminations, or doubles them, is told as
        a notice in the health. ``GuardedChangeError`` where the server was told to refuse it
        (``sync_guard="refuse"``), and ``force`` does not say that it is meant.

        ``ValueError`` or ``TypeError``, which names the place in the list, if a record cannot be stored;
        ``UploadLostError`` if the server was restarted in the middle of a long list. Nothing is applied then.
        """
        given = check_listed(eliminations)
        tell = on_progress or (lambda _: None)
        meant = {"force": True} if force else {}
        found = None
        if (published := self._published()) is not None and isinstance(given, (list, tuple)):
            with contextlib.suppress(SegmentError, NotServingError):
                found = difference(published, given)
        if found is not None and (removed := self._sync_difference(found, meant, tell)) is not None:
            tell(len(given))  # type: ignore[arg-type]  # a list, or there would be no difference
            return removed
        rows = iter(given) if published is None else map(encoded, given)
        part = list(islice(rows, _PART))
        if len(part) < _PART:
            with contextlib.suppress(MessageTooLargeError):
                removed = list(self._call("sync_eliminations_rpc", (part,), meant, timeout=self._long()))
                tell(len(part))
                return removed
        return self._sync_uploaded(chain(part, rows), meant, tell) or []

    def _sync_difference(
        self, found: Difference, meant: dict[str, Any], tell: Callable[[int], Any]
    ) -> list[str] | None:
        """Sync by sending only what differs from what is published; None where the whole list must be sent."""
        root_id, version, changed, gone = found
        # Whatever is wrong with a record is told of the whole list, with its place in it.
        with contextlib.suppress(ValueError, TypeError, UnknownMethodError, MessageTooLargeError):
            if len(changed) <= _PART:
                with contextlib.suppress(MessageTooLargeError):
                    arguments = (root_id, version, packed(changed), gone)
                    method, timeout = "sync_difference_rpc", self._long()
                    removed: list[str] | None = self._call(method, arguments, meant, timeout=timeout)
                    return removed
            since = {"root_id": root_id, "version": version, "gone": gone}
            return self._sync_uploaded(changed, meant | since, tell)
        return None

    def _sync_uploaded(
        self, records: Iterable[Any], kwargs: dict[str, Any], tell: Callable[[int], Any]
    ) -> list[str] | None:
        """Send records in parts, and sync to them."""
        token = self._call("begin_upload_rpc")
        sent, rows = 0, iter(records)
        try:
            while part := list(islice(rows, _PART)):
                self._upload(token, part)
                sent += len(part)
                tell(sent)
        except BaseException:
            with contextlib.suppress(ShmelimError):
                self._call("abandon_upload_rpc", (token,), timeout=_ABANDON_TIMEOUT)
            raise
        limit = _LONG_TIMEOUT + sent * _TIMEOUT_PER_ROW
        removed: list[str] | None = self._call("sync_uploaded_rpc", (token,), kwargs, timeout=limit)
        return removed

    def _upload(self, token: str, part: list[Any]) -> None:
        """Send records in one message, or in two where that is too large."""
        try:
            self._call("upload_rpc", (token, packed(part)), timeout=_PART_TIMEOUT)
        except MessageTooLargeError:
            if len(part) == 1:
                raise
            middle = len(part) // 2
            self._upload(token, part[:middle])
            self._upload(token, part[middle:])

    @accepts(dat="eliminations", eliminations_list="eliminations")
    def write_eliminations_to_disk(
        self, eliminations: Iterable[Mapping[str, Any]], *, force: bool = False
    ) -> None:
        """Make exactly these records the eliminations, and return when ``eliminations.json`` has them.

        StoreError if that cannot be written; the eliminations are changed all the same. GuardedChangeError,
        ``force``: as for :meth:`sync_eliminations`.
        """
        self.sync_eliminations(eliminations, force=force)
        self.save_eliminations()

    @remote(grows=True)
    def clear_eliminations(self, *, force: bool = False) -> None:
        """Remove all elimination records. Departures stay.

        GuardedChangeError, ``force``: as for :meth:`sync_eliminations`.
        """

    @remote()
    def acknowledge(self) -> list[str]:
        """Say that somebody has looked at the changes which the guard noticed; returns what they were."""

    # ------------------------------------------------------------------ the past

    @remote(idempotent=True, grows=True, check=carried)
    def as_of(self, when: int | str | datetime) -> dict[str, dict[str, Any]]:
        """Return the eliminations as they were at an earlier moment, by hotkey.

        `when` is the number of an event (see :meth:`get_history`), ms since 1970, or a time in ISO 8601 or as a
        ``datetime``, UTC where it has no zone. Those that are still eliminated come first, in their order.
        ``ValueError``: it is no moment, or lies in the future, or before the history begins. Costs some µs for
        each event since.
        """

    @remote(grows=True, check=carried)
    def rollback(self, when: int | str | datetime) -> int:
        """Make the eliminations what :meth:`as_of` returns for a moment; return how many that changes.

        One transaction, whose events say so. Departures and registrations stay; no debt is made or unmade: what
        those owe that are eliminated no more rests, as after a sync. The guard takes it for meant.
        """

    @remote(grows=True, check=carried)
    def prune_history(self, before: int | str | datetime, *, dry_run: bool = False) -> int:
        """Forget the events up to a moment, which is said as in :meth:`as_of`; return how many those are.

        What is asked of that moment or a later one, :meth:`as_of` and :meth:`rollback` too, is answered as before;
        earlier ones raise ``ValueError`` from then on. The newest event stays, and what debts are made of. Nothing
        but a backup brings the rest back. ``dry_run`` only counts.
        """

    # ------------------------------------------------------------------ files

    @remote(idempotent=True, grows=True)
    def save_eliminations(self) -> None:
        """Write the JSON files, and return when they are written; StoreError if they cannot be."""

    @remote(idempotent=True, grows=True)
    def get_eliminations_from_disk(self) -> list[dict[str, Any]]:
        """Write what ``eliminations.json`` lacks, and return its rows.

        Those of the store where there is no such file, or it cannot be written.
        """

    @remote(grows=True)
    def load_eliminations_from_disk(self) -> None:
        """Take over JSON files that somebody else put into the state directory, as a start does.

        Files that the server wrote itself are older than its state, and left alone. A damaged file is moved
        aside, with an error in the log, and changes nothing. Without a state directory nothing happens.
        """

    reload_from_disk = load_eliminations_from_disk

    # ------------------------------------------------------------------ registered and departed

    @remote(idempotent=True, grows=True, check=check_hotkeys)
    def update_metagraph(
        self, hotkeys: Iterable[str], now_ms: int | None = None, believe_empty: bool = False
    ) -> list[str]:
        """Say which hotkeys are registered now: all in the metagraph. Return those whose departure it recorded.

        Those that were registered and are no longer have departed, which is recorded once and for ever, unless so
        many are lost at once, or in small steps within a day (more than 10, and at least a quarter), that it is
        not believed. `now_ms` is the time of the look (ms since 1970, UTC; None: now). That nobody is registered
        any more is not believed unless `believe_empty` says so.
        """

    @remote(idempotent=True)
    def get_missing_hotkeys(self) -> list[str]:
        """Return the hotkeys that the metagraph no longer shows, so many at once that it was not believed."""

    @remote(grows=True, check=check_hotkeys)
    def accept_loss(self, hotkeys: Iterable[str]) -> list[str]:
        """Record the departure of hotkeys that really left, though their loss was not believed.

        Return those that were missing; the others are left as they are.
        """

    @remote(grows=True)
    def clear_departed_hotkeys(self) -> None:
        """Forget all departures; eliminations, and who is registered now, stay."""

    @remote(grows=True, check=check_hotkeys)
    def undo_departures(self, hotkeys: Iterable[str]) -> list[str]:
        """Forget departures that were none, of a metagraph that was wrong; return whose there were.

        A hotkey that is registered now is not re-registered any more, and for slashes his registration is the one
        that he had before, unless he was slashed since.
        """

    # ------------------------------------------------------------------ history, debts, first refresh

    @remote(idempotent=True)
    def get_history(
        self, hotkey: str | None = None, limit: int | None = 100, before_id: int | None = None
    ) -> list[dict[str, Any]]:
        """Return events, newest first: who changed what, when, with the old and the new record.

        ``hotkey``: only this one's. ``limit``: at most so many, up to 10,000 (None); ``ValueError`` beyond.
        ``before_id``: only events older than the one with this ``id``, for the next page.

        Each has ``id``, ``at_ms``, ``action``, ``hotkey``, ``pid``, ``uid``, ``program``, ``note``, ``old``,
        ``new`` and ``commit_number``, which is None where a release before schema 3 wrote it.
        """

    @remote(idempotent=True)
    def changes(self, since: int) -> dict[str, Any]:
        """Return what changed after version ``since``: the ``version`` of now, and the ``events``, oldest first.

        The events are as :meth:`get_history` has them; the version is the next ``since``, so that nothing is left
        out and nothing comes twice. ``ChangesUnknownError``: the server was started after that version, or it is
        too long ago; take a snapshot, and go on from its version.
        """

    @remote(idempotent=True)
    def get_debts(self, hotkey: str | None = None) -> list[dict[str, Any]]:
        """Return what one hotkey or all still owe, in the order of eliminations: limit orders, positions, slash.

        Each has ``hotkey``, ``kind``, ``state`` (``"owed"``, ``"attempting"``, ``"in_doubt"``), ``due``,
        ``since_ms``, ``eliminated_ms``, ``attempts``, ``error``, ``attempt`` and ``in_doubt_since_ms``; a slash
        also its cause, ``rule`` and ``registration`` (how often the miner had come back after a departure), and
        ``reason``, ``share`` and ``share_asked`` of the moment when it became owed. What is not ``due`` rests: its
        elimination was taken back, and it is due again with the next one.
        """

    @remote(idempotent=True)
    def get_slashes(self, hotkey: str | None = None) -> list[dict[str, Any]]:
        """Return the slashes of one hotkey or of all that were made or declined, one for each cause, oldest first.

        Each has ``hotkey``, ``rule``, ``registration``, ``made_ms``, ``eliminated_ms``, ``by`` (``"contract"``, or
        ``"hand"`` where a person said that it was made), ``outcome`` (``"made"`` or ``"declined"``), ``reason``,
        ``share`` and ``answer``. A rule of ``""``: an older version recorded it, and it counts for every rule.
        """

    @remote()
    def resolve_slash(
        self, hotkey: str, made: bool, rule: str | None = None, registration: int | None = None
    ) -> bool:
        """Say by hand that a slash that was begun was made, or was not: then it is owed again.

        ``rule`` and ``registration`` say which, where several were begun: ValueError without them. False where
        there is no such slash, or where a running process may still be making it, and so does not know.
        """

    @remote()
    def rearm_slash(self, hotkey: str, rule: str | None = None, registration: int | None = None) -> bool:
        """Let a hotkey be slashed once more for what he was slashed for; None: for every rule, every registration.

        The next elimination for it owes a slash again. False where nothing was made or declined.
        """

    @remote(idempotent=True)
    def get_money_held(self) -> dict[str, Any] | None:
        """Return ``{"since_ms", "why"}`` while no slash is begun until a person releases them, else None."""

    @remote()
    def release_money(self) -> bool:
        """Let slashes go on that are held: too many in an hour, or a state that may have forgotten some.

        All that are owed now may be made, however many they are. False where they are not held.
        Until then the health has the problem ``money_held``, and no slash is begun.
        """

    @remote(idempotent=True)
    def get_first_refresh_ran(self) -> bool:
        """Tell whether the first refresh was made since the server started."""

    @remote(idempotent=True)
    def set_first_refresh_ran(self, value: bool) -> None:
        """Say whether the first refresh was made."""


class ServerAwayError(StateUnavailableError):
    """The server is away; raised by :class:`ProcessingCalls` alone, never by a collaborator."""


class ProcessingCalls(Calls):
    """The calls of the processing, through a manager that it does not keep alive.

    A collaborator may raise a channel's error too. So errors of the server itself come out of here as
    :class:`ServerAwayError`, and whoever handles a miner's failure can tell them apart.
    """

    def __init__(self, manager: Calls) -> None:
        self._manager = weakref.ref(manager)

    def _call(self, method: str, args: tuple[Any, ...] = (), kwargs: Any = None, **options: Any) -> Any:
        manager = self._manager()
        try:
            if manager is None:
                raise ChannelError("the manager is gone")
            return manager._call(method, args, kwargs, **options)  # noqa: SLF001
        except MessageTooLargeError:
            raise  # a record's fault
        except (ConnectionError, TimeoutError, StoreError) as error:
            raise ServerAwayError(f"{method} failed: {error}") from error

    def _long(self) -> float:
        manager = self._manager()
        return _LONG_TIMEOUT if manager is None else manager._long()  # noqa: SLF001

    @remote()
    def eliminate(
        self,
        hotkey: str,
        record: Mapping[str, Any],
        owed: Iterable[str],
        replacements: int | None = None,
        rule: str | None = None,
        share: float | None = None,
        share_asked: bool = False,
    ) -> str:
        """Eliminate a hotkey that is not eliminated yet, and record in the same transaction what that owes.

        ``owed`` are kinds of debts. ``replacements`` is what :meth:`get_replacements` returned when the decision
        was made; None: whatever it is. ``rule`` is what a slash is owed for, in up to 64 characters; None: the
        rule that has the record's reason. A hotkey is slashed once for a rule, until it has departed and
        registered again: one that was made or declined owes no second, and one that rests or was begun stands for
        this elimination too. ``share`` of the collateral, 0 to 1 (None: the contract's own), is kept with the
        reason until the slash is made, unless ``share_asked`` is False and ``share`` None: whoever makes the slash
        asks for it then.

        Returns ``"added"``; ``"already"`` where it was eliminated, whose reason and debts stay; ``"superseded"``
        where the list was replaced since. Only ``"added"`` changes anything.
        """

    @remote(idempotent=True)
    def report_processing(self, whole_ms: int | None, interval_ms: float, problems: list[dict[str, Any]]) -> None:
        """Tell the server's health of the processing: of its last whole tick, and of all problems that stand.

        ``whole_ms`` is when that was made, in ms since 1970; None: there was none yet. Another is expected within
        a few times ``interval_ms``. Problems are as :meth:`~shmelim.system.problems.Problem.as_dict` has them.
        """

    @remote(idempotent=True)
    def get_replacements(self) -> int:
        """Return how often a sync, a write, a clear, or a file at a start changed what the eliminations are."""

    @remote()
    def settle_debt(
        self, hotkey: str, kind: str, attempt: str | None = None, declined: bool = False, answer: str | None = None
    ) -> bool:
        """Say that an effect is made; a slash only by its own attempt. False where nothing fits.

        ``declined``: the contract took nothing and never will; ``answer`` is what it said. An attempt may settle
        the doubt that there is about it.
        """

    @remote()
    def fail_debt(
        self,
        hotkey: str,
        kind: str,
        error: str,
        attempt: str | None = None,
        in_doubt: bool = False,
        rule: str | None = None,
        registration: int | None = None,
    ) -> bool:
        """Say that an effect could not be made; False where nothing fits.

        A slash that is attempted is owed again, or ``in_doubt`` where nobody knows whether it was made.
        """

    @remote(idempotent=True)
    def begin_slash(
        self,
        hotkey: str,
        attempt: str,
        rule: str | None = None,
        registration: int | None = None,
        at_ms: int | None = None,
        most_per_hour: float | None = None,
    ) -> bool:
        """Let an attempt have an owed slash, durable before this returns; may be repeated with the same token.

        ``rule`` and ``registration`` say which. ``most_per_hour``: where so many were begun in the hour before
        ``at_ms`` (ms since 1970, UTC; None: now) and may have been made, this one and all others are held.
        False: the slash is not owed, another attempt has it, or money is held; it must not be made.
        """

    @remote(idempotent=True)
    def renew_slash(self, hotkey: str, attempt: str) -> bool:
        """Renew the lease of an attempt, which lives that much longer; False where it does not stand any more."""

    @remote()
    def doubt_slash(self, hotkey: str, attempt: str, error: str) -> bool:
        """Put the slash that an attempt has in doubt; False: it lives, by its lease, or there is none."""
