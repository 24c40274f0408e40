"""A start: finding what there is under a name and in its directory, deciding, and carrying that out.

The caller holds the lock on the state directory, and the namespace's. Until a plan is carried out nothing is
touched, so that a refused start can be made again. What is carried out may end at any line: the next start finds
what the last step left, which is what there was before or what there is after it.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

from shmelim.eliminations.files.format import ELIMINATIONS_FILE
from shmelim.eliminations.files.taking import NAMES, name_kept, take_files
from shmelim.eliminations.rows import ORIGIN_KEY, row_entry
from shmelim.eliminations.starting import recovery, replacement
from shmelim.eliminations.starting.deciding import Action, Facts, Plan, Relation, StoreIs, decide
from shmelim.eliminations.starting.imports import import_departed
from shmelim.eliminations.starting.recovery import Published
from shmelim.eliminations.starting.registry import Memory
from shmelim.eliminations.state.changes import Judge, Step, no_judge
from shmelim.eliminations.state.debt_book import hold_money
from shmelim.eliminations.store.history import Change as EventOf
from shmelim.eliminations.store.opening import LOG_SUFFIXES, need_readable
from shmelim.eliminations.store.schema import FILE_NAME, RESTORE_HINT, Durability
from shmelim.eliminations.store.store import Store
from shmelim.errors import DamagedFileError, DamagedStoreError, FollowerError, StateConflictError, StoreError
from shmelim.shm import Namespace, TableReader, TableWriter
from shmelim.system import clock
from shmelim.system.problems import Problems
from shmelim.system.text import get_logger

# What goes without saying: the log has it, the history not.
_ORDINARY: Final = frozenset({Action.BEGIN, Action.TAKE_FILES, Action.CONTINUE, Action.ADOPT})

_log = get_logger("shmelim.recovery")


class Choices(NamedTuple):
    """What a start was told."""

    durability: Durability = "power"
    use_files: bool = True
    default_departed: Path | None = None  # used where nobody has departed yet
    adopt_published: bool = False
    replace_published: bool = False
    must_exist: bool = False
    judge: Judge = no_judge  # of what an edited file changes


def begin(
    directory: Path | None,
    namespace: Namespace,
    memory: Memory | None,
    choices: Choices,
    problems: Problems,
    *,
    has_registry: bool,
) -> Store:
    """Return the store to serve from; None as directory stands for one in memory.

    `memory` is what the registry remembers of the name; `problems` gets what is wrong with a JSON file.
    StateConflictError, DamagedStoreError or StoreError where the start is refused, and nothing was touched;
    DamagedFileError if a file is damaged which is the only record of the state; StoreError if something cannot be
    read or written.
    """
    if directory is not None:
        name_kept(directory, problems)
    store, damage = _open(directory, choices.durability)
    found = _Found(directory, namespace, store, damage, recovery.look(namespace), memory, has_registry, problems)
    try:
        _need_no_follower(found, choices)
        facts = found.facts(choices)
        plan = decide(facts)
        _need_accepted(found, plan)
        if plan.action is Action.BEGIN:
            _need_nothing_behind_links(found)
        level = _log.warning if plan.hold or plan.action not in _ORDINARY else _log.info
        level("%r begins with %s (%s)", namespace.name, plan.action.value, facts)
        if found.damage is not None:
            return _rebuild(found, facts, plan, choices)
        made = store is None
        if store is None:
            store = Store.in_memory() if directory is None else Store.open(directory, choices.durability)
        try:
            with store.transaction():
                _fill(Step(store, None), found, facts, plan, choices)
        except BaseException:
            store.close()
            if made and directory is not None:
                # The next start must not take an empty store for the state.
                for suffix in ("", *LOG_SUFFIXES):
                    (directory / (FILE_NAME + suffix)).unlink(missing_ok=True)
            raise
    except BaseException:
        if store is not None:
            store.close()
        raise
    return store


def adopt(store: Store, table: TableWriter, namespace: Namespace, origin_record: bytes) -> bool:
    """Take the published table over where it lies, and publish in it what the store says otherwise.

    False, and nothing happened, where it is not whole, or of another store. About 3 µs a row.
    """
    if not table.adopt():
        return False
    table.branch = store.branch  # before the commit: of an earlier one it says nothing wrong
    reader = TableReader(namespace)
    find = reader._entry  # noqa: SLF001  # get(), without its tuple
    changed, known = [], 0
    for row in chain([(ORIGIN_KEY, 0, origin_record, 0)], map(row_entry, store.rows_as_checked())):
        key, flags, record, ordinal = row
        found = find(key)
        known += found is not None
        if found != (flags, ordinal, record):
            changed.append(row)
    unknown: set[bytes] = set()
    if known < table.entries:
        unknown = reader.snapshot().entries.keys() - {ORIGIN_KEY, *(row.hotkey.encode() for row in store.rows())}
    if changed or unknown:
        with table.transaction() as transaction:
            for row in changed:
                transaction.put(*row)
            for key in unknown:
                transaction.remove(key)
            transaction.commit = store.commit_number
    table.commit = store.commit_number
    return True


def _need_nothing_behind_links(found: _Found) -> None:
    """Raise DamagedFileError where a state would begin empty beside a link to a file that is not mounted yet."""
    for path in [] if found.directory is None else [found.directory / name for name in NAMES]:
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not target.parent.is_dir():
            raise DamagedFileError(
                f"{path} is a link to {target}, and there is no directory {target.parent}",
                hint="mount what it is on; or remove the link, to start empty",
            )


# ---------------------------------------------------------------------- finding


class _Found(NamedTuple):
    """What there is."""

    directory: Path | None
    namespace: Namespace
    store: Store | None
    damage: DamagedStoreError | None
    published: Published | None
    memory: Memory | None
    has_registry: bool
    problems: Problems

    @property
    def here(self) -> str | None:
        """The state directory, as others name it."""
        return None if self.directory is None else str(self.directory.resolve())

    def facts(self, choices: Choices) -> Facts:
        """Return what of it a decision needs."""
        directory, store = self.directory, self.store
        kind = StoreIs.DAMAGED if self.damage else StoreIs.MISSING if store is None else StoreIs.WHOLE
        return Facts(
            kind,
            _published_relation(self),
            _remembered_relation(self),
            # Without files they count all the same where nothing else is known: later they would be too old.
            files=(choices.use_files or kind is StoreIs.MISSING)
            and directory is not None
            and (directory / ELIMINATIONS_FILE).exists(),
            slashes=store is not None and store.knows_slashes(),
            adopt_published=choices.adopt_published,
            replace_published=choices.replace_published,
            must_exist=choices.must_exist,
        )

    @property
    def acknowledged(self) -> int:
        """The highest commit that anybody knows of."""
        table = 0 if self.published is None or self.published.identity is None else self.published.identity.commit
        return max(table, 0 if self.memory is None else self.memory.commit)


def _open(directory: Path | None, durability: Durability) -> tuple[Store | None, DamagedStoreError | None]:
    """Return the store that is there, read through, or what is wrong with it; neither where there is none."""
    if directory is None:
        return None, None
    if (path := directory / FILE_NAME).is_symlink() and not path.exists():
        raise StoreError(
            f"{path} is a link to {os.path.realpath(path)}, which is not there",
            hint="mount what it is on; or remove the link, to start without that store",
        )
    finished = replacement.is_finished(directory)
    try:
        if finished and not (directory / FILE_NAME).exists():
            # Only its name is missing.
            replacement.put_in_place(directory)
        replacement.need_finished_recovery(directory)
        store = recovery.open_whole(directory, durability) if (directory / FILE_NAME).exists() else None
    except DamagedStoreError as error:
        # What takes the place of a store knows neither debts nor history: not for a disk that fails for a while.
        need_readable(directory / FILE_NAME)
        if not finished:
            return None, error
        replacement.put_in_place(directory)
        store = recovery.open_whole(directory, durability)
    try:
        replacement.discard(directory)
    except BaseException:
        if store is not None:
            store.close()
        raise
    return store, None


def _remembered_relation(found: _Found) -> Relation | None:
    memory = found.memory
    if memory is None:
        return Relation.NOTHING if found.has_registry else None
    own = found.damage is not None and memory.directory == found.here
    relation = _relation(found.store, bytes.fromhex(memory.store_id), memory.commit, memory.branch, own=own)
    # Nothing is lost by forgetting a store in which nothing was.
    worthless = relation is Relation.OTHER and not (memory.eliminated or memory.departed)
    return Relation.NOTHING if worthless else relation


def _published_relation(found: _Found) -> Relation:
    published = found.published
    if published is None:
        return Relation.NOTHING
    if published.identity is None:
        return Relation.UNREADABLE
    identity = published.identity
    if published.source:
        return Relation.OTHER  # which has no debts, no history, and other numbers
    own = found.damage is not None and published.state_dir == found.here
    relation = _relation(found.store, identity.store_id, identity.commit, identity.branch, own=own)
    # What a server in memory leaves ended with it, and another one may take its place.
    of_memory = published.state_dir is None and found.here is None
    worthless = relation is Relation.OTHER and (of_memory or not published.entries)
    return Relation.NOTHING if worthless else relation


def _relation(store: Store | None, store_id: bytes, commit: int, branch: int, *, own: bool) -> Relation:
    """Return how somebody's word of a store stands to this one; ``own``: it is this directory's, and damaged."""
    if own:
        return Relation.HERE
    if store is None or store.store_id != store_id:
        return Relation.OTHER
    if not store.has_made(commit, branch):
        return Relation.AHEAD
    return Relation.LATEST if commit == store.commit_number else Relation.BEHIND


# ---------------------------------------------------------------------- refusing


def _need_no_follower(found: _Found, choices: Choices) -> None:
    """Refuse the name of a table that follows another host's: a server in its place could slash twice."""
    source = "" if found.published is None else found.published.source
    if source and not choices.replace_published:
        raise FollowerError(
            f"the table {found.namespace.name!r} follows {source!r}, and has neither debts nor history",
            hint="stop the server there, restore its backup here, and say --replace-published"
            " (replace_published=True); or serve under another --name",
        )


def _need_accepted(found: _Found, plan: Plan) -> None:
    """Raise what a refusal has to say."""
    if plan.action is Action.REFUSE_MISSING:
        where = "a server in memory" if found.directory is None else str(found.directory)
        raise StoreError(
            f"{where} has no store, and must_exist refuses to make one",
            hint="is the right file system mounted? To make a new store, leave must_exist (--must-exist) out",
        )
    if plan.action is Action.REFUSE_DAMAGED and found.damage is not None:
        raise DamagedStoreError(
            f"{found.damage.message}, and there is no other record of the state",
            hint=f"{RESTORE_HINT}; or move every {FILE_NAME}* out of the directory to start empty",
        ) from found.damage
    if plan.action is not Action.REFUSE_CONFLICT:
        return
    published, memory = found.published, found.memory
    sides = [_own_side(found)]
    others = set()
    if published is not None:
        sides.append(_table_side(published))
        others.add(published.state_dir)
    if memory is not None:
        sides.append(_memory_side(memory))
        others.add(memory.directory)
    places = sorted(place for place in others if place not in (None, found.here))
    ways = [f"name the directory of that state, {' or '.join(places)}" if places else "restore its latest backup"]
    if plan.can_adopt:
        ways.append("say --adopt-published (adopt_published=True): the published table is the truth")
    ways.append("say --replace-published (replace_published=True): this directory is the truth")
    raise StateConflictError(
        f"what is known under the name {found.namespace.name!r} is not the state of this directory, or is later:"
        f" {'; '.join(sides)}",
        hint="; or ".join(ways),
    )


def _own_side(found: _Found) -> str:
    store, damage, directory = found.store, found.damage, found.directory or "memory"
    if damage is not None:
        return damage.message
    if store is None:
        return f"there is no store in {directory}"
    events = store.events(limit=1)
    last = _ago(clock.now_ms() - events[0].at_ms) if events else "never"
    counts = store.counts()
    return (
        f"the store in {directory} has {counts.eliminated} eliminated, {counts.departed} departed,"
        f" commit {store.commit_number}, last changed {last}"
    )


def _table_side(published: Published) -> str:
    if published.identity is None:
        return f"what is published cannot be read: {published.problem}"
    age = published.identity.heartbeat_age
    served = "nobody knows when" if age is None else _ago(int(age * 1000))
    return (
        f"the published table has {published.eliminated} eliminated, {published.departed} departed,"
        f" commit {published.identity.commit}, from {published.state_dir or 'memory'},"
        f" last served {served}"
    )


def _memory_side(memory: Memory) -> str:
    seen = datetime.fromtimestamp(memory.at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    return (
        f"the registry remembers {memory.eliminated} eliminated, {memory.departed} departed,"
        f" commit {memory.commit}, in {memory.directory}, at {seen} UTC"
    )


def _ago(ms: int) -> str:
    for unit, length in (("days", 86_400_000), ("h", 3_600_000), ("min", 60_000)):
        if ms >= 2 * length:
            return f"{ms / length:.1f} {unit} ago"
    return f"{max(0, ms) / 1000:.0f} s ago"


# ---------------------------------------------------------------------- carrying out


def _fill(step: Step, found: _Found, facts: Facts, plan: Plan, choices: Choices) -> None:
    """Make a store say what the plan wants, in one transaction."""
    if plan.action is Action.FROM_TABLE:
        assert found.published is not None
        recovery.say_what_is_published(step, found.namespace, found.published, found.directory, found.problems)
    # A start may have died between making a store and this. Asked before the store has a mark of this one.
    fresh = not any(step.store.counts()) and not step.store.meta_items()
    _mark(step, found, facts, plan)
    if found.directory is not None and (choices.use_files or fresh):
        take_files(step, found.directory, found.problems, fresh=fresh, judge=choices.judge)
    if choices.default_departed is not None and not step.store.counts().departed:
        import_departed(step, choices.default_departed, "default departed file")


def _rebuild(found: _Found, facts: Facts, plan: Plan, choices: Choices) -> Store:
    """Put a whole store in the place of the damaged one, and open it."""
    directory, published, memory, damage = found.directory, found.published, found.memory, found.damage
    assert directory is not None
    assert damage is not None

    def fill(step: Step) -> None:
        if plan.action is Action.REBUILD_FROM_TABLE:
            assert published is not None
            step.record([EventOf("recover", note="the store was damaged: restored from shared memory")])
            recovery.say_what_is_published(step, found.namespace, published, directory, found.problems)
        else:
            step.record([EventOf("recover", note="the store was damaged: restored from the JSON files")])
            recovery.say_what_files_say(step, directory)
            own = memory is not None and memory.directory == found.here
            step.store.go_on_from(found.acknowledged, bytes.fromhex(memory.store_id) if memory and own else None)
        _mark(step, found, facts, plan)

    replacement.build(directory, fill)
    aside = replacement.put_in_place(directory)
    _log.error("%s%s", damage.message, "" if aside is None else f"; it is now {aside}")
    _log.warning("the history starts anew, and what eliminations still owed is in the damaged store alone")
    return recovery.open_whole(directory, choices.durability)


def _mark(step: Step, found: _Found, facts: Facts, plan: Plan) -> None:
    """Have history and money know of a start that is not from the store's own latest state."""
    if plan.action not in _ORDINARY or plan.hold:
        step.record([EventOf("start", note=f"began with {plan.action.value} ({facts})")])
    if plan.hold:
        step.store.go_on_from(found.acknowledged)
        hold_money(step, f"the server began with {plan.action.value} ({facts})")
