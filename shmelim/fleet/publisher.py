"""The publisher: sends what changed in the store, under a term that others can take over, and beats.

What ``term``, ``line`` and ``seq`` are for is in ``docs/fleet.md``. The engine takes nothing from a publisher
whose head is not the one that stands there: that fences.

Does no I/O of its own: a turn asks an :class:`~shmelim.fleet.engine.Engine` and an
:class:`~shmelim.fleet.cuts.Outbox`, and may be broken off at any of their calls, by an error or by SIGKILL. What
the next turn needs stands in the engine.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from typing import Any, Final

from msgspec import structs

from shmelim.errors import FencedError, FleetDataError, OtherStoreError
from shmelim.fleet.cuts import Cut, Facts, Outbox
from shmelim.fleet.engine import HIGHEST, Engine, Id, LogAheadError, Look
from shmelim.fleet.messages import (
    DIGEST_MASK,
    FORMAT,
    Head,
    Part,
    Report,
    Snapshot,
    message_of,
    pack,
    pack_chunk,
    parts_of,
    row_digest,
    unpack_head,
    unpack_report,
)
from shmelim.system.clock import now_ms

_FAR: Final = 20_000
"""So many changes behind, all rows are sent in place of those that changed."""
_PROMPT: Final = 0.5
"""Seconds within which a beat follows the look at the engine's clock that it tells of: followers count on that."""
_ALL: Final = 1 << 62
_BELIEVED: Final = 1 << 62
"""Up to here reports are believed, and _FURTHER above what is known: no follower's lie uses up the numbers."""
_FURTHER: Final = 1 << 40
_LEAST_LOG: Final = 4 << 20
"""Bytes of log after which a new snapshot may be due."""


class Publisher:
    """Publishes one store under one name.

    ``beat`` is the seconds between two beats, which say that nothing is newer; ``digest_rows`` up to how many rows
    every message carries the digest of the whole table (a larger one's goes with a beat every ``digest_every``
    seconds). ``take_over`` takes the name from another store. With ``hold_guarded``, nothing is sent while a
    change that the guard noticed is not acknowledged. ``owner`` is 16 random bytes, ``host`` where it
    runs, for people.

    ``head`` is what this publisher left in the engine, None while it does not lead; ``held`` why nothing is sent;
    ``behind`` how many changes were not sent yet. Not thread-safe.
    """

    def __init__(
        self,
        engine: Engine,
        outbox: Outbox,
        *,
        beat: float = 0.5,
        digest_rows: int = 2000,
        digest_every: float = 60.0,
        take_over: bool = False,
        hold_guarded: bool = False,
        owner: bytes | None = None,
        host: str = "",
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], int] = now_ms,
    ) -> None:
        self.head: Head | None = None
        self.held: str | None = None
        self.behind = 0
        self._engine, self._outbox = engine, outbox
        self._owner, self._host = owner or secrets.token_bytes(16), host
        self._beat, self._digest_rows, self._digest_every = beat, digest_rows, digest_every
        self._take_over, self._hold_guarded = take_over, hold_guarded
        self._monotonic, self._wall = monotonic, wall
        self._fenced = False
        self._term = 0  # the highest that was used, or may have been
        self._raw: bytes | None = None  # self.head's bytes
        self._tried: bytes | None = None  # what was to replace them when the engine failed
        self._word: str | None = None  # of an operator, to hold
        self._logged = 0  # bytes since the newest snapshot
        self._beats_next = self._digests_next = -1.0

    def turn(self) -> None:
        """Send what is new, and a beat if one is due.

        After an EngineError or a StoreError the next turn goes on. FencedError, OtherStoreError and FleetDataError
        (what stands under the name is not ours) need a person.
        """
        if self._fenced:
            raise self._fence()
        if (self.head is None or self._tried is not None) and not self._find_out(self._engine.look()):
            return
        now = self._monotonic()
        # The engine's clock is read before the store is: what is in the store then was the newest at that moment.
        look = self._engine.look() if now >= self._beats_next else None
        if look is not None and not self._leads(look):
            return
        head = self._led()
        wanted = _ALL if look is not None and now >= self._digests_next else self._digest_rows
        cut = self._held_cut(look) or self._outbox.cut(head.seq, digest_rows=wanted)
        self._hold(cut.facts, look)
        self.behind = cut.facts.top - head.seq
        if head.snapshot is None and head.store_id == cut.facts.store_id:
            self._send_all(anew=True)  # this line was begun, and its snapshot failed
        elif head.snapshot is None or not _goes_on(head, cut.facts):
            self._begin_line()
        elif (self.held is not None or self._send(cut)) and look is not None:
            self._beats_next = now + self._beat
            if cut.digest is not None:
                self._digests_next = now + self._digest_every
            if self._say_beat(look, cut.digest, prompt=self._monotonic() - now < _PROMPT):
                self._keep(look)

    def _held_cut(self, look: Look | None) -> Cut | None:
        """Return where the store is, without what changed, if nothing may be sent now as before; else None."""
        if self.held is None:
            return None
        facts = self._outbox.facts()
        self._hold(facts, look)
        return None if self.held is None else Cut(facts, [], [])

    def _led(self) -> Head:
        assert self.head is not None, "this publisher does not lead"
        return self.head

    # ------------------------------------------------------------------ who leads

    def _find_out(self, look: Look) -> bool:
        """Take the lead, or find out whether the engine did what it failed in; tell whether this one leads."""
        tried, self._tried = self._tried, None
        if tried is not None and look.head == tried:
            self._took(tried)
            return True
        if self.head is not None:
            return self._leads(look)
        head, facts = self._read(look), self._outbox.facts()
        self._not_fenced(head)
        if head is not None and head.store_id != facts.store_id and not self._take_over:
            raise OtherStoreError(
                f"the name belongs to the store {head.store_id.hex()}, and this one is {facts.store_id.hex()}",
                hint="publish under another --name, or with --take-over if this store takes that one's place",
            )
        if head is not None and _goes_on(head, facts) and _reaches_back(head, look):
            last = Id(self._next_term(look), 0)
            return self._enter(look, structs.replace(head, owner=self._owner, host=self._host, last=last))
        self._begin_line(look)
        return False

    def _leads(self, look: Look) -> bool:
        """Tell whether the head is still this publisher's; begin again where the engine has lost it."""
        if look.head == self._raw:
            return True
        self._not_fenced(self._read(look))
        # Nobody has taken over: it is gone, or an earlier one.
        self._begin_line(look)
        return False

    def _not_fenced(self, head: Head | None) -> None:
        if self._term and head is not None and head.owner != self._owner and head.term >= self._term:
            raise self._fence()

    def _fence(self) -> FencedError:
        self._fenced = True
        return FencedError(
            "another publisher has taken over this name",
            hint="see `shmelim fleet status`; stop one of them, and start this one again if it is to publish",
        )

    def _read(self, look: Look) -> Head | None:
        try:
            return None if look.head is None else unpack_head(look.head)
        except FleetDataError:
            if self._take_over:
                return None
            raise

    def _next_term(self, look: Look) -> int:
        """Return a term above all that were seen, and above the log: it takes only what is above its entries."""
        seen = (self.head, self._read(look), self._engine.top())
        term = max(self._term, *(each.term for each in seen if each is not None))
        return _above(term, [report.term for report in self._reports()], max(look.time, self._wall()))

    def _begin_line(self, look: Look | None = None) -> None:
        """Begin a line above all that were seen, with a snapshot; not while nothing may be sent."""
        look = look or self._engine.look()
        head, facts = self._read(look), self._outbox.facts()
        self._not_fenced(head)
        self._hold(facts, look)
        if self.held is not None:
            return
        # Where nothing is left that remembers the last line, the clocks do.
        now = max(look.time, self._wall())
        line = max([now, *(each.line for each in (self.head, head) if each is not None)])
        line = _above(line, [report.line for report in self._reports()], now)
        last = Id(self._next_term(look), 0)
        source = self._owner, self._host, facts.store_id
        if self._enter(look, Head(FORMAT, *source, line, 0, facts.runs[-1], last, None)):
            self._send_all(anew=True)

    def _enter(self, look: Look, head: Head) -> bool:
        """Put one's own head in the place of the one that was seen, and an entry that its log begins with."""
        message = pack(message_of(head, prev=head.seq, seq=head.seq, run=head.run))
        self.head, self._raw, self._term = None, None, head.term
        return self._commit(look.head, head, message)

    def _commit(
        self, expected: bytes | None, head: Head, message: bytes, keep: tuple[str, ...] | None = None
    ) -> bool:
        """Put a head in the place of the expected one; where the engine fails, the next turn finds out."""
        self._tried = pack(head)
        try:
            done = self._engine.commit(expected, self._tried, (head.last, message), keep)
        except LogAheadError:
            self.head = None  # somebody else has written there: the next turn goes on above that
            raise
        tried, self._tried = self._tried, None
        if done:
            self._took(tried)
        return done

    def _took(self, raw: bytes) -> None:
        self.head, self._raw = unpack_head(raw), raw
        if self.head.last.number == 0:
            self._logged, self._beats_next = 0, -1.0

    def _hold(self, facts: Facts, look: Look | None) -> None:
        if look is not None:
            self._word = look.held
        self.held = self._word
        if self._hold_guarded and facts.notice is not None:
            self.held = facts.notice

    # ------------------------------------------------------------------ sending

    def _append(self, message: dict[str, Any], keep: tuple[str, ...] | None = None, **changed: Any) -> bool:
        """Append an entry, if the head is still the one that this publisher left there; tell whether it was."""
        former = self._led()
        head = structs.replace(former, last=Id(former.term, former.last.number + 1), **changed)
        raw = pack(message_of(head, **message))
        if self._commit(self._raw, head, raw, keep):
            self._logged += len(raw)
            return True
        self._leads(self._engine.look())
        return False

    def _send(self, cut: Cut) -> bool:
        """Send a cut in as many messages as it takes; it counts with the last one. False: the lead was lost."""
        head, facts = self._led(), cut.facts
        if self.behind == 0:
            return True
        if facts.oldest > head.seq + 1 or self.behind > _FAR:
            self._send_all(anew=True)
            return False
        parts = list(parts_of(cut.rows, cut.gone)) or [Part([], [])]
        span = {"prev": head.seq, "seq": facts.top, "run": facts.runs[-1], "parts": len(parts)}
        for number, part in enumerate(parts[:-1]):
            if not self._append({**span, "part": number, **part._asdict()}):
                return False
        last = {"part": len(parts) - 1, **parts[-1]._asdict(), "digest": cut.digest}
        if not self._append({**span, **last}, seq=facts.top, run=facts.runs[-1]):
            return False
        self.behind = 0
        return True

    def _say_beat(self, look: Look, digest: int | None, *, prompt: bool) -> bool:
        """Say that the store had nothing newer when the engine's clock was read; else only that this one lives."""
        head = self._led()
        about: dict[str, Any] = {"prev": head.seq, "seq": head.seq, "run": head.run}
        nothing_newer = prompt and not self.behind
        return self._append(about | ({"as_of": look.time, "digest": digest} if nothing_newer else {}))

    def _send_all(self, *, anew: bool) -> None:
        """Leave a snapshot; ``anew``: the log goes on from it, else from where it was."""
        before = self._led()
        name = f"{self._owner.hex()}{before.last.term:x}{before.last.number:08x}"[-64:]
        with self._outbox.whole() as whole:
            facts = whole.facts
            self._hold(facts, None)
            same = facts.store_id == before.store_id and (before.snapshot is None or _goes_on(before, facts))
            if self.held is not None or not same:
                return
            chunks = size = rows = digest = 0
            for part in parts_of(whole.rows):
                chunk = pack_chunk(part.rows)
                self._engine.put(name, chunks, chunk)
                chunks, size, rows = chunks + 1, size + len(chunk), rows + len(part.rows)
                digest = sum((row_digest(*row) for row in part.rows), digest) & DIGEST_MASK
        run = facts.runs[-1]
        snapshot = Snapshot(name, before.line, facts.top, run, before.last, chunks, rows, size, digest)
        span = {"seq": facts.top, "run": run} if anew else {"seq": before.seq, "run": before.run}
        kept = (name,) if before.snapshot is None else (name, before.snapshot.id)
        if self._append({**span, "prev": span["seq"]}, kept, snapshot=snapshot, **span):
            self._logged = 0

    def _keep(self, look: Look) -> None:
        """See to it that the log reaches back to the newest snapshot and no further, and that nobody is lost."""
        head = self._led()
        snapshot = head.snapshot
        assert snapshot is not None
        for report in self._reports():
            is_above = _is_above(report.line, head.line) or _is_above(report.term, head.term)
            if is_above or (report.lost and report.line == head.line):
                self._begin_line()
                return
        whole = _reaches_back(head, look) and self._engine.chunks(snapshot.id) == snapshot.chunks
        if not whole or self._logged > max(_LEAST_LOG, snapshot.size):
            self._send_all(anew=False)
        elif look.first is not None and look.first < snapshot.after:
            self._engine.trim(snapshot.after)

    def _reports(self) -> list[Report]:
        found = []
        for raw in self._engine.reports().values():
            with contextlib.suppress(FleetDataError):
                found.append(unpack_report(raw))
        return found


def _is_above(reported: int, known: int) -> bool:
    return known < reported and (known < _BELIEVED or reported <= known + _FURTHER)


def _above(known: int, reported: list[int], now: int) -> int:
    """Return a number above what is known and reported; FleetDataError if there is none that others would read.

    Where a report is too high to be believed, that of a moment is: so it is none that was given before.
    """
    if any(number > max(_BELIEVED, known + _FURTHER) for number in reported):
        known = max(known, _BELIEVED + now)
    highest = max([known, *(number for number in reported if _is_above(number, known))])
    if highest >= HIGHEST:
        raise FleetDataError(
            f"a term or a line in the engine is {highest}, and none can be above it",
            hint="delete what stands under the name in the engine, and start this publisher again",
        )
    return highest + 1


def _goes_on(head: Head, facts: Facts) -> bool:
    """Tell whether a store goes on from a head: also from its snapshot, which may be newer than what was sent."""
    snapshot = head.snapshot
    return (
        head.store_id == facts.store_id
        and facts.continues(head.run, head.seq)
        and (snapshot is None or facts.continues(snapshot.run, snapshot.seq))
    )


def _reaches_back(head: Head, look: Look) -> bool:
    return head.snapshot is not None and look.first is not None and look.first <= head.snapshot.after
