"""What on this machine keeps a name from being served well, or will: a list of findings, each with what to do.

Each check is a generator of its own that yields nothing where all is well. None changes anything, but for one
small file in the state directory that is written, synced and removed to see how long that takes.
"""

from __future__ import annotations

import configparser
import ctypes
import os
import resource
import stat
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Final, Literal, NamedTuple

from shmelim.eliminations.runtime import RuntimeDirectory, state_directory_of
from shmelim.errors import ShmelimError, StoreError
from shmelim.shm import READ_PATH
from shmelim.shm.native import HOW_TO_COMPILE, why_pure
from shmelim.system import clock
from shmelim.system.durable import writing
from shmelim.system.owner import named_owner
from shmelim.watch.seeing import Seen, see

_MIB: Final = 1 << 20
_LEAST_MEMORY: Final = 64 * _MIB  # what Docker gives by default
_LEAST_FILES: Final = 1024
_SLOW_FSYNC: Final = 0.02  # seconds
_SYNCS: Final = 5
_FIRST_USER: Final = 1000  # logind spares the uids of system users
_TIME_ERROR: Final = 5  # of adjtimex(2): the clock is not synchronised
_TIMEX_SIZE: Final = 256  # bytes; struct timex has 208
_2020_MS: Final = 1_577_836_800_000


class Finding(NamedTuple):
    """Something that is not as it should be."""

    what: str  # which check found it
    severity: Literal["notice", "warning"]
    text: str
    remedy: str


class Machine(NamedTuple):
    """Where the machine is looked at; tests give places of their own."""

    shared_memory: Path = Path("/dev/shm")  # noqa: S108  # where Linux keeps POSIX shared memory
    configuration: Path = Path("/etc/systemd")
    logind: Path = Path("/run/systemd/seats")  # is there where logind runs


def examine(name: str, state_dir: Path | None = None, machine: Machine = Machine()) -> list[Finding]:  # noqa: B008
    """Return what is found of a name and of the machine, for this user; well within 5 s.

    ``state_dir`` is the state directory; None: that of the server that started last, else the name's default.
    """
    seen = see(name)
    directory = state_dir
    with suppress(ShmelimError):  # which is among what is seen
        directory = directory or state_directory_of(name)
    return [
        *_of_package(seen),
        *_of_memory(seen, machine),
        *_of_logind(machine),
        *_of_limits(),
        *_of_clock(),
        *(() if directory is None else _of_disk(directory)),
        *_of_runtime(name),
        *_of_leftovers(machine),
        *_of_name(seen),
    ]


def _of_package(seen: Seen) -> Iterator[Finding]:
    if READ_PATH == "pure":
        yield Finding("read path", "notice", f"reads take the pure-Python path: {why_pure()}", HOW_TO_COMPILE)
    served, here = (seen.server or {}).get("package_version"), version("shmelim")
    if served is not None and served != here:
        text = f"the server is shmelim {served}, this command {here}"
        yield Finding("versions", "warning", text, "restart the server, or upgrade this environment")


def _of_memory(seen: Seen, machine: Machine) -> Iterator[Finding]:
    where = machine.shared_memory
    try:
        status = os.statvfs(where)
    except OSError as error:
        text = f"{where} cannot be used: {error.strerror}"
        yield Finding("shared memory", "warning", text, "mount a tmpfs there")
        return
    if status.f_flag & os.ST_RDONLY:
        text = f"{where} is mounted read-only: here nothing can be published, and readers cannot count"
        yield Finding("shared memory", "warning", text, f"mount -o remount,rw {where}")
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    enlarge = f"enlarge it: mount -o remount,size=1g {where} (Docker: --shm-size 1g)"
    if size <= _LEAST_MEMORY:
        yield Finding("shared memory", "notice", f"{where} has {size / _MIB:,.0f} MiB in all", enlarge)
    needed = 2 * seen.table.segment_size if seen.table is not None else _MIB
    if free < needed:
        text = f"{where} has {free / _MIB:,.1f} MiB left, and growing takes {needed / _MIB:,.1f}"
        yield Finding("shared memory", "warning", text, f"remove what fills it, or {enlarge}")


def _of_logind(machine: Machine) -> Iterator[Finding]:
    """Whether logind removes this user's shared memory when he logs out."""
    if os.geteuid() < _FIRST_USER or not machine.logind.exists():
        return
    removes = True
    base = machine.configuration
    for path in (base / "logind.conf", *sorted((base / "logind.conf.d").glob("*.conf"))):
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        with suppress(OSError, configparser.Error):
            parser.read_string(path.read_text())
            removes = parser.getboolean("Login", "RemoveIPC", fallback=removes)
    if removes:
        text = f"logind removes the shared memory of uid {os.geteuid()} when he has logged out everywhere"
        yield Finding(
            "RemoveIPC", "warning", text, f"set RemoveIPC=no in {base / 'logind.conf'}, or use a system user"
        )


def _of_limits() -> Iterator[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < _LEAST_FILES:
        yield Finding("limits", "notice", f"a process may have {files} files open", "raise it (ulimit -n 4096)")
    size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size != resource.RLIM_INFINITY:
        text = f"a file may have {size / _MIB:,.0f} MiB, which limits segments and the store"
        yield Finding("limits", "warning", text, "lift it (ulimit -f unlimited)")


def _of_clock() -> Iterator[Finding]:
    if clock.now_ms() < _2020_MS:
        yield Finding("clock", "warning", "the time is before 2020", "set it")
    with suppress(OSError, AttributeError):  # there is no such call in every libc
        if ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_SIZE)) == _TIME_ERROR:
            text = "nothing keeps the clock synchronised: times of eliminations and deletions depend on it"
            yield Finding(
                "clock", "notice", text, "run chrony or systemd-timesyncd here, or on the machine's host"
            )


def _of_disk(directory: Path) -> Iterator[Finding]:
    """Whether the state directory is this user's, and how long a write to it takes."""
    try:
        status = directory.stat()
    except FileNotFoundError:
        text = f"there is no state directory {directory}"
        yield Finding("state", "notice", text, "nothing, if no server of this name ran; else name it: --state-dir")
        return
    except OSError as error:
        yield Finding("state", "warning", f"{directory}: {error.strerror}", "run as the server's user")
        return
    if status.st_uid != os.geteuid():
        text = f"{directory} belongs to uid {status.st_uid}, this is uid {os.geteuid()}"
        yield Finding("state", "notice", text, "run as the server's user to see whether it can write there")
        return
    try:
        with writing(f"{directory} cannot be written", "make it writable"):
            took = _time_of_sync(directory)
    except StoreError as error:
        yield Finding("state", "warning", error.message, error.hint or "")
        return
    if took > _SLOW_FSYNC:
        text = f"a write to {directory} takes {1000 * took:,.0f} ms, and so does each change"
        yield Finding("disk", "notice", text, "use another disk, or --durability process")


def _time_of_sync(directory: Path) -> float:
    """Return the median of the seconds that a small synced write takes."""
    times = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(_SYNCS):
            began = perf_counter()
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
            times.append(perf_counter() - began)
    return statistics.median(times)


def _of_runtime(name: str) -> Iterator[Finding]:
    runtime = RuntimeDirectory.of_server(name)
    for path in (runtime.path, runtime.key):
        try:
            status = path.lstat()
        except FileNotFoundError:
            return
        except OSError as error:
            yield Finding("runtime", "notice", f"{path}: {error.strerror}", "run as the server's user")
            return
        if status.st_uid not in {0, os.geteuid(), named_owner()} or stat.S_IMODE(status.st_mode) & 0o077:
            text = f"{path} belongs to uid {status.st_uid} and has mode {stat.S_IMODE(status.st_mode):#o}"
            yield Finding(
                "runtime", "warning", text, "it should be its user's alone: remove it, and restart the server"
            )


def _of_leftovers(machine: Machine) -> Iterator[Finding]:
    """Look for data segments of names that have no root segment: nobody can find them."""
    with suppress(OSError):
        there = {path.name for path in machine.shared_memory.iterdir() if path.name.startswith("shmelim")}
        for path in sorted(there):
            root, _, rest = path.rpartition(".")
            if rest.isdecimal() and "." in root and root not in there:
                remedy = f"remove it, unless a server is just starting: rm {machine.shared_memory / path}"
                yield Finding("leftovers", "notice", f"{path} is of a name that is not there", remedy)


def _of_name(seen: Seen) -> Iterator[Finding]:
    for problem in seen.problems:
        severity: Literal["notice", "warning"] = "notice" if problem["severity"] == "notice" else "warning"
        yield Finding(problem["name"], severity, problem["text"], problem["remedy"] or "see `shmelim health`")
