"""Strangers' words made harmless, in one place for logs, alerts, problems and the terminal.

Hotkeys, reasons, names of directories and the texts of other people's exceptions are chosen by strangers. What a
terminal would obey, or what would look like another line or another order of characters, is shown escaped.
"""

from __future__ import annotations

import contextlib
import logging
import traceback


def printable(text: str) -> str:
    """Return text in one line, with everything escaped that is not printed, or that has no UTF-8."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def trace_of(error: BaseException) -> str:
    """Return the trace of an error, indented: no line of an error's text can pass for a line of a log."""
    trace = "".join(traceback.format_exception(error))
    return "\n".join(f"  {printable(line)}" for line in trace.rstrip("\n").split("\n"))


def get_logger(name: str) -> logging.Logger:
    """Return the logger of that name, whose records are escaped whatever handlers its users give it."""
    logger = logging.getLogger(name)
    logger.addFilter(_escape)  # the same one is added once
    return logger


def _escape(record: logging.LogRecord) -> bool:
    with contextlib.suppress(Exception):  # wrong arguments are told by the handler
        record.msg, record.args = printable(record.getMessage()), None
    if record.exc_info and record.exc_info[1] is not None and not record.exc_text:
        record.exc_text = trace_of(record.exc_info[1])
    return True
