"""Process titles: how the processes of a service show up in ``ps``, and by what they are known again."""

from __future__ import annotations

_NAME_LIMIT = 60  # bytes


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
