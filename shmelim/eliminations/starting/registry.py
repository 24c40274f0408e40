"""The registry of names: what is remembered of each name's store outside of its state directory, and of a reboot.

A file for each name, ``<registry>/<name>.json`` (0600): whose store served it last, from which directory, how much
was in it, and its last commit. So a start notices that its directory is empty (a volume that is not mounted), or
its store an older copy, also where shared memory is gone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final

import msgspec
import platformdirs

from shmelim.errors import ShmelimError, StoreError
from shmelim.system.durable import hint_of, make_private_directory, reading, write_whole, writing
from shmelim.system.places import place
from shmelim.system.problems import Problems
from shmelim.system.text import get_logger

VARIABLE: Final = "SHMELIM_REGISTRY"
OFF: Final = "off"

_INTERVAL: Final = 0.8  # seconds: at most one behind, with the write
_BEHIND: Final = "registry_behind"
_HINT: Final = f"make it writable for this user, or name another place (registry=, {VARIABLE})"

_log = get_logger("shmelim.registry")


_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]  # what a store can have
_LAST_MS: Final = 253_402_300_799_999  # of the year 9999


class Memory(msgspec.Struct, frozen=True):
    """What is remembered of a name."""

    store_id: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{2})*\Z")]  # in hexadecimal digits
    directory: str
    commit: _Count
    eliminated: _Count
    departed: _Count
    at_ms: Annotated[int, msgspec.Meta(ge=0, le=_LAST_MS)]  # when that was so: ms since 1970, UTC
    branch: _Count = 0  # of its last commit; 0 where an earlier release wrote this


class Registry:
    """What is remembered of one name, in a directory that is made when it is first written to."""

    def __init__(self, base: Path, name: str) -> None:
        self.path = base / f"{name}.json"

    def recall(self) -> Memory | None:
        """Return what is remembered; None where there is nothing, or nothing that can be understood.

        StoreError if this user may not look.
        """
        try:
            with reading(self.path) as file:
                return msgspec.json.decode(file.read(), type=Memory)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(
                f"the registry {self.path} cannot be read: {error.strerror}", hint=hint_of(error, _HINT)
            ) from error
        except ValueError as error:
            _log.warning("the registry %s cannot be understood, and counts as missing: %s", self.path, error)
            return None

    def remember(self, memory: Memory) -> None:
        """Write it down, durably and in one step; StoreError if that cannot be."""
        with writing(f"the registry {self.path} cannot be written", _HINT):
            make_private_directory(self.path.parent)
            write_whole(self.path, [msgspec.json.encode(memory)])

    def forget(self) -> bool:
        """Forget the name; return whether anything was remembered."""
        with writing(f"the registry {self.path} cannot be removed", _HINT), suppress(FileNotFoundError):
            self.path.unlink()
            return True
        return False


def registry_base(given: Path | str | bool | None = True) -> Path | None:
    """Return where registries are; None where there are none.

    `given` is a directory, True for the default (what ``SHMELIM_REGISTRY`` says, else the user's), or None.
    """
    if given is None or given is False:
        return None
    if given is not True:
        return place("registry", given)
    said = os.environ.get(VARIABLE)
    if said == OFF:
        return None
    # Beside the names' own directories, under what can be the name of none.
    return Path(said).absolute() if said else Path(platformdirs.user_state_dir("shmelim")) / ".registry"


class Remembering:
    """Keeps a registry at most a second behind a store that is served, in a thread of its own.

    `ask` returns what is to be remembered now; it is asked only when `moved` returns another number than before.
    Between the two, `durable` is called: what was remembered of a store must not be lost with a power cut.
    """

    def __init__(
        self,
        registry: Registry,
        ask: Callable[[], Memory],
        moved: Callable[[], int],
        durable: Callable[[], object],
        problems: Problems,
    ) -> None:
        self._registry = registry
        self._ask = ask
        self._moved = moved
        self._durable = durable
        self._problems = problems
        self._seen: int | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shmelim-registry", daemon=True)

    def start(self) -> None:
        """Remember what is so now, and from now on; what keeps it from that is a named problem."""
        self._look_and_tell()
        self._thread.start()

    def stop(self) -> None:
        """Remember the last state, and no more. Idempotent."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
            self._look_and_tell()

    def _run(self) -> None:
        while not self._stopped.wait(_INTERVAL):
            self._look_and_tell()

    def _look_and_tell(self) -> None:
        try:
            moved = self._moved()
            if moved != self._seen:
                memory = self._ask()
                self._durable()
                self._registry.remember(memory)
                self._seen = moved
        except (ShmelimError, OSError) as error:
            report_behind(self._problems, error)
        else:
            self._problems.clear(_BEHIND)


def report_behind(problems: Problems, error: Exception) -> None:
    """Name the problem that the registry cannot be read or written."""
    text = f"the registry of names is behind: {getattr(error, 'message', error)}"
    problems.report(_BEHIND, text, remedy=getattr(error, "hint", None) or _HINT)
