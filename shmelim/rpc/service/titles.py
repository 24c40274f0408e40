"""Process titles: how the processes of a service show up in ``ps``, and by what they are known again."""

from __future__ import annotations

import logging

import psutil
from setproctitle import setproctitle

__all__ = ["check_service_name", "checker_title", "server_title", "set_title", "title_of"]

_NAME_LIMIT = 60  # bytes

_logger = logging.getLogger("shmelim.service")


def check_service_name(name: str) -> str:
    """Return a service's name if it can stand in a process title; ``ValueError`` otherwise."""
    if not name or len(name.encode()) > _NAME_LIMIT or not name.isprintable() or name != " ".join(name.split()):
        raise ValueError(f"{name!r} is no name for a service: 1 to {_NAME_LIMIT} printable characters")
    return name


def server_title(service_name: str) -> str:
    """Return the title of a service's server process."""
    return f"vali_{service_name}"


def checker_title(service_name: str) -> str:
    """Return the title of the process that checks a service's health."""
    return f"vali_{service_name}_HealthChecker"


def set_title(title: str) -> None:
    """Give this process a title; say so in the log if the system has no room for it."""
    setproctitle(title)
    if title_of(psutil.Process()) != title:
        # The title overwrites arguments and environment, and has no room where both are almost empty.
        _logger.warning("the process title %r could not be set; a later server will not replace this one", title)


def title_of(process: psutil.Process) -> str | None:
    """Return a process' whole title, or None if it is gone or may not be looked at."""
    try:
        return " ".join(process.cmdline()).rstrip()  # what the old arguments leave over is filled with NULs
    except psutil.Error:
        return None
