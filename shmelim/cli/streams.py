"""The standard streams of a command: lost output is an error of its own, and what stderr does not take is none."""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

import click

from shmelim.errors import ShmelimError
from shmelim.system.text import printable

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


# Both are OSErrors, as what writes a log expects, but of no number: click takes EPIPE for its own exit code 1.
class OutputLostError(ShmelimError, OSError):
    """Stdout did not take what a command has to say."""


class ReaderGoneError(OSError):
    """Whoever read stdout went away."""


class _Stdout(io.FileIO):
    def write(self, data: ReadableBuffer) -> int:
        try:
            while (taken := super().write(data)) is None:  # it does not block, and is full
                select.select([], [self], [])
        except BrokenPipeError as error:
            raise ReaderGoneError from error
        except OSError as error:
            why = "stdout is closed" if error.errno == errno.EBADF else error.strerror
            raise OutputLostError(
                f"the output could not be written: {why}",
                hint="what was asked for is done, and only the output lost; /dev/null takes what nobody needs",
            ) from error
        return taken


class _Stderr(io.FileIO):
    def write(self, data: ReadableBuffer) -> int:
        taken = None
        with suppress(OSError):  # what a command says by the way must not end it
            taken = super().write(data)
        return memoryview(data).nbytes if taken is None else taken


class Log(logging.Handler):
    """What this package logs while a command runs: a line each on stderr, or kept where that is for JSON."""

    def __init__(self, *, keeps: bool) -> None:
        super().__init__()
        self.keeps = keeps
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        if self.keeps:
            self.kept.append(record.getMessage())
        else:
            click.echo(f"{record.levelname.lower()}: {printable(record.getMessage())}", err=True)


@contextmanager
def logging_to(log: Log) -> Iterator[None]:
    """Have this package log there."""
    logger = logging.getLogger("shmelim")
    logger.addHandler(log)
    try:
        yield
    finally:
        logger.removeHandler(log)


def take_over() -> None:
    """Have this process write to stdout and stderr through the above; to be called first.

    Descriptors 0 to 2 are open afterwards, lest a state file get one of them and be written to; what is written to
    one that was closed is still an error.
    """
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:  # noqa: PLR2004
        os.set_inheritable(descriptor, True)  # noqa: FBT003
    os.close(descriptor)
    sys.stdout = _text_of(_Stdout(1, "w", closefd=False), sys.stdout)
    if sys.stderr is not None:
        sys.stderr = _text_of(_Stderr(2, "w", closefd=False), sys.stderr)


def _text_of(raw: io.FileIO, before: TextIO | Any) -> TextIO:
    """Return a stream of text; a character that a terminal cannot show becomes its escape, not an exception."""
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=None if before is None else before.encoding,
        errors="backslashreplace",
        line_buffering=raw.isatty() or raw.fileno() == 2,  # noqa: PLR2004
    )


def finish() -> None:
    """Write out what stdout has buffered; OSError where that fails, and no later attempt does."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
