"""Starting, telling and ending the processes of a benchmark; nothing of them is left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import shutil
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from bench import worker
from bench.peers.base import Place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["CORES", "Crew", "Process", "TooSlowError", "WorkerError", "place_for"]

CORES = sorted(os.sched_getaffinity(0))
"""The processors of this run: hosts, with all that they start, run on the first, readers on the others in turn."""

_SHM = Path("/dev/shm")
_GRACE = 20.0
_context = multiprocessing.get_context("spawn")


class WorkerError(RuntimeError):
    """A process of the benchmark failed; the message has its traceback."""


class TooSlowError(WorkerError):
    """A process did not answer in time, and was ended."""


class Process:
    """A process that obeys; a context manager that ends it and all it started.

    Parameters
    ----------
    label
        For messages.
    target, arguments
        One of the functions of `bench.worker`, and what it takes besides its pipe.
    environment
        Variables that it has besides ours.
    seat
        Which of the processors it runs on, counted around.

    """

    def __init__(
        self, label: str, target: Callable, *arguments: Any, environment: dict[str, str], seat: int = 0
    ) -> None:
        self.label = label
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=target, args=(theirs, *arguments), name=label)
        with _environment(environment), _pinned(CORES[seat % len(CORES)]):
            self._process.start()
        theirs.close()

    def tell(self, name: str, *arguments: Any) -> None:
        """Send a command whose answer is taken later."""
        self._pipe.send((name, arguments))

    def answer(self, within: float) -> Any:
        """Take the answer to the oldest command; the first answer of all says that the process is ready."""
        if not self._pipe.poll(within):
            self.kill()
            raise TooSlowError(f"{self.label} took longer than {within:.0f} s")
        try:
            how, result = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(1)
            raise WorkerError(f"{self.label} died, exit code {self._process.exitcode}") from None
        if how == "failed":
            raise WorkerError(f"{self.label}: {result.strip()}")
        return result

    def ask(self, name: str, *arguments: Any, within: float = 60.0) -> Any:
        self.tell(name, *arguments)
        return self.answer(within)

    def kill(self) -> None:
        """End the process and its group."""
        if self._process.pid is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # Its own group, as it made itself the leader; before that there is only the process.
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._pipe.close()
        self._process.join(_GRACE)
        self.kill()


class Crew:
    """The processes around one contender at one place.

    Parameters
    ----------
    name
        The contender's.
    place
        Where it runs.
    environment
        Of all its processes.

    """

    def __init__(self, name: str, place: Place, environment: dict[str, str]) -> None:
        self.name, self.place = name, place
        self._environment = environment
        self._closing = contextlib.ExitStack()
        self.readers: list[Process] = []

    def open(self, within: float) -> None:
        """Start the host and wait until it is filled."""
        self.start()
        self.wait(within)

    def start(self) -> None:
        """Start the host."""
        label = f"host of {self.name} with {self.place.size:,} records"
        self.host = self._closing.enter_context(
            Process(label, worker.host, self.name, self.place, environment=self._environment)
        )

    def wait(self, within: float) -> None:
        """Wait until the host is filled."""
        self.facts = self.host.answer(within)

    def add_readers(self, count: int, within: float, **of: Any) -> None:
        """Have so many readers, started at once; `name` and `environment` for another view of the same host."""
        missing = count - len(self.readers)
        name, environment = of.get("name", self.name), of.get("environment", self._environment)
        new = [
            self._closing.enter_context(
                Process(
                    f"reader of {name} with {self.place.size:,} records",
                    worker.reader,
                    name,
                    self.place,
                    self.facts,
                    environment=environment,
                    seat=len(self.readers) + number + 1,
                )
            )
            for number in range(missing)
        ]
        self.readers += new
        for process in new:
            process.answer(within)

    def dismiss_readers(self) -> None:
        """End all readers."""
        for process in self.readers:
            process.__exit__(None, None, None)
        self.readers.clear()

    @contextlib.contextmanager
    def writing(self, readers: int = 0) -> Iterator[dict[str, float | None]]:
        """Have the host, or so many readers where only they can, change a record a thousand times a second.

        The yielded dict has ``per_second`` afterwards.
        """
        processes = [self.host, *self.readers[:readers]]
        made: dict[str, float | None] = {}
        for process in processes:
            process.ask("begin")
        yield made
        rates = [rate for rate in [process.ask("end") for process in processes] if rate is not None]
        made["per_second"] = min(rates) if rates else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.__exit__(None, None, None)


@contextlib.contextmanager
def place_for(size: int, *, durable: bool = False, short: bool = False) -> Iterator[Place]:
    """Give a place, and leave nothing of it: no directory, nothing in ``/dev/shm``."""
    name = f"bench{secrets.token_hex(4)}"
    # Short, since sockets live in it, whose paths have room for 107 characters.
    directory = Path(tempfile.mkdtemp(prefix="shmelim-bench-"))
    try:
        yield Place(name, directory, size, durable, short)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        for pattern in (f"{name}*", f"shmelim.{name}*"):
            for left in _SHM.glob(pattern):
                left.unlink(missing_ok=True)


@contextlib.contextmanager
def _pinned(core: int) -> Iterator[None]:
    """What is started meanwhile, and all that it starts, stays on one processor."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    before = {key: os.environ.get(key) for key in more}
    os.environ.update(more)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
