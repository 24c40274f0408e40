"""``shmelim backup``, ``verify``, ``restore`` and ``forget``: keeping a state, and letting a name go."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from shmelim.cli import output
from shmelim.cli.failure import NO, YES, FileProblemError, RefusedError, need_own_user
from shmelim.cli.options import PATH, Settings, command, registry_option, yes_option
from shmelim.cli.progress import DelayedProgress
from shmelim.eliminations.reader import EliminationReader
from shmelim.eliminations.runtime import RuntimeDirectory, announced_state_directory, need_own, state_directory_of
from shmelim.eliminations.starting import keeping
from shmelim.eliminations.starting.keeping import Finding
from shmelim.eliminations.starting.registry import Registry, registry_base
from shmelim.eliminations.store.schema import FILE_NAME
from shmelim.eliminations.store.store import Store
from shmelim.errors import AlreadyServingError, NotServingError, SegmentError, ShmelimError, StoreError
from shmelim.shm import SharedNamespace, TableReader
from shmelim.system.owner import means_another, whose
from shmelim.system.text import printable

directory_option = click.option(
    "--state-dir",
    type=PATH,
    metavar="DIR",
    help="The state directory [default: that of the name's last server, else the name's own].",
)


@command
@click.argument("target", metavar="DIR", type=PATH)
@directory_option
def backup(settings: Settings, *, target: Path, state_dir: Path | None) -> None:
    """Write a backup to DIR, a new directory: the state with its history, debts and slashes, as of one moment.

    The server, if there is one, goes on serving and changing. DIR is there when it is complete, or not at all.

    With --json: name, backup, state_dir, store_id, commit, eliminated, departed, events, at_ms, sha256.

    For example:
      shmelim backup /backup/shmelim-$(date +%F)
    """
    if state_dir is None:
        need_own(settings.name)  # what is here by default is not what is published
    directory = state_dir or state_directory_of(settings.name)
    with DelayedProgress() as progress:
        made = keeping.back_up(directory, target.absolute(), progress.update)
    about = {**msgspec.structs.asdict(made), "state_dir": made.directory, "backup": str(target)}
    del about["directory"]
    said = f"backed up: commit {made.commit}, {made.eliminated} eliminated, {made.departed} departed, in {target}"
    settings.answer(about, printable(said))


@command
@click.argument("target", metavar="[DIR]", type=PATH, required=False)
@directory_option
@registry_option
def verify(settings: Settings, *, target: Path | None, state_dir: Path | None, registry: Path | bool) -> int:
    """Check the backup in DIR; or without DIR all that there is of the name.

    That is: the published table (checksums, and that lookups find every entry), the store (structure, checksums,
    debts, slashes, history), the JSON files, and whether the registry remembers this very store. Where the name
    follows a source on another host, that is the table alone. Changes nothing, and may be done while the name is
    served.

    Exit code 1: something is wrong, and the output says what.

    With --json: name, whole, findings [{what ("backup", "store", "file", "table", "registry"), place, said,
    problem}], where problem is null where nothing is wrong.

    For example:
      shmelim verify
      shmelim verify /backup/shmelim-2026-01-31
    """
    if target is not None and state_dir is not None:
        raise click.UsageError("a backup in DIR is checked alone: it goes with no --state-dir")
    findings = _look(settings.name, state_dir, registry) if target is None else keeping.check_backup(target)
    whole = all(finding.problem is None for finding in findings)
    settings.table(
        {"whole": whole, "findings": [finding._asdict() for finding in findings]},
        ("what", "place", "whole", "about"),
        ((it.what, it.place, it.problem is None, it.problem or it.said) for it in findings),
    )
    return YES if whole else NO


def _look_at_table(name: str, directory: Path) -> tuple[Finding, str | None]:
    """Look at what is published, and whether it is of the store in a directory; also return whom it follows."""
    namespace, found, problem, source = SharedNamespace(name), "", None, None
    try:
        identity, reader = TableReader(namespace).identity(), EliminationReader(name)
        source = reader.source
        found = f"commit {identity.commit}, {reader.verify()} entries"
        if source is not None:
            return Finding("table", namespace.root_name, f"{found}; it follows {source}", None), source
        # After the table was looked at: a server that lives commits first.
        with Store.read_only(directory) as store:
            if store.store_id != identity.store_id:
                problem = f"it is not of the store in {directory}"
            elif store.commit_number < identity.commit:
                problem = f"it is newer than the store in {directory}, which has commit {store.commit_number}"
            elif not store.has_made(identity.commit, identity.branch):
                problem = f"it is of another copy of the store in {directory}"
    except SegmentError as error:
        problem = error.message
    except StoreError:
        pass  # which is looked at by itself
    return Finding("table", namespace.root_name, found, problem), source


def _look(name: str, state_dir: Path | None, registry: Path | bool) -> list[Finding]:
    """Look at all that there is of a name; NotServingError where there is nothing."""
    known, findings = state_dir or announced_state_directory(name), []
    directory = known or state_directory_of(name)
    try:
        finding, source = _look_at_table(name, directory)
    except NotServingError:
        if state_dir is None and not (directory / FILE_NAME).exists():
            raise
    else:
        findings.append(finding)
        if source is not None:
            return findings  # a store is one of a time when this host was the source itself
    if known is None and not (directory / FILE_NAME).exists():
        return findings  # its server keeps it in memory
    findings += [keeping.check_store(directory), *keeping.check_files(directory)]
    # Each user has a registry of his own.
    base = None if means_another() and registry is True else registry_base(registry)
    return findings if base is None else [*findings, keeping.check_registry(Registry(base, name), directory)]


@command
@click.argument("source", metavar="DIR", type=PATH)
@directory_option
@registry_option
@yes_option
def restore(settings: Settings, *, source: Path, state_dir: Path | None, registry: Path | bool, yes: bool) -> int:
    """Put the backup in DIR in the place of the state; the server must be stopped.

    The store that was there is kept beside it (shmelim.sqlite.replaced-<time>). The next start publishes the
    restored state, and begins no slash until you have said "shmelim slash release": the backup does not know of
    those that were made since.

    Exit code 1: the question was answered with no; nothing was changed.

    With --json: name, restored, state_dir, commit, eliminated, departed, kept (a path or null).

    For example:
      shmelim restore /backup/shmelim-2026-01-31
    """
    need_own_user(settings.name, "restore")
    directory = state_dir or state_directory_of(settings.name)
    made = keeping.read_manifest(source)
    if not yes and not output.agreed(
        "Replace that state by the backup?",
        printable(f"state   {directory}"),
        printable(f"backup  {source}: commit {made.commit}, {made.eliminated} eliminated"),
    ):
        settings.answer({"restored": False}, "nothing was changed")
        return NO
    base = registry_base(registry)
    remembered = None if base is None else Registry(base, settings.name)
    with _unserved(settings.name):
        done = keeping.restore(source, directory.absolute(), remembered, _published_commit(settings.name))
    kept = None if done.kept is None else str(done.kept)
    about = {**done._asdict(), "kept": kept, "restored": True, "state_dir": str(directory)}
    before = "" if kept is None else f"; what was there is {kept}"
    said = f"restored: commit {done.commit}, {done.eliminated} eliminated, {done.departed} departed{before}"
    settings.answer(about, printable(said))
    return YES


def _published_commit(name: str) -> int:
    """Return the commit that is published under a name; 0 where nothing is."""
    with contextlib.suppress(NotServingError, SegmentError):
        return TableReader(SharedNamespace(name)).identity().commit
    return 0


@command
@registry_option
@yes_option
def forget(settings: Settings, *, registry: Path | bool, yes: bool) -> int:
    """Let a name go that is no longer served: its table, its runtime directory, and what the registry remembers.

    Its state directory stays: remove it yourself if nobody needs it any more. Readers that are attached keep the
    last state until they end.

    Exit code 1: it is served, or the question was answered with no; nothing was changed. 3: there is nothing of
    that name. 4: something stays, which the error names.

    With --json: name, forgotten, state_dir.

    For example:
      shmelim forget --name old
    """
    need_own_user(settings.name, "forget")
    name, directory = settings.name, state_directory_of(settings.name)
    _need_unserved(name)
    runtime = RuntimeDirectory.of_server(name)  # its place stands in the table, which goes first
    base = registry_base(registry)
    remembered = None if base is None else Registry(base, name)
    left = [runtime.path, *([] if remembered is None else [remembered.path])]
    if SharedNamespace(name).is_empty() and not any(map(os.path.lexists, left)):
        raise NotServingError(f"nothing is known of the name {name!r}", hint="`shmelim names` lists all")
    state = str(directory)
    if not os.path.lexists(directory):  # a followed name has none; the registry may know another
        memory = None if remembered is None else remembered.recall()
        state = "" if memory is None else memory.directory
    about: dict[str, Any] = {"state_dir": state or None}
    stays = f"its state stays in {state}" if state else "there is no state of it"
    if not yes and not output.agreed(f"Forget {name!r}?", printable(stays)):
        settings.answer({"forgotten": False, **about}, "nothing was changed")
        return NO
    with _unserved(name) as namespace:
        namespace.remove()
    if remembered is not None:
        remembered.forget()
    try:
        runtime.remove()
    except OSError as error:
        why = f"{error.strerror}; {whose(runtime.path)}"
        text = f"{name!r} is forgotten, but its runtime directory {runtime.path} stays: {why}"
        raise FileProblemError(text, hint="see what is in it, and remove it by hand") from error
    settings.answer({"forgotten": True, **about}, printable(f"forgot {name!r}; {stays}"))
    return YES


@contextlib.contextmanager
def _unserved(name: str) -> Iterator[SharedNamespace]:
    """Have nobody serve a name, or begin to, from whatever directory."""
    namespace = SharedNamespace(name)
    try:
        lock = namespace.acquire()
    except AlreadyServingError as error:
        raise AlreadyServingError(error.message, hint="stop that server first") from None
    try:
        yield namespace
    finally:
        lock.release()


def _need_unserved(name: str) -> None:
    try:
        writer = EliminationReader(name).writer
    except ShmelimError:
        return
    if writer.alive:
        with contextlib.suppress(AlreadyServingError), _unserved(name):
            return  # it was killed, and its heartbeat is not old yet
        raise RefusedError(f"{name!r} is served by process {writer.pid}", hint="stop it first")
