"""Debts: the server's methods about them, and the changes of the state that these commit.

The methods check arguments, and are documented where they are declared, in ``calls.py``. A change is a step of a
transaction, with its events, and does nothing where it does not fit.

A debt that fails with every tick must not flood a history that is never shortened: of the failures of one debt
the 1st, 2nd, 4th, 8th, … are told, and so are the beginnings of these attempts. What puts a slash in doubt,
settles or resolves it is always told.
"""

# ruff: noqa: D102

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from shmelim.eliminations.debts.journal import REARMED, Entry, Journal, begun, entry_of, unmade
from shmelim.eliminations.debts.states import (
    ANY_RULE,
    ATTEMPTING,
    BY_CONTRACT,
    BY_HAND,
    DECLINED,
    IN_DOUBT,
    KINDS,
    MADE,
    OWED,
    SLASH,
    Debt,
    Slash,
    rule_of,
)
from shmelim.eliminations.epochs import Teller
from shmelim.eliminations.record import check_hotkey, decode, prepare
from shmelim.eliminations.state.changes import Step, owe_once, registrations, replacements
from shmelim.eliminations.state.leases import Leases
from shmelim.eliminations.state.thread import State
from shmelim.eliminations.store.history import Change as EventOf
from shmelim.eliminations.store.history import Origin
from shmelim.eliminations.store.store import DebtFigures, Store
from shmelim.errors import StoreError
from shmelim.system import clock
from shmelim.system.problems import Problems

T = TypeVar("T")

MOST_SHOWN: Final = 20
"""Hotkeys in doubt that a health check names."""

HELD: Final = "money_held"
"""Name of the problem that no slash is begun, and of the value in the store that says since when, and why."""

_MAX_ATTEMPT: Final = 255
_MAX_ERROR: Final = 500
_MAX_RULE: Final = 64
_HOUR_MS: Final = 3_600_000
_REMEMBERED: Final = 100  # slashes, even where all of them seem to be older than an hour
_BEGUN: Final = "slashes_begun"  # when the last ones were begun that may have been made, by attempt
_RELEASED: Final = "slashes_released"  # the causes of the debts that a person released, until they are settled
# A record's time may be any whole number of 64 bits; SQLite's are signed.
_LARGEST_MS: Final = (1 << 63) - 1


Noted: TypeAlias = tuple[bool, list[Entry]]
"""Whether a change was made, and what the journal is to say of it."""

_NOTHING: Final[Noted] = (False, [])
_JOURNAL: Final = "slash_journal"


class Cause(NamedTuple):
    """Which slash of a hotkey is meant, as far as it is said."""

    rule: str | None = None
    registration: int | None = None

    def fits(self, debt: Debt | Slash) -> bool:
        """Whether this may mean that debt, or that slash."""
        return self.rule in (None, debt.rule) and self.registration in (None, debt.registration)


class DebtMethods:
    """A server's remote methods about debts."""

    # Of the server.
    _state: State
    state_dir: Path | None
    problems: Problems
    _journal: Journal | None
    _teller: Teller
    _leases: Leases
    _whose_call: Callable[[], Origin]

    def _ask(self, question: Callable[[Store], T]) -> T:
        """Ask the store beside who commits, who may be busy with a long sync; in memory, between commits."""
        if self.state_dir is None:
            return self._state.read(question)
        with Store.read_only(self.state_dir) as store:
            return question(store)

    def eliminate_rpc(
        self,
        hotkey: str,
        record: Mapping[str, Any],
        owed: Iterable[str],
        replacements: int | None = None,
        rule: str | None = None,
        share: float | None = None,
        share_asked: bool = False,
    ) -> str:
        check_hotkey(hotkey)  # which also refuses None: prepare would take the record's word for it
        _check_type("replacements", replacements, int | None, "a whole number or None")
        _check_rule(rule)
        _check_type("share", share, int | float | None, "a number or None")
        if share is not None and not 0 <= share <= 1:  # NaN is neither
            raise ValueError(f"share must be 0 to 1, not {share!r}")
        _check_type("share_asked", share_asked, bool, "True or False")
        _, encoded = prepare(record, hotkey)
        plain = decode(encoded)
        eliminated_ms = min(plain["elimination_initiated_time_ms"], _LARGEST_MS)
        reason = plain["reason"]
        cause = rule_of(reason) if rule is None else rule
        slash = Debt(
            hotkey, SLASH, cause, 0, OWED, 0, due=True, since_ms=clock.now_ms(), eliminated_ms=eliminated_ms,
            reason=reason, share=share, share_asked=share_asked or share is not None,
        )  # fmt: skip
        kinds = _check_kinds(owed)
        return self._state.commit(eliminate, hotkey, encoded, kinds, slash, replacements)

    def get_replacements_rpc(self) -> int:
        return self._state.read(replacements)

    def get_debts_rpc(self, hotkey: str | None = None) -> list[dict[str, Any]]:
        if hotkey is not None:
            check_hotkey(hotkey)
        debts = self._ask(lambda store: store.debts(hotkey))
        return [debt.as_dict() | {"under_way": self._leases.is_live(debt)} for debt in debts]

    def get_slashes_rpc(self, hotkey: str | None = None) -> list[dict[str, Any]]:
        if hotkey is not None:
            check_hotkey(hotkey)
        return [slash._asdict() for slash in self._ask(lambda store: store.slashes(hotkey))]

    def settle_debt_rpc(
        self, hotkey: str, kind: str, attempt: str | None = None, declined: bool = False, answer: str | None = None
    ) -> bool:
        _check(hotkey, kind, attempt)
        _check_type("declined", declined, bool, "True or False")
        if declined and attempt is None:
            raise ValueError("declined is said of an attempt: attempt must not be None")
        text = None if answer is None else _storable("answer", answer)
        return self._answer(attempt, settle, hotkey, kind, attempt, text, declined=declined)

    def fail_debt_rpc(
        self,
        hotkey: str,
        kind: str,
        error: str,
        attempt: str | None = None,
        in_doubt: bool = False,
        rule: str | None = None,
        registration: int | None = None,
    ) -> bool:
        _check(hotkey, kind, attempt)
        _check_type("in_doubt", in_doubt, bool, "True or False")
        if in_doubt and attempt is None:
            raise ValueError("in_doubt is said of an attempt: attempt must not be None")
        text = _storable("error", error)
        cause = _check_cause(rule, registration)
        return self._answer(attempt, fail, hotkey, kind, text, attempt, cause, in_doubt=in_doubt)

    def begin_slash_rpc(
        self,
        hotkey: str,
        attempt: str,
        rule: str | None = None,
        registration: int | None = None,
        at_ms: int | None = None,
        most_per_hour: float | None = None,
    ) -> bool:
        self._teller.check_tells("begin slashes")
        check_hotkey(hotkey)
        _check_attempt(attempt)
        cause = _check_cause(rule, registration)
        _check_type("at_ms", at_ms, int | None, "a whole number or None")
        _check_type("most_per_hour", most_per_hour, int | float | None, "a number or None")
        now = clock.now_ms() if at_ms is None else at_ms
        most = math.inf if most_per_hour is None else most_per_hour
        self._leases.renew(attempt)
        granted, entries = self._state.commit(begin_slash, hotkey, attempt, cause, now, most)
        if not granted:
            self._leases.end(attempt)
            self._tell_held(self._state.read(held_money))
            return False
        # After a power cut that took this with it, the slash would be owed, and made again.
        self._state.sync()
        if self._journal is not None:
            self._journal.append(entries)
        return True

    def renew_slash_rpc(self, hotkey: str, attempt: str) -> bool:
        check_hotkey(hotkey)
        _check_attempt(attempt)
        stands = any(debt.attempt == attempt for debt in self._ask(lambda store: store.debts(hotkey)))
        if stands:
            self._leases.renew(attempt)
        return stands

    def doubt_slash_rpc(self, hotkey: str, attempt: str, error: str) -> bool:
        check_hotkey(hotkey)
        _check_attempt(attempt)
        return self._commit_noted(doubt, hotkey, attempt, _storable("error", error), self._leases)

    def resolve_slash_rpc(
        self, hotkey: str, made: bool, rule: str | None = None, registration: int | None = None
    ) -> bool:
        check_hotkey(hotkey)
        _check_type("made", made, bool, "True or False")
        cause = _check_cause(rule, registration)
        return self._commit_noted(resolve_slash, hotkey, cause, self._leases, made=made)

    def rearm_slash_rpc(self, hotkey: str, rule: str | None = None, registration: int | None = None) -> bool:
        check_hotkey(hotkey)
        cause = _check_cause(rule, registration)
        found = [slash for slash in self._ask(lambda store: store.slashes(hotkey)) if cause.fits(slash)]
        if found and self._journal is not None:
            # First: a start that finds it on record in the journal alone would put it back.
            self._journal.append(entry_of(REARMED, slash, clock.now_ms()) for slash in found)
        return self._state.commit(rearm_slash, hotkey, cause)

    def get_money_held_rpc(self) -> dict[str, Any] | None:
        return self._ask(held_money)

    def release_money_rpc(self) -> bool:
        released = self._state.commit(release_money)
        self._tell_held(self._state.read(held_money))
        return released

    def _commit_noted(self, change: Callable[..., Noted], *arguments: Any, **options: Any) -> bool:
        """Commit a change of a slash, and then have the journal say what became of it."""
        return self._noted(*self._state.commit(change, *arguments, **options))

    def _answer(self, attempt: str | None, change: Callable[..., Noted], *arguments: Any, **options: Any) -> bool:
        """Commit what became of an effect; how an attempt at a slash ended counts whoever made it.

        A copy of an earlier manager may change nothing, but that the contract took the collateral is so.
        """
        if attempt is None:
            return self._commit_noted(change, *arguments, **options)
        done = self._noted(*self._state.commit_by(self._whose_call(), change, *arguments, **options))
        self._leases.end(attempt)
        return done

    def _noted(self, done: bool, entries: Sequence[Entry]) -> bool:
        """Have the journal say what became of a slash."""
        if entries and self._journal is not None:
            try:
                self._journal.append(entries)
            except StoreError as error:
                # It is in the store; the journal gets it with its next line, or at the next start.
                text = f"{error.message}: without it a damaged store may forget slashes"
                self.problems.report(_JOURNAL, text, remedy=error.hint)
            else:
                self.problems.clear(_JOURNAL)
        return done

    def _tell_held(self, held: Mapping[str, Any] | None) -> None:
        """Raise or clear the problem that money is held."""
        if held is None:
            self.problems.clear(HELD)
            return
        remedy = (
            "compare `shmelim debts` and `shmelim slash list` with what you know was slashed; then"
            " `shmelim slash release` lets slashes go on"
        )
        text = f"no slash is begun until a person says so: {held['why']}"
        self.problems.report(HELD, text, remedy=remedy, since_ms=held["since_ms"])

    def _debt_health(self, problems: Problems) -> dict[str, Any]:
        """Return what a health check says of debts; raise and clear what is wrong with them."""

        def look(store: Store) -> tuple[DebtFigures, dict[str, Any] | None, list[Debt]]:
            figures = store.debt_figures()
            return figures, held_money(store), store.debts() if figures.by_state.get(ATTEMPTING) else []

        try:
            figures, held, debts = self._ask(look)
        except StoreError as error:
            problems.report("debts_unreadable", f"what is owed cannot be read: {error}")
            return {"num_debts": None, "debts_by_state": None, "slashes_in_doubt": None}
        problems.clear("debts_unreadable")
        self._tell_held(held)
        if figures.oldest_ms is not None and clock.now_ms() - figures.oldest_ms > _HOUR_MS:
            problems.report(
                "debts_old",
                "what an elimination owes has not been settled for more than an hour",
                remedy="`shmelim debts` shows what is owed, and the last error of each",
                since_ms=figures.oldest_ms,
            )
        else:
            problems.clear("debts_old")
        # Those begun by a process that is not heard of any more the next tick will put in doubt, if there is one.
        unheard = (debt for debt in debts if debt.state == ATTEMPTING and not self._leases.is_live(debt))
        doubtful = [*figures.in_doubt, *(debt.hotkey for debt in unheard)]
        if doubtful:
            more = f" and {len(doubtful) - MOST_SHOWN} more" if len(doubtful) > MOST_SHOWN else ""
            problems.report(
                "slashes_in_doubt",
                f"nobody knows whether these slashes were made: {', '.join(doubtful[:MOST_SHOWN])}{more}",
                remedy="see `shmelim debts`, look at the contract, and settle them with `shmelim slash resolve`",
            )
        else:
            problems.clear("slashes_in_doubt")
        shown = figures.in_doubt[:MOST_SHOWN]
        return {"num_debts": figures.debts, "debts_by_state": figures.by_state, "slashes_in_doubt": shown}


def _check(hotkey: str, kind: str, attempt: str | None) -> None:
    check_hotkey(hotkey)
    _check_kinds([kind])
    if attempt is not None:
        _check_attempt(attempt)
        if kind != SLASH:
            raise ValueError(f"attempt goes with kind {SLASH!r}, not with {kind!r}")


def _check_rule(rule: str | None) -> None:
    if rule is None:
        return
    _check_type("rule", rule, str, "text")
    if len(rule) > _MAX_RULE or not (rule.isascii() and rule.isprintable()):
        raise ValueError(f"rule must be at most {_MAX_RULE} printable ASCII characters, not {rule!r:.100}")


def _check_cause(rule: str | None, registration: int | None) -> Cause:
    _check_rule(rule)
    _check_type("registration", registration, int | None, "a whole number or None")
    return Cause(rule, registration)


def _storable(name: str, text: str) -> str:
    """Return a text as it can be stored, and not too long."""
    _check_type(name, text, str, "text")
    short = text if len(text) <= _MAX_ERROR else f"{text[:_MAX_ERROR]} …"
    return short.encode("utf-8", "backslashreplace").decode()


def _check_kinds(owed: Iterable[str]) -> list[str]:
    """Return kinds of debts in their order, each once."""
    if isinstance(owed, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"owed must be a list of kinds of debts, not {type(owed).__name__}")
    given = list(owed)
    for kind in given:
        _check_type("the kind of a debt", kind, str, "text")
        if kind not in KINDS:
            raise ValueError(f"the kind of a debt must be one of {', '.join(KINDS)}, not {kind!r}")
    return [kind for kind in KINDS if kind in given]


def _check_attempt(attempt: str) -> None:
    _check_type("attempt", attempt, str, "text")
    if not (0 < len(attempt) <= _MAX_ATTEMPT and attempt.isascii() and attempt.isprintable()):
        raise ValueError(f"attempt must be 1 to {_MAX_ATTEMPT} printable ASCII characters")


def _check_type(name: str, value: object, wanted: Any, words: str) -> None:
    """Refuse a value of another type: a text that says "false" would count as true, and True as a number."""
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(f"{name} must be {words}, not {type(value).__name__}: {value!r:.60}")


# ---------------------------------------------------------------------- the changes


def eliminate(
    step: Step, hotkey: str, record: bytes, kinds: Sequence[str], slash: Debt, expected: int | None = None
) -> str:
    """Eliminate a hotkey that is not eliminated yet, and record what that owes; as ``ProcessingCalls.eliminate``.

    ``slash`` is the one that it owes if it owes one, and ``expected`` the number of replacements on which the
    decision rests.
    """
    if expected is not None and expected != replacements(step.store):
        return "superseded"
    known = step.store.get(hotkey)
    if known is not None and known.record is not None:
        return "already"
    step.store.put_elimination(hotkey, record)
    step.record([EventOf("add", hotkey)])
    _owe(step, kinds, slash)
    return "added"


def settle(
    step: Step,
    hotkey: str,
    kind: str,
    attempt: str | None = None,
    answer: str | None = None,
    *,
    declined: bool = False,
) -> Noted:
    """Remove a debt whose effect is made, a slash only by its own attempt; False where there is none.

    That a slash was made, or declined, is recorded with it. An answer that comes late settles a doubt, and what is
    owed again as a person took it for not made.
    """
    if kind == SLASH:
        slashes = [] if attempt is None else _slashes_of(step, hotkey, Cause())
        debt = next((debt for debt in slashes if debt.attempt == attempt), None)
    else:
        debt = _find(step, hotkey, kind, attempt, Cause())
    if debt is None:
        return _NOTHING
    step.store.remove_debt(debt)
    outcome, entries = "", []
    if kind == SLASH:
        if declined:
            _forget_begun(step, debt.attempt or "")
        outcome = ", declined" if declined else ""
        entries = [_put_on_record(step, debt, BY_CONTRACT, DECLINED if declined else MADE, answer)]
    failures = f", after {debt.attempts} failures" if debt.attempts else ""
    answered = "" if answer is None else f"; the contract answered {answer}"
    step.record([EventOf("settle", hotkey, note=f"{_named(debt)}{outcome}{failures}{answered}")])
    return True, entries


def fail(
    step: Step,
    hotkey: str,
    kind: str,
    error: str,
    attempt: str | None = None,
    cause: Cause = Cause(),  # noqa: B008 - it cannot be changed
    *,
    in_doubt: bool = False,
) -> Noted:
    """Note that a debt could not be settled; False where there is none, or another attempt stands.

    A slash that was attempted is owed again, or is ``in_doubt`` where nobody knows whether it was made.
    """
    debt = _find(step, hotkey, kind, attempt, cause)
    if debt is None:
        return _NOTHING
    if in_doubt and debt.state == IN_DOUBT:
        step.store.put_debt(debt._replace(error=error))  # what the attempt itself says, though it comes late
        return _NOTHING
    debt = debt._replace(attempts=debt.attempts + 1, error=error)
    if in_doubt:
        step.store.put_debt(debt._replace(state=IN_DOUBT, in_doubt_since_ms=clock.now_ms()))
        step.record([EventOf("doubt", hotkey, note=f"{_named(debt)}: {error}")])
        return True, []
    if attempt is not None:
        _forget_begun(step, attempt)
    if _is_told(debt.attempts):
        step.record([EventOf("fail", hotkey, note=f"{_named(debt)}: {error} (failure {debt.attempts})")])
    _owe_again(step, debt)
    return True, [] if attempt is None else [unmade(debt)]


def doubt(step: Step, hotkey: str, attempt: str, error: str, leases: Leases) -> Noted:
    """Put a slash in doubt whose attempt was not heard of for a lease; False where it lives, or is not there."""
    debt = _find(step, hotkey, SLASH, attempt, Cause())
    if debt is None or debt.state == IN_DOUBT or leases.is_live(debt):
        return _NOTHING
    return fail(step, hotkey, SLASH, error, attempt, Cause(), in_doubt=True)


def begin_slash(step: Step, hotkey: str, attempt: str, cause: Cause, now_ms: int, most_per_hour: float) -> Noted:
    """Make an owed slash the one that this attempt makes; False where it is not owed, or another's, or is held.

    May be repeated while the attempt stands. An attempt that failed never comes back, so that a request which is
    overtaken by its repetition begins nothing. One too many within an hour holds all that are not released.
    """
    slashes = _slashes_of(step, hotkey, cause)
    if mine := [debt for debt in slashes if debt.attempt == attempt]:
        return mine[0].state == ATTEMPTING, [begun(mine[0])]
    debt = next((debt for debt in slashes if debt.state == OWED and debt.due), None)
    if debt is None or held_money(step.store) is not None:
        return _NOTHING
    counted: dict[str, int] = step.store.meta(_BEGUN) or {}
    # In the order in which they were begun. A clock that is wrong for a moment must not open the way for more:
    # what came after a recent one is recent, and some are remembered however long ago they seem.
    old = itertools.takewhile(lambda ms: now_ms - ms >= _HOUR_MS, counted.values())
    recent = len(counted) - sum(1 for _ in old)
    if _key(debt) not in step.store.meta(_RELEASED, []) and recent >= most_per_hour:
        hold_money(step, f"{recent} slashes within an hour, and more are owed: at most {most_per_hour:g} may be")
        return _NOTHING
    last = list(counted.items())[-max(recent, _REMEMBERED) :]
    step.set_meta(_BEGUN, dict(last) | {attempt: now_ms})
    debt = debt._replace(state=ATTEMPTING, attempt=attempt)
    step.store.put_debt(debt)
    if _is_told(debt.attempts + 1):
        step.record([EventOf("begin", hotkey, note=_named(debt))])
    return True, [begun(debt)]


def held_money(store: Store) -> dict[str, Any] | None:
    """Return since when no slash is begun, and why; None where slashes go on."""
    held: dict[str, Any] | None = store.meta(HELD)
    return held


def hold_money(step: Step, why: str) -> None:
    """Let no slash be begun until a person releases them; what held them first stays the reason."""
    if held_money(step.store) is None:
        step.set_meta(HELD, {"since_ms": clock.now_ms(), "why": why})
        step.record([EventOf("hold", note=f"no slash is begun until a person says so: {why}")])


def release_money(step: Step) -> bool:
    """Let slashes go on, those that are due now however many they are; False where they were not held.

    Later ones count anew.
    """
    if held_money(step.store) is None:
        return False
    step.set_meta(HELD, None)
    due = [debt for debt in step.store.debts() if debt.kind == SLASH and debt.state == OWED and debt.due]
    step.set_meta(_RELEASED, [_key(debt) for debt in due])
    step.set_meta(_BEGUN, {})
    step.record([EventOf("release", note="slashes go on")])
    return True


def resolve_slash(step: Step, hotkey: str, cause: Cause, leases: Leases, *, made: bool) -> Noted:
    """Settle by hand a slash that was begun, or make it owed again; False where there is none.

    Not one whose attempt lives: how that ends is not known yet. ValueError: more than one was begun.
    """
    standing = [
        debt for debt in _slashes_of(step, hotkey, cause) if debt.state != OWED and debt.attempt is not None
    ]
    if len(standing) > 1:
        listed = "; ".join(f"rule {debt.rule!r}, registration {debt.registration}" for debt in standing)
        raise ValueError(
            f"{hotkey} has {len(standing)} slashes that were begun: say which, by its rule ({listed})"
        )
    if not standing:
        return _NOTHING
    (debt,) = standing
    if leases.is_live(debt):
        return _NOTHING
    step.record([EventOf("resolve", hotkey, note=f"{_named(debt)}: {'made' if made else 'not made'}")])
    if made:
        step.store.remove_debt(debt)
        return True, [_put_on_record(step, debt, BY_HAND, MADE)]
    _forget_begun(step, debt.attempt or "")
    _owe_again(step, debt)
    return True, [unmade(debt)]


def rearm_slash(step: Step, hotkey: str, cause: Cause) -> bool:
    """Forget what was made or declined for a cause, so that the next elimination for it owes a slash again."""
    found = [slash for slash in step.store.slashes(hotkey) if cause.fits(slash)]
    for slash in found:
        step.store.remove_slash(slash)
        note = f"{named_cause(slash)}: may be slashed for it once more; {slash.outcome} by {slash.by}"
        step.record([EventOf("rearm", hotkey, note=note)])
    return bool(found)


def _owe(step: Step, kinds: Sequence[str], slash: Debt) -> None:
    hotkey, ordinal = slash.hotkey, step.store.next_debt_ordinal()
    known = step.store.debts(hotkey)
    owed = []
    for kind in kinds:
        if kind == SLASH:
            owed.append(_owe_slash(step, slash._replace(ordinal=ordinal), known))
            continue
        step.store.put_debt(
            slash._replace(kind=kind, rule=ANY_RULE, ordinal=ordinal, reason=None, share=None, share_asked=False)
        )  # of one that rests this is the same
        owed.append(kind)
    if owed:
        step.record([EventOf("owe", hotkey, note=", ".join(owed))])


def _owe_slash(step: Step, new: Debt, known: Sequence[Debt]) -> str:
    """Have a slash owed, if its cause owes none yet and none was made for it; return what became of it."""
    new = new._replace(registration=step.store.registration(new.hotkey))

    same = registrations(step, new.hotkey)

    def is_same(other: Debt | Slash) -> bool:
        return other.rule in (new.rule, ANY_RULE) and other.registration in same

    on_record = next(filter(is_same, step.store.slashes(new.hotkey)), None)
    slashes = [debt for debt in known if debt.kind == SLASH and is_same(debt)]
    standing = next((debt for debt in slashes if debt.state != OWED), next(iter(slashes), None))
    if standing is not None and (on_record is None or standing.state != OWED):
        # It rested, or was begun: never a second one. Its reason and share are those of the first moment.
        step.store.put_debt(standing._replace(ordinal=new.ordinal, due=True, eliminated_ms=new.eliminated_ms))
        return SLASH if standing.state == OWED else f"{SLASH} (begun before, {standing.state})"
    if on_record is not None:
        # The elimination that owed it was taken back; the money was not.
        return f"{SLASH} ({on_record.outcome} before)"
    step.store.put_debt(new)
    return _terms(new)


def _terms(debt: Debt) -> str:
    """Return for what, and how much, as it was when the slash became owed; as far as the server was told."""
    if not debt.share_asked:
        return named_cause(debt)
    share = "the contract's share" if debt.share is None else f"share {debt.share:g}"
    return f"{named_cause(debt)} for {debt.reason}: {share}"


def _put_on_record(step: Step, debt: Debt, by: str, outcome: str, answer: str | None = None) -> Entry:
    terms = debt.reason, debt.share, answer
    cause = debt.hotkey, debt.rule, debt.registration
    slash = Slash(*cause, clock.now_ms(), debt.eliminated_ms, by, outcome, *terms)
    step.store.put_slash(slash)
    released = step.store.meta(_RELEASED, [])
    if _key(debt) in released:
        step.set_meta(_RELEASED, [key for key in released if key != _key(debt)])
    return entry_of(outcome, slash, slash.made_ms, attempt=debt.attempt, by=by, answer=answer)


def _owe_again(step: Step, debt: Debt) -> None:
    step.store.put_debt(debt._replace(state=OWED, in_doubt_since_ms=None))
    if debt.kind == SLASH:  # of which the journal may have told that another attempt was made
        owe_once(step, debt)


def _key(debt: Debt) -> list[Any]:
    return [debt.hotkey, debt.rule, debt.registration]


def _forget_begun(step: Step, attempt: str) -> None:
    """Count an attempt no more that certainly took nothing."""
    counted: dict[str, int] = step.store.meta(_BEGUN) or {}
    if attempt in counted:
        step.set_meta(_BEGUN, {token: ms for token, ms in counted.items() if token != attempt})


def _find(step: Step, hotkey: str, kind: str, attempt: str | None, cause: Cause) -> Debt | None:
    """Return a debt that is owed, or the one that this attempt is about."""
    for debt in step.store.debts(hotkey):
        if debt.kind == kind and cause.fits(debt):
            if attempt is None and debt.state == OWED and debt.due:
                return debt
            if attempt is not None and debt.state != OWED and debt.attempt == attempt:
                return debt
    return None


def _slashes_of(step: Step, hotkey: str, cause: Cause) -> list[Debt]:
    return [debt for debt in step.store.debts(hotkey) if debt.kind == SLASH and cause.fits(debt)]


def _named(debt: Debt) -> str:
    if debt.kind != SLASH:
        return debt.kind
    return f"{named_cause(debt)}{'' if debt.state == OWED else f', attempt {debt.attempt}'}"


def named_cause(debt: Debt | Slash) -> str:
    """Return a slash and its cause in words, for the history."""
    again = f"registration {debt.registration}" if debt.registration else ""
    cause = ", ".join(filter(None, (debt.rule, again)))
    return f"{SLASH} ({cause})" if cause else SLASH


def _is_told(number: int) -> bool:
    """Tell whether this failure of a debt is written into the history."""
    return number & (number - 1) == 0
