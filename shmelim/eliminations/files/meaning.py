"""What a JSON file that stands in a state directory means: our own, older or newer than the store, or an edit.

One function decides it, from what stands in the file, what we wrote down beside it, and whose store this is.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from shmelim.eliminations.files.sidecar import Sidecars


class Meaning(Enum):
    """What a file means for the state."""

    ABSENT = "there is none"
    STATE = "nothing else is known: it is the state"
    TAKEN = "it was taken over before"
    CURRENT = "we wrote it, and nothing was committed since"
    OLDER = "we wrote it, and more was committed since"
    NEWER = "we wrote it from a later state of this store, which was put back"
    FOREIGN = "we wrote it from another store"
    EDIT = "somebody changed what we had written"
    UNKNOWN = "somebody put it there, and what it was made from is not known"


class Owner(NamedTuple):
    """The store that a file stands beside."""

    store_id: bytes
    commit_number: int
    fresh: bool = False  # nothing was ever stored in it


class Taken(NamedTuple):
    """A file that was taken over: its digest, and the commit number of what we had written before (None: nothing).

    A file that we write after that makes it a thing of the past, so that the same edit made again is another one.
    """

    digest: str
    commit_number: int | None


def decide(digest: str | None, sidecars: Sidecars, owner: Owner, taken: Sequence[Taken] = ()) -> Meaning:
    """Say what a file of this digest means (None: there is no file); whether it can be read is another matter."""
    ours = None if digest is None else sidecars.of(digest)
    # What this very store wrote while nothing was in it says nothing that it does not know.
    is_own = ours is not None and (ours.store_id, ours.commit_number) == owner[:2]
    if digest is None or (owner.fresh and not is_own):
        return Meaning.ABSENT if digest is None else Meaning.STATE
    if Taken(digest, None if sidecars.written is None else sidecars.written.commit_number) in taken:
        return Meaning.TAKEN
    made_from = ours or sidecars.base
    if made_from is None:
        return Meaning.UNKNOWN
    is_foreign = made_from.store_id != owner.store_id
    ahead = made_from.commit_number - owner.commit_number
    if ours is None:
        return Meaning.UNKNOWN if is_foreign or ahead > 0 else Meaning.EDIT
    if is_foreign:
        return Meaning.FOREIGN
    return Meaning.NEWER if ahead > 0 else Meaning.OLDER if ahead < 0 else Meaning.CURRENT
