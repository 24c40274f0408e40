"""shmelim: is this hotkey eliminated? Answered from shared memory, in any process.

Readers attach by name and look up without IPC and without locks; one server process owns the state::

    from shmelim import EliminationReader

    eliminations = EliminationReader("shmelim")
    eliminations.is_hotkey_eliminated(hotkey)
"""

from shmelim.eliminations import (
    DEPARTED_HOTKEYS_KEY,
    EliminationClient,
    EliminationManager,
    EliminationManagerServer,
    EliminationReader,
    EliminationReason,
    Snapshot,
    Status,
    ValidatorEnvironment,
)
from shmelim.errors import (
    AlreadyServingError,
    NotServingError,
    OutcomeUnknownError,
    ShmelimError,
    SlashNotMadeError,
)
from shmelim.notify import SlackNotifier
from shmelim.service import HealthCheckDaemon, RPCServiceBase

__all__ = [
    "DEPARTED_HOTKEYS_KEY",
    "AlreadyServingError",
    "EliminationClient",
    "EliminationManager",
    "EliminationManagerServer",
    "EliminationReader",
    "EliminationReason",
    "HealthCheckDaemon",
    "NotServingError",
    "OutcomeUnknownError",
    "RPCServiceBase",
    "ShmelimError",
    "SlackNotifier",
    "SlashNotMadeError",
    "Snapshot",
    "Status",
    "ValidatorEnvironment",
    "__version__",
]


def __getattr__(name: str) -> str:
    # Looked up only when asked for: finding it costs tens of milliseconds.
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415

        return version("shmelim")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
