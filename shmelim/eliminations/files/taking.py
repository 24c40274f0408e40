"""Taking over the JSON files that a person put there: what they say, against what the store knows by now.

An edit changes only what it changed against the version that it was made from, by the hashes that we kept of that.
Where the store has another row by now, the store's stands: it was acknowledged. What is not applied, or cannot be
read, is moved aside and is a named problem until somebody takes it away.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

from shmelim.eliminations.files.format import (
    DEPARTED_FILE,
    ELIMINATIONS_FILE,
    BadRow,
    Content,
    File,
    departed_row,
    departures_in,
    elimination_row,
    eliminations_in,
    hash_of,
    hashes_in,
    quarantine,
    read_file,
)
from shmelim.eliminations.files.meaning import Meaning, Owner, Taken, decide
from shmelim.eliminations.files.sidecar import Sidecars, read_sidecars
from shmelim.eliminations.record import is_hotkey
from shmelim.eliminations.state.changes import Judge, Step, no_judge, record_departures, replace_all
from shmelim.eliminations.store.history import Change as EventOf
from shmelim.eliminations.store.store import Store
from shmelim.errors import DamagedFileError, GuardedChangeError
from shmelim.system.durable import kept_of, move_aside, write_aside, writing
from shmelim.system.problems import Problems
from shmelim.system.text import get_logger

T = TypeVar("T")

NAMES: Final = (ELIMINATIONS_FILE, DEPARTED_FILE)

Read: TypeAlias = tuple[list[bytes], dict[str, int]]
"""The records and the departures that the two files say."""

# A file that says nothing which the store does not know.
KNOWN: Final = (Meaning.TAKEN, Meaning.CURRENT, Meaning.OLDER)

_DAMAGED: Final = "file_damaged"
_NOT_APPLIED: Final = "file_not_applied"
_EARLIER_SERVER: Final = "was set aside by an earlier server"
_TAKEN: Final = "taken:"
_EARLIER: Final = "digests:"  # what earlier versions wrote and took over, where there is no sidecar

_log = get_logger("shmelim.files")


def take_files(step: Step, directory: Path, problems: Problems, *, fresh: bool, judge: Judge = no_judge) -> None:
    """Take over what somebody put into a state directory; into a `fresh` store whatever stands there.

    A file that cannot be read or believed is moved aside. Where it is all there is, DamagedFileError: nothing is
    touched.
    """
    for name in NAMES:
        path = directory / name
        sidecars = read_sidecars(path)
        try:
            file = read_file(path)
            meaning = meaning_of(step.store, name, None if file is None else file.digest, sidecars, fresh=fresh)
            if file is None or meaning in KNOWN:
                continue
            if meaning in (Meaning.STATE, Meaning.EDIT):
                with step.store.savepoint():
                    _take(step, file, sidecars, problems, fresh=fresh, judge=judge)
                continue
            if _says_the_same(step.store, file):  # as in a copy of the directory without the hidden files
                _mark_taken(step, file, sidecars)
                continue
            _parse(file)  # a damaged one is damaged, whoever put it there
        except GuardedChangeError as error:
            step.record([set_aside(path, f"{name} is not applied: {error.message}", problems)])
        except DamagedFileError as error:
            if fresh:
                raise DamagedFileError(
                    f"{error.message}, and there is no other record of the state",
                    hint="repair the file, or move it away to start empty",
                ) from None
            step.record([_set_damaged_aside(path, error, problems)])
        else:
            step.record([set_aside(path, f"{name} is not applied: {meaning.value}", problems)])


def meaning_of(store: Store, name: str, digest: str | None, sidecars: Sidecars, *, fresh: bool = False) -> Meaning:
    """Say what a file means beside a store."""
    latest = store.meta(_TAKEN + name)
    taken = [Taken(digest, None) for digest in store.meta(_EARLIER + name, [])]
    if latest is not None:
        taken = [Taken(*latest)]
    return decide(digest, sidecars, Owner(store.store_id or b"", store.commit_number, fresh), taken)


def take_for_known(step: Step, directory: Path, problems: Problems) -> None:
    """Have what stands in the files known as no newer than the store, whose state comes from elsewhere.

    Of what we did not write, and what says something else than the store, a copy is kept: somebody's work.
    """
    for path in (directory / name for name in NAMES):
        with suppress(DamagedFileError):
            if (file := read_file(path)) is not None:
                sidecars = read_sidecars(path)
                if not (sidecars.of(file.digest) or _says_the_same(step.store, file)):
                    text = f"{path.name} was put there by somebody else, and the state came from elsewhere"
                    step.record([_keep_copy(file, text, problems)])
                _mark_taken(step, file, sidecars)


def _says_the_same(store: Store, file: File) -> bool:
    try:
        found = _parse(file)
    except DamagedFileError:
        return False
    stored = dict(store.eliminated() if file.path.name == ELIMINATIONS_FILE else store.departed())
    return not found.bad and found.taken == stored


def _mark_taken(step: Step, file: File, sidecars: Sidecars) -> None:
    before = None if sidecars.written is None else sidecars.written.commit_number
    step.set_meta(_TAKEN + file.path.name, Taken(file.digest, before))


def set_aside(path: Path, text: str, problems: Problems) -> EventOf:
    """Move a file aside that is not applied, name that as a problem, and return the event that says so."""
    return _kept(path, move_aside(path, "edited"), text, problems)


def _keep_copy(file: File, text: str, problems: Problems) -> EventOf:
    """Do the same with a copy: a death before the commit must leave the file where it is."""
    with writing(f"a copy of {file.path} could not be kept", hint="make its directory writable for this user"):
        aside = write_aside(file.path, "edited", file.data, ".json")
    return _kept(file.path, aside, text, problems)


def _kept(path: Path, aside: Path, text: str, problems: Problems) -> EventOf:
    _report_kept(path, aside, text, problems)
    return EventOf("edited", note=f"{text}; kept as {aside.name}")


def _report_kept(path: Path, aside: Path, text: str, problems: Problems) -> None:
    apply = f"the next start with `--import {aside}` adds what it has"
    if path.name == ELIMINATIONS_FILE:
        apply += f"; `shmelim sync {aside}` makes the state just that, and takes back what was added since"
    else:
        apply += "; `shmelim returned` undoes a departure"
    problems.report(
        _NOT_APPLIED,
        f"{text}; it is now {aside}",
        subject=str(aside),
        remedy=f"{apply}. Then, or if nobody needs it, take it away. To edit the files, stop the server first",
    )


def name_kept(directory: Path, problems: Problems) -> None:
    """Name the problems of files that earlier servers set aside and nobody has taken away."""
    for path in (directory / name for name in NAMES):
        for aside in kept_of(path, "edited"):
            _report_kept(path, aside, f"{path.name} {_EARLIER_SERVER}", problems)
        for aside in kept_of(path, "damaged"):
            _report_damaged(aside, f"{path.name} was damaged, and {_EARLIER_SERVER}", problems)


def clear_gone(problems: Problems) -> None:
    """Clear the problems of files that were set aside and that somebody took away."""
    for problem in problems.standing():
        if problem.name in (_DAMAGED, _NOT_APPLIED) and _is_gone(Path(problem.subject)):
            problems.clear(problem.name, problem.subject)


def _is_gone(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False  # nobody can see whether it is
    return False


def read_state(step: Step, directory: Path) -> Read:
    """Make what stands in the files the eliminations, and record the departures in them; returns what they say."""
    eliminated: list[bytes] = []
    departed: dict[str, int] = {}
    file = read_file(directory / ELIMINATIONS_FILE)
    if file is not None:
        listed = eliminations_in(file)
        replace_all(step, news_of(step.store, listed), f"file {file.path.name}", _named_in(listed.bad))
        quarantine(file.path, listed.bad)
        eliminated = [record for _, record in step.store.eliminated()]
    file = read_file(directory / DEPARTED_FILE)
    if file is not None:
        found = departures_in(file)
        record_departures(step, found.taken, f"file {file.path.name}")
        quarantine(file.path, found.bad)
        departed = found.taken
    return eliminated, departed


def _set_damaged_aside(path: Path, error: DamagedFileError, problems: Problems) -> EventOf:
    aside = move_aside(path)
    _report_damaged(aside, error.message, problems)
    return EventOf("damaged", note=f"{path.name} was damaged: moved aside to {aside.name}")


def _report_damaged(aside: Path, text: str, problems: Problems) -> None:
    problems.report(
        _DAMAGED,
        f"{text}; it is now {aside}, and the state comes from the store",
        subject=str(aside),
        remedy="look at it, and take it away",
    )


def _parse(file: File) -> Any:
    return eliminations_in(file) if file.path.name == ELIMINATIONS_FILE else departures_in(file)


def _take(step: Step, file: File, sidecars: Sidecars, problems: Problems, *, fresh: bool, judge: Judge) -> None:
    """Apply a file; what contradicts the store is not, and the file is kept for whoever made it."""
    name = file.path.name
    base = {} if fresh or sidecars.base is None else hashes_in(sidecars.base.rows)
    found = _parse(file)
    edit = _Edit(news_of(step.store, found), _named_in(found.bad), base)
    if name == ELIMINATIONS_FILE:
        overtaken = _apply_eliminations(step, name, edit, judge)
    else:
        overtaken = _apply_departures(step, name, edit)
    quarantine(file.path, found.bad)
    _log.info("%s was not written by this server: taken over", file.path)
    step.record([EventOf("import", note=f"{name} was put there by somebody else: taken over")])
    _mark_taken(step, file, sidecars)
    if overtaken:
        how = "were changed since" if name == ELIMINATIONS_FILE else "departed"
        text = f"the edit of {name} is applied, but for {len(overtaken)} hotkeys that {how}"
        step.record([_keep_copy(file, f"{text} ({', '.join(overtaken[:3])}, …)", problems)])


def news_of(store: Store, content: Content[T]) -> dict[str, T]:
    """Return what is taken of a file: of a row that could not be taken whole, nothing if its hotkey is known."""
    known = {hotkey for hotkey, row in store.get_many(content.salvaged).items() if row.record is not None}
    return {hotkey: taken for hotkey, taken in content.taken.items() if hotkey not in known}


class _Edit(NamedTuple):
    """What a file says: what is taken, whose rows could not be, and the hashes of what it was made from."""

    taken: dict[str, Any]
    unsure: list[str]
    base: dict[bytes, bytes]


def _apply_eliminations(step: Step, name: str, edit: _Edit, judge: Judge) -> list[str]:
    """Apply what was changed by hand; returns the hotkeys of which the store's row is a later one."""
    stored = dict(step.store.eliminated())
    put: dict[str, bytes] = {}
    overtaken = []
    for hotkey, record in edit.taken.items():
        before = edit.base.get(hash_of(hotkey))
        if _row_hash(record) == before or record == stored.get(hotkey):
            continue
        if _row_hash(stored.get(hotkey)) == before:
            put[hotkey] = record
        else:
            overtaken.append(hotkey)
    missing = edit.base.keys() - {hash_of(hotkey) for hotkey in (*edit.taken, *edit.unsure)}
    gone = {hotkey for hotkey in stored if hash_of(hotkey) in missing}
    changed_since = [hotkey for hotkey in gone if _row_hash(stored[hotkey]) != edit.base[hash_of(hotkey)]]
    gone.difference_update(changed_since)
    if put or gone:
        kept = [hotkey for hotkey in stored if hotkey not in gone]
        replace_all(step, put, f"file {name}", kept, judge)
    return overtaken + changed_since


def _apply_departures(step: Step, name: str, edit: _Edit) -> list[str]:
    """Record the departures that were added by hand; returns the hotkeys that it takes back or dates anew.

    A departure is for ever, with the time at which it was seen; a time of 0 says nothing against another.
    """
    rows = {hotkey: hash_of(departed_row(ms)) for hotkey, ms in edit.taken.items()}
    changed = {hotkey: edit.taken[hotkey] for hotkey in rows if edit.base.get(hash_of(hotkey)) != rows[hotkey]}
    new = {hotkey: ms for hotkey, ms in changed.items() if hash_of(hotkey) not in edit.base}
    record_departures(step, new, f"file {name}")
    stored = dict(step.store.departed())
    dated = [hotkey for hotkey, ms in changed.items() if ms not in (0, stored.get(hotkey))]
    missing = edit.base.keys() - {hash_of(hotkey) for hotkey in (*edit.taken, *edit.unsure)}
    return dated + [hotkey for hotkey in stored if hash_of(hotkey) in missing]


def _row_hash(record: bytes | None) -> bytes | None:
    return None if record is None else hash_of(elimination_row(record)[1])


def _named_in(bad: Iterable[BadRow]) -> list[str]:
    """Return the hotkeys of rows that cannot be taken: such a row says nothing against what is known of them."""
    return [row.row["hotkey"] for row in bad if isinstance(row.row, dict) and is_hotkey(row.row.get("hotkey"))]
